"""What both models are built of: layout changes, strips of rows, spectral attention, the pixel head's parts.

Images inside the models are (B, H, W, C), so that a pixel's channels are one row of a linear layer's input.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drops a residual branch per sample with probability p and scales the rest by 1 / (1 - p) (stochastic depth)."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.p
        return x * keep.to(x.dtype) / (1 - self.p)


def space_to_depth(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 4C); an odd side repeats its last row or column."""
    if x.shape[1] % 2:
        x = torch.cat([x, x[:, -1:]], dim=1)
    if x.shape[2] % 2:
        x = torch.cat([x, x[:, :, -1:]], dim=2)
    return (
        x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).transpose(2, 3).flatten(3)
    )  # by way of B, H/2, 2, W/2, 2, C


def depth_to_space(x: Tensor, height: int, width: int) -> Tensor:
    """(B, h, w, 4C) -> (B, height, width, C), the inverse of space_to_depth."""
    return (
        x.unflatten(3, (2, 2, -1)).transpose(2, 3).flatten(1, 2).flatten(2, 3)[:, :height, :width]
    )


# Values in one temporary where no gradient is recorded. A CPU's allocator maps larger ones anew for every operation, which
# costs more than the arithmetic; a GPU needs large ones to be busy.
STRIP_FLOATS = {"cpu": 1 << 21, "cuda": 1 << 27}


