"""Cube to RGB: cameras, observers, the field's rendering of a photo, sRGB pictures to look at."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from common_utils_v32 import UserError

# CIE 1964 10-degree colour matching functions x10, y10, z10 (CIE 15, Colorimetry), 380 to 780 nm, step 10 nm.
CIE_1964 = (np.arange(380.0, 781.0, 10.0), np.array([
    [.00016, .002362, .01911, .084736, .204492, .314679, .383734, .370702, .302273, .195618, .080507, .016172, .003816, .037465,
     .117749, .236491, .376772, .529826, .705224, .878655, 1.01416, 1.11852, 1.12399, 1.03048, .856297, .647467, .431567, .268329,
     .152568, .081261, .040851, .019941, .009577, .004553, .002175, .001045, .000508, .000251, .000126, 6.5e-05, 3.3e-05],
    [1.7e-05, .000253, .002004, .008756, .021391, .038676, .062077, .089456, .128201, .18519, .253589, .339133, .460777, .606741,
     .761757, .875211, .961988, .991761, .99734, .955552, .868934, .777405, .658341, .527963, .398057, .283493, .179828, .107633,
     .060281, .0318, .015905, .007749, .003718, .001768, .000846, .000407, .000199, 9.8e-05, 5e-05, 2.5e-05, 1.3e-05],
    [.000705, .010482, .086011, .389366, .972542, 1.55348, 1.96728, 1.9948, 1.74537, 1.31756, .772125, .415254, .218502, .112044,
     .060709, .030451, .013676, .003988, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]).T)
XYZ_TO_SRGB = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
D65_XYZ = np.array([0.9505, 1.0, 1.0890])  # both IEC 61966-2-1
# Two cameras of our own as lobes (height, peak nm, width nm below it, width nm above it): the piecewise Gaussians of Wyman et
# al., "Simple Analytic Approximations to the CIE XYZ Color Matching Functions", JCGT 2(2), 2013, eq. 4; overlaps and side lobes
# as in Jiang et al., "What is the Space of Spectral Sensitivity Functions for Digital Color Cameras?", WACV 2013.
CAMERAS = {
    "analytic": ([(1.0, 602, 22, 36), (0.10, 535, 30, 30), (0.04, 440, 20, 20)],
                 [(1.0, 532, 34, 38), (0.08, 440, 25, 25), (0.05, 640, 30, 30)], [(1.0, 458, 26, 30), (0.07, 530, 25, 35)]),
    "analytic2": ([(1.0, 592, 18, 46), (0.16, 520, 35, 30), (0.10, 430, 20, 25)],
                  [(1.0, 545, 42, 34), (0.14, 470, 30, 25)], [(1.0, 446, 22, 38), (0.12, 545, 30, 40)]),
}


def sum_of_lobes(nm: np.ndarray, lobes: list[tuple[float, float, float, float]]) -> np.ndarray:
    """A smooth spectrum: piecewise Gaussians (height, peak, width below, width above), in nm."""
    return sum(a * np.exp(-0.5 * ((nm - peak) / np.where(nm < peak, low, high)) ** 2) for a, peak, low, high in lobes)


def camera_response(camera: str, wavelengths: list[float] | np.ndarray) -> np.ndarray:
    """Weights (bands, 3) that make R, G, B of a spectrum: band width x sensitivity, with the gain at which a perfect
    white (all bands 1) is 1. camera: `analytic`, `analytic2`, `cie1964`, or a CSV file with rows nm,r,g,b."""
    nm = np.asarray(wavelengths, np.float64)
    if camera in CAMERAS:
        response = np.stack([sum_of_lobes(nm, lobes) for lobes in CAMERAS[camera]], axis=1)
    else:
        at, table = CIE_1964 if camera == "cie1964" else _read_camera_csv(camera)
        response = np.stack([np.interp(nm, at, column, left=0.0, right=0.0) for column in table.T], axis=1)
    response = response * (np.abs(np.gradient(nm)) if len(nm) > 1 else 1.0)[:, None]
    total = response.sum(axis=0)
    if not (total > 1e-6).all():
        raise UserError(f"camera {camera}: channel {'RGB'[int(np.argmin(total))]} sees nothing of "
                        f"{nm.min():g}-{nm.max():g} nm; choose another camera")
    return response / total


def _read_camera_csv(path: str) -> tuple[np.ndarray, np.ndarray]:
    if not Path(path).is_file():
        raise UserError(f"camera {path}: choose {', '.join(CAMERAS)}, cie1964, or a CSV file with rows nm,r,g,b")
    try:
        table = np.genfromtxt(path, delimiter=",", dtype=np.float64, ndmin=2)
    except ValueError as error:
        raise UserError(f"camera {path}: {error}; rows must be nm,r,g,b") from None
    table = table[1:] if np.isnan(table[:1]).all() else table  # a header line
    if len(table) < 2 or table.shape[1] != 4 or not np.isfinite(table).all():
        raise UserError(f"camera {path}: needs two or more rows of four numbers nm,r,g,b")
    table = table[np.argsort(table[:, 0])]
    return table[:, 0], table[:, 1:]


def render_rgb(cube: np.ndarray, response: np.ndarray, *, rng: np.random.Generator, exposure: float | None = None,
               electrons: float = 750, jpeg_quality: int = 65) -> tuple[np.ndarray, bytes]:
    """The field's photo of a cube (H, W, bands): camera, exposure, Poisson noise, clip, 8 bit, JPEG. Linear, no gamma.

    exposure: a fixed gain (1: perfect white is full scale), or None: mean signal 0.18 of full scale, another brightness
    for each scene. electrons: photo-electrons at full scale, 0 for no noise. -> (uint8 (H, W, 3), the JPEG file)."""
    signal = np.maximum(cube.astype(np.float32, copy=False) @ response.astype(np.float32), 0)
    signal *= 0.18 / max(float(signal.mean()), 1e-9) if exposure is None else exposure
    if electrons:
        signal = rng.poisson(np.minimum(signal, 4.0) * electrons) / electrons  # 4: well above the clip
    encoded = io.BytesIO()
    frame = np.rint(np.clip(signal, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(frame).save(encoded, "JPEG", quality=jpeg_quality)
    return np.asarray(Image.open(encoded).convert("RGB")), encoded.getvalue()


def cube_to_srgb(cube: np.ndarray, wavelengths: list[float] | np.ndarray) -> np.ndarray:
    """A picture to look at, uint8 sRGB (H, W, 3), of a cube (H, W, bands) in [0, 1]: the CIE 1964 observer, a flat spectrum of
    1 as D65 white; bands that miss its red, green or blue in false colour, by a long, a middle and a short one."""
    nm = np.asarray(wavelengths, float)
    if nm.min() > 500 or nm.max() < 600 or len(nm) < 3:
        bands = np.argsort(nm)[[-1 - len(nm) // 6, len(nm) // 2, len(nm) // 6]]
        return np.rint(np.clip(cube[..., bands].astype(np.float32), 0, 1) * 255).astype(np.uint8)
    xyz = camera_response("cie1964", nm) * D65_XYZ
    linear = np.clip(cube.astype(np.float32, copy=False) @ (xyz @ XYZ_TO_SRGB.T).astype(np.float32), 0, 1)
    gamma = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(gamma * 255).astype(np.uint8)
