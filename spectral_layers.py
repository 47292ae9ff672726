"""What both models are built of: changes of resolution, strips of rows, spectral attention, and the
head that turns a pixel's colour and features into its spectrum.

Images inside the models are (B, H, W, C): a pixel's channels are one row of a linear layer's input,
and the image is a channels_last one to a convolution, with no copy between the two.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Values in one temporary where no gradient is recorded. A CPU's allocator maps larger ones anew for
# every operation, which costs more than the arithmetic; a GPU needs large ones to be busy.
STRIP_FLOATS = {"cpu": 1 << 21, "cuda": 1 << 27}

# Added to the brightness of a pixel: below it a relative correction fades, as the floor of the
# relative error does.
DARK = 0.01

PIXEL_CHANNELS = 48  # width of the network at full resolution
GAIN_LIMIT = 3.0  # of the logarithm of a band's gain: 1/20 to 20
# Smooth spectra that the head mixes: fewer than bands, so that what it learns holds for other
# materials. Measured reflectances need fewer than 10.
BASIS_RANK = 12
BASIS_WEIGHT = 0.01  # of the loss that keeps those spectra smooth and orthonormal


class DropPath(nn.Module):
    """Drops a branch per sample with probability p, else scales it (Huang et al. 2016)."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.p
        return x * keep.to(x.dtype) / (1 - self.p)


class PixelConv(nn.Conv2d):
    """A convolution of (B, H, W, C), computed in channels_last memory unless told otherwise."""

    channels_last = True

    def forward(self, x: Tensor) -> Tensor:
        image = x.permute(0, 3, 1, 2)
        if not self.channels_last:
            image = image.contiguous()
        return super().forward(image).permute(0, 2, 3, 1)


def space_to_depth(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 4C); an odd side repeats its last row or column."""
    if x.shape[1] % 2:
        x = torch.cat([x, x[:, -1:]], dim=1)
    if x.shape[2] % 2:
        x = torch.cat([x, x[:, :, -1:]], dim=2)
    return rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=2, q=2)


def depth_to_space(x: Tensor, height: int, width: int) -> Tensor:
    """(B, h, w, 4C) -> (B, height, width, C), the inverse of space_to_depth."""
    return rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=2, q=2)[:, :height, :width]


def check_image(rgb: Tensor, channels: int, least_side: int) -> None:
    """ValueError unless rgb is (B, channels, H, W) with sides of `least_side` pixels or more."""
    if rgb.ndim != 4 or rgb.shape[1] != channels or min(rgb.shape[2:]) < least_side:
        raise ValueError(
            f"the input must be (B, {channels}, H, W) with H and W at least "
            f"min_input_size = {least_side}, not {tuple(rgb.shape)}"
        )


def row_strips(x: Tensor, channels: int, halo: int = 0) -> list[tuple[slice, slice]]:
    """Rows of x (B, H, W, C) to read, and which of the rows read to keep, strip by strip.

    While gradients are recorded all rows are one strip. Else strips have an even height, `halo`
    rows of context, and temporaries of `channels` channels with at most STRIP_FLOATS values."""
    height, width = x.shape[1:3]
    rows = height
    if not torch.is_grad_enabled() and not torch.compiler.is_exporting():
        floats = STRIP_FLOATS.get(x.device.type, STRIP_FLOATS["cuda"])
        rows = max(4, floats // (len(x) * width * channels) // 2 * 2)
    strips = []
    for top in range(0, height, rows):
        start = max(0, top - halo)
        read = slice(start, top + rows + halo)
        keep = slice(top - start, top - start + rows)
        strips.append((read, keep))
    return strips


def in_strips(function: Callable[..., Tensor], *xs: Tensor, channels: int, halo: int = 0) -> Tensor:
    """function(*xs), computed strip by strip.

    It maps rows of (B, H, W, C) to rows, or two rows to one, and sees `halo` rows to either side;
    its largest temporary has `channels` channels."""
    strips = row_strips(xs[0], channels, halo)
    if len(strips) == 1:
        return function(*xs)
    out, filled = None, 0
    for read, keep in strips:
        part = function(*(x[:, read] for x in xs))[:, keep]
        if out is None:
            rows_in_one = keep.stop // part.shape[1]
            height = math.ceil(xs[0].shape[1] / rows_in_one)
            out = part.new_empty(len(part), height, *part.shape[2:])
        out[:, filled : filled + part.shape[1]] = part
        filled += part.shape[1]
    assert out is not None  # an image has rows
    return out


def brightness(x: Tensor) -> Tensor:
    """Mean of the channels of (B, H, W, C), DARK above 0: (B, H, W, 1)."""
    return x.mean(dim=-1, keepdim=True).clamp_min(0) + DARK


def colour_features(x: Tensor) -> Tensor:
    """x (B, H, W, C), x over its brightness, and the logarithms of both, all of order 1.

    -> (B, H, W, colour_channels(C))"""
    light, most = brightness(x), 2.0 * x.shape[-1]
    chroma = ((x.clamp_min(0) + DARK) / light).log()
    parts = [x, (x / light).clamp(-most, most), 0.5 + 0.3 * light.log(), 0.5 * chroma]
    return torch.cat(parts, dim=-1)


def colour_channels(channels: int) -> int:
    """How many features colour_features makes of an image's channels."""
    return 3 * channels + 1


