"""Attention of every query to a few keys: exact top-k, blocks of keys, local windows, sparsemax; see
`sparse_attention_topk_streaming`.

Shapes: B batch, h heads, N tokens, D head width, K keys kept, H W pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

SPARSE_MODES = ("topk", "block", "sparsemax", "local")


TILE = 8  # side in pixels of a query tile of local attention
ROW_GROUP = (
    16  # rows and keys of a score tile come in groups: BLAS sums in another order for tiny ones
)
MASKED = (
    -1e30
)  # a score that gets no weight; finite, so that padded queries, without keys, stay finite
TILE_SCORES = {
    "cpu": 2**18,
    "cuda": 2**24,
}  # scores held at a time: 1 MiB is a core's L2 cache, 64 MiB fill a GPU


def _register(name: str, forward, backward, keys):
    """An operator whose loops stay out of compiled graphs. It maps q, k, v and settings to (out, a number a query); its
    backward gets the gradient, q, k, v, both outputs and the settings. `keys(k's shape, settings)` is how many keys a
    query meets: two products forward, five backward, which computes the scores again."""
    op = torch.library.custom_op(f"hsi::{name}", forward, mutates_args=())
    back = torch.library.custom_op(f"hsi::{name}_backward", backward, mutates_args=())
    op.register_fake(
        lambda q, k, v, *_: (q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(*q.shape[:-1], 1))
    )
    back.register_fake(lambda grad, *inputs: tuple(torch.empty_like(x) for x in inputs[:3]))

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.mark_non_differentiable(output[1])
        ctx.settings = inputs[3:]

    def gradients(ctx, grad, _):
        return *back(grad.contiguous(), *ctx.saved_tensors, *ctx.settings), *[None] * len(
            ctx.settings
        )

    def flops(q, k, v, *settings, out_shape=None, products=(1, 1)):
        return (
            2 * math.prod(q[:-1]) * keys(k, settings) * (products[0] * q[-1] + products[1] * v[-1])
        )

    op.register_autograd(gradients, setup_context=setup)
    register_flop_formula(getattr(torch.ops.hsi, name))(flops)
    register_flop_formula(getattr(torch.ops.hsi, f"{name}_backward"))(
        lambda grad, q, k, v, out, extra, *settings, out_shape=None: flops(
            q, k, v, *settings, products=(3, 2)
        )
    )
    return op


def keys_to_keep(n: int, ratio: float) -> int:
    """K = max(1, ceil((1 - ratio) * n)), with room for the rounding of 1 - ratio (0.9 of 300 keeps 30, not 31)."""
    return max(1, math.ceil((1.0 - ratio) * n - 1e-6))


def _spans(total: int, size: int):
    """(start, stop) pairs that cover range(total), `size` rounded up to ROW_GROUP long; a short tail joins the last."""
    size = -(-size // ROW_GROUP) * ROW_GROUP
    starts = list(range(0, total, size))
    if len(starts) > 1 and total - starts[-1] < ROW_GROUP:
        starts.pop()
    return list(zip(starts, starts[1:] + [total], strict=False))


def _score_tiles(q: Tensor, k: Tensor, scale: float, block_size: int, q_block_size: int):
    """Yield (heads, rows, scores): slices of q and the scores (g, r, N) of those queries in a buffer that is reused."""
    (heads, n_q, _), n_k = q.shape, k.shape[1]
    budget = TILE_SCORES.get(q.device.type, 2**24) * (
        torch.get_num_threads() if q.device.type == "cpu" else 1
    )
    group = max(1, budget // (n_q * n_k)) if n_q <= q_block_size else 1  # heads a tile
    row_spans, buffer = _spans(n_q, max(1, min(q_block_size, budget // n_k))), q.new_empty(0)
    for h in range(0, heads, group):
        hs = slice(h, min(h + group, heads))
        for a, b in row_spans:
            scores = buffer.resize_(hs.stop - h, b - a, n_k)
            for c, d in _spans(n_k, block_size):
                torch.bmm(q[hs, a:b], k[hs, c:d].mT, out=scores[..., c:d])
            yield hs, slice(a, b), scores.mul_(scale)


def _kth_largest(scores: Tensor, keep: int) -> Tensor:
    """The keep-th largest score of each row, (..., 1). On a CPU NumPy's partition takes a tenth of kthvalue's time."""
    index = scores.shape[-1] - keep
    if scores.device.type != "cpu":
        return scores.kthvalue(index + 1, dim=-1, keepdim=True).values
    work = scores.clone().numpy()
    work.partition(index, axis=-1)
    return torch.from_numpy(work[..., index : index + 1].copy())


def _keep_and_softmax_(scores: Tensor, threshold: Tensor) -> Tensor:
    """In place: softmax over the scores that reach the row's threshold (all ties), exactly 0 elsewhere."""
    below = torch.nextafter(threshold, threshold.new_tensor(-math.inf))
    scores.sub_(
        below.minimum(threshold - torch.finfo(threshold.dtype).tiny)
    )  # > 0 exactly where score >= threshold
    F.threshold_(scores, 0.0, -math.inf)
    return torch.softmax(scores, -1, out=scores)


