"""Cube to RGB: cameras and observers, the field's rendering of a photo, sRGB pictures to look at.

    response = camera_response("nikon5100", wavelengths)        # (bands, 3)
    rgb, jpeg = render_rgb(cube, response, rng=np.random.default_rng(0))
    picture = cube_to_srgb(cube, wavelengths)

A thin layer over colour-science, which has the measured tables. It takes 0.7 s to import, so it is
imported where a table is needed.
"""

import functools
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common_utils_v32 import UserError

Wavelengths = Sequence[float] | np.ndarray  # nm
Table = tuple[np.ndarray, np.ndarray]  # wavelengths in nm (n), and columns (n, 3)
Lobe = tuple[float, float, float, float]  # height, peak nm, width nm below it, width nm above it

# Two cameras of our own, R, G and B as sums of lobes: the piecewise Gaussians of Wyman et al.,
# "Simple Analytic Approximations to the CIE XYZ Color Matching Functions", JCGT 2(2), 2013, eq. 4.
# Overlaps and side lobes are as in Jiang et al., "What is the Space of Spectral Sensitivity
# Functions for Digital Color Cameras?", WACV 2013.
ANALYTIC: dict[str, tuple[list[Lobe], list[Lobe], list[Lobe]]] = {
    "analytic": (
        [(1.0, 602, 22, 36), (0.10, 535, 30, 30), (0.04, 440, 20, 20)],
        [(1.0, 532, 34, 38), (0.08, 440, 25, 25), (0.05, 640, 30, 30)],
        [(1.0, 458, 26, 30), (0.07, 530, 25, 35)],
    ),
    "analytic2": (
        [(1.0, 592, 18, 46), (0.16, 520, 35, 30), (0.10, 430, 20, 25)],
        [(1.0, 545, 42, 34), (0.14, 470, 30, 25)],
        [(1.0, 446, 22, 38), (0.12, 545, 30, 40)],
    ),
}
OBSERVERS = {
    "cie1931": "CIE 1931 2 Degree Standard Observer",
    "cie1964": "CIE 1964 10 Degree Standard Observer",
}
MEASURED = {"nikon5100": "Nikon 5100 (NPL)"}
# The cube is reflectance, shaded and exposed; in daylight (D65) it looks like this sRGB photo.
SRGB = "srgb"
CAMERAS = (*ANALYTIC, *MEASURED, *OBSERVERS, SRGB)

# The field's recipe (NTIRE 2022): photo-electrons at full scale, and mean signal over full scale.
ELECTRONS = 750
MEAN_SIGNAL = 0.18
CLIP_MARGIN = 4.0  # of full scale: what is brighter clips anyway, and would overflow the noise


def sum_of_lobes(nm: np.ndarray, lobes: Sequence[Lobe]) -> np.ndarray:
    """A smooth spectrum at wavelengths nm: the sum of piecewise Gaussians."""
    total = np.zeros(len(nm))
    for height, peak, below, above in lobes:
        width = np.where(nm < peak, below, above)
        total += height * np.exp(-0.5 * ((nm - peak) / width) ** 2)
    return total


def camera_response(camera: str, wavelengths: Wavelengths) -> np.ndarray:
    """Weights (bands, 3) that make R, G and B of a spectrum: band width times sensitivity, with
    the gain at which a perfect white (all bands 1) is 1.

    camera: one of CAMERAS, or a CSV file with rows nm,r,g,b. UserError for another one, and where a
    channel sees none of the wavelengths."""
    nm = np.asarray(wavelengths, np.float64)
    if camera == SRGB:
        return _srgb_response(tuple(nm.tolist()))
    if camera in ANALYTIC:
        sensitivity = np.stack([sum_of_lobes(nm, lobes) for lobes in ANALYTIC[camera]], axis=1)
    elif camera in OBSERVERS or camera in MEASURED:
        sensitivity = _interpolate(nm, _table(camera))
    else:
        sensitivity = _interpolate(nm, _read_camera_csv(camera))
    response = sensitivity * _band_widths(nm)[:, None]
    total = response.sum(axis=0)
    if not (total > 1e-6).all():
        raise UserError(
            f"camera {camera}: channel {'RGB'[int(np.argmin(total))]} sees nothing of "
            f"{nm.min():g}-{nm.max():g} nm; choose another camera"
        )
    return response / total


def _band_widths(nm: np.ndarray) -> np.ndarray:
    """Distances of the bands from their neighbours, in whatever order a file has them."""
    widths, order = np.ones(len(nm)), np.argsort(nm)
    if len(nm) > 1:
        widths[order] = np.gradient(nm[order])
    return widths


def _interpolate(nm: np.ndarray, table: Table) -> np.ndarray:
    """The table's columns at wavelengths nm, 0 outside of it."""
    at, columns = table
    return np.stack([np.interp(nm, at, column, left=0, right=0) for column in columns.T], axis=1)


@functools.cache
def _table(camera: str) -> Table:
    import colour

    if camera in OBSERVERS:
        measured = colour.MSDS_CMFS[OBSERVERS[camera]]
    else:
        measured = colour.MSDS_CAMERA_SENSITIVITIES[MEASURED[camera]]
    return np.array(measured.wavelengths), np.array(measured.values)


