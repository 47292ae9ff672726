"""The generator's scenes beside measured ones, in figures, and a picture of twelve.

    python benchmarks/bench_scenes.py --picture scenes.png
    python benchmarks/bench_scenes.py --data_root data/ARAD_1K     # measured scenes beside them

Neutral scenes are reflectance times shading, as measured sets divided by a white reference
are; lit ones also have the light's colour.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common_utils_v32 as common  # noqa: E402
from camera_colour import camera_response, cube_to_srgb  # noqa: E402
from measured_spectra import WAVELENGTHS  # noqa: E402
from optimized_dataloader import DataConfig, val_loader  # noqa: E402
from synthetic_scenes import synthetic_cube  # noqa: E402

SCENES, SIDE = 40, 128
PIXELS = 4000  # of all scenes, for pairs that a camera cannot tell apart
ALIKE = 0.02  # of the brightness: the largest difference in a camera's channels
DARK = 0.02  # darker pixels have no colour to speak of


def generated(neutral: bool) -> list[np.ndarray]:
    rngs = [np.random.default_rng([5, number]) for number in range(SCENES)]
    return [synthetic_cube(rng, SIDE, SIDE, neutral=neutral) for rng in rngs]


def measured(data_root: str) -> list[np.ndarray]:
    loader = val_loader(DataConfig(data_root=data_root, val_split="train"))
    return [scene.cube[0].permute(1, 2, 0).numpy() for scene in loader]


def figures(cubes: list[np.ndarray]) -> dict[str, str]:
    """Name of each figure -> its value, of scenes (H, W, 31)."""
    rng = np.random.default_rng(0)
    parts = []
    for cube in cubes:
        pixels = cube.reshape(-1, 31)
        parts.append(pixels[rng.integers(len(pixels), size=20_000)])
    pixels = np.concatenate(parts).astype(float)
    energy = np.linalg.eigvalsh(np.cov(pixels.T))[::-1].cumsum()
    energy /= energy[-1]
    brightness = pixels.mean(-1)
    bright = pixels[brightness > DARK]
    rgb = bright @ camera_response("analytic", WAVELENGTHS)
    chroma = np.ptp(rgb, axis=1) / rgb.max(1)
    share, angle = metamers(bright, rgb, rng)
    return {
        "scenes": f"{len(cubes)}",
        "variance in 3, 6, 8 components": ", ".join(f"{energy[n - 1]:.3f}" for n in (3, 6, 8)),
        "mean": f"{pixels.mean():.3f}",
        "brightness, 10, 50, 90 %": quantiles(brightness),
        "share above 0.5": f"{(pixels > 0.5).mean():.3f}",
        "chroma of a camera's RGB, 10, 50, 90 %": quantiles(chroma),
        "700 nm over 680 nm, median": f"{np.median(bright[:, 30] / bright[:, 28].clip(1e-3)):.3f}",
        "pairs alike to a camera that differ by over 5 degrees": f"{share:.3f}",
        "angle of pairs alike to a camera, median, degrees": f"{angle:.2f}",
    }


def quantiles(values: np.ndarray) -> str:
    return ", ".join(f"{value:.3f}" for value in np.quantile(values, (0.1, 0.5, 0.9)))


def metamers(spectra: np.ndarray, rgb: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """Of pairs of pixels whose RGB over its brightness is ALIKE: the share whose spectra differ by
    over 5 degrees, and the median angle."""
    chosen = rng.choice(len(rgb), PIXELS)
    colour = rgb[chosen] / rgb[chosen].mean(1, keepdims=True)
    unit = spectra[chosen] / np.linalg.norm(spectra[chosen], axis=1, keepdims=True)
    angles = []
    for row in range(PIXELS - 1):
        near = np.abs(colour[row + 1 :] - colour[row]).max(1) < ALIKE
        cosine = unit[row + 1 :][near] @ unit[row]
        angles.append(np.degrees(np.arccos(cosine.clip(-1, 1))))
    found = np.concatenate(angles)
    return float((found > 5).mean()), float(np.median(found))


def draw(path: Path) -> None:
    """Twelve scenes as pictures, the lower six in neutral light."""
    rows = []
    for neutral in (False, True):
        pictures = []
        for number in range(6):
            rng = np.random.default_rng([9, number])
            cube = synthetic_cube(rng, 192, 192, neutral=neutral)
            pictures.append(cube_to_srgb(cube, WAVELENGTHS))
        rows.append(np.concatenate(pictures, axis=1))
    from PIL import Image

    Image.fromarray(np.concatenate(rows)).save(path)


def main() -> None:
    parser = common.CliParser(description=__doc__)
    parser.add_argument("--data_root", help="measured scenes, raw or staged")
    parser.add_argument("--picture", type=Path, help="where to write a picture of twelve scenes")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    columns = {"neutral": figures(generated(True)), "lit": figures(generated(False))}
    if args.data_root:
        columns["measured"] = figures(measured(args.data_root))
    print(f"| | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for name in columns["neutral"]:
        print(f"| {name} | {' | '.join(column[name] for column in columns.values())} |")
    if args.picture:
        draw(args.picture)
    if args.json:
        common.write_json(args.json, columns)


if __name__ == "__main__":
    common.run_cli(main)
