"""HSIFusionNet v2.5.3 "Lightning Pro": an RGB image in, a hyperspectral cube out.

    from hsifusion_v252_complete import create_hsifusion_lightning_pro
    model = create_hsifusion_lightning_pro("tiny")
    model.fit_spectral_path(rgb, cube)                  # start at the best linear map
    cube = model(rgb)                                   # (B, 3, H, W) -> (B, 31, H, W)

A U-net works at half resolution and below, in blocks of sliding-window attention, spectral
(channel) attention and an MLP. Its features steer a small network on the pixels, which corrects a
linear map from RGB to the bands: `SpectralHead` of spectral_layers.py.

Features are (B, H, W, C) throughout. Levels halve with a ceiling, so no size needs padding but the
odd row or column that a 2 x 2 cell lacks. Shapes: B batch, H W pixels or tokens, C channels,
h heads, N tokens, D head width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import spectral_layers as layers
from attention_windows import (
    add_windows,
    along_axis,
    coverage,
    extract_windows,
    keys_inside,
    rotary_table,
    rotate,
    window_count,
)
from checkpoint_files import build_from_checkpoint
from common_utils_v32 import opt
from sparse_attention import sparse_attention_topk_streaming
from spectral_layers import DropPath, PixelConv, SpectralAttention, SpectralHead, in_strips

SIZES = {
    "tiny": {"base_channels": 48, "depths": (1, 2, 2), "num_heads": (2, 2, 4)},
    "small": {"base_channels": 80, "depths": (2, 3, 4), "num_heads": (2, 6, 8)},
    "base": {"base_channels": 112, "depths": (3, 5, 6), "num_heads": (2, 8, 12)},
    "large": {"base_channels": 176, "depths": (3, 6, 8), "num_heads": (2, 8, 8)},
}
LEVEL_WIDTHS = (1.0, 1.75, 2.5)  # of the base channels, at 1/2, 1/4 and 1/8 of the resolution
LEVELS = len(LEVEL_WIDTHS)
_model = partial(opt, group="model")
_feature = partial(opt, group="model features")
_regularisation = partial(opt, group="model regularisation")
CONTEXT_SIDE = 8  # cross-attention sees a skip pooled to at most 8 x 8 tokens


@dataclass
class LightningProConfig:
    """Settings of HSIFusionNet. Tuples have one entry per level, fine to coarse."""

    in_channels: int = _model(3, "channels of the input image")
    out_channels: int = _model(31, "bands of the output cube")
    base_channels: int = _model(48, "channels at half resolution; coarser levels are wider")
    depths: tuple[int, ...] = _model((1, 2, 2), "blocks per level; a decoder has one less (or 1)")
    num_heads: tuple[int, ...] = _model((2, 2, 4), "attention heads per level, half spectral")
    window_size: int = _model(8, "side of an attention window, tokens; they overlap by a quarter")
    mlp_ratio: float = _model(2.0, "hidden width of an MLP over its input width")

    enable_spectral: bool = _feature(True, "give half of the heads to spectral attention")
    use_sliding_window: bool = _feature(True, "window attention; off: over the whole frame")
    use_sparse_attention: bool = _feature(False, "whole-frame attention keeps a tenth of the keys")
    use_moe: bool = _feature(False, "mixture of experts in place of the MLP")
    num_experts: int = _feature(4, "experts of a mixture; each token goes to two")
    use_rope: bool = _feature(True, "rotary positions in windows")
    use_channels_last: bool = _feature(True, "convolutions and output in channels_last memory")
    use_cross_attention: bool = _feature(False, "decoder attends to pooled skips")
    estimate_uncertainty: bool = _feature(False, "also return a Laplace scale per value")

    drop_path: float = _regularisation(0.0, "chance to drop a block's branch, rising with depth")
    dropout: float = _regularisation(0.0, "dropout inside MLPs")
    auxiliary_loss_weight: float = _regularisation(0.01, "weight of the experts' balancing loss")
    min_input_size: int = _regularisation(64, "smallest accepted height and width, pixels")
    use_checkpoint: bool = _regularisation(False, "recompute blocks in backward to save memory")

    def __post_init__(self) -> None:
        self.depths, self.num_heads = tuple(self.depths), tuple(self.num_heads)
        self._check_counts()
        if self.enable_spectral and any(heads % 2 for heads in self.num_heads):
            raise ValueError(f"num_heads {self.num_heads}: must be even, half of them are spectral")
        if self.use_sparse_attention and self.use_sliding_window:
            raise ValueError("use_sparse_attention needs use_sliding_window off: windows are dense")
        if self.use_moe and self.num_experts < 2:
            raise ValueError(f"num_experts = {self.num_experts}: a mixture needs at least 2")
        if self.window_size < 4:
            raise ValueError(f"window_size = {self.window_size}: must be at least 4")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio = {self.mlp_ratio}: must be above 0")
        for name in ("drop_path", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must lie in [0, 1)")

    def _check_counts(self) -> None:
        for name in ("in_channels", "out_channels", "base_channels", "min_input_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("depths", "num_heads"):
            values = getattr(self, name)
            if len(values) != LEVELS or min(values) < 1:
                raise ValueError(f"{name} {values}: give {LEVELS} values of at least 1")

    @property
    def widths(self) -> list[int]:
        """Channels per level. A head's width is a multiple of 8, for half precision's fast kernels,
        and so of 4, which rotary positions in 2-D need."""
        widths = []
        for share, heads in zip(LEVEL_WIDTHS, self.num_heads, strict=True):
            step = 8 * heads
            widths.append(max(1, round(self.base_channels * share / step)) * step)
        return widths


class WindowAttention(nn.Module):
    """Attention of some heads in space: in overlapping windows, or over the whole frame."""

    table: Tensor

    def __init__(self, config: LightningProConfig, dim: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(dim, 3 * width, bias=False)
        self.in_windows = config.use_sliding_window
        self.window = config.window_size
        self.stride = config.window_size - config.window_size // 4
        self.use_rope, self.sparse = config.use_rope, config.use_sparse_attention
        table = rotary_table(self.window, self.window, self.head_dim)
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, width)."""
        return self.windows(x) if self.in_windows else self.whole_frame(x)

    def windows(self, x: Tensor) -> Tensor:
        """In windows, strip by strip of them where no gradient is recorded."""
        (height, width), (window, stride) = x.shape[1:3], (self.window, self.stride)
        first_strip, _ = layers.row_strips(x, 4 * self.heads * self.head_dim)[0]
        if first_strip.stop >= height:
            total = self.sum_over_windows(x)[:, :height, :width]
        else:
            total = x.new_zeros(x.shape[0], height, width, self.heads * self.head_dim)
            windows = max(1, first_strip.stop // stride)  # down a strip
            rows = (windows - 1) * stride + window
            for top in range(0, window_count(height, window, stride) * stride, windows * stride):
                part = self.sum_over_windows(x[:, top : top + rows])[:, : height - top, :width]
                total[:, top : top + part.shape[1]] += part
        return total / coverage(height, width, window, stride, total)

    def sum_over_windows(self, x: Tensor) -> Tensor:
        """The sum over windows of their attention, (B, H, W, width) as far as they reach."""
        windows = extract_windows(self.qkv(x), self.window, self.stride, 3 * self.heads)
        q, k, v = windows.unflatten(0, (3, -1))
        shape = v.shape
        tokens = (self.heads, -1, self.window**2, self.head_dim)
        q, k, v = q.reshape(tokens), k.reshape(tokens), v.reshape(tokens)
        if self.use_rope:
            q, k = rotate(q, self.table), rotate(k, self.table)
        # Windows are the batch: a GPU's kernels take 65,535 heads at most.
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.padding_mask(x))
        return add_windows(out.transpose(0, 1).reshape(shape), self.stride)

    def padding_mask(self, x: Tensor) -> Tensor | None:
        """True where a window's key is of the frame, (B * windows, 1, 1, keys); or None."""
        sides, window, stride = x.shape[1:3], self.window, self.stride
        whole = all(side >= window and (side - window) % stride == 0 for side in sides)
        if whole and not torch.compiler.is_exporting():  # an exported graph is for any size
            return None
        settings = (window, stride, x.device)
        rows = along_axis(keys_inside, sides[0], *settings)
        columns = along_axis(keys_inside, sides[1], *settings)
        mask = rows[:, None, :, None] & columns[None, :, None, :]
        return mask.reshape(-1, 1, 1, window**2).repeat(x.shape[0], 1, 1, 1)

    def whole_frame(self, x: Tensor) -> Tensor:
        """Dense, or sparse by exact top-k."""
        batch, height, width, _ = x.shape
        q, k, v = rearrange(self.qkv(x), "b y x (n h d) -> n b h (y x) d", n=3, h=self.heads)
        if self.use_rope:
            table = rotary_table(height, width, self.head_dim, x.device)
            q, k = rotate(q, table), rotate(k, table)
        if self.sparse:
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
            out = sparse_attention_topk_streaming(q, k, v, max_tokens=height * width)
            out = out.unflatten(0, (batch, self.heads))
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return rearrange(out, "b h (y x) d -> b y x (h d)", y=height)