def _read_camera_csv(path: str) -> Table:
    if not Path(path).is_file():
        choices = ", ".join(CAMERAS)
        raise UserError(f"camera {path}: choose {choices}, or a CSV file with rows nm,r,g,b")
    try:
        table = np.genfromtxt(path, delimiter=",", dtype=np.float64, ndmin=2, encoding="utf-8")
    except ValueError as error:
        raise UserError(f"camera {path}: {error}; rows must be nm,r,g,b") from None
    if np.isnan(table[:1]).all():
        table = table[1:]  # without its header line
    if len(table) < 2 or table.shape[1] != 4 or not np.isfinite(table).all():
        raise UserError(f"camera {path}: needs two or more rows of four numbers nm,r,g,b")
    table = table[np.argsort(table[:, 0])]
    return table[:, 0], table[:, 1:]


def render_rgb(
    cube: np.ndarray,
    response: np.ndarray,
    *,
    rng: np.random.Generator,
    exposure: float | None = None,
    electrons: float = ELECTRONS,
    jpeg_quality: int = 65,
) -> tuple[np.ndarray, bytes]:
    """The field's photo of a cube (H, W, bands): camera, exposure, Poisson noise, clip, 8 bit,
    JPEG. Linear light, no gamma.

    exposure: a fixed gain (1: perfect white is full scale), or None: mean signal 0.18 of full
    scale, another gain for each scene. electrons: photo-electrons at full scale, 0 for no noise.
    -> (uint8 (H, W, 3), the bytes of the JPEG file)."""
    signal = np.maximum(cube.astype(np.float32, copy=False) @ response.astype(np.float32), 0)
    if exposure is None:
        exposure = MEAN_SIGNAL / max(float(signal.mean()), 1e-9)
    signal *= exposure
    if electrons:
        signal = rng.poisson(np.minimum(signal, CLIP_MARGIN) * electrons) / electrons
    frame = np.rint(np.clip(signal, 0, 1) * 255).astype(np.uint8)
    return _as_jpeg(frame, jpeg_quality)


def ordinary_photo(
    cube: np.ndarray, response: np.ndarray, *, rng: np.random.Generator
) -> tuple[np.ndarray, bytes]:
    """An sRGB photo of a cube (H, W, bands) as cameras and phones deliver them: white balance off
    by some per cent, photon noise, clipping, gamma, 8 bit, JPEG of quality 70 to 95.

    -> (uint8 (H, W, 3), the bytes of the JPEG file)."""
    signal = np.maximum(cube.astype(np.float32, copy=False) @ response.astype(np.float32), 0)
    signal *= np.exp(rng.normal(0, (0.02, 0.0, 0.02))).astype(np.float32)
    electrons = np.exp(rng.uniform(np.log(1500), np.log(30000)))
    signal = rng.poisson(np.minimum(signal, CLIP_MARGIN) * electrons) / electrons
    frame = np.rint(encode_srgb(np.clip(signal, 0, 1)) * 255).astype(np.uint8)
    return _as_jpeg(frame, int(rng.integers(70, 96)))


def _as_jpeg(frame: np.ndarray, quality: int) -> tuple[np.ndarray, bytes]:
    """The frame as a JPEG file gives it back, and that file's bytes."""
    encoded = io.BytesIO()
    Image.fromarray(frame).save(encoded, "JPEG", quality=quality)
    return np.asarray(Image.open(encoded).convert("RGB")), encoded.getvalue()


def cube_to_srgb(cube: np.ndarray, wavelengths: Wavelengths) -> np.ndarray:
    """A picture to look at, uint8 sRGB (H, W, 3), of a cube (H, W, bands) in [0, 1].

    The cube is taken as reflectance in daylight (D65), seen by the CIE 1931 observer, for which
    sRGB is defined; a flat spectrum of 1 is white. Bands that miss red, green or blue are shown in
    false colour: a long, a middle and a short one."""
    nm = np.asarray(wavelengths, np.float64)
    if nm.min() > 500 or nm.max() < 600 or len(nm) < 3:
        order = np.argsort(nm)
        bands = order[[-1 - len(nm) // 6, len(nm) // 2, len(nm) // 6]]
        picture = np.clip(cube[..., bands].astype(np.float32), 0, 1)
    else:
        linear = cube.astype(np.float32, copy=False) @ _srgb_response(tuple(nm.tolist()))
        picture = encode_srgb(np.clip(linear, 0, 1))
    return np.rint(picture * 255).astype(np.uint8)


def encode_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] -> sRGB values in [0, 1] (IEC 61966-2-1)."""
    import colour

    return colour.cctf_encoding(linear, "sRGB")


@functools.cache
def decoding_table(levels: int) -> np.ndarray:
    """Linear light (levels,) float32 in [0, 1] of each sRGB value of 8 or 16 bits."""
    import colour

    return colour.cctf_decoding(np.linspace(0, 1, levels), "sRGB").astype(np.float32)


def linear_light(rgb: np.ndarray) -> np.ndarray:
    """sRGB values, uint8 or uint16 of any shape -> linear light in [0, 1], float32."""
    return decoding_table(np.iinfo(rgb.dtype).max + 1)[rgb]


@functools.lru_cache(maxsize=16)
def _srgb_response(wavelengths: tuple[float, ...]) -> np.ndarray:
    """Weights (bands, 3) that make linear sRGB of reflectance in daylight."""
    import colour

    nm = np.array(wavelengths)
    daylight = colour.SDS_ILLUMINANTS["D65"]
    light = np.interp(nm, daylight.wavelengths, daylight.values)
    response = _interpolate(nm, _table("cie1931")) * (light * _band_widths(nm))[:, None]
    srgb = colour.RGB_COLOURSPACES["sRGB"]
    white = colour.xy_to_XYZ(srgb.whitepoint)
    to_xyz = response / response.sum(axis=0) * white
    weights = to_xyz @ srgb.matrix_XYZ_to_RGB.T
    return (weights / weights.sum(axis=0)).astype(np.float32)  # the matrix has four decimals