def _topk_forward(
    q: Tensor, k: Tensor, v: Tensor, keep: int, scale: float, block_size: int, q_block_size: int
) -> tuple[Tensor, Tensor]:
    out, threshold = q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(*q.shape[:2], 1)
    for hs, rows, scores in _score_tiles(q, k, scale, block_size, q_block_size):
        threshold[hs, rows] = limit = _kth_largest(scores, keep)
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
    delta, buffer = (grad * out).sum(-1, keepdim=True), q.new_empty(0)
    for hs, rows, scores in _score_tiles(q, k, scale, block_size, q_block_size):
        weights = _keep_and_softmax_(scores, threshold[hs, rows])
        dv[hs].baddbmm_(weights.mT, grad[hs, rows])
        ds = torch.bmm(grad[hs, rows], v[hs].mT, out=buffer.resize_(weights.shape))
        ds.sub_(delta[hs, rows]).mul_(weights)
        torch.bmm(ds, k[hs], out=dq[hs, rows])
        dk[hs].baddbmm_(ds.mT, q[hs, rows])
    return dq.mul_(scale), dk.mul_(scale), dv


_topk_op = _register("topk_attention", _topk_forward, _topk_backward, lambda k, rest: k[1])


def sparsemax(scores: Tensor) -> Tensor:
    """Sparsemax over the last dimension (Martins and Astudillo, 2016): rows sum to 1, most entries are exactly 0."""
    with torch.no_grad():
        ordered = scores.sort(-1, descending=True).values
        rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
        size = (1 + rank * ordered > ordered.cumsum(-1)).sum(-1, keepdim=True).clamp_min(1)
        support = scores >= ordered.gather(-1, size - 1)
    total = scores.masked_fill(~support, 0.0).sum(-1, keepdim=True)
    return (scores - (total - 1) / support.sum(-1, keepdim=True)).clamp_min(0.0)