class CrossAttention(nn.Module):
    """Decoder tokens attend to a skip pooled to CONTEXT_SIDE^2 tokens; the query path stays."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_context = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q, self.to_kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        side = (min(CONTEXT_SIDE, height), min(CONTEXT_SIDE, width))
        pooled = F.adaptive_avg_pool2d(skip.permute(0, 3, 1, 2), side)
        context = self.norm_context(rearrange(pooled, "b c y x -> b (y x) c"))
        q = rearrange(self.to_q(self.norm(x)), "b y x (h d) -> b h (y x) d", h=self.heads)
        k, v = rearrange(self.to_kv(context), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(rearrange(out, "b h (y x) d -> b y x (h d)", y=height))


class Mlp(nn.Module):
    """Linear, 3 x 3 depthwise convolution, GELU, linear."""

    def __init__(self, config: LightningProConfig, dim: int) -> None:
        super().__init__()
        hidden = int(dim * config.mlp_ratio)
        self.dropout = config.dropout
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.depthwise = depthwise(config, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.depthwise(self.fc1(x)))
        return self.fc2(F.dropout(x, self.dropout, self.training))


def depthwise(config: LightningProConfig, channels: int) -> PixelConv:
    """A 3 x 3 convolution of each channel on its own."""
    conv = PixelConv(channels, channels, 3, padding=1, groups=channels)
    conv.channels_last = config.use_channels_last
    return conv


class MixtureOfExperts(nn.Module):
    """Each token goes to its two likeliest experts, which compute their own tokens only.

    Shazeer et al. 2017. `balance` is the balancing loss of the last forward, 1 when even (Fedus et
    al. 2021)."""

    def __init__(self, config: LightningProConfig, dim: int) -> None:
        super().__init__()
        hidden = int(dim * config.mlp_ratio)
        self.router = nn.Linear(dim, config.num_experts)
        self.experts = nn.ModuleList()
        for _ in range(config.num_experts):
            expand, shrink = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
            expert = nn.Sequential(expand, nn.GELU(), nn.Dropout(config.dropout), shrink)
            self.experts.append(expert)
        self.balance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 2)
        probability = self.router(tokens).float().softmax(dim=-1)
        weight, chosen = probability.topk(2, dim=-1)
        weight = (weight / weight.sum(dim=-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = (chosen == index).nonzero(as_tuple=True)
            # Without a token the gradients are zeros, not missing, so DDP is content.
            mine = expert(tokens[token]) * weight[token, slot, None]
            out = out.index_add(0, token, mine.to(out.dtype))
        share = F.one_hot(chosen, len(self.experts)).float().mean(dim=(0, 1))
        self.balance = len(self.experts) * (share * probability.mean(dim=0)).sum()
        return out.view_as(x)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"balance": None}  # a tensor of a graph can't be copied or pickled


class LightningProBlock(nn.Module):
    """Norm, attention, residual; norm, MLP or experts, residual. Half of the heads attend in space
    and half between channels, so the block costs as much as one attention."""

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
        frame_map = None if self.spectral is None else self.spectral.frame_map(normed)

        def residuals(x: Tensor, normed: Tensor, heads: Tensor) -> Tensor:
            if self.spectral is not None:
                heads = torch.cat([heads, self.spectral(normed, frame_map)], dim=-1)
            x = x + self.drop_path(self.scale1 * self.proj(heads))
            return x + self.drop_path(self.scale2 * self.mlp(self.norm2(x)))

        return in_strips(residuals, x, normed, spatial, channels=self.hidden, halo=1)


class TokenGroupNorm(nn.GroupNorm):
    """GroupNorm of every token on its own: no statistics of frame size or padding."""

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(-1, (self.num_groups, -1))
        normed = F.layer_norm(grouped, grouped.shape[-1:], eps=self.eps).flatten(-2)
        return torch.addcmul(self.bias, normed, self.weight)


def _norm_linear(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(TokenGroupNorm(4, dim), nn.Linear(dim, out))


class HSIFusionNet(nn.Module):
    """See the head of this file. `config` holds its settings."""

    def __init__(self, config: LightningProConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        encoder_depths = list(config.depths)
        decoder_depths = [max(1, depth - 1) for depth in reversed(config.depths[:-1])]
        blocks = sum(encoder_depths) + sum(decoder_depths)
        drop_rates = (config.drop_path * i / (blocks - 1) for i in range(blocks))

        colours = layers.colour_channels(config.in_channels)
        self.stem = nn.Linear(4 * colours, widths[0])
        self.stem_mix = depthwise(config, widths[0])
        self.encoder, self.down = nn.ModuleList(), nn.ModuleList()
        for level, depth in enumerate(encoder_depths):
            if level > 0:
                self.down.append(_norm_linear(4 * widths[level - 1], widths[level]))
            self.encoder.append(self._stage(level, depth, drop_rates))
        self.up, self.fuse, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.cross = nn.ModuleList()
        for step, depth in enumerate(decoder_depths):
            level = LEVELS - 2 - step
            self.up.append(_norm_linear(widths[level + 1], 4 * widths[level]))
            self.fuse.append(nn.Linear(2 * widths[level], widths[level]))
            if config.use_cross_attention:
                self.cross.append(CrossAttention(widths[level], config.num_heads[level]))
            self.decoder.append(self._stage(level, depth, drop_rates))
        self.head = SpectralHead(
            config.in_channels,
            config.out_channels,
            widths[0],
            TokenGroupNorm(4, widths[0]),
            estimate_uncertainty=config.estimate_uncertainty,
            channels_last=config.use_channels_last,
        )

    def _stage(self, level: int, depth: int, drop_rates: Iterator[float]) -> nn.Sequential:
        dim, heads = self.config.widths[level], self.config.num_heads[level]
        return nn.Sequential(
            *(LightningProBlock(self.config, dim, heads, next(drop_rates)) for _ in range(depth))
        )

    def forward(self, rgb: Tensor) -> Tensor | tuple[Tensor, ...]:
        """rgb (B, in, H, W) in any memory layout -> cube (B, out, H, W), unclamped; with
        `estimate_uncertainty` also the scale b > 0 of a Laplace distribution around each value.

        ValueError for a wrong number of channels or too small an image."""
        config = self.config
        layers.check_image(rgb, config.in_channels, config.min_input_size)
        x = rgb.permute(0, 2, 3, 1).contiguous()
        colour = layers.colour_features(x)
        outputs = [y.permute(0, 3, 1, 2) for y in self.head(x, colour, self.trunk(colour))]
        if not config.use_channels_last:
            outputs = [y.contiguous() for y in outputs]
        return tuple(outputs) if config.estimate_uncertainty else outputs[0]

    def trunk(self, colour: Tensor) -> Tensor:
        """The U-net: (B, H, W, colours) -> features (B, ceil(H/2), ceil(W/2), C)."""
        width, recompute = self.stem.out_features, self.config.use_checkpoint and self.training
        x = in_strips(lambda x: self.stem(layers.space_to_depth(x)), colour, channels=width)
        x = in_strips(lambda x: x + self.stem_mix(x), x, channels=width, halo=1)
        skips = []
        for level, stage in enumerate(self.encoder):
            if level > 0:
                skips.append(x)
                x = self._halve(x, self.down[level - 1])
            x = layers.run_blocks(stage, x, recompute)
        for step, stage in enumerate(self.decoder):
            skip = skips.pop()
            x = layers.depth_to_space(self.up[step](x), *skip.shape[1:3])
            if self.config.use_cross_attention:
                x = self.cross[step](x, skip)
            x = self.fuse[step](torch.cat([x, skip], dim=-1))
            x = layers.run_blocks(stage, x, recompute)
        return x

    def _halve(self, x: Tensor, down: nn.Module) -> Tensor:
        return in_strips(lambda x: down(layers.space_to_depth(x)), x, channels=2 * x.shape[3])

    @torch.no_grad()
    def fit_spectral_path(self, rgb: Tensor, cube: Tensor) -> None:
        """Set the direct path to the linear map RGB -> bands of least relative error, and learn the
        camera: rgb (B, in, h, w) and cube (B, out, h, w), both as in training."""
        self.head.fit(rgb, cube)

    def auxiliary_loss(self) -> Tensor:
        """What keeps the head's spectra smooth, and the experts' balancing loss, weighted."""
        loss = layers.BASIS_WEIGHT * self.head.basis_loss()
        balances = []
        for module in self.modules():
            if isinstance(module, MixtureOfExperts) and module.balance is not None:
                balances.append(module.balance)
        if balances:
            loss = loss + self.config.auxiliary_loss_weight * torch.stack(balances).mean()
        return loss


def laplace_nll(pred: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-likelihood of a Laplace distribution: log 2b + |target - pred| / b.

    In float32. It trains the scale alone (the prediction is detached), so that the cube keeps
    following the reconstruction loss."""
    error = (pred.detach() - target).abs().float()
    return (torch.log(2 * scale.float()) + error / scale.float()).mean()


def create_hsifusion_lightning_pro(
    model_size: str = "base", in_channels: int = 3, out_channels: int = 31, **overrides: object
) -> HSIFusionNet:
    """A model in train mode, not compiled. The size fills the fields that `overrides` (fields of
    LightningProConfig) does not give. ValueError for an unknown size, field or value."""
    if model_size not in SIZES:
        raise ValueError(f"model_size {model_size!r}: choose from {', '.join(SIZES)}")
    unknown = sorted(set(overrides) - set(LightningProConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"unknown settings {', '.join(unknown)}; LightningProConfig lists the known ones"
        )
    channels = {"in_channels": in_channels, "out_channels": out_channels}
    settings: dict = {**SIZES[model_size], **channels, **overrides}
    return HSIFusionNet(LightningProConfig(**settings))


def from_pretrained(path: str, ema: bool = True) -> HSIFusionNet:
    """Model and weights from a checkpoint of the trainer (.ckpt or .safetensors), the averaged
    weights where there are any and `ema` is on. UserError for a file that is none."""
    return build_from_checkpoint(path, "hsifusion", create_hsifusion_lightning_pro, ema)