def run_blocks(stage: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    """The blocks of a stage in turn, computed again in the backward where `recompute` says so."""
    for block in stage.children():
        x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return x


class SpectralAttention(nn.Module):
    """Attention between a head's channels over all pixels, at a cost linear in the pixels.

    As in MST (Cai et al., CVPR 2022) and Restormer (Zamir et al., CVPR 2022). All that it needs of
    a frame X is X'X, for q'k is Wq' X'X Wk; and what it does to a pixel is one linear map, the
    attention weights times Wv."""

    def __init__(self, dim: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * width, bias=False)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 4.0))

    def frame_map(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, dim, width): what attention over this frame does to its pixels."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.flatten(1, 2).to(wide)
        qkv = rearrange(self.qkv.weight.to(wide), "(n h d) c -> n h d c", n=3, h=self.heads)
        qk, k, v = qkv[:2, None], qkv[1], qkv[2]
        with torch.autocast(x.device.type, enabled=False):  # sums over many pixels, in float32
            gram = (x.transpose(1, 2) @ x)[:, None]
            qk_gram = qk @ gram  # 2, B, h, d, c
            q_norm, k_norm = (qk_gram * qk).sum(-1).clamp_min(1e-12).sqrt()
            cosine = qk_gram[0] @ k.mT / (q_norm[..., :, None] * k_norm[..., None, :])
            weights = (cosine * self.temperature).softmax(dim=-1)
            return rearrange(weights @ v, "b h d c -> b c (h d)")

    def forward(self, x: Tensor, frame_map: Tensor) -> Tensor:
        """Some rows of the frame (B, H, W, dim) -> (B, H, W, width)."""
        return (x.flatten(1, 2) @ frame_map).unflatten(1, x.shape[1:3])


