"""Cube to RGB: cameras, observers, the field's rendering of a photo, sRGB pictures to look at."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from common_utils_v32 import UserError

# CIE 1964 10-degree colour matching functions x10, y10, z10 (CIE 15, Colorimetry), 380 to 780 nm, step 10 nm.
CIE_1964 = (
    np.arange(380.0, 781.0, 10.0),
    np.array(
        [
            [
                0.00016,
                0.002362,
                0.01911,
                0.084736,
                0.204492,
                0.314679,
                0.383734,
                0.370702,
                0.302273,
                0.195618,
                0.080507,
                0.016172,
                0.003816,
                0.037465,
                0.117749,
                0.236491,
                0.376772,
                0.529826,
                0.705224,
                0.878655,
                1.01416,
                1.11852,
                1.12399,
                1.03048,
                0.856297,
                0.647467,
                0.431567,
                0.268329,
                0.152568,
                0.081261,
                0.040851,
                0.019941,
                0.009577,
                0.004553,
                0.002175,
                0.001045,
                0.000508,
                0.000251,
                0.000126,
                6.5e-05,
                3.3e-05,
            ],
            [
                1.7e-05,
                0.000253,
                0.002004,
                0.008756,
                0.021391,
                0.038676,
                0.062077,
                0.089456,
                0.128201,
                0.18519,
                0.253589,
                0.339133,
                0.460777,
                0.606741,
                0.761757,
                0.875211,
                0.961988,
                0.991761,
                0.99734,
                0.955552,
                0.868934,
                0.777405,
                0.658341,
                0.527963,
                0.398057,
                0.283493,
                0.179828,
                0.107633,
                0.060281,
                0.0318,
                0.015905,
                0.007749,
                0.003718,
                0.001768,
                0.000846,
                0.000407,
                0.000199,
                9.8e-05,
                5e-05,
                2.5e-05,
                1.3e-05,
            ],
            [
                0.000705,
                0.010482,
                0.086011,
                0.389366,
                0.972542,
                1.55348,
                1.96728,
                1.9948,
                1.74537,
                1.31756,
                0.772125,
                0.415254,
                0.218502,
                0.112044,
                0.060709,
                0.030451,
                0.013676,
                0.003988,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
            ],
        ]
    ).T,
)
XYZ_TO_SRGB = np.array(
    [[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]]
)
D65_XYZ = np.array([0.9505, 1.0, 1.0890])  # both IEC 61966-2-1
# Two cameras of our own as lobes (height, peak nm, width nm below it, width nm above it): the piecewise Gaussians of Wyman et
# al., "Simple Analytic Approximations to the CIE XYZ Color Matching Functions", JCGT 2(2), 2013, eq. 4; overlaps and side lobes
# as in Jiang et al., "What is the Space of Spectral Sensitivity Functions for Digital Color Cameras?", WACV 2013.
CAMERAS = {
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


def sum_of_lobes(nm: np.ndarray, lobes: list[tuple[float, float, float, float]]) -> np.ndarray:
    """A smooth spectrum: piecewise Gaussians (height, peak, width below, width above), in nm."""
    return sum(
        a * np.exp(-0.5 * ((nm - peak) / np.where(nm < peak, low, high)) ** 2)
        for a, peak, low, high in lobes
    )


def camera_response(camera: str, wavelengths: list[float] | np.ndarray) -> np.ndarray:
    """Weights (bands, 3) that make R, G, B of a spectrum: band width x sensitivity, with the gain at which a perfect
    white (all bands 1) is 1. camera: `analytic`, `analytic2`, `cie1964`, or a CSV file with rows nm,r,g,b."""
    nm = np.asarray(wavelengths, np.float64)
    if camera in CAMERAS:
        response = np.stack([sum_of_lobes(nm, lobes) for lobes in CAMERAS[camera]], axis=1)
    else:
        at, table = CIE_1964 if camera == "cie1964" else _read_camera_csv(camera)
        response = np.stack(
            [np.interp(nm, at, column, left=0.0, right=0.0) for column in table.T], axis=1
        )
    response = response * (np.abs(np.gradient(nm)) if len(nm) > 1 else 1.0)[:, None]
    total = response.sum(axis=0)
    if not (total > 1e-6).all():
        raise UserError(
            f"camera {camera}: channel {'RGB'[int(np.argmin(total))]} sees nothing of "
            f"{nm.min():g}-{nm.max():g} nm; choose another camera"
        )
    return response / total


def _read_camera_csv(path: str) -> tuple[np.ndarray, np.ndarray]:
    if not Path(path).is_file():
        raise UserError(
            f"camera {path}: choose {', '.join(CAMERAS)}, cie1964, or a CSV file with rows nm,r,g,b"
        )
    try:
        table = np.genfromtxt(path, delimiter=",", dtype=np.float64, ndmin=2)
    except ValueError as error:
        raise UserError(f"camera {path}: {error}; rows must be nm,r,g,b") from None
    table = table[1:] if np.isnan(table[:1]).all() else table  # a header line
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
    electrons: float = 750,
    jpeg_quality: int = 65,
) -> tuple[np.ndarray, bytes]:
    """The field's photo of a cube (H, W, bands): camera, exposure, Poisson noise, clip, 8 bit, JPEG. Linear, no gamma.

    exposure: a fixed gain (1: perfect white is full scale), or None: mean signal 0.18 of full scale, another brightness
    for each scene. electrons: photo-electrons at full scale, 0 for no noise. -> (uint8 (H, W, 3), the JPEG file)."""
    signal = np.maximum(cube.astype(np.float32, copy=False) @ response.astype(np.float32), 0)
    signal *= 0.18 / max(float(signal.mean()), 1e-9) if exposure is None else exposure
    if electrons:
        signal = (
            rng.poisson(np.minimum(signal, 4.0) * electrons) / electrons
        )  # 4: well above the clip
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
    linear = np.clip(
        cube.astype(np.float32, copy=False) @ (xyz @ XYZ_TO_SRGB.T).astype(np.float32), 0, 1
    )
    gamma = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(gamma * 255).astype(np.uint8)
