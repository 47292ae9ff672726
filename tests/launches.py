"""How many kernels a GPU would launch for something, counted on any device: what reaches torch's
dispatcher, without views, and with the loops inside the attention operators."""

from torch.utils._python_dispatch import TorchDispatchMode

import sparse_attention

NO_KERNEL = ("empty", "detach", "alias", "resize_", "_unsafe_view", "lift_fresh", "new_empty")
INSIDE = {
    "hsi::topk_attention": sparse_attention._topk_forward,
    "hsi::topk_attention_backward": sparse_attention._topk_backward,
    "hsi::local_attention": sparse_attention._local_forward,
    "hsi::local_attention_backward": sparse_attention._local_backward,
}


class Launches(TorchDispatchMode):
    """`count` is how many, `names` how often each operator."""

    def __init__(self):
        super().__init__()
        self.names = {}

    @property
    def count(self):
        return sum(self.names.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in INSIDE:
            with self:
                return INSIDE[name](*args, **(kwargs or {}))
        short = name.removeprefix("aten::")
        if not function.is_view and not short.startswith(NO_KERNEL):
            self.names[short] = self.names.get(short, 0) + 1
        return function(*args, **(kwargs or {}))


def launches_of(run, monkeypatch):
    """Launches of run(), with the tiles of a GPU."""
    monkeypatch.setitem(sparse_attention.TILE_SCORES, "cpu", sparse_attention.TILE_SCORES["cuda"])
    with Launches() as launches:
        run()
    return launches