def fit_linear_spectral_path(
    rgb: Tensor, cube: Tensor, floor: float = 0.01
) -> tuple[Tensor, Tensor]:
    """The affine map RGB -> bands of least squared error relative to max(target, floor).

    rgb (B, in, h, w) and cube (B, out, h, w) -> weight (out, in), bias (out), float32. In closed
    form: each band is its own weighted least-squares problem, X' W X beta = X' W y with
    W = max(y, floor)^-2, solved in float64 with a slight ridge."""
    rgb_pixels = rearrange(rgb.detach(), "b c h w -> (b h w) c")
    cube_pixels = rearrange(cube.detach(), "b c h w -> (b h w) c")
    size, bands = rgb.shape[1] + 1, cube.shape[1]
    gram = torch.zeros(bands, size * size, dtype=torch.float64, device=rgb.device)
    moment = torch.zeros(bands, size, dtype=torch.float64, device=rgb.device)
    chunk = 2**15  # pixels that stay in a processor's cache
    for x, y in zip(rgb_pixels.split(chunk), cube_pixels.split(chunk), strict=True):
        x, y = F.pad(x.double(), (0, 1), value=1.0), y.double()
        weight = y.clamp_min(floor).reciprocal().square_()
        gram += weight.T @ (x[:, :, None] * x[:, None, :]).flatten(1)
        moment += weight.mul_(y).T @ x
    gram = gram.view(bands, size, size)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += 1e-9 * diagonal.mean(dim=1, keepdim=True)
    beta = torch.linalg.solve(gram, moment[..., None])[..., 0]
    return beta[:, :-1].float(), beta[:, -1].float()


