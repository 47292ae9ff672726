"""SHARP v3.2.2: an RGB to hyperspectral U-net with exact sparse attention, and the step engine that trains it.

    model = create_sharp_v32("tiny", in_channels=3, out_channels=31)
    model.fit_spectral_path(rgb, cube)        # start at the best linear map from RGB to the bands
    cube = model(rgb)                         # (B, 3, H, W) -> (B, 31, H, W), any H and W from 64 up
Shapes: B batch, h heads, N tokens, D head width, K keys kept, H W pixels, C channels.
"""

import dataclasses
import math
from contextlib import nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common_utils_v32 import (
    build_from_checkpoint,
    decay_groups,
    make_average,
    make_scaler,
    opt,
    restore,
)
from sparse_attention import odd_side, sparse_attention_topk_streaming
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
    smooth_basis,
    space_to_depth,
)

SPARSE_MODES, KEY_RBF_MODES = ("topk", "block", "sparsemax", "local"), ("linear", "mean", "none")
SIZES = {
    "tiny": {"base_dim": 64, "depths": (2, 2, 2), "heads": (1, 2, 4)},
    "small": {"base_dim": 80, "depths": (2, 3, 4), "heads": (2, 2, 4)},
    "base": {"base_dim": 112, "depths": (3, 4, 6), "heads": (2, 4, 6)},
    "large": {"base_dim": 176, "depths": (3, 6, 8), "heads": (3, 4, 8)},
}
LEVEL_WIDTHS = (1.0, 1.75, 2.75, 3.5)  # of base_dim, at 1/2, 1/4, 1/8 and 1/16 of the resolution
GAIN_LIMIT = 3.0  # of the logarithm of a band's gain: 1/20 to 20
PIXEL_DIM = 48  # width of the full-resolution network
BASIS_RANK = 16  # smooth spectra that the head mixes; measured reflectances need fewer than 10


@dataclasses.dataclass
class SHARPv32Config:
    """Settings of SHARP. Tuples hold one entry a level, from fine to coarse."""

    in_channels: int = opt(3, "channels of the image", group="model")
    out_channels: int = opt(31, "bands of the cube", group="model")
    base_dim: int = opt(64, "channels at half resolution", group="model")
    depths: tuple[int, ...] = opt(
        (2, 2, 2), "blocks of each level; a decoder has one less, at least 1", group="model"
    )
    heads: tuple[int, ...] = opt(
        (1, 2, 4), "attention heads of each branch, by level", group="model"
    )
    mlp_ratios: tuple[float, ...] = opt(
        (2.0, 2.0, 2.0), "hidden width of an MLP over its input's", group="model"
    )
    drop_path_rate: float = opt(
        0.0, "chance to drop a branch of the last block, rising to it", group="model"
    )
    use_checkpoint: bool = opt(
        False, "recompute blocks in the backward to save memory", group="model"
    )
    min_input_size: int = opt(64, "smallest height and width, pixels", group="model")
    sparse_mode: str = opt(
        "topk", "attention of the coarsest level", group="sparse attention", choices=SPARSE_MODES
    )
    sparse_sparsity_ratio: float = opt(
        0.9, "share of keys that a query ignores", group="sparse attention"
    )
    sparse_block_size: int = opt(2048, "keys in a product", group="sparse attention")
    sparse_q_block_size: int = opt(1024, "queries in a tile", group="sparse attention")
    sparse_max_tokens: int = opt(8192, "above it, local windows", group="sparse attention")
    sparse_window_size: int = opt(
        49, "tokens in a local window, an odd square", group="sparse attention"
    )
    sparse_k_cap: int = opt(1024, "most keys that a query keeps", group="sparse attention")
    rbf_centers_per_head: int = opt(
        32, "RBF features of queries and keys", group="sparse attention"
    )
    key_rbf_mode: str = opt(
        "linear",
        "keys: RBF features mixed, averaged (all queries pick the same keys), or no RBF",
        group="sparse attention",
        choices=KEY_RBF_MODES,
    )
    sparsemax_pad_value: float | None = opt(
        None, "sparsemax score off the frame; none masks", group="sparse attention"
    )
    non_negative: bool = opt(True, "clamp the cube at 0, gradients pass", group="model")
    basis_weight: float = opt(
        0.01, "weight of the loss that keeps spectra smooth, orthonormal", group="model"
    )
    compile_mode: str | None = opt(
        None,
        "of torch.compile; where given, the step engine compiles",
        group="model",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    ema_update_every: int = opt(1, "steps between updates of the averaged weights", group="model")

    def __post_init__(self):
        self.depths, self.heads, self.mlp_ratios = (
            tuple(self.depths),
            tuple(self.heads),
            tuple(self.mlp_ratios),
        )
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices and value not in (None, *choices):
                raise ValueError(f"{field.name} must be one of {', '.join(choices)}, not {value!r}")
            if type(field.default) is int and (value < 1 or value != int(value)):
                raise ValueError(f"{field.name} must be a positive integer, not {value}")
        levels = len(self.depths)
        same = levels == len(self.heads) == len(self.mlp_ratios)
        if not (
            2 <= levels <= len(LEVEL_WIDTHS)
            and same
            and min(*self.depths, *self.heads, *self.mlp_ratios) > 0
        ):
            raise ValueError(
                f"depths, heads, mlp_ratios: a positive value for each of 2 to {len(LEVEL_WIDTHS)} levels"
            )
        if not (0 <= self.drop_path_rate < 1 and 0 <= self.sparse_sparsity_ratio < 1):
            raise ValueError("drop_path_rate and sparse_sparsity_ratio must be in [0, 1)")
        odd_side(self.sparse_window_size, "sparse_window_size")

    @property
    def dims(self) -> list[int]:
        """Channels of each level, a multiple of 8 for each head of the two branches."""
        return [
            max(1, round(self.base_dim * width / (8 * heads))) * 8 * heads
            for width, heads in zip(LEVEL_WIDTHS, self.heads, strict=False)
        ]


class ChannelRMSNorm(nn.Module):
    """Each pixel's channels over their root mean square, times a weight: (B, C, H, W), or channels elsewhere.
    Nothing is cached for evaluation, so nothing goes stale: all that does not depend on x is the weight."""

    def __init__(self, dim: int, channel_dim: int = 1, eps: float = 1e-6):
        super().__init__()
        self.channel_dim, self.eps = channel_dim, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.channel_dim, -1)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).movedim(
            -1, self.channel_dim
        )