class _LocalTiles:
    """A tile is TILE x TILE pixels of queries; its keys are those pixels and a border `reach` wide. A step is a few
    tiles in a row. All tensors are images (BH, H, W, D): only a step's strip is padded, never the frame."""

    def __init__(self, q: Tensor, side: int, off_frame: float):
        (self.height, self.width), self.off_frame = q.shape[1:3], off_frame
        self.reach, self.halo = side // 2, TILE + side - 1
        self.columns = -(-self.width // TILE)
        budget = 2 * TILE_SCORES.get(q.device.type, 2**24)
        self.per_step = max(1, min(self.columns, budget // (q.shape[0] * TILE**2 * self.halo**2)))
        self.across = -(-self.columns // self.per_step)
        self.steps = -(-self.height // TILE) * self.across
        offset = (
            torch.arange(self.halo, device=q.device) - torch.arange(TILE, device=q.device)[:, None]
        )
        near = (offset >= 0) & (offset < side)  # (TILE, halo): in the window, along one axis
        near = near[:, None, :, None] & near[None, :, None, :]
        self.window = q.new_zeros(()).where(near, MASKED).reshape(1, 1, TILE * TILE, -1)

    def _place(self, step: int, reach: int):
        """A step's tile count, the part of the frame that its strip covers, and the padding around that."""
        row, part = divmod(step, self.across)
        top, left = row * TILE - reach, part * self.per_step * TILE - reach
        tiles = min(self.per_step, self.columns - part * self.per_step)
        bottom, right = top + TILE + 2 * reach, left + tiles * TILE + 2 * reach
        rows, columns = (
            slice(max(0, top), min(bottom, self.height)),
            slice(max(0, left), min(right, self.width)),
        )
        return (
            tiles,
            rows,
            columns,
            (columns.start - left, right - columns.stop, rows.start - top, bottom - rows.stop),
        )

    def take(self, x: Tensor, step: int, reach: int) -> Tensor:
        """Tiles of pixels (reach 0) or of keys: (BH, tiles, side * side, D)."""
        _, rows, columns, pad = self._place(step, reach)
        strip = F.pad(x[:, rows, columns], (0, 0, *pad))
        return strip.unfold(2, TILE + 2 * reach, TILE).permute(0, 2, 1, 4, 3).flatten(2, 3)

    def add(self, x: Tensor, value: Tensor, step: int, reach: int):
        """Add such tiles to the frame. Neighbours share the border: they are added a tile's width at a time."""
        tiles, rows, columns, (left, _, top, _) = self._place(step, reach)
        size = TILE + 2 * reach
        value = value.unflatten(2, (size, size))
        strip = x.new_zeros(x.shape[0], size, (tiles - 1) * TILE + size, x.shape[3])
        for shift in range(0, size, TILE):
            part = value[:, :, :, shift : shift + TILE]
            span = strip[:, :, shift : shift + (tiles - 1) * TILE + part.shape[3]]
            span.unfold(2, part.shape[3], TILE).permute(0, 2, 1, 4, 3).add_(part)
        frame = x[:, rows, columns]
        frame += strip[:, top : top + frame.shape[1], left : left + frame.shape[2]]

    def inputs(self, step: int, q: Tensor, k: Tensor, v: Tensor):
        """q, k, v of a step and what its windows and the frame add to the scores. Keys off the frame are zeros."""
        tiles, rows, columns, pad = self._place(step, self.reach)
        q, k, v = (
            self.take(q, step, 0),
            self.take(k, step, self.reach),
            self.take(v, step, self.reach),
        )
        if not any(pad):
            return q, k, v, self.window
        frame = k.new_ones(
            1, rows.stop - rows.start, columns.stop - columns.start, dtype=torch.bool
        )
        frame = (
            F.pad(frame, pad).unfold(2, self.halo, TILE).transpose(1, 2).reshape(1, tiles, 1, -1)
        )
        return q, k, v, self.window.where(frame | (self.window < 0), self.off_frame)

    def weights(self, q: Tensor, k: Tensor, bias: Tensor, scale: float, sparse: bool) -> Tensor:
        scores = (q @ k.mT).mul_(scale).add_(bias)
        return sparsemax(scores) if sparse else torch.softmax(scores, -1, out=scores)


def _local_forward(
    q: Tensor, k: Tensor, v: Tensor, side: int, scale: float, off_frame: float, sparse: bool
) -> tuple[Tensor, Tensor]:
    tiles = _LocalTiles(q, side, off_frame)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    for step in range(tiles.steps):
        tq, tk, tv, bias = tiles.inputs(step, q, k, v)
        tiles.add(
            out,
            tiles.weights(tq, tk, bias, scale, sparse) @ tv
            if sparse
            else F.scaled_dot_product_attention(tq, tk, tv, attn_mask=bias, scale=scale),
            step,
            0,
        )
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
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for step in range(tiles.steps):
        tq, tk, tv, bias = tiles.inputs(step, q, k, v)
        tg, weights = tiles.take(grad, step, 0), tiles.weights(tq, tk, bias, scale, sparse)
        ds = tg @ tv.mT
        if sparse:  # the Jacobian of sparsemax: centred on the support, 0 elsewhere
            support = (weights > 0).to(ds.dtype)
            ds.sub_(
                (ds * support).sum(-1, keepdim=True) / support.sum(-1, keepdim=True).clamp_min(1)
            ).mul_(support)
        else:
            ds.sub_((tg * tiles.take(out, step, 0)).sum(-1, keepdim=True)).mul_(weights)
        tiles.add(dq, (ds @ tk).mul_(scale), step, 0)
        tiles.add(dk, (ds.mT @ tq).mul_(scale), step, tiles.reach)
        tiles.add(dv, weights.mT @ tg, step, tiles.reach)
    return dq, dk, dv


_local_op = _register(
    "local_attention", _local_forward, _local_backward, lambda k, rest: (TILE + rest[0] - 1) ** 2
)


def _block_attention(q, k, v, scale, ratio, k_cap, block_size, q_block_size):
    """Gathering whole blocks costs a hundredth of the products; the gathered keys take N / q_block * K * D."""
    n_q, n_k, heads = q.shape[1], k.shape[1], len(q)
    size = min(
        block_size, max(ROW_GROUP, min(64, n_k // 32))
    )  # so that a tenth of the blocks is a choice
    q, k, v = (
        F.pad(x, (0, 0, 0, -x.shape[1] % s)).unflatten(1, (-1, s))
        for x, s in ((q, min(q_block_size, 2 * size)), (k, size), (v, size))
    )
    blocks = k.shape[1]
    keep = min(keys_to_keep(blocks, ratio), max(1, k_cap // size))
    with torch.no_grad():  # padded keys are zeros: they leave a sum as it is
        pooled = k.mean(2).mT
        pooled[..., -1] *= size / (n_k - size * (blocks - 1))
        index = (q.mean(2) @ pooled).topk(keep, sorted=False).indices
        rows = (index + blocks * torch.arange(heads, device=q.device)[:, None, None]).flatten()
        place = index[..., None] * size + torch.arange(size, device=q.device)
        mask = (place < n_k).flatten(2)[:, :, None] if n_k < blocks * size else None
    k, v = (
        x.flatten(0, 1).flatten(1).index_select(0, rows).view(heads, -1, keep * size, x.shape[-1])
        for x in (k, v)
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).flatten(1, 2)[
        :, :n_q
    ]


def odd_side(window_size: int, name: str) -> int:
    side = math.isqrt(max(0, window_size))
    if side**2 != window_size or side % 2 == 0:
        raise ValueError(f"{name} must be an odd square (9, 25, 49, ...), not {window_size}")
    return side


def _check_attention(q, k, v, ratio, mode, spatial_shape, sizes):
    shapes = [tuple(x.shape) for x in (q, k, v)]  # spatial_shape: () when it is not needed
    fits = (
        {len(x) for x in shapes} == {3}
        and len({x[0] for x in shapes}) == 1
        and min(min(x) for x in shapes) > 0
    )
    if not fits or shapes[0][2] != shapes[1][2] or shapes[1][1] != shapes[2][1]:
        raise ValueError(f"q, k, v must be (B*h, N, D), (B*h, N, D), (B*h, N, Dv), not {shapes}")
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"sparsity_ratio must be in [0, 1), not {ratio}")
    if mode not in SPARSE_MODES:
        raise ValueError(f"sparse_mode must be one of {', '.join(SPARSE_MODES)}, not {mode!r}")
    if bad := [f"{name} = {size}" for name, size in sizes.items() if size < 1 or size != int(size)]:
        raise ValueError(f"{', '.join(bad)}: must be positive integers")
    if spatial_shape != () and (
        spatial_shape is None or {math.prod(spatial_shape)} != {x[1] for x in shapes}
    ):
        raise ValueError(
            f"local windows need spatial_shape=(H, W), H * W = {q.shape[1]} tokens, not {spatial_shape}"
        )


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
    spatial_shape: tuple[int, int] | None = None,
    sparse_mode: str = "topk",
    sparsemax_pad_value: float | None = None,
) -> Tensor:
    """Attention of q (B*h, N, D) to a few keys k (B*h, N, D), v (B*h, N, Dv): (B*h, N, Dv). Never N x N in memory.

    "topk": softmax over the K = max(1, ceil((1 - ratio) N)) best keys of every query, at most `k_cap`, ties kept. Exact
        whatever `block_size` (keys a product) and `q_block_size` (queries a tile, in groups of 16). Ratio 0 is dense.
    "block": whole blocks of up to `block_size` keys for a block of queries, chosen by their mean scores; the time falls
        with the ratio. Not bound by `max_tokens`; `k_cap` holds.
    "local", and "topk" above `max_tokens`: the `window_size` pixels around each query (49 is 7 x 7) in `spatial_shape`.
    "sparsemax": the same windows with sparsemax; pixels outside the frame are masked, or score `sparsemax_pad_value`.
    Raises ValueError for bad values, and when windows are needed and `spatial_shape` is not given."""
    local = sparse_mode in ("local", "sparsemax") or (
        sparse_mode == "topk" and k.shape[1] > max_tokens
    )
    _check_attention(
        q,
        k,
        v,
        sparsity_ratio,
        sparse_mode,
        spatial_shape if local else (),
        dict(block_size=block_size, max_tokens=max_tokens, k_cap=k_cap, q_block_size=q_block_size),
    )
    side = odd_side(window_size, "window_size")
    scale, dtype = q.shape[-1] ** -0.5 if scale is None else float(scale), v.dtype
    with torch.autocast(
        q.device.type, enabled=False
    ):  # scores of half precision would move the threshold
        q, k, v = (
            x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (q, k, v)
        )
        if local:
            run = _local_forward if torch.compiler.is_exporting() else _local_op
            off = (
                MASKED
                if sparse_mode != "sparsemax" or sparsemax_pad_value is None
                else sparsemax_pad_value
            )
            q, k, v = (x.unflatten(1, spatial_shape) for x in (q, k, v))
            out = run(q, k, v, side, scale, off, sparse_mode == "sparsemax")[0].flatten(1, 2)
        elif sparsity_ratio == 0.0:
            out = F.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]
        elif sparse_mode == "block":
            out = _block_attention(q, k, v, scale, sparsity_ratio, k_cap, block_size, q_block_size)
        elif (
            torch.compiler.is_exporting()
        ):  # plain operators, for the small frame that a graph is exported for
            scores = q @ k.mT * scale
            least = scores.topk(min(keys_to_keep(k.shape[1], sparsity_ratio), k_cap)).values[
                ..., -1:
            ]
            out = scores.masked_fill(scores < least, -math.inf).softmax(-1) @ v
        else:
            keep = min(keys_to_keep(k.shape[1], sparsity_ratio), k_cap)
            out = _topk_op(
                q.contiguous(),
                k.contiguous(),
                v.contiguous(),
                keep,
                scale,
                block_size,
                q_block_size,
            )[0]
    return out.to(dtype)