class CameraConsistency(nn.Module):
    """Moves a predicted cube towards the image that it was predicted from.

    What the camera would have seen of the cube is compared with what it saw, averaged over a few
    pixels against noise, and the difference goes back into the bands as the likeliest smooth
    spectrum that explains it: the update of a linear Gaussian model (Wiener filter), whose prior
    error is PRIOR of a pixel's brightness. Where an image is noisier than that, or no linear camera
    explains it, little changes; nothing does before `fit`.

    For evaluation: a network that is trained through it leans on it, and its own spectra get worse.
    `forward` gives the correction alone."""

    PRIOR = 0.04
    SIDE = 5  # pixels
    SMOOTHNESS = 0.01  # weight of the squared second differences of a response of 31 bands
    MOST_PIXELS = 2**17  # that the response is fitted on

    whiten: Tensor
    seen: Tensor
    back: Tensor
    noise: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # Rotates and scales the channels so that the prior's error in each has variance 1.
        self.register_buffer("whiten", torch.zeros(in_channels, in_channels))
        self.register_buffer("seen", torch.zeros(in_channels, out_channels))  # cube -> these
        self.register_buffer("back", torch.zeros(out_channels, in_channels))  # these -> cube
        # Variance of the noise over that of the prior: a constant part, and one per brightness.
        self.register_buffer("noise", torch.ones(2, in_channels))

    @torch.no_grad()
    def fit(self, rgb: Tensor, cube: Tensor) -> None:
        """Estimate the camera's smooth response and its noise. rgb (B, in, h, w) and cube (B, out,
        h, w), as in training."""
        response = self._fit_response(rgb, cube)
        bands = response.shape[1]
        place = torch.arange(bands, dtype=response.dtype, device=rgb.device) * (31 / bands)
        # The prior error of a cube: errors of bands 20 nm apart are alike.
        prior = torch.exp(-((place[:, None] - place) ** 2) / 8)
        variance, axes = torch.linalg.eigh(response @ prior @ response.T)
        variance = variance.clamp_min(1e-6 * variance.max()) + 1e-12
        whiten = axes.T / variance.sqrt()[:, None]
        noise = self._fit_noise(rgb, cube, response)
        self.whiten.copy_(whiten)
        self.seen.copy_(whiten @ response)
        self.back.copy_(prior @ (whiten @ response).T)
        self.noise.copy_(noise[:, None] / (self.PRIOR**2 * variance / variance.mean()))

    def _fit_response(self, rgb: Tensor, cube: Tensor) -> Tensor:
        """The smooth linear response (in, out) that makes rgb of cube, in float64. Pixels weigh by
        1 / brightness, as a relative error does."""
        bands = cube.shape[1]
        x = rearrange(rgb.detach(), "b c h w -> (b h w) c")
        y = rearrange(cube.detach(), "b c h w -> (b h w) c")
        step = math.ceil(len(x) / self.MOST_PIXELS)
        light = brightness(x[::step])
        x, y = x[::step].div(light).double(), y[::step].div(light).double()
        order = min(2, bands - 1)
        difference = torch.eye(bands, dtype=y.dtype, device=y.device).diff(n=order, dim=0)
        smoothness = self.SMOOTHNESS * (bands / 31) ** 5  # differences shrink as bands get finer
        gram = y.T @ y / len(y) + smoothness * difference.T @ difference
        gram.diagonal().add_(1e-6 * gram.diagonal().mean() + 1e-12)
        return torch.linalg.solve(gram, y.T @ x / len(y)).T

    def _fit_noise(self, rgb: Tensor, cube: Tensor, response: Tensor) -> Tensor:
        """Variance of what the response leaves of rgb: (constant part, part per brightness)."""
        error = rgb - torch.einsum("kn,bnhw->bkhw", response.to(cube.dtype), cube)
        light = brightness(rgb.movedim(1, -1)).flatten().double()
        power = self.average(error).square().mean(dim=1).flatten().double()
        terms = torch.stack([torch.ones_like(light), light], dim=1) / light[:, None]
        normal = terms.T @ terms
        # In images of one brightness the two parts cannot be told apart.
        normal.diagonal().add_(1e-9 * normal.trace())
        return torch.linalg.solve(normal, terms.T @ (power / light)).clamp_min(1e-9)

    def average(self, x: Tensor) -> Tensor:
        """The mean over SIDE x SIDE pixels of (B, C, H, W)."""
        return F.avg_pool2d(x, self.SIDE, 1, self.SIDE // 2, count_include_pad=False)

    def forward(self, cube: Tensor, image: Tensor) -> Tensor:
        """cube (B, H, W, out) and image (B, H, W, in) -> what to add to the cube, so that it
        explains the image better."""
        light = brightness(image)
        error = F.linear(image, self.whiten) - F.linear(cube, self.seen)
        error = self.average(error.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        constant, per_light = self.noise
        return F.linear(error / (1 + (constant + per_light * light) / light**2), self.back)


def smooth_basis(bands: int, rank: int) -> Tensor:
    """The smoothest orthonormal spectra (bands, rank): the first cosines of the DCT."""
    place = torch.arange(bands, dtype=torch.float64)[:, None] + 0.5
    angle = math.pi * place * torch.arange(rank) / bands
    return F.normalize(angle.cos(), dim=0).float()


class SpectralHead(nn.Module):
    """From a pixel's colour, and a U-net's features around it, to its spectrum.

    cube = direct(rgb) * exp(gain) + brightness(rgb) * term. `direct` is a linear map from RGB to
    the bands, fitted in closed form before training (`fit`). A small network on the pixels, steered
    by the features, multiplies each band by a gain, as pigments and filters do, and adds a term;
    both are mixed from a few smooth spectra, and both are relative to the pixel, as the error is,
    so a dark pixel is as well conditioned as a bright one. In evaluation the cube is then moved
    towards one that the camera would have seen as this image (`CameraConsistency`).

    features: channels of the U-net at half resolution. norm: of those features, the model's own.
    non_negative: clamp the cube at 0 while gradients pass. estimate_uncertainty: also give the
    scale b > 0 of a Laplace distribution around each value. channels_last: of the convolution."""

    roughness: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        features: int,
        norm: nn.Module,
        *,
        non_negative: bool = False,
        estimate_uncertainty: bool = False,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        rank = min(out_channels, BASIS_RANK)
        self.non_negative = non_negative
        self.direct = nn.Linear(in_channels, out_channels)
        self.consistency = CameraConsistency(in_channels, out_channels)
        self.guide = nn.Sequential(norm, nn.Linear(features, 4 * PIXEL_CHANNELS))
        self.pixel_in = PixelConv(colour_channels(in_channels), PIXEL_CHANNELS, 3, padding=1)
        self.pixel_in.channels_last = channels_last
        self.pixel_mix = nn.Linear(PIXEL_CHANNELS, PIXEL_CHANNELS)
        self.coefficients = nn.Linear(PIXEL_CHANNELS, 2 * rank)  # of log gain and of the term
        nn.init.normal_(self.coefficients.weight, std=2e-3)  # near the linear path, with gradients
        nn.init.zeros_(self.coefficients.bias)
        self.basis = nn.Parameter(smooth_basis(out_channels, rank))
        self.register_buffer("roughness", self._roughness().detach(), persistent=False)
        self.scale = nn.Linear(PIXEL_CHANNELS, out_channels) if estimate_uncertainty else None
        if self.scale is not None:
            nn.init.constant_(self.scale.bias, math.log(math.expm1(0.1)))  # a tenth of brightness

    def forward(self, rgb: Tensor, colour: Tensor, features: Tensor) -> list[Tensor]:
        """rgb (B, H, W, in), its colour_features, and features (B, ceil(H/2), ceil(W/2), C).

        -> [cube (B, H, W, out)], and its scale of the same shape where the head has one."""
        parts = []
        # Two rows of features are four of pixels: the convolution needs one, the camera's mean two.
        for read, keep in row_strips(features, 8 * self.direct.out_features, halo=2):
            rows = slice(2 * read.start, 2 * read.stop)
            kept = slice(2 * keep.start, 2 * keep.stop)
            outputs = self._rows(rgb[:, rows], colour[:, rows], features[:, read])
            parts.append([output[:, kept] for output in outputs])
        if len(parts) == 1:
            return parts[0]
        return [torch.cat(strips, dim=1) for strips in zip(*parts, strict=True)]

    def _rows(self, rgb: Tensor, colour: Tensor, features: Tensor) -> list[Tensor]:
        guide = depth_to_space(self.guide(features), *rgb.shape[1:3])
        pixels = F.gelu(self.pixel_in(colour) + guide)
        pixels = pixels + F.gelu(self.pixel_mix(pixels))
        with torch.autocast(rgb.device.type, enabled=False):  # it decides the error of the dark
            pixels, rgb = pixels.to(self.basis.dtype), rgb.to(self.basis.dtype)
            outputs = [self._spectra(rgb, pixels)]
            if self.scale is not None:
                scale = F.softplus(self.scale(pixels.detach()))
                outputs.append(brightness(rgb) * scale + 1e-4)
        return outputs

    def _spectra(self, rgb: Tensor, pixels: Tensor) -> Tensor:
        both = torch.block_diag(self.basis, self.basis)  # one product over the pixels, not two
        weight, bias = both @ self.coefficients.weight, both @ self.coefficients.bias
        gain, term = F.linear(pixels, weight, bias).chunk(2, dim=-1)
        gain = gain.clamp(-GAIN_LIMIT, GAIN_LIMIT).exp()
        cube = self.direct(rgb) * gain + brightness(rgb) * term
        if not self.training:
            cube = cube + self.consistency(cube, rgb)
        if self.non_negative:  # the gradient passes, or a value below 0 would stay there
            with torch.no_grad():
                cube.clamp_(min=0)
        return cube

    @torch.no_grad()
    def fit(self, rgb: Tensor, cube: Tensor) -> None:
        """Set the direct path to the linear map of least relative error, and learn the camera. rgb
        (B, in, h, w) and cube (B, out, h, w), both as in training."""
        self.consistency.fit(rgb, cube)
        weight, bias = fit_linear_spectral_path(rgb, cube)
        self.direct.weight.copy_(weight)
        self.direct.bias.copy_(bias)

    def basis_loss(self) -> Tensor:
        """How far the spectra are from orthonormal, and rougher than cosines; of weights alone."""
        identity = torch.eye(self.basis.shape[1], device=self.basis.device)
        error = self.basis.mT @ self.basis - identity
        return error.square().mean() + F.relu(self._roughness() / self.roughness - 1.0)

    def _roughness(self) -> Tensor:
        order = min(2, len(self.basis) - 1)
        return self.basis.diff(n=order, dim=0).square().sum()
