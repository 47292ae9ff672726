"""SHARP v3.2.2: an RGB image in, a hyperspectral cube out, by a U-net with exact sparse attention;
and the step engine that trains it.

    from sharp_v322_hardened import create_sharp_v32
    model = create_sharp_v32("tiny")
    model.fit_spectral_path(rgb, cube)                  # start at the best linear map
    cube = model(rgb)                                   # (B, 3, H, W) -> (B, 31, H, W)

The U-net works at 1/2 to 1/8 of the resolution. In a block half of the channels attend in space, to
a few keys, and half are mixed by spectral attention. Its features steer a small network on the
pixels, which corrects a linear map from RGB to the bands: `SpectralHead` of spectral_layers.py.

Features are (B, H, W, C). Shapes: B batch, H W pixels or tokens, C channels, h heads, N tokens,
D head width."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import spectral_layers as layers
from checkpoint_files import build_from_checkpoint
from common_utils_v32 import decay_groups, make_average, make_scaler, opt, restore
from sparse_attention import SPARSE_MODES, odd_side, sparse_attention_topk_streaming
from spectral_layers import DropPath, PixelConv, SpectralAttention, SpectralHead, in_strips

SIZES = {
    "tiny": {"base_dim": 48, "depths": (1, 2, 2), "heads": (1, 1, 2), "rbf_centers_per_head": 24},
    "small": {"base_dim": 80, "depths": (2, 3, 4), "heads": (1, 3, 2)},
    "base": {"base_dim": 112, "depths": (3, 4, 6), "heads": (1, 4, 6)},
    "large": {"base_dim": 176, "depths": (3, 6, 8), "heads": (1, 4, 8)},
}
LEVEL_WIDTHS = (1.0, 1.75, 2.75, 3.5)  # of base_dim, at 1/2, 1/4, 1/8 and 1/16 of the resolution
KEY_RBF_MODES = ("linear", "mean", "none")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_model = partial(opt, group="model")
_sparse = partial(opt, group="sparse attention")


@dataclasses.dataclass
class SHARPv32Config:
    """Settings of SHARP. Tuples hold one entry per level, from fine to coarse."""

    in_channels: int = _model(3, "channels of the image")
    out_channels: int = _model(31, "bands of the cube")
    base_dim: int = _model(48, "channels at half resolution")
    depths: tuple[int, ...] = _model((1, 2, 2), "blocks per level; a decoder has one less (or 1)")
    heads: tuple[int, ...] = _model((1, 1, 2), "attention heads of each branch, by level")
    mlp_ratios: tuple[float, ...] = _model((2.0, 2.0, 2.0), "hidden width of an MLP over its input")
    drop_path_rate: float = _model(0.0, "chance to drop a branch of the last block, rising to it")
    use_checkpoint: bool = _model(False, "recompute blocks in the backward to save memory")
    min_input_size: int = _model(64, "smallest height and width, pixels")
    sparse_mode: str = _sparse("topk", "attention of the coarsest level", choices=SPARSE_MODES)
    sparse_sparsity_ratio: float = _sparse(0.9, "share of keys that a query ignores")
    sparse_block_size: int = _sparse(2048, "keys in a product")
    sparse_q_block_size: int = _sparse(1024, "queries in a tile")
    sparse_max_tokens: int = _sparse(8192, "above it, local windows")
    sparse_window_size: int = _sparse(49, "tokens in a local window, an odd square")
    sparse_k_cap: int = _sparse(1024, "most keys that a query keeps")
    rbf_centers_per_head: int = _sparse(24, "RBF features of queries and keys")
    key_rbf_mode: str = _sparse(
        "linear",
        "keys: RBF features mixed, averaged (all queries pick the same keys), or no RBF",
        choices=KEY_RBF_MODES,
    )
    sparsemax_pad_value: float | None = _sparse(None, "sparsemax score off the frame; none masks")
    non_negative: bool = _model(True, "clamp the cube at 0, gradients pass")
    basis_weight: float = _model(
        layers.BASIS_WEIGHT, "weight of the loss of spectra not smooth, orthonormal"
    )
    compile_mode: str | None = _model(
        None, "of torch.compile; where given, the step engine compiles", choices=COMPILE_MODES
    )
    ema_update_every: int = _model(1, "steps between updates of the averaged weights")

    def __post_init__(self) -> None:
        self.depths, self.heads = tuple(self.depths), tuple(self.heads)
        self.mlp_ratios = tuple(self.mlp_ratios)
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise ValueError(f"{field.name} must be one of {', '.join(choices)}, not {value!r}")
            if type(field.default) is int and (value < 1 or value != int(value)):
                raise ValueError(f"{field.name} must be a positive integer, not {value}")
        self._check_levels()
        for name in ("drop_path_rate", "sparse_sparsity_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        odd_side(self.sparse_window_size, "sparse_window_size")

    def _check_levels(self) -> None:
        levels = len(self.depths)
        if not 2 <= levels <= len(LEVEL_WIDTHS):
            raise ValueError(f"depths {self.depths}: give 2 to {len(LEVEL_WIDTHS)} levels")
        for name in ("depths", "heads", "mlp_ratios"):
            values = getattr(self, name)
            if len(values) != levels or min(values) <= 0:
                raise ValueError(
                    f"{name} {values}: give a positive value for each of {levels} levels"
                )

    @property
    def dims(self) -> list[int]:
        """Channels of each level, a multiple of 8 per head and branch: fast in half precision."""
        dims = []
        for share, heads in zip(LEVEL_WIDTHS, self.heads, strict=False):
            step = 16 * heads
            dims.append(max(1, round(self.base_dim * share / step)) * step)
        return dims


class ChannelRMSNorm(nn.Module):
    """Each pixel's channels over their root mean square, times a weight.

    Channels are axis `channel_dim`: 1 of (B, C, H, W). Nothing is cached for evaluation, so nothing
    goes stale: all that does not depend on x is the weight."""

    def __init__(self, dim: int, channel_dim: int = 1, eps: float = 1e-6) -> None:
        super().__init__()
        self.channel_dim, self.eps = channel_dim, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.channel_dim, -1)
        x = F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return x.movedim(-1, self.channel_dim)


class RBFProjection(nn.Module):
    """Features exp(-gamma |x - c|^2), about 0.14 at first, of a head's normalised q and k."""

    def __init__(self, heads: int, width: int, centers: int, key_mode: str) -> None:
        super().__init__()
        self.key_mode, self.size = key_mode, centers
        self.centers = nn.Parameter(torch.randn(heads, width, centers))
        self.log_gamma = nn.Parameter(torch.full((heads, 1, 1), -math.log(width)))
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 8.0))
        if key_mode == "linear":
            self.mix = nn.Parameter(torch.eye(centers).repeat(heads, 1, 1))
        elif key_mode == "none":
            start = torch.randn(width, centers) / math.sqrt(width)
            self.mix = nn.Parameter(start.repeat(heads, 1, 1))

    def features(self, *xs: Tensor) -> list[Tensor]:
        """Those of normalised vectors (B, h, N, D), for which |x - c|^2 = D + |c|^2 - 2 x.c."""
        gamma = self.log_gamma.exp()
        squares = self.centers.shape[1] + self.centers.square().sum(1, keepdim=True)
        weight, offset = self.centers * (2 * gamma), gamma * squares
        return [(x @ weight - offset).clamp_max(0).exp() for x in xs]

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h, N, D) -> (B, h, N, centers), whose product is the score. Both are normalised, or a
        few keys would win everywhere."""
        q = F.rms_norm(q.float(), q.shape[-1:], eps=1e-6)
        k = F.rms_norm(k.float(), k.shape[-1:], eps=1e-6)
        if self.key_mode == "none":
            (q,) = self.features(q)
        else:
            q, k = self.features(q, k)
        if self.key_mode == "mean":
            return q * self.temperature, k.mean(-1, keepdim=True).expand_as(k)
        if self.key_mode == "linear":
            k = F.layer_norm(k, (self.size,))
        queries = F.layer_norm(q, (self.size,)) * (self.temperature / self.size)
        return queries, k @ self.mix


class SpatialAttention(nn.Module):
    """Sparse attention between the tokens of two images."""

    def __init__(self, config: SHARPv32Config, heads: int, width: int, mode: str) -> None:
        super().__init__()
        self.heads = heads
        self.rbf = RBFProjection(heads, width, config.rbf_centers_per_head, config.key_rbf_mode)
        self.settings: dict = {
            "scale": 1.0,
            "sparse_mode": mode,
            "sparsity_ratio": config.sparse_sparsity_ratio,
            "block_size": config.sparse_block_size,
            "q_block_size": config.sparse_q_block_size,
            "max_tokens": config.sparse_max_tokens,
            "window_size": config.sparse_window_size,
            "k_cap": config.sparse_k_cap,
            "sparsemax_pad_value": config.sparsemax_pad_value,
        }

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k (B, H, W, h * D) and v (B, H, W, h * Dv) -> (B, H, W, h * Dv)."""
        height, width = q.shape[1:3]
        split = "b y x (h d) -> b h (y x) d"
        q, k = rearrange(q, split, h=self.heads), rearrange(k, split, h=self.heads)
        v = rearrange(v, "b y x (h d) -> (b h) (y x) d", h=self.heads)
        with torch.autocast(q.device.type, enabled=False):
            q, k = self.rbf(q, k)
        q, k = q.flatten(0, 1), k.flatten(0, 1)
        shape = (height, width)
        out = sparse_attention_topk_streaming(q, k, v, spatial_shape=shape, **self.settings)
        return rearrange(out, "(b h) (y x) d -> b y x (h d)", h=self.heads, y=height)


