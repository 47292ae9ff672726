"""Attention of every query to a few keys: exact top-k, blocks of keys, local windows, sparsemax.

    out = sparse_attention_topk_streaming(q, k, v, sparsity_ratio=0.9)      # (B*h, N, D)

Shapes: B batch, h heads, BH batch times heads, N tokens, D head width, K keys kept, H W pixels.
Scores are computed tile by tile in buffers that are used again: never N x N in memory."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

SPARSE_MODES = ("topk", "block", "sparsemax", "local")
TILE = 8  # side in pixels of a query tile of local attention
ROW_GROUP = 16  # rows and keys of a score tile come in groups: BLAS sums tiny ones in another order
# A score that gets no weight. It is finite, so that padded queries, without keys, stay finite.
MASKED = -1e30
# Scores held at a time: 1 MiB is a core's L2 cache, 64 MiB fill a GPU.
TILE_SCORES = {"cpu": 2**18, "cuda": 2**24}
KEPT_SCORES = 2**22  # of a mask that is kept for the next step: 16 MiB

Shape = tuple[int, ...]
Pair = tuple[int, int]
Padding = tuple[int, int, int, int]  # left, right, top, bottom


def _register(
    name: str, forward: Callable, backward: Callable, keys_met: Callable[[Shape, tuple], int]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A custom operator hsi::<name> with its gradient and its count of operations.

    forward(q, k, v, *settings) gives the output and one value per query, which
    backward(gradient, q, k, v, output, values, *settings) gets back. keys_met(shape of k, settings)
    is how many keys a query meets."""
    # Masks are kept from call to call: a captured CUDA graph must not own them.
    kept: dict = {"mutates_args": (), "tags": (torch.Tag.cudagraph_unsafe,)}
    operator = torch.library.custom_op(f"hsi::{name}", forward, **kept)
    operator_backward = torch.library.custom_op(f"hsi::{name}_backward", backward, **kept)

    def fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(*q.shape[:-1], 1)

    def fake_backward(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *__: Any) -> tuple[Tensor, ...]:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.mark_non_differentiable(output[1])
        ctx.settings = inputs[3:]

    def gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Else a backward inside autocast would compute the scores again in half precision.
        with torch.autocast(gradient.device.type, enabled=False):
            found = operator_backward(gradient.contiguous(), *ctx.saved_tensors, *ctx.settings)
        return *found, *[None] * len(ctx.settings)

    operator.register_fake(fake)
    operator_backward.register_fake(fake_backward)
    operator.register_autograd(gradients, setup_context=setup)
    _count_operations(name, keys_met)
    return operator


def _count_operations(name: str, keys_met: Callable[[Shape, tuple], int]) -> None:
    """Tell FlopCounterMode: two products of q and k forward, five with the scores backward."""

    def flops(q: Shape, k: Shape, v: Shape, *settings: Any, **_: Any) -> int:
        return 2 * math.prod(q[:-1]) * keys_met(k, settings) * (q[-1] + v[-1])

    def flops_backward(_: Shape, q: Shape, k: Shape, v: Shape, *others: Any, **__: Any) -> int:
        settings = others[2:]  # after output and values
        return 2 * math.prod(q[:-1]) * keys_met(k, settings) * (3 * q[-1] + 2 * v[-1])

    register_flop_formula(getattr(torch.ops.hsi, name))(flops)
    register_flop_formula(getattr(torch.ops.hsi, f"{name}_backward"))(flops_backward)


def keys_to_keep(n: int, ratio: float) -> int:
    """K = max(1, ceil((1 - ratio) * n)), with room for rounding: 0.9 of 300 keeps 30, not 31."""
    return max(1, math.ceil((1.0 - ratio) * n - 1e-6))


