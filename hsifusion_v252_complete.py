"""HSIFusionNet v2.5.3 "Lightning Pro": an RGB image in, a hyperspectral cube out.

    from hsifusion_v252_complete import create_hsifusion_lightning_pro
    model = create_hsifusion_lightning_pro("tiny")
    cube = model(rgb)                                   # (B, 3, H, W) -> (B, 31, H, W)

A U-net works at half resolution and below, in blocks of sliding-window attention, spectral (channel) attention and an
MLP. Its features are brought up to full resolution, where they steer a small per-pixel network. That network corrects a
linear map from RGB to the bands, which is fitted in closed form before training (`fit_spectral_path`): it multiplies
each band by a gain, as pigments and filters do, and adds a term relative to the pixel's intensity. Both are relative, as
the error is, so a dark pixel is as well conditioned as a bright one. In evaluation the cube is then moved towards one
that the camera, whose response is fitted with the linear map, would have seen as this image (`CameraConsistency`).

Features are (B, H, W, C) throughout: rows of tokens to a linear layer, a channels_last image to a convolution, and no
copy between the two. Levels halve with a ceiling, so no size needs padding but the odd row that a 2 x 2 cell lacks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common_utils_v32 import build_from_checkpoint, opt
from sparse_attention import sparse_attention_topk_streaming
from spectral_layers import (
    CameraConsistency,
    DropPath,
    SpectralAttention,
    brightness,
    colour_features,
    depth_to_space,
    fit_linear_spectral_path,
    in_strips,
    pixels_in_strips,
    row_strips,
    smooth_basis,
    space_to_depth,
)

SIZES = {
    "tiny": {"base_channels": 64, "depths": (2, 2, 2), "num_heads": (4, 4, 8)},
    "small": {"base_channels": 80, "depths": (2, 3, 4), "num_heads": (4, 4, 8)},
    "base": {"base_channels": 112, "depths": (3, 5, 6), "num_heads": (4, 8, 8)},
    "large": {"base_channels": 176, "depths": (3, 6, 8), "num_heads": (4, 8, 8)},
}
LEVEL_WIDTHS = (1.0, 1.75, 2.5)  # of the base channels, at 1/2, 1/4 and 1/8 of the resolution
PIXEL_CHANNELS = 48  # width of the full-resolution network
CONTEXT_SIDE = 8  # cross-attention sees a skip pooled to at most 8 x 8 tokens
BASIS_RANK = 12  # smooth spectra that the head mixes: fewer than bands, so that what it learns holds for other materials
GAIN_LIMIT = 3.0  # of the logarithm of a band's gain: 1/20 to 20


@dataclass
class LightningProConfig:
    """Settings of HSIFusionNet. Tuples have one entry per level, fine to coarse."""

    in_channels: int = opt(3, "channels of the input image", group="model")
    out_channels: int = opt(31, "bands of the output cube", group="model")
    base_channels: int = opt(
        64, "channels at half resolution; coarser levels are wider", group="model"
    )
    depths: tuple[int, ...] = opt(
        (2, 2, 2), "blocks per level; a decoder level has one less, at least one", group="model"
    )
    num_heads: tuple[int, ...] = opt(
        (4, 4, 8), "attention heads per level, half of them spectral", group="model"
    )
    window_size: int = opt(
        8, "side of an attention window, tokens; windows overlap by a quarter", group="model"
    )
    mlp_ratio: float = opt(2.0, "hidden width of an MLP over its input width", group="model")

    enable_spectral: bool = opt(
        True, "give half of the heads to spectral attention", group="model features"
    )
    use_sliding_window: bool = opt(
        True, "window attention; off: attention over the whole frame", group="model features"
    )
    use_sparse_attention: bool = opt(
        False, "whole-frame attention keeps the top tenth of keys", group="model features"
    )
    use_moe: bool = opt(False, "mixture of experts in place of the MLP", group="model features")
    num_experts: int = opt(
        4, "experts of a mixture; each token goes to two", group="model features"
    )
    use_rope: bool = opt(True, "rotary positions in windows", group="model features")
    use_channels_last: bool = opt(
        True, "convolutions and output in channels_last memory", group="model features"
    )
    use_cross_attention: bool = opt(
        False, "decoder attends to pooled skips", group="model features"
    )
    estimate_uncertainty: bool = opt(
        False, "also return a Laplace scale per value", group="model features"
    )

    drop_path: float = opt(
        0.0, "chance to drop a block's branch, rising with depth", group="model regularisation"
    )
    dropout: float = opt(0.0, "dropout inside MLPs", group="model regularisation")
    auxiliary_loss_weight: float = opt(
        0.01, "weight of the experts' balancing loss", group="model regularisation"
    )
    min_input_size: int = opt(
        64, "smallest accepted height and width, pixels", group="model regularisation"
    )
    use_checkpoint: bool = opt(
        False, "recompute blocks in backward to save memory", group="model regularisation"
    )

    def __post_init__(self) -> None:
        self.depths, self.num_heads = tuple(self.depths), tuple(self.num_heads)
        for name in (
            "in_channels",
            "out_channels",
            "base_channels",
            "window_size",
            "min_input_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        levels = len(LEVEL_WIDTHS)
        if (
            len(self.depths) != levels
            or len(self.num_heads) != levels
            or min(*self.depths, *self.num_heads) < 1
        ):
            raise ValueError(
                f"depths {self.depths} and num_heads {self.num_heads}: give {levels} values of at least 1 each"
            )
        if self.enable_spectral and any(heads % 2 for heads in self.num_heads):
            raise ValueError(f"num_heads {self.num_heads}: must be even, half of them are spectral")
        if self.use_sparse_attention and self.use_sliding_window:
            raise ValueError("use_sparse_attention needs use_sliding_window off: windows are dense")
        if self.use_moe and self.num_experts < 2:
            raise ValueError(f"num_experts = {self.num_experts}: a mixture needs at least 2")
        if self.window_size < 4 or self.mlp_ratio <= 0:
            raise ValueError(
                f"window_size {self.window_size} must be at least 4, mlp_ratio {self.mlp_ratio} above 0"
            )
        for name in ("drop_path", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must lie in [0, 1)")

    @property
    def widths(self) -> list[int]:
        """Channels per level; a head's width is a multiple of 4, which 2-D rotary positions need."""
        sizes = [4 * heads for heads in self.num_heads]
        return [
            max(1, round(self.base_channels * w / s)) * s
            for w, s in zip(LEVEL_WIDTHS, sizes, strict=True)
        ]