class MultiScaleAttention(nn.Module):
    """Half of the channels attend in space, half are mixed by what the frame holds."""

    def __init__(self, config: SHARPv32Config, dim: int, heads: int, mode: str) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(dim, 3 * (dim // 2), bias=False)
        self.spatial = SpatialAttention(config, heads, dim // 2 // heads, mode)
        self.spectral = SpectralAttention(dim, dim // 2, heads)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        spatial = self.spatial(*self.to_qkv(x).chunk(3, -1))
        spectral = self.spectral(x, self.spectral.frame_map(x))
        return self.out(torch.cat([spatial, spectral], -1))


class Block(nn.Module):
    """Attention and an MLP with a 3 x 3 depthwise convolution, both pre-norm with a layer scale."""

    def __init__(
        self, config: SHARPv32Config, dim: int, heads: int, ratio: float, mode: str, drop: float
    ) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.norm1, self.norm2 = ChannelRMSNorm(dim, -1), ChannelRMSNorm(dim, -1)
        self.attention = MultiScaleAttention(config, dim, heads, mode)
        self.expand, self.shrink = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.depthwise = PixelConv(hidden, hidden, 3, padding=1, groups=hidden)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.scale1 * self.attention(self.norm1(x)))
        return in_strips(self._mlp, x, channels=self.expand.out_features, halo=1)

    def _mlp(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.depthwise(self.expand(self.norm2(x))))
        return x + self.drop_path(self.scale2 * self.shrink(hidden))


class GatedCrossFusion(nn.Module):
    """A decoder level takes its skip: as it is, and, gated, by attention to windows of it."""

    def __init__(self, config: SHARPv32Config, dim: int, heads: int) -> None:
        super().__init__()
        half = dim // 2
        self.norm, self.norm_skip = ChannelRMSNorm(dim, -1), ChannelRMSNorm(dim, -1)
        self.to_q, self.to_kv = nn.Linear(dim, half), nn.Linear(dim, dim)
        self.attention = SpatialAttention(config, heads, half // heads, "local")
        self.out, self.gate = nn.Linear(half, dim), nn.Linear(dim, dim)
        self.skip = nn.Linear(dim, dim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        query = self.norm(x)
        k, v = self.to_kv(self.norm_skip(skip)).chunk(2, -1)
        found = self.out(self.attention(self.to_q(query), k, v))
        return x + self.skip(skip) + torch.sigmoid(self.gate(query)) * found


class SHARPv32(nn.Module):
    """See the head of this file. `config` holds its settings."""

    def __init__(self, config: SHARPv32Config) -> None:
        super().__init__()
        self.config = config
        dims = config.dims
        encoder_depths = list(config.depths)
        decoder_depths = [max(1, depth - 1) for depth in reversed(config.depths[:-1])]
        blocks = sum(encoder_depths) + sum(decoder_depths)
        drop_rates = (config.drop_path_rate * i / (blocks - 1) for i in range(blocks))

        self.stem = nn.Linear(4 * layers.colour_channels(config.in_channels), dims[0])
        self.encoder, self.down = nn.ModuleList(), nn.ModuleList()
        for level, depth in enumerate(encoder_depths):
            if level > 0:
                self.down.append(nn.Linear(4 * dims[level - 1], dims[level]))
            self.encoder.append(self._stage(level, depth, drop_rates))
        self.up, self.fuse, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for step, depth in enumerate(decoder_depths):
            level = len(dims) - 2 - step
            self.up.append(nn.Linear(dims[level + 1], 4 * dims[level]))
            self.fuse.append(GatedCrossFusion(config, dims[level], config.heads[level]))
            self.decoder.append(self._stage(level, depth, drop_rates))
        self.head = SpectralHead(
            config.in_channels,
            config.out_channels,
            dims[0],
            ChannelRMSNorm(dims[0], -1),
            non_negative=config.non_negative,
        )

    def _stage(self, level: int, depth: int, drop_rates: Iterator[float]) -> nn.Sequential:
        """Blocks of a level: the coarsest attends by `sparse_mode`, the others in local windows."""
        config = self.config
        coarsest = level == len(config.depths) - 1
        mode = config.sparse_mode if coarsest else "local"
        dim, heads, ratio = config.dims[level], config.heads[level], config.mlp_ratios[level]
        return nn.Sequential(
            *(Block(config, dim, heads, ratio, mode, next(drop_rates)) for _ in range(depth))
        )

    def forward(self, rgb: Tensor) -> Tensor:
        """(B, in, H, W) in any memory layout -> (B, out, H, W) float32. ValueError for a wrong
        number of channels or too small an image."""
        layers.check_image(rgb, self.config.in_channels, self.config.min_input_size)
        x = rgb.permute(0, 2, 3, 1).contiguous().float()
        colour = layers.colour_features(x)
        (cube,) = self.head(x, colour, self.trunk(colour))
        return cube.permute(0, 3, 1, 2)

    def trunk(self, colour: Tensor) -> Tensor:
        """The U-net: (B, H, W, colours) -> features (B, ceil(H/2), ceil(W/2), C)."""
        recompute = self.config.use_checkpoint and torch.is_grad_enabled()
        x = self.stem(layers.space_to_depth(colour))
        skips = []
        for level, stage in enumerate(self.encoder):
            if level > 0:
                skips.append(x)
                x = self.down[level - 1](layers.space_to_depth(x))
            x = layers.run_blocks(stage, x, recompute)
        for step, stage in enumerate(self.decoder):
            skip = skips.pop()
            x = layers.depth_to_space(self.up[step](x), *skip.shape[1:3])
            x = layers.run_blocks(stage, self.fuse[step](x, skip), recompute)
        return x

    def auxiliary_loss(self) -> Tensor:
        """Keeps the head's spectra orthonormal and no rougher than cosines; of weights alone."""
        return self.config.basis_weight * self.head.basis_loss()

    @torch.no_grad()
    def fit_spectral_path(self, rgb: Tensor, cube: Tensor) -> None:
        """Set the direct path to the linear map RGB -> bands of least relative error, and learn the
        camera: rgb (B, in, h, w) and cube (B, out, h, w), both as in training."""
        self.head.fit(rgb, cube)


def create_sharp_v32(
    model_size: str = "base", in_channels: int = 3, out_channels: int = 31, **overrides: object
) -> SHARPv32:
    """A model in train mode, not compiled. The size fills the fields that `overrides` (fields of
    SHARPv32Config) does not give.

    ValueError for an unknown size or field, or a bad value."""
    if model_size not in SIZES:
        raise ValueError(f"unknown model_size {model_size!r}: choose from {', '.join(SIZES)}")
    names = SHARPv32Config.__dataclass_fields__
    unknown = sorted(set(overrides) - set(names))
    if unknown:
        raise ValueError(f"unknown fields {', '.join(unknown)}: choose from {', '.join(names)}")
    channels = {"in_channels": in_channels, "out_channels": out_channels}
    settings: dict = {**SIZES[model_size], **channels, **overrides}
    return SHARPv32(SHARPv32Config(**settings))


def from_pretrained(path: str, ema: bool = True) -> SHARPv32:
    """Model and weights from any checkpoint of the trainer; the averaged weights if there are any
    and `ema` is on. UserError for a file that is none."""
    return build_from_checkpoint(path, "sharp", create_sharp_v32, ema)


CHECK_EVERY = 50  # steps between two looks of a GPU at the count of skipped ones


class SHARPv32Trainer:
    """Optimizer steps for a model: mixed precision, clipping, accumulation, averaged weights.

    A script drives it. `model` is a SHARPv32, plain or in DistributedDataParallel;
    `loss_fn(prediction, target)` gets float32. `optimizer` and `scaler` are open to schedules;
    `average.module` holds the averaged weights (`average` is None without)."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        *,
        lr: float = 4e-4,
        weight_decay: float = 1e-4,
        optimizer: type = torch.optim.AdamW,
        amp_dtype: torch.dtype | None = None,
        grad_clip: float = 1.0,
        ema_decay: float = 0.999,
        ema_update_every: int | None = None,
        max_bad_steps: int = 20,
    ) -> None:
        self.wrapped, self.loss_fn = model, loss_fn
        self.grad_clip, self.amp_dtype = grad_clip, amp_dtype
        self.distributed = model if isinstance(model, DistributedDataParallel) else None
        self.model = cast(SHARPv32, model if self.distributed is None else self.distributed.module)
        config = self.model.config
        self.max_bad_steps, self.steps = max_bad_steps, 0
        self.ema_update_every = ema_update_every or config.ema_update_every
        self.device = next(model.parameters()).device
        self.bad_steps = torch.zeros((), device=self.device)  # in a row
        groups = decay_groups(self.model, weight_decay)
        self.optimizer = optimizer(groups, lr=lr, betas=(0.9, 0.999), fused=True)
        self.scaler = make_scaler(self.device, amp_dtype)
        self.average = make_average(self.model, ema_decay, self.ema_update_every)
        if config.compile_mode:
            model.compile(mode=config.compile_mode)  # in place: names in state_dict stay

    def train_step(self, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """One optimizer step on (rgb, cube) batches, the same as on one big batch.

        Gradients that are not finite skip it. Returns loss, error (`loss_fn` alone) and grad_norm
        as tensors: nothing waits for the device. FloatingPointError after `max_bad_steps` skipped
        steps in a row, which a GPU is asked for every CHECK_EVERY steps."""
        self.optimizer.zero_grad(set_to_none=True)
        patches = sum(len(rgb) for rgb, _ in batches)
        totals = torch.zeros(2, device=self.device)
        for index, (rgb, target) in enumerate(batches):
            last = index == len(batches) - 1
            totals += self._backward(rgb, target, len(rgb) / patches, last)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip or math.inf)
        self.bad_steps = (self.bad_steps + 1) * ~norm.isfinite()
        self.scaler.step(self.optimizer)  # fused: it reads the scaler's flag on the device
        self.scaler.update()
        self.steps += 1
        self._check_bad_steps()
        if self.average is not None and self.steps % self.ema_update_every == 0:
            self.average.update()
        return {"loss": totals[0], "error": totals[1], "grad_norm": norm}

    def _backward(self, rgb: Tensor, target: Tensor, share: float, last: bool) -> Tensor:
        """Add one batch's part of the gradients; ranks exchange them with the last one.

        -> (loss, error), each times the batch's share of the step."""
        amp = self.amp_dtype
        keep_apart: AbstractContextManager = nullcontext()
        if self.distributed is not None and not last:
            keep_apart = self.distributed.no_sync()
        with keep_apart:
            with torch.autocast(self.device.type, amp, enabled=amp is not None):
                cube = self.wrapped(rgb)
            error = self.loss_fn(cube.float(), target)
            loss = error + self.model.auxiliary_loss()
            loss = loss * (1 + 0 * loss.detach())  # a loss of NaN gets gradients of NaN
            loss = loss * share
            self.scaler.scale(loss).backward()
        return torch.stack([loss.detach(), error.detach() * share])

    def _check_bad_steps(self) -> None:
        if self.device.type != "cpu" and self.steps % CHECK_EVERY:
            return  # to look would wait for the device
        if self.bad_steps >= self.max_bad_steps:
            count = int(self.bad_steps)
            raise FloatingPointError(f"{count} steps in a row had non-finite gradients")

    def state_dict(self) -> dict:
        """What an exact resume needs. `ema`: a state dict of the model, or None."""
        average = {"ema": None, "ema_updates": 0}
        if self.average is not None:
            average = self.average.state_dict()
        return average | {
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.steps,
            "bad_steps": int(self.bad_steps),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from what state_dict gave."""
        self.model.load_state_dict(state["state_dict"])
        restore(self.optimizer, self.scaler, state)
        self.steps = state["step"]
        self.bad_steps.fill_(state["bad_steps"])
        if self.average is not None and state["ema"]:
            self.average.load_state_dict(state)