def row_strips(x: Tensor, channels: int, halo: int = 0) -> list[tuple[slice, slice]]:
    """Rows of x (B, H, W, C) to read, and which of those to keep: all at once while gradients are recorded, else strips of
    even height whose temporaries of `channels` channels have at most STRIP_FLOATS values, with `halo` rows of context."""
    height, floats = x.shape[1], STRIP_FLOATS.get(x.device.type, 1 << 27)
    whole = torch.is_grad_enabled() or torch.compiler.is_exporting()
    rows = height if whole else max(4, floats // (len(x) * x.shape[2] * channels) // 2 * 2)
    tops = [(max(0, top - halo), top) for top in range(0, height, rows)]
    return [
        (slice(start, top + rows + halo), slice(top - start, top - start + rows))
        for start, top in tops
    ]


def in_strips(function: Callable[..., Tensor], *xs: Tensor, channels: int, halo: int = 0) -> Tensor:
    """function(*xs), which maps rows of (B, H, W, C) to rows, or two to one, and sees `halo` rows to either side."""
    strips, out, filled = row_strips(xs[0], channels, halo), None, 0
    for read, keep in strips:
        part = function(*(x[:, read] for x in xs))[:, keep]
        if len(strips) == 1:
            return part
        if out is None:
            height = math.ceil(xs[0].shape[1] / (keep.stop // part.shape[1]))
            out = part.new_empty(len(part), height, *part.shape[2:])
        out[:, filled : filled + part.shape[1]] = part
        filled += part.shape[1]
    return out


def pixels_in_strips(
    function: Callable[..., list[Tensor]],
    x: Tensor,
    colour: Tensor,
    features: Tensor,
    channels: int,
) -> list:
    """function(x, colour, features) -> outputs of `channels`, which sees four rows more to either side; x, colour and the
    outputs have the pixels' rows, the features half as many."""
    parts = []
    for read, keep in row_strips(features, 8 * channels, halo=2):
        pixels, keep = slice(2 * read.start, 2 * read.stop), slice(2 * keep.start, 2 * keep.stop)
        parts.append(
            [y[:, keep] for y in function(x[:, pixels], colour[:, pixels], features[:, read])]
        )
    return [y[0] if len(y) == 1 else torch.cat(y, dim=1) for y in zip(*parts, strict=True)]


DARK = 0.01  # added to the intensity: below it a pixel's relative correction fades, as the relative error's floor does


def brightness(x: Tensor) -> Tensor:
    """Mean of the channels of (B, H, W, C), DARK above 0, (B, H, W, 1)."""
    return x.mean(dim=-1, keepdim=True).clamp_min(0) + DARK


def colour_features(x: Tensor) -> Tensor:
    """x (B, H, W, C), x over its intensity, and the logarithms of both, (B, H, W, 3 C + 1), all of order 1."""
    intensity, most = brightness(x), 2.0 * x.shape[-1]
    chroma = ((x.clamp_min(0) + DARK) / intensity).log()
    return torch.cat(
        [x, (x / intensity).clamp(-most, most), 0.5 + 0.3 * intensity.log(), 0.5 * chroma], dim=-1
    )


def smooth_basis(bands: int, rank: int) -> Tensor:
    """The smoothest orthonormal spectra (bands, rank): the first cosines of the DCT."""
    angle = (
        math.pi
        * (torch.arange(bands, dtype=torch.float64)[:, None] + 0.5)
        * torch.arange(rank)
        / bands
    )
    return F.normalize(angle.cos(), dim=0).float()


class SpectralAttention(nn.Module):
    """Attention between a head's channels over all pixels, at a cost linear in them (as in MST and Restormer). All it needs
    of a frame is X'X, for q'k is Wq' X'X Wk, and what it does to a pixel is one linear map, the weights times Wv."""

    def __init__(self, dim: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * width, bias=False)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 4.0))

    def frame_map(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, dim, width): what attention over this frame does to each of its pixels."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.flatten(1, 2).to(wide)
        q, k, v = self.qkv.weight.to(wide).unflatten(0, (3, self.heads, -1))  # h, D, dim
        with torch.autocast(
            x.device.type, enabled=False
        ):  # sums over many pixels are kept in float32
            gram = (x.transpose(1, 2) @ x)[:, None]
            from_q, from_k = q @ gram, k @ gram
            norm_q, norm_k = (
                (a * b).sum(-1).clamp_min(1e-12).sqrt() for a, b in ((from_q, q), (from_k, k))
            )
            cosine = from_q @ k.transpose(-1, -2) / (norm_q[..., :, None] * norm_k[..., None, :])
            return ((cosine * self.temperature).softmax(dim=-1) @ v).flatten(1, 2).transpose(1, 2)

    def forward(self, x: Tensor, frame_map: Tensor) -> Tensor:
        """Some rows of the frame (B, H, W, dim) -> (B, H, W, width)."""
        return (x.flatten(1, 2) @ frame_map).unflatten(1, x.shape[1:3])


def fit_linear_spectral_path(
    rgb: Tensor, cube: Tensor, floor: float = 0.01
) -> tuple[Tensor, Tensor]:
    """The affine map RGB -> bands that minimises the squared error relative to max(target, floor), in closed form.

    rgb (B, in, h, w) and cube (B, out, h, w) -> weight (out, in), bias (out), float32. Each band is its own weighted
    least-squares problem: X' W X beta = X' W y with W = max(y, floor)^-2, solved in float64 with a slight ridge."""
    pixels = [t.detach().movedim(1, -1).flatten(0, -2) for t in (rgb, cube)]
    size, bands = rgb.shape[1] + 1, cube.shape[1]
    gram, moment = (
        torch.zeros(bands, n, dtype=torch.float64, device=rgb.device) for n in (size * size, size)
    )
    for x, y in zip(*(t.split(2**15) for t in pixels), strict=True):  # chunks stay in cache
        x, y = F.pad(x.double(), (0, 1), value=1.0), y.double()
        w = y.clamp_min(floor).reciprocal().square_()
        gram += w.T @ (x[:, :, None] * x[:, None, :]).flatten(1)
        moment += w.mul_(y).T @ x
    gram = gram.view(bands, size, size)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += 1e-9 * diagonal.mean(dim=1, keepdim=True)
    beta = torch.linalg.solve(gram, moment[..., None])[..., 0]
    return beta[:, :-1].float(), beta[:, -1].float()


class CameraConsistency(nn.Module):
    """Moves a predicted cube towards the image that it was predicted from.

    What the camera would have seen of the cube is compared with what it saw, averaged over 5 x 5 pixels against noise, and
    the difference goes back into the bands as the likeliest smooth spectrum that explains it: the update of a linear
    Gaussian model (Wiener filter), whose prior error is PRIOR of a pixel's brightness. Where an image is noisier than
    that, or no linear camera explains it, little changes; nothing does before `fit`.

    For evaluation: a network that is trained through it leans on it, and its own spectra get worse. `forward` gives the
    correction alone."""

    PRIOR, SIDE = 0.04, 5

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.register_buffer(
            "whiten", torch.zeros(in_channels, in_channels)
        )  # rotates and scales channels to variance 1
        self.register_buffer(
            "seen", torch.zeros(in_channels, out_channels)
        )  # cube -> those channels
        self.register_buffer("back", torch.zeros(out_channels, in_channels))
        self.register_buffer(
            "noise", torch.ones(2, in_channels)
        )  # its variance over the prior's: constant, per brightness

    @torch.no_grad()
    def fit(self, rgb: Tensor, cube: Tensor) -> None:
        """Estimate the camera's smooth response and its noise from rgb (B, in, h, w) and cube (B, out, h, w)."""
        bands = self.seen.shape[1]
        x, y = (t.detach().movedim(1, -1).flatten(0, -2) for t in (rgb, cube))
        step = math.ceil(len(x) / 2**17)
        light = brightness(x[::step])
        seen, y = x[::step].div(light).double(), y[::step].div(light).double()
        smooth = torch.eye(bands, dtype=y.dtype, device=y.device).diff(n=min(2, bands - 1), dim=0)
        gram = (
            y.T @ y / len(y) + 0.01 * (bands / 31) ** 5 * smooth.T @ smooth
        )  # differences shrink as bands get finer
        gram.diagonal().add_(1e-6 * gram.diagonal().mean() + 1e-12)
        response = torch.linalg.solve(gram, y.T @ seen / len(y)).T

        place = torch.arange(bands, dtype=y.dtype, device=y.device) * (31 / bands)
        prior = torch.exp(
            -((place[:, None] - place) ** 2) / 8
        )  # errors of bands 20 nm apart are alike
        variance, axes = torch.linalg.eigh(response @ prior @ response.T)
        variance = variance.clamp_min(1e-6 * variance.max()) + 1e-12
        whiten = axes.T / variance.sqrt()[:, None]

        error = rgb - torch.einsum("kn,bnhw->bkhw", response.to(cube.dtype), cube)
        light = brightness(rgb.movedim(1, -1)).flatten().double()
        power = self.average(error).square().mean(dim=1).flatten().double()
        terms = torch.stack([torch.ones_like(light), light], dim=1) / light[:, None]
        normal = terms.T @ terms
        normal.diagonal().add_(
            1e-9 * normal.trace()
        )  # in images of one brightness the two can't be told apart
        noise = torch.linalg.solve(normal, terms.T @ (power / light)).clamp_min(1e-9)
        self.whiten.copy_(whiten)
        self.seen.copy_(whiten @ response)
        self.back.copy_(prior @ (whiten @ response).T)
        self.noise.copy_(noise[:, None] / (self.PRIOR**2 * variance / variance.mean()))

    def average(self, x: Tensor) -> Tensor:
        """The mean over SIDE x SIDE pixels of (B, C, H, W)."""
        return F.avg_pool2d(x, self.SIDE, 1, self.SIDE // 2, count_include_pad=False)

    def forward(self, cube: Tensor, image: Tensor) -> Tensor:
        """cube (B, H, W, out) and image (B, H, W, in) -> what to add to the cube, so that it explains the image better."""
        light = brightness(image)
        error = self.average(
            (F.linear(image, self.whiten) - F.linear(cube, self.seen)).permute(0, 3, 1, 2)
        ).permute(0, 2, 3, 1)
        constant, per_light = self.noise
        return F.linear(error / (1 + (constant + per_light * light) / light**2), self.back)