# --- layout ---------------------------------------------------------------------------------------------------------


def convolve(conv: nn.Conv2d, x: Tensor, channels_last: bool = True) -> Tensor:
    """Apply a convolution to (B, H, W, C)."""
    image = x.permute(0, 3, 1, 2)
    return conv(image if channels_last else image.contiguous()).permute(0, 2, 3, 1)


# --- attention ------------------------------------------------------------------------------------------------------


def rotary_table(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Cosines and signed sines (2, height * width, dim) that turn a head of width `dim`: pairs (i, i + dim / 2), the first
    half of them by row, the second by column (2-D rotary position embedding, Su et al. 2021). Wavelengths run from 2 pi
    to about 100 tokens."""
    frequency = 16.0 ** -(torch.arange(dim // 4, device=device) / max(1, dim // 4))
    rows = (torch.arange(height, device=device)[:, None] * frequency)[:, None].expand(
        height, width, -1
    )
    columns = (torch.arange(width, device=device)[:, None] * frequency)[None].expand(
        height, width, -1
    )
    angle = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return torch.stack([angle.cos().repeat(1, 2), torch.cat([-angle.sin(), angle.sin()], dim=-1)])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn pairs (x[i], x[i + D/2]) of (..., N, D) by the table's angles; norms are kept. Whole rows are multiplied:
    to cut them into halves first takes five times as long."""
    cos, sin = table.to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def window_count(side: int, window: int, stride: int) -> int:
    """Windows that cover `side` tokens, the last one reaching past the end where it must."""
    return 1 + max(0, math.ceil((side - window) / stride))


def extract_windows(x: Tensor, window: int, stride: int, groups: int = 1) -> Tensor:
    """(B, H, W, C) -> (groups, B, rows, columns, window, window, C / groups): overlapping windows, zeros past the right
    and bottom. Needs window <= 2 stride: a window is its own `stride` tokens and the first of the next one's."""
    rows, columns = (window_count(side, window, stride) for side in x.shape[1:3])
    x = F.pad(
        x, (0, 0, 0, (columns + 1) * stride - x.shape[2], 0, (rows + 1) * stride - x.shape[1])
    )
    x = x.unflatten(1, (-1, stride))
    x = torch.cat([x[:, :-1], x[:, 1:, : window - stride]], dim=2)  # B, rows, window, W, C
    x = x.unflatten(3, (-1, stride)).unflatten(5, (groups, -1)).permute(5, 0, 1, 3, 2, 4, 6)
    return torch.cat([x[:, :, :, :-1], x[:, :, :, 1:, :, : window - stride]], dim=5)


def _merge_axis(x: Tensor, stride: int) -> Tensor:
    """Add up windows (A, n, window, ...) that start every `stride` along one axis -> (A, (n - 1) stride + window, ...)."""
    count, window = x.shape[1:3]
    if window == stride:
        return x.flatten(1, 2)
    rest = (0, 0) * (x.ndim - 3)
    heads = F.pad(x[:, :, :stride], (*rest, 0, 0, 0, 1))
    tails = F.pad(x[:, :, stride:], (*rest, 0, 2 * stride - window, 1, 0))
    return (heads + tails).flatten(1, 2)[:, : (count - 1) * stride + window]


def add_windows(x: Tensor, stride: int) -> Tensor:
    """(groups, B, rows, columns, window, window, D) -> (B, H, W, groups D): the sum over the windows that cover a token.
    H and W reach as far as the windows do."""
    groups, batch, rows, columns, window = x.shape[:5]
    x = x.permute(1, 2, 4, 3, 5, 0, 6).reshape(batch, rows, window, -1)
    x = _merge_axis(x, stride)  # rows of tokens x (columns, window, groups, D)
    return _merge_axis(x.reshape(batch * x.shape[1], columns, window, -1), stride).unflatten(
        0, (batch, -1)
    )


def merge_windows(x: Tensor, height: int, width: int, stride: int) -> Tensor:
    """(groups, B, rows, columns, window, window, D) -> (B, height, width, groups D): the mean over the windows that cover
    a token."""
    return add_windows(x, stride)[:, :height, :width] / coverage(
        height, width, x.shape[4], stride, x
    )


def coverage(height: int, width: int, window: int, stride: int, like: Tensor) -> Tensor:
    """How many windows cover each token, (height, width, 1)."""
    sides = []
    for side in (height, width):
        ones = like.new_ones(1, window_count(side, window, stride), window)
        sides.append(_merge_axis(ones, stride)[0, :side])
    return (sides[0][:, None] * sides[1])[..., None]


class WindowAttention(nn.Module):
    """Attention of some heads in space: in overlapping windows, or over the whole frame (dense or sparse)."""

    def __init__(self, config: LightningProConfig, dim: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(dim, 3 * width, bias=False)
        self.window = config.window_size if config.use_sliding_window else 0
        self.stride = config.window_size - config.window_size // 4
        self.use_rope, self.sparse = config.use_rope, config.use_sparse_attention
        side = max(self.window, 1)
        self.register_buffer("table", rotary_table(side, side, self.head_dim), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, width)."""
        return self.in_windows(x) if self.window else self.whole_frame(x)

    def in_windows(self, x: Tensor) -> Tensor:
        (height, width), (window, stride) = x.shape[1:3], (self.window, self.stride)
        rows = row_strips(x, 4 * self.heads * self.head_dim)[0][0].stop
        if rows >= height:
            total = self.one_strip(x)[:, :height, :width]
        else:
            total, strip = (
                x.new_zeros(len(x), height, width, self.heads * self.head_dim),
                max(1, rows // stride),
            )
            for top in range(0, window_count(height, window, stride) * stride, strip * stride):
                part = self.one_strip(x[:, top : top + (strip - 1) * stride + window])[
                    :, : height - top, :width
                ]
                total[:, top : top + part.shape[1]] += part
        return total / coverage(height, width, window, stride, total)

    def one_strip(self, x: Tensor) -> Tensor:
        """The sum over windows of their attention, (B, H, W, width) as far as they reach."""
        q, k, v = extract_windows(self.qkv(x), self.window, self.stride, 3 * self.heads).unflatten(
            0, (3, -1)
        )
        shape = v.shape
        q, k, v = (t.reshape(self.heads, -1, self.window**2, self.head_dim) for t in (q, k, v))
        if self.use_rope:
            q, k = rotate(q, self.table), rotate(k, self.table)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.padding_mask(x))
        return add_windows(out.view(shape), self.stride)

    def padding_mask(self, x: Tensor) -> Tensor | None:
        """True where a window's key is a token of the frame, (1, windows, 1, keys); None where all are."""
        if all(
            (side - self.window) % self.stride == 0 and side >= self.window for side in x.shape[1:3]
        ):
            return None
        inside = torch.ones(1, *x.shape[1:3], 1, dtype=torch.bool, device=x.device)
        mask = extract_windows(inside, self.window, self.stride).reshape(1, -1, 1, self.window**2)
        return mask.repeat(1, len(x), 1, 1)

    def whole_frame(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        q, k, v = (
            self.qkv(x).reshape(batch, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        if self.use_rope:
            table = rotary_table(height, width, self.head_dim, x.device)
            q, k = rotate(q, table), rotate(k, table)
        if self.sparse:
            flat = (t.flatten(0, 1) for t in (q, k, v))
            out = sparse_attention_topk_streaming(*flat, max_tokens=height * width).unflatten(
                0, (batch, self.heads)
            )
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(batch, height, width, -1)


class CrossAttention(nn.Module):
    """Decoder tokens attend to a skip connection pooled to at most CONTEXT_SIDE^2 tokens; the query path stays."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_context = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q, self.to_kv, self.proj = (
            nn.Linear(dim, dim),
            nn.Linear(dim, 2 * dim),
            nn.Linear(dim, dim),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        side = (min(CONTEXT_SIDE, height), min(CONTEXT_SIDE, width))
        context = F.adaptive_avg_pool2d(skip.permute(0, 3, 1, 2), side).flatten(2).transpose(1, 2)
        q = (
            self.to_q(self.norm(x))
            .reshape(batch, -1, self.heads, dim // self.heads)
            .transpose(1, 2)
        )
        k, v = (
            self.to_kv(self.norm_context(context))
            .unflatten(-1, (2, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        out = (
            F.scaled_dot_product_attention(q, k, v)
            .transpose(1, 2)
            .reshape(batch, height, width, dim)
        )
        return x + self.proj(out)


# --- blocks ---------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Linear, 3 x 3 depthwise convolution, GELU, linear."""

    def __init__(self, config: LightningProConfig, dim: int) -> None:
        super().__init__()
        hidden = int(dim * config.mlp_ratio)
        self.channels_last, self.dropout = config.use_channels_last, config.dropout
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(convolve(self.depthwise, self.fc1(x), self.channels_last))
        return self.fc2(F.dropout(x, self.dropout, self.training))


class MixtureOfExperts(nn.Module):
    """Each token goes to its two likeliest experts, which compute their own tokens only (Shazeer et al. 2017)."""

    def __init__(self, config: LightningProConfig, dim: int) -> None:
        super().__init__()
        hidden = int(dim * config.mlp_ratio)
        self.router = nn.Linear(dim, config.num_experts)
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(dim, hidden),
                nn.GELU(),
                nn.Dropout(config.dropout),
                nn.Linear(hidden, dim),
            )
            for _ in range(config.num_experts)
        )
        self.balance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 2)
        probability = self.router(tokens).float().softmax(dim=-1)
        weight, chosen = probability.topk(2, dim=-1)
        weight = (weight / weight.sum(dim=-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = (chosen == index).nonzero(as_tuple=True)
            mine = (
                expert(tokens[token]) * weight[token, slot, None]
            )  # no token: zeros for gradients, so DDP is content
            out = out.index_add(0, token, mine.to(out.dtype))
        share = F.one_hot(chosen, len(self.experts)).float().mean(dim=(0, 1))
        self.balance = (
            len(self.experts) * (share * probability.mean(dim=0)).sum()
        )  # Fedus et al. 2021, 1 when even
        return out.view_as(x)

    def __getstate__(self) -> dict:
        return self.__dict__ | {
            "balance": None
        }  # a tensor inside a graph can't be copied or pickled


class LightningProBlock(nn.Module):
    """Norm, attention, residual; norm, MLP or experts, residual. Half of the heads attend in space and half between
    channels, so the block costs as much as one attention."""

    def __init__(
        self, config: LightningProConfig, dim: int, heads: int, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        spectral = heads // 2 if config.enable_spectral else 0
        spatial_dim = dim * (heads - spectral) // heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.spatial = WindowAttention(config, dim, spatial_dim, heads - spectral)
        self.spectral = SpectralAttention(dim, dim - spatial_dim, spectral) if spectral else None
        self.proj = nn.Linear(dim, dim)
        self.mlp = MixtureOfExperts(config, dim) if config.use_moe else Mlp(config, dim)
        self.hidden = int(dim * config.mlp_ratio)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the same shape."""
        normed = self.norm1(x)
        spatial = self.spatial(normed)
        frame_map = self.spectral.frame_map(normed) if self.spectral is not None else None

        def rest(x: Tensor, normed: Tensor, heads: Tensor) -> Tensor:
            if frame_map is not None:
                heads = torch.cat([heads, self.spectral(normed, frame_map)], dim=-1)
            x = x + self.drop_path(self.scale1 * self.proj(heads))
            return x + self.drop_path(self.scale2 * self.mlp(self.norm2(x)))

        return in_strips(rest, x, normed, spatial, channels=self.hidden, halo=1)


class TokenGroupNorm(nn.GroupNorm):
    """GroupNorm of every token on its own, so that its statistics depend on no frame size and on no padding."""

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(-1, (self.num_groups, -1))
        return torch.addcmul(
            self.bias,
            F.layer_norm(grouped, grouped.shape[-1:], eps=self.eps).flatten(-2),
            self.weight,
        )


class HSIFusionNet(nn.Module):
    """See the head of this file. `config` holds its settings."""

    def __init__(self, config: LightningProConfig) -> None:
        super().__init__()
        self.config, widths, levels = config, config.widths, len(config.widths)
        colours = 3 * config.in_channels + 1
        depths = [*config.depths, *(max(1, d - 1) for d in config.depths[-2::-1])]
        rates = (config.drop_path * i / (sum(depths) - 1) for i in range(sum(depths)))

        def stage(level: int, depth: int) -> nn.Sequential:
            return nn.Sequential(
                *(
                    LightningProBlock(config, widths[level], config.num_heads[level], next(rates))
                    for _ in range(depth)
                )
            )

        self.direct = nn.Linear(config.in_channels, config.out_channels)
        self.consistency = CameraConsistency(config.in_channels, config.out_channels)
        self.stem = nn.Linear(4 * colours, widths[0])
        self.stem_mix = nn.Conv2d(widths[0], widths[0], 3, padding=1, groups=widths[0])
        self.encoder = nn.ModuleList(stage(i, config.depths[i]) for i in range(levels))
        self.decoder = nn.ModuleList(
            stage(i, max(1, config.depths[i] - 1)) for i in range(levels - 2, -1, -1)
        )
        self.down, self.up, self.fuse, self.cross = (nn.ModuleList() for _ in range(4))
        for i in range(levels - 1):
            self.down.append(
                nn.Sequential(
                    TokenGroupNorm(4, 4 * widths[i]), nn.Linear(4 * widths[i], widths[i + 1])
                )
            )
        for i in range(levels - 2, -1, -1):
            self.up.append(
                nn.Sequential(
                    TokenGroupNorm(4, widths[i + 1]), nn.Linear(widths[i + 1], 4 * widths[i])
                )
            )
            self.fuse.append(nn.Linear(2 * widths[i], widths[i]))
            if config.use_cross_attention:
                self.cross.append(CrossAttention(widths[i], config.num_heads[i]))
        self.to_pixels = nn.Sequential(
            TokenGroupNorm(4, widths[0]), nn.Linear(widths[0], 4 * PIXEL_CHANNELS)
        )
        self.pixel_in = nn.Conv2d(colours, PIXEL_CHANNELS, 3, padding=1)
        self.pixel_mix = nn.Linear(PIXEL_CHANNELS, PIXEL_CHANNELS)
        rank = min(config.out_channels, BASIS_RANK)
        self.head = nn.Linear(
            PIXEL_CHANNELS, 2 * rank
        )  # coefficients of the gain's logarithm, and of the added term
        self.basis = nn.Parameter(
            smooth_basis(config.out_channels, rank) * 0.5 * math.sqrt(config.out_channels / rank)
        )
        nn.init.zeros_(
            self.head.weight
        )  # the start is the linear path alone; the head's gradient is not zero
        nn.init.zeros_(self.head.bias)
        if config.estimate_uncertainty:
            self.scale_head = nn.Linear(PIXEL_CHANNELS, config.out_channels)
            nn.init.constant_(
                self.scale_head.bias, math.log(math.expm1(0.1))
            )  # a tenth of the intensity

    def forward(self, rgb: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """rgb (B, in, H, W) in any memory layout -> cube (B, out, H, W), unclamped; with `estimate_uncertainty` also
        the scale b > 0 of a Laplace distribution around each value. Raises ValueError for a wrong or too small input."""
        config = self.config
        if (
            rgb.ndim != 4
            or rgb.shape[1] != config.in_channels
            or min(rgb.shape[2:]) < config.min_input_size
        ):
            raise ValueError(
                f"input {tuple(rgb.shape)}: need (B, {config.in_channels}, H, W) with sides of at least "
                f"min_input_size = {config.min_input_size}"
            )
        x = rgb.permute(0, 2, 3, 1).contiguous()
        colour = colour_features(x)
        outputs = pixels_in_strips(
            self.bands, x, colour, self.trunk(colour), channels=config.out_channels
        )
        outputs = [y.permute(0, 3, 1, 2) for y in outputs]
        outputs = outputs if config.use_channels_last else [y.contiguous() for y in outputs]
        return tuple(outputs) if config.estimate_uncertainty else outputs[0]

    def bands(self, x: Tensor, colour: Tensor, features: Tensor) -> list[Tensor]:
        """The per-pixel network, on rows of pixels and the trunk's features under them: the cube (B, H, W, out), and its
        scale where the model has one."""
        guide = depth_to_space(self.to_pixels(features), *x.shape[1:3])
        pixels = F.gelu(convolve(self.pixel_in, colour, self.config.use_channels_last) + guide)
        pixels = pixels + F.gelu(self.pixel_mix(pixels))
        with torch.autocast(
            x.device.type, enabled=False
        ):  # the last sum decides the error of dark pixels
            pixels, x = pixels.to(self.head.weight.dtype), x.to(self.head.weight.dtype)
            spectra = torch.block_diag(
                self.basis, self.basis
            )  # one product over the pixels, not two
            gain, term = F.linear(
                pixels, spectra @ self.head.weight, spectra @ self.head.bias
            ).chunk(2, dim=-1)
            intensity = brightness(x)
            outputs = [
                self.direct(x) * gain.clamp(-GAIN_LIMIT, GAIN_LIMIT).exp() + intensity * term
            ]
            if (
                not self.training
            ):  # and only once there is something to correct: the start is the linear path
                outputs[0] = outputs[0] + self.consistency(outputs[0], x) * self.head.weight.any()
            if self.config.estimate_uncertainty:
                outputs.append(intensity * F.softplus(self.scale_head(pixels.detach())) + 1e-4)
        return outputs

    def trunk(self, colour: Tensor) -> Tensor:
        """The U-net: (B, H, W, colours) -> features (B, ceil(H/2), ceil(W/2), C)."""
        width = self.stem.out_features
        x = in_strips(lambda colour: self.stem(space_to_depth(colour)), colour, channels=width)
        x = in_strips(
            lambda x: x + convolve(self.stem_mix, x, self.config.use_channels_last),
            x,
            channels=width,
            halo=1,
        )
        skips = []
        for level, stage in enumerate(self.encoder):
            x = self.run(stage, x)
            if level < len(self.down):
                skips.append(x)
                x = in_strips(
                    lambda x, down=self.down[level]: down(space_to_depth(x)),
                    x,
                    channels=2 * x.shape[3],
                )
        for step, stage in enumerate(self.decoder):
            skip = skips.pop()
            x = depth_to_space(self.up[step](x), *skip.shape[1:3])
            if self.config.use_cross_attention:
                x = self.cross[step](x, skip)
            x = self.run(stage, self.fuse[step](torch.cat([x, skip], dim=-1)))
        return x

    def run(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        for block in stage:
            recompute = self.config.use_checkpoint and self.training
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x

    @torch.no_grad()
    def fit_spectral_path(self, rgb: Tensor, cube: Tensor) -> None:
        """Set the direct path to the linear map RGB -> bands with the least relative error on rgb (B, in, h, w) and cube
        (B, out, h, w), both as in training, and learn the camera from them; see fit_linear_spectral_path."""
        self.consistency.fit(rgb, cube)
        weight, bias = fit_linear_spectral_path(rgb, cube)
        self.direct.weight.copy_(weight)
        self.direct.bias.copy_(bias)

    def auxiliary_loss(self) -> Tensor:
        """The experts' balancing loss of the last forward, weighted; zero without experts."""
        balances = [
            m.balance
            for m in self.modules()
            if isinstance(m, MixtureOfExperts) and m.balance is not None
        ]
        if not balances:
            return self.head.bias.new_zeros(())
        return self.config.auxiliary_loss_weight * torch.stack(balances).mean()


def laplace_nll(pred: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-likelihood of a Laplace distribution, log 2b + |target - pred| / b, in float32. It trains the scale
    alone (the prediction is detached), so that the cube keeps following the reconstruction loss."""
    error = (pred.detach() - target).abs().float()
    return (torch.log(2 * scale.float()) + error / scale.float()).mean()


def create_hsifusion_lightning_pro(
    model_size: str = "base", in_channels: int = 3, out_channels: int = 31, **overrides: object
) -> HSIFusionNet:
    """A model in train mode, not compiled. The size fills the fields that `overrides` (fields of LightningProConfig)
    does not give. Raises ValueError for an unknown size, field or value."""
    if model_size not in SIZES:
        raise ValueError(f"model_size {model_size!r}: choose from {', '.join(SIZES)}")
    unknown = sorted(set(overrides) - set(LightningProConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"unknown settings {', '.join(unknown)}; LightningProConfig lists the known ones"
        )
    settings = {
        **SIZES[model_size],
        "in_channels": in_channels,
        "out_channels": out_channels,
        **overrides,
    }
    return HSIFusionNet(LightningProConfig(**settings))


def from_pretrained(path: str, ema: bool = True) -> HSIFusionNet:
    """Model and weights from a checkpoint of the trainer (.ckpt or .safetensors), the averaged weights where there are
    any and `ema` is on. Raises UserError for a file that is none."""
    return build_from_checkpoint(
        path, "hsifusion", lambda **config: HSIFusionNet(LightningProConfig(**config)), ema
    )