def _spans(total: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) pairs that cover range(total), a multiple of ROW_GROUP of about `size` long."""
    size = -(-size // ROW_GROUP) * ROW_GROUP
    starts = list(range(0, total, size))
    if len(starts) > 1 and total - starts[-1] < ROW_GROUP:
        starts.pop()
    return list(zip(starts, [*starts[1:], total], strict=True))


def _score_tiles(
    q: Tensor, k: Tensor, scale: float, block_size: int, q_block_size: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (heads, rows, scores): slices of q (BH, N, D), and the scores (heads, rows, N) of those
    queries, in a buffer that is used again."""
    (heads, queries, _), keys = q.shape, k.shape[1]
    budget = TILE_SCORES.get(q.device.type, TILE_SCORES["cuda"])
    if q.device.type == "cpu":
        budget *= torch.get_num_threads()
    heads_in_tile = max(1, budget // (queries * keys)) if queries <= q_block_size else 1
    row_spans = _spans(queries, max(1, min(q_block_size, budget // keys)))
    buffer = q.new_empty(0)
    for head in range(0, heads, heads_in_tile):
        hs = slice(head, min(head + heads_in_tile, heads))
        for top, bottom in row_spans:
            scores = buffer.resize_(hs.stop - head, bottom - top, keys)
            for first, last in _spans(keys, block_size):
                torch.bmm(q[hs, top:bottom], k[hs, first:last].mT, out=scores[..., first:last])
            yield hs, slice(top, bottom), scores.mul_(scale)


def _kth_largest(scores: Tensor, keep: int) -> Tensor:
    """The keep-th largest score of each row, (..., 1)."""
    if scores.device.type != "cpu":  # kthvalue is not deterministic on a GPU
        return scores.topk(keep, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    index = scores.shape[-1] - keep  # NumPy's partition takes a tenth of torch's time
    work = scores.clone().numpy()
    work.partition(index, axis=-1)
    return torch.from_numpy(work[..., index : index + 1].copy())


def _keep_and_softmax_(scores: Tensor, threshold: Tensor) -> Tensor:
    """In place: softmax over the scores that reach the row's threshold, 0 elsewhere."""
    below = torch.nextafter(threshold, torch.full_like(threshold, -math.inf))
    # The difference is > 0 exactly where a score reaches the threshold.
    scores.sub_(below.minimum(threshold - torch.finfo(threshold.dtype).tiny))
    torch.threshold_(scores, 0.0, -math.inf)
    return torch.softmax(scores, -1, out=scores)


def _topk_forward(
    q: Tensor, k: Tensor, v: Tensor, keep: int, scale: float, block_size: int, q_block_size: int
) -> tuple[Tensor, Tensor]:
    """Output (BH, N, Dv) and each query's threshold (BH, N, 1)."""
    out, threshold = q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(*q.shape[:2], 1)
    for hs, rows, scores in _score_tiles(q, k, scale, block_size, q_block_size):
        limit = _kth_largest(scores, keep)
        threshold[hs, rows] = limit
        torch.bmm(_keep_and_softmax_(scores, limit), v[hs], out=out[hs, rows])
    return out, threshold


def _topk_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    threshold: Tensor,
    keep: int,
    scale: float,
    block_size: int,
    q_block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (grad * out).sum(-1, keepdim=True)
    buffer = q.new_empty(0)
    for hs, rows, scores in _score_tiles(q, k, scale, block_size, q_block_size):
        weights = _keep_and_softmax_(scores, threshold[hs, rows])
        dv[hs].baddbmm_(weights.mT, grad[hs, rows])
        ds = torch.bmm(grad[hs, rows], v[hs].mT, out=buffer.resize_(weights.shape))
        ds.sub_(delta[hs, rows]).mul_(weights)
        torch.bmm(ds, k[hs], out=dq[hs, rows])
        dk[hs].baddbmm_(ds.mT, q[hs, rows])
    return dq.mul_(scale), dk.mul_(scale), dv


_topk_op = _register("topk_attention", _topk_forward, _topk_backward, lambda k, settings: k[1])


def sparsemax(scores: Tensor) -> Tensor:
    """Sparsemax over the last dimension (Martins and Astudillo, 2016): rows sum to 1."""
    with torch.no_grad():
        ordered = scores.sort(-1, descending=True).values
        rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
        size = (1 + rank * ordered > ordered.cumsum(-1)).sum(-1, keepdim=True).clamp_min(1)
        support = scores >= ordered.gather(-1, size - 1)
    total = scores.masked_fill(~support, 0.0).sum(-1, keepdim=True)
    return (scores - (total - 1) / support.sum(-1, keepdim=True)).clamp_min(0.0)


@functools.lru_cache(maxsize=8)
def _window_scores(side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Added to scores of a tile, (1, 1, TILE^2, halo^2): 0 in a query's window, else MASKED."""
    with torch.inference_mode(False):  # a later call may need it for gradients
        halo = torch.arange(TILE + side - 1, device=device)
        offset = halo - torch.arange(TILE, device=device)[:, None]
        near = (offset >= 0) & (offset < side)  # (TILE, halo): in the window, along one axis
        near = near[:, None, :, None] & near[None, :, None, :]
        zero = torch.zeros((), device=device, dtype=dtype)
        return zero.where(near, MASKED).reshape(1, 1, TILE * TILE, -1)


@functools.lru_cache(maxsize=8)  # a training step meets the same few again and again
def _border_scores(
    window: Tensor, tiles: Pair, inside: Pair, padding: Padding, off_frame: float
) -> Tensor:
    """The same of each of some tiles (1, tiles, TILE^2, halo^2) at the frame's border, where a key
    off the frame has off_frame. inside: pixels of the frame that they cover, down and across;
    padding: those beyond it."""
    with torch.inference_mode(False):
        halo = math.isqrt(window.shape[-1])
        frame = F.pad(window.new_ones(1, *inside, dtype=torch.bool), padding)
        frame = frame.unfold(1, halo, TILE).unfold(2, halo, TILE)
        frame = frame.reshape(1, tiles[0] * tiles[1], 1, -1)
        return window.where(frame | (window < 0), off_frame)


class _LocalTiles:
    """Cuts images (BH, H, W, D) into tiles of TILE x TILE queries, whose keys are those pixels and
    a border `reach` wide. A step is some tiles of a row, or some rows of tiles, as many as the
    budget of scores allows: only its part of the frame is padded."""

    def __init__(self, q: Tensor, side: int, off_frame: float) -> None:
        self.height, self.width = q.shape[1:3]
        self.off_frame = off_frame
        self.reach, self.halo = side // 2, TILE + side - 1
        self.rows, self.columns = -(-self.height // TILE), -(-self.width // TILE)
        budget = 2 * TILE_SCORES.get(q.device.type, TILE_SCORES["cuda"])
        scores_in_tile = q.shape[0] * TILE**2 * self.halo**2
        tiles = self.rows * self.columns
        if not torch.compiler.is_exporting():  # else one step, for a graph of any batch
            tiles = max(1, budget // scores_in_tile)
        self.wide, self.high = min(self.columns, tiles), max(1, tiles // self.columns)
        self.parts = -(-self.columns // self.wide)
        self.steps = -(-self.rows // self.high) * self.parts
        self.kept = not torch.compiler.is_exporting()  # a graph holds no tensors of before
        build = _window_scores if self.kept else _window_scores.__wrapped__
        self.window = build(side, q.device, q.dtype)

    def _place(self, step: int, reach: int) -> tuple[Pair, slice, slice, Padding]:
        """A step's tiles down and across, their rows and columns of the frame, and the padding
        around those."""
        row, part = divmod(step, self.parts)
        down = min(self.high, self.rows - row * self.high)
        across = min(self.wide, self.columns - part * self.wide)
        top, left = row * self.high * TILE - reach, part * self.wide * TILE - reach
        bottom, right = top + down * TILE + 2 * reach, left + across * TILE + 2 * reach
        rows = slice(max(0, top), min(bottom, self.height))
        columns = slice(max(0, left), min(right, self.width))
        padding = (columns.start - left, right - columns.stop, rows.start - top, bottom - rows.stop)
        return (down, across), rows, columns, padding

    def take(self, x: Tensor, step: int, reach: int) -> Tensor:
        """Tiles of pixels (reach 0) or of keys: (BH, tiles, side * side, D)."""
        _, rows, columns, padding = self._place(step, reach)
        size = TILE + 2 * reach
        part = F.pad(x[:, rows, columns], (0, 0, *padding))
        tiles = part.unfold(1, size, TILE).unfold(2, size, TILE)  # BH, down, across, D, size, size
        return tiles.permute(0, 1, 2, 4, 5, 3).flatten(3, 4).flatten(1, 2)

    def add(self, x: Tensor, value: Tensor, step: int, reach: int) -> None:
        """Add such tiles to the frame x."""
        tiles, rows, columns, (left, _, top, _) = self._place(step, reach)
        value = value.unflatten(2, (TILE + 2 * reach, -1)).unflatten(1, tiles)
        if reach:
            part = self._overlapping(value)
        else:
            part = rearrange(value, "b y x p q d -> b (y p) (x q) d")
        frame = x[:, rows, columns]
        frame += part[:, top : top + frame.shape[1], left : left + frame.shape[2]]

    def _overlapping(self, value: Tensor) -> Tensor:
        """The sum of tiles of keys (BH, down, across, size, size, D), TILE from one another, as an
        image. Neighbours share a border, so they are added in pieces of which no two overlap."""
        down, across, size = value.shape[1:4]
        below, right = (down - 1) * TILE, (across - 1) * TILE
        part = value.new_zeros(len(value), below + size, right + size, value.shape[5])
        for y, z in itertools.product(range(0, size, TILE), repeat=2):
            piece = value[:, :, :, y : y + TILE, z : z + TILE]
            height, width = piece.shape[3:5]
            span = part[:, y : y + below + height, z : z + right + width]
            places = span.unfold(1, height, TILE).unfold(2, width, TILE)
            places.permute(0, 1, 2, 4, 5, 3).add_(piece)
        return part

    def inputs(self, step: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """q, k, v of a step (keys off the frame are zeros), and what is added to the scores."""
        tiles, rows, columns, padding = self._place(step, self.reach)
        q = self.take(q, step, 0)
        k, v = self.take(k, step, self.reach), self.take(v, step, self.reach)
        if not any(padding):
            return q, k, v, self.window
        inside = (rows.stop - rows.start, columns.stop - columns.start)
        kept = self.kept and tiles[0] * tiles[1] * self.window.numel() <= KEPT_SCORES
        build = _border_scores if kept else _border_scores.__wrapped__
        return q, k, v, build(self.window, tiles, inside, padding, self.off_frame)

    def weights(self, q: Tensor, k: Tensor, bias: Tensor, scale: float, sparse: bool) -> Tensor:
        """Attention weights of a step, (BH, tiles, TILE^2, halo^2)."""
        scores = (q @ k.mT).mul_(scale).add_(bias)
        return sparsemax(scores) if sparse else torch.softmax(scores, -1, out=scores)


def _local_forward(
    q: Tensor, k: Tensor, v: Tensor, side: int, scale: float, off_frame: float, sparse: bool
) -> tuple[Tensor, Tensor]:
    """Output (BH, H, W, Dv), and nothing per query."""
    tiles = _LocalTiles(q, side, off_frame)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    for step in range(tiles.steps):
        step_q, step_k, step_v, bias = tiles.inputs(step, q, k, v)
        if sparse:
            found = tiles.weights(step_q, step_k, bias, scale, sparse) @ step_v
        else:
            found = F.scaled_dot_product_attention(
                step_q, step_k, step_v, attn_mask=bias, scale=scale
            )
        tiles.add(out, found, step, 0)
    return out, q.new_empty(*q.shape[:-1], 1)


def _local_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    unused: Tensor,
    side: int,
    scale: float,
    off_frame: float,
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = _LocalTiles(q, side, off_frame)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for step in range(tiles.steps):
        step_q, step_k, step_v, bias = tiles.inputs(step, q, k, v)
        weights = tiles.weights(step_q, step_k, bias, scale, sparse)
        step_grad = tiles.take(grad, step, 0)
        ds = step_grad @ step_v.mT
        if sparse:  # the Jacobian of sparsemax: centred on the support, 0 elsewhere
            support = (weights > 0).to(ds.dtype)
            size = support.sum(-1, keepdim=True).clamp_min(1)
            ds.sub_((ds * support).sum(-1, keepdim=True) / size).mul_(support)
        else:
            ds.sub_((step_grad * tiles.take(out, step, 0)).sum(-1, keepdim=True)).mul_(weights)
        tiles.add(dq, (ds @ step_k).mul_(scale), step, 0)
        tiles.add(dk, (ds.mT @ step_q).mul_(scale), step, tiles.reach)
        tiles.add(dv, weights.mT @ step_grad, step, tiles.reach)
    return dq, dk, dv


_local_op = _register(
    "local_attention",
    _local_forward,
    _local_backward,
    lambda k, settings: (TILE + settings[0] - 1) ** 2,  # settings[0]: side of the window
)


def _in_blocks(x: Tensor, size: int) -> Tensor:
    """(BH, N, D) -> (BH, blocks, size, D), zeros in the last block's rest."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))


def _block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    ratio: float,
    k_cap: int,
    block_size: int,
    q_block_size: int,
) -> Tensor:
    """Whole blocks of keys for a block of queries, chosen by the product of their means. To choose
    takes a hundredth of the products; the gathered keys take N / q_block * K * D."""
    queries, keys, heads = q.shape[1], k.shape[1], q.shape[0]
    # Small enough that a tenth of the blocks is a choice.
    size = min(block_size, max(ROW_GROUP, min(64, keys // 32)))
    q = _in_blocks(q, min(q_block_size, 2 * size))
    k, v = _in_blocks(k, size), _in_blocks(v, size)
    blocks = k.shape[1]
    keep = min(keys_to_keep(blocks, ratio), max(1, k_cap // size))
    mask = None
    with torch.no_grad():
        pooled = k.mean(2).mT
        # The zeros that fill the last block leave its sum as it is, but not its mean.
        pooled[..., -1] *= size / (keys - size * (blocks - 1))
        chosen = (q.mean(2) @ pooled).topk(keep, sorted=False).indices  # BH, query blocks, keep
        head = torch.arange(heads, device=q.device)[:, None, None]
        rows = (chosen + blocks * head).flatten()
        if keys < blocks * size:
            place = chosen[..., None] * size + torch.arange(size, device=q.device)
            mask = (place < keys).flatten(2)[:, :, None]

    def gather(x: Tensor) -> Tensor:
        found = x.flatten(0, 1).flatten(1).index_select(0, rows)
        return found.view(heads, -1, keep * size, x.shape[-1])

    out = F.scaled_dot_product_attention(q, gather(k), gather(v), attn_mask=mask, scale=scale)
    return out.flatten(1, 2)[:, :queries]


def odd_side(window_size: int, name: str) -> int:
    """The side of a window of `window_size` pixels. ValueError unless it is odd."""
    side = math.isqrt(max(0, window_size))
    if side**2 != window_size or side % 2 == 0:
        raise ValueError(f"{name} must be an odd square (9, 25, 49, ...), not {window_size}")
    return side


def _check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (q, k, v)]
    fits = all(len(shape) == 3 and min(shape) > 0 for shape in shapes)
    if fits:
        same_heads = q.shape[0] == k.shape[0] == v.shape[0]
        fits = same_heads and q.shape[2] == k.shape[2] and k.shape[1] == v.shape[1]
    if not fits:
        raise ValueError(f"q, k, v must be (B*h, N, D), (B*h, N, D), (B*h, N, Dv), not {shapes}")


def _check_settings(ratio: float, mode: str, sizes: dict[str, int]) -> None:
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"sparsity_ratio must be in [0, 1), not {ratio}")
    if mode not in SPARSE_MODES:
        raise ValueError(f"sparse_mode must be one of {', '.join(SPARSE_MODES)}, not {mode!r}")
    for name, size in sizes.items():
        if size < 1 or size != int(size):
            raise ValueError(f"{name} = {size}: must be a positive integer")


def _check_frame(q: Tensor, k: Tensor, spatial_shape: Pair | None) -> Pair:
    tokens = q.shape[1]
    if spatial_shape is None or k.shape[1] != tokens or math.prod(spatial_shape) != tokens:
        raise ValueError(
            f"local windows need spatial_shape=(H, W), H * W = {tokens} tokens, not {spatial_shape}"
        )
    return spatial_shape


def sparse_attention_topk_streaming(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparsity_ratio: float = 0.9,
    scale: float | None = None,
    block_size: int = 2048,
    max_tokens: int = 8192,
    window_size: int = 49,
    k_cap: int = 1024,
    q_block_size: int = 1024,
    *,
    spatial_shape: Pair | None = None,
    sparse_mode: str = "topk",
    sparsemax_pad_value: float | None = None,
) -> Tensor:
    """Attention of q (B*h, N, D) to a few keys k (B*h, N, D), v (B*h, N, Dv): (B*h, N, Dv).

    topk: softmax over the K = max(1, ceil((1 - ratio) N)) best keys of a query, at most `k_cap`,
        ties kept. Exact whatever `block_size` (keys in a product) and `q_block_size` (queries in
        a tile, in groups of 16). Ratio 0 is dense.
    block: whole blocks of up to `block_size` keys for a block of queries; the time falls with the
        ratio. Not bound by `max_tokens`; `k_cap` holds.
    local, and topk above `max_tokens`: the `window_size` pixels around a query (49 is 7 x 7).
    sparsemax: the same with sparsemax; pixels off the frame are masked, or score
        `sparsemax_pad_value`.
    ValueError for bad values, and where windows are needed without `spatial_shape` (H, W)."""
    sizes = {"block_size": block_size, "max_tokens": max_tokens}
    sizes |= {"k_cap": k_cap, "q_block_size": q_block_size}
    _check_settings(sparsity_ratio, sparse_mode, sizes)
    _check_tokens(q, k, v)
    side, dtype = odd_side(window_size, "window_size"), v.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    in_windows = sparse_mode in ("local", "sparsemax")
    with torch.autocast(q.device.type, enabled=False):  # half precision would move the threshold
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        if in_windows or (sparse_mode == "topk" and k.shape[1] > max_tokens):
            frame, sparse = _check_frame(q, k, spatial_shape), sparse_mode == "sparsemax"
            out = _local_attention(q, k, v, frame, side, scale, sparse, sparsemax_pad_value)
        elif sparsity_ratio == 0.0:
            out = F.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]
        elif sparse_mode == "block":
            out = _block_attention(q, k, v, scale, sparsity_ratio, k_cap, block_size, q_block_size)
        else:
            keep = min(keys_to_keep(k.shape[1], sparsity_ratio), k_cap)
            out = _topk_attention(q, k, v, keep, scale, block_size, q_block_size)
    return out.to(dtype)


def _local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frame: tuple[int, int],
    side: int,
    scale: float,
    sparse: bool,
    pad_value: float | None,
) -> Tensor:
    off_frame = MASKED
    if sparse and pad_value is not None:
        off_frame = pad_value
    run = _local_forward if torch.compiler.is_exporting() else _local_op
    q, k, v = q.unflatten(1, frame), k.unflatten(1, frame), v.unflatten(1, frame)
    out, _ = run(q, k, v, side, scale, off_frame, sparse)
    return out.flatten(1, 2)


def _topk_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: int, scale: float, block_size: int, q_block_size: int
) -> Tensor:
    if torch.compiler.is_exporting():  # plain operators, for the small frame of an exported graph
        scores = q @ k.mT * scale
        least = scores.topk(keep).values[..., -1:]
        return scores.masked_fill(scores < least, -math.inf).softmax(-1) @ v
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, _ = _topk_op(q, k, v, keep, scale, block_size, q_block_size)
    return out