class PixelConv(nn.Conv2d):
    """A convolution of (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class RBFProjection(nn.Module):
    """Features exp(-gamma |x - c|^2) of a head's normalised queries and keys, about 0.14 each at the start."""

    def __init__(self, heads: int, width: int, centers: int, key_mode: str):
        super().__init__()
        self.key_mode, self.size = key_mode, centers
        self.centers = nn.Parameter(torch.randn(heads, width, centers))
        self.log_gamma = nn.Parameter(torch.full((heads, 1, 1), -math.log(width)))
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 8.0))
        if key_mode != "mean":
            start = (
                torch.eye(centers)
                if key_mode == "linear"
                else torch.randn(width, centers) / math.sqrt(width)
            )
            self.mix = nn.Parameter(start.repeat(heads, 1, 1))

    def features(self, x: Tensor) -> Tensor:
        distance = x.shape[-1] + self.centers.square().sum(1, keepdim=True) - 2 * x @ self.centers
        return torch.exp(-distance.clamp_min(0) * self.log_gamma.exp())

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h, N, D) -> (B, h, N, centers) whose product is the score; normalised, or a few keys win everywhere."""
        q, k = (F.rms_norm(x.float(), x.shape[-1:], eps=1e-6) for x in (q, k))
        if self.key_mode == "mean":
            q, k = self.features(q) * self.temperature, self.features(k)
            return q, k.mean(-1, keepdim=True).expand_as(k)
        k = k if self.key_mode == "none" else F.layer_norm(self.features(k), (self.size,))
        return F.layer_norm(self.features(q), (self.size,)) * (
            self.temperature / self.size
        ), k @ self.mix


class SpatialAttention(nn.Module):
    """Sparse attention between the tokens of two images: q, k (B, H, W, h * D), v (B, H, W, h * Dv)."""

    def __init__(self, config: SHARPv32Config, heads: int, width: int, mode: str):
        super().__init__()
        self.heads = heads
        self.rbf = RBFProjection(heads, width, config.rbf_centers_per_head, config.key_rbf_mode)
        names = (
            "sparsity_ratio",
            "block_size",
            "max_tokens",
            "window_size",
            "k_cap",
            "q_block_size",
        )
        self.settings = {"sparse_mode": mode, "sparsemax_pad_value": config.sparsemax_pad_value}
        self.settings |= {name: getattr(config, f"sparse_{name}") for name in names}

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = tuple(q.shape[1:3])
        q, k, v = (
            x.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v)
        )
        with torch.autocast(q.device.type, enabled=False):
            q, k = self.rbf(q, k)
        out = sparse_attention_topk_streaming(
            *(x.flatten(0, 1) for x in (q, k, v)), scale=1.0, spatial_shape=shape, **self.settings
        )
        return out.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2).unflatten(1, shape)


class MultiScaleAttention(nn.Module):
    """Two branches: half of the channels attend in space, half are mixed by what the frame holds."""

    def __init__(self, config: SHARPv32Config, dim: int, heads: int, mode: str):
        super().__init__()
        self.to_qkv, self.out = nn.Linear(dim, 3 * (dim // 2), bias=False), nn.Linear(dim, dim)
        self.spatial = SpatialAttention(config, heads, dim // 2 // heads, mode)
        self.spectral = SpectralAttention(dim, dim // 2, heads)

    def forward(self, x: Tensor) -> Tensor:
        local = self.spatial(*self.to_qkv(x).chunk(3, -1))
        return self.out(torch.cat([local, self.spectral(x, self.spectral.frame_map(x))], -1))


class Block(nn.Module):
    """Attention and an MLP with a 3 x 3 depthwise convolution, both pre-norm with a layer scale."""

    def __init__(
        self, config: SHARPv32Config, dim: int, heads: int, ratio: float, mode: str, drop: float
    ):
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
    """A decoder level takes its skip: as it is, and, gated, by attention of each token to the window around it."""

    def __init__(self, config: SHARPv32Config, dim: int, heads: int):
        super().__init__()
        self.norm, self.norm_skip, half = ChannelRMSNorm(dim, -1), ChannelRMSNorm(dim, -1), dim // 2
        self.to_q, self.to_kv, self.out = (
            nn.Linear(dim, half),
            nn.Linear(dim, dim),
            nn.Linear(half, dim),
        )
        self.skip, self.gate = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.attention = SpatialAttention(config, heads, half // heads, "local")

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        query, (k, v) = self.norm(x), self.to_kv(self.norm_skip(skip)).chunk(2, -1)
        found = self.out(self.attention(self.to_q(query), k, v))
        return x + self.skip(skip) + torch.sigmoid(self.gate(query)) * found


class SHARPv32(nn.Module):
    """cube = linear(rgb) * gain + intensity * term: a U-net at 1/2 to 1/8 of the resolution steers a small network on
    the pixels, which mixes smooth spectra to log gain and term. Both are relative to the pixel, as the error is. In
    evaluation the cube is moved towards one that the camera would have seen as this image (`CameraConsistency`)."""

    def __init__(self, config: SHARPv32Config):
        super().__init__()
        self.config, dims, levels = config, config.dims, len(config.depths)
        colours = 3 * config.in_channels + 1
        depths = [*config.depths, *(max(1, d - 1) for d in config.depths[-2::-1])]
        rates = (config.drop_path_rate * i / (sum(depths) - 1) for i in range(sum(depths)))

        def stage(level: int, depth: int) -> nn.ModuleList:
            mode = config.sparse_mode if level == levels - 1 else "local"
            heads, ratio = config.heads[level], config.mlp_ratios[level]
            return nn.ModuleList(
                Block(config, dims[level], heads, ratio, mode, next(rates)) for _ in range(depth)
            )

        self.direct = nn.Linear(config.in_channels, config.out_channels)
        self.consistency = CameraConsistency(config.in_channels, config.out_channels)
        self.stem = nn.Linear(4 * colours, dims[0])
        self.encoder = nn.ModuleList(stage(i, config.depths[i]) for i in range(levels))
        self.down = nn.ModuleList(nn.Linear(4 * a, b) for a, b in zip(dims, dims[1:], strict=False))
        self.up = nn.ModuleList(nn.Linear(b, 4 * a) for a, b in zip(dims, dims[1:], strict=False))
        self.fuse = nn.ModuleList(
            GatedCrossFusion(config, dims[i], config.heads[i]) for i in range(levels - 1)
        )
        self.decoder = nn.ModuleList(
            [stage(i, max(1, config.depths[i] - 1)) for i in range(levels - 2, -1, -1)][::-1]
        )
        self.guide = nn.Sequential(ChannelRMSNorm(dims[0], -1), nn.Linear(dims[0], 4 * PIXEL_DIM))
        self.pixel_in, self.pixel_mix = (
            PixelConv(colours, PIXEL_DIM, 3, padding=1),
            nn.Linear(PIXEL_DIM, PIXEL_DIM),
        )
        rank = min(config.out_channels, BASIS_RANK)
        self.coefficients = nn.Linear(
            PIXEL_DIM, 2 * rank
        )  # of the gain's logarithm, and of the added term
        nn.init.normal_(
            self.coefficients.weight, std=2e-3
        )  # starts near the linear path, yet with gradients
        nn.init.zeros_(self.coefficients.bias)
        self.basis = nn.Parameter(smooth_basis(config.out_channels, rank))
        self.register_buffer("roughness", self._roughness().detach(), persistent=False)

    def forward(self, rgb: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W) in float32. Raises ValueError when the channels or the size do not fit."""
        config = self.config
        if (
            rgb.dim() != 4
            or rgb.shape[1] != config.in_channels
            or min(rgb.shape[2:]) < config.min_input_size
        ):
            raise ValueError(
                f"the input must be (B, {config.in_channels}, H, W) with H and W at least "
                f"min_input_size = {config.min_input_size}, not {tuple(rgb.shape)}"
            )
        x = rgb.permute(0, 2, 3, 1).contiguous().float()
        colour = colour_features(x)
        [cube] = pixels_in_strips(
            self._bands, x, colour, self._unet(colour), channels=config.out_channels
        )
        return cube.permute(0, 3, 1, 2)

    def _bands(self, x: Tensor, colour: Tensor, features: Tensor) -> list[Tensor]:
        """The per-pixel network, on rows of pixels and the U-net's features under them: [cube (B, H, W, out)]."""
        pixels = F.gelu(self.pixel_in(colour) + depth_to_space(self.guide(features), *x.shape[1:3]))
        pixels = pixels + F.gelu(self.pixel_mix(pixels))
        with torch.autocast(
            x.device.type, enabled=False
        ):  # the last sum decides the error of dark pixels
            both = torch.block_diag(self.basis, self.basis)  # one product over the pixels, not two
            spectra = F.linear(
                pixels.float(), both @ self.coefficients.weight, both @ self.coefficients.bias
            )
            gain, term = spectra.chunk(2, dim=-1)
            cube = self.direct(x) * gain.clamp(-GAIN_LIMIT, GAIN_LIMIT).exp() + brightness(x) * term
            if not self.training:
                cube = cube + self.consistency(cube, x)
            if self.config.non_negative:  # the gradient passes, or a pixel below 0 would stay there
                cube = cube + (cube.clamp_min(0) - cube).detach()
        return [cube]

    def _unet(self, colour: Tensor) -> Tensor:
        x, skips = self._run(self.encoder[0], self.stem(space_to_depth(colour))), []
        for down, blocks in zip(self.down, self.encoder[1:], strict=True):
            skips.append(x)
            x = self._run(blocks, down(space_to_depth(x)))
        for up, fuse, blocks, skip in zip(
            self.up[::-1], self.fuse[::-1], self.decoder[::-1], skips[::-1], strict=True
        ):
            x = self._run(blocks, fuse(depth_to_space(up(x), *skip.shape[1:3]), skip))
        return x

    def _run(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            recompute = self.config.use_checkpoint and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x

    def _roughness(self) -> Tensor:
        return self.basis.diff(n=min(2, len(self.basis) - 1), dim=0).square().sum()

    def auxiliary_loss(self) -> Tensor:
        """Keeps the head's spectra orthonormal and no rougher than cosines. It depends on the weights alone."""
        error = self.basis.mT @ self.basis - torch.eye(
            self.basis.shape[1], device=self.basis.device
        )
        return self.config.basis_weight * (
            error.square().mean() + F.relu(self._roughness() / self.roughness - 1.0)
        )

    @torch.no_grad()
    def fit_spectral_path(self, rgb: Tensor, cube: Tensor) -> None:
        """Set the direct path to the linear map of least relative error, and learn the camera: rgb (B, in, h, w), cube
        (B, out, h, w)."""
        self.consistency.fit(rgb, cube)
        weight, bias = fit_linear_spectral_path(rgb, cube)
        self.direct.weight.copy_(weight)
        self.direct.bias.copy_(bias)


def create_sharp_v32(
    model_size: str = "base", in_channels: int = 3, out_channels: int = 31, **overrides
) -> SHARPv32:
    """A model in train mode, not compiled. A size fills only the fields that `overrides` leaves out. ValueError for an
    unknown size or field, or a bad value."""
    if model_size not in SIZES:
        raise ValueError(f"unknown model_size {model_size!r}: choose from {', '.join(SIZES)}")
    if unknown := set(overrides) - set(names := SHARPv32Config.__dataclass_fields__):
        raise ValueError(
            f"unknown fields {', '.join(sorted(unknown))}: choose from {', '.join(names)}"
        )
    fields = {
        **SIZES[model_size],
        "in_channels": in_channels,
        "out_channels": out_channels,
        **overrides,
    }
    return SHARPv32(SHARPv32Config(**fields))


def from_pretrained(path: str, ema: bool = True) -> SHARPv32:
    """Model and weights from any checkpoint of the trainer; the averaged weights if there are any and `ema` is on."""
    return build_from_checkpoint(
        path, "sharp", lambda **config: SHARPv32(SHARPv32Config(**config)), ema
    )


CHECK_EVERY = 50  # steps between two looks at the count of skipped ones


class SHARPv32Trainer:
    """Optimizer steps for a model: mixed precision, clipping, accumulation, averaged weights. A script drives it.
    `model` is a SHARPv32, plain or in DistributedDataParallel; `loss_fn(prediction, target)` gets float32.
    `optimizer` and `scaler` are open to schedules; `average.module` holds the averaged weights (None without)."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn,
        *,
        lr: float = 4e-4,
        weight_decay: float = 1e-4,
        optimizer: type = torch.optim.AdamW,
        amp_dtype: torch.dtype | None = None,
        grad_clip: float = 1.0,
        ema_decay: float = 0.999,
        ema_update_every: int | None = None,
        max_bad_steps: int = 20,
    ):
        self.wrapped, self.loss_fn, self.grad_clip, self.amp_dtype = (
            model,
            loss_fn,
            grad_clip,
            amp_dtype,
        )
        self.model = (
            model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        )
        self.max_bad_steps, self.steps = max_bad_steps, 0
        self.ema_update_every = ema_update_every or self.model.config.ema_update_every
        self.device = next(model.parameters()).device
        self.bad_steps = torch.zeros((), device=self.device)  # in a row
        self.optimizer = optimizer(
            decay_groups(self.model, weight_decay), lr=lr, betas=(0.9, 0.999), fused=True
        )
        self.scaler = make_scaler(self.device, amp_dtype)
        self.average = make_average(self.model, ema_decay, self.ema_update_every)
        if self.model.config.compile_mode:
            model.compile(mode=self.model.config.compile_mode)  # in place: names in state_dict stay

    def train_step(self, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """One optimizer step on (rgb, cube) batches, the same as on one big batch. Gradients that are not finite skip it.
        Returns loss, error (`loss_fn` alone) and grad_norm as tensors: nothing waits for the device. FloatingPointError
        after `max_bad_steps` skipped steps in a row, which a GPU is asked for every CHECK_EVERY steps."""
        self.optimizer.zero_grad(set_to_none=True)
        count, totals = sum(len(rgb) for rgb, _ in batches), torch.zeros(2, device=self.device)
        for index, (rgb, target) in enumerate(batches):
            last = index == len(batches) - 1 or self.wrapped is self.model
            with nullcontext() if last else self.wrapped.no_sync():
                with torch.autocast(
                    self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None
                ):
                    cube = self.wrapped(rgb)
                error = self.loss_fn(cube.float(), target)
                loss = error + self.model.auxiliary_loss()
                loss = (
                    loss * (1 + 0 * loss.detach()) * (len(rgb) / count)
                )  # a loss of NaN has gradients of NaN
                self.scaler.scale(loss).backward()
            totals += torch.stack([loss.detach(), error.detach() * (len(rgb) / count)])
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip or math.inf)
        self.bad_steps = (self.bad_steps + 1) * ~norm.isfinite()
        self.scaler.step(self.optimizer)  # fused: it reads the scaler's flag on the device
        self.scaler.update()
        self.steps += 1
        if (
            self.device.type == "cpu" or self.steps % CHECK_EVERY == 0
        ) and self.bad_steps >= self.max_bad_steps:
            raise FloatingPointError(
                f"{int(self.bad_steps)} steps in a row had non-finite gradients; lower the lr?"
            )
        if self.average is not None and self.steps % self.ema_update_every == 0:
            self.average.update_parameters(self.model)
        return {"loss": totals[0], "error": totals[1], "grad_norm": norm}

    def state_dict(self) -> dict:
        """Tensors and plain types: what an exact resume needs. `ema` is a state dict of the model, or None."""
        average = self.average
        return {
            "state_dict": self.model.state_dict(),
            "ema": average.module.state_dict() if average else None,
            "ema_updates": int(average.n_averaged) if average else 0,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.steps,
            "bad_steps": int(self.bad_steps),
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["state_dict"])
        restore(self.optimizer, self.scaler, state)
        self.steps = state["step"]
        self.bad_steps.fill_(state["bad_steps"])
        if self.average is not None and state["ema"]:
            self.average.module.load_state_dict(state["ema"])
            self.average.n_averaged.fill_(state["ema_updates"])
