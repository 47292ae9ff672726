"""Draws the pictures of README.md and docs/: the diagrams as SVG, and what the shipped weights do.

python docs/draw.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from camera_colour import camera_response, cube_to_srgb, ordinary_photo  # noqa: E402
from measured_spectra import WAVELENGTHS  # noqa: E402
from sharp_inference import load_model, predict_image  # noqa: E402
from synthetic_scenes import synthetic_cube  # noqa: E402

HERO_SEED, HERO_SIZE = 999, (256, 320)  # a scene that no weights were trained on
POINTS = ((60, 50), (230, 150), (150, 210), (290, 70))  # x, y
BANDS = (5, 15, 25)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito 2008
BLUE, GREEN, SAND = "#dbe9f4", "#ddefe3", "#f6ead3"
plt.rcParams["svg.hashsalt"] = "draw"  # the same file each time


def hero() -> None:
    """Photo, bands, error and spectra of one synthetic scene, by the weights that ship."""
    rng = np.random.default_rng(HERO_SEED)
    cube = synthetic_cube(rng, *HERO_SIZE, neutral=True)
    photo, _ = ordinary_photo(cube, camera_response("srgb", WAVELENGTHS), rng=rng)
    predicted, nm = predict_image(load_model(), photo)
    predicted = predicted.transpose(1, 2, 0)
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.6), layout="constrained")
    shown = [("photo", photo), ("predicted cube in daylight", cube_to_srgb(predicted, nm))]
    shown += [(f"predicted, {nm[band]:.0f} nm", predicted[..., band] ** 0.5) for band in BANDS]
    error = (np.abs(predicted - cube) / np.maximum(cube, 0.01)).mean(-1)
    for axis, (title, picture) in zip(axes.flat, shown, strict=False):
        axis.imshow(picture, cmap="gray")
        axis.set_title(title, fontsize=10)
    for (x, y), colour in zip(POINTS, COLOURS, strict=True):
        axes[0, 0].plot(x, y, "o", mfc="none", mec="white", ms=9, mew=3)
        axes[0, 0].plot(x, y, "o", mfc="none", mec=colour, ms=9, mew=1.8)
    bar = figure.colorbar(axes[1, 1].imshow(error, cmap="cividis", vmax=0.5), ax=axes[1, 1])
    bar.ax.tick_params(labelsize=8)
    axes[1, 1].set_title("relative error", fontsize=10)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    grid = axes[1, 2].get_gridspec()
    for axis in axes[1, 2:]:
        axis.remove()
    curves = figure.add_subplot(grid[1, 2:])
    for (x, y), colour in zip(POINTS, COLOURS, strict=True):
        curves.plot(nm, cube[y, x], "--", color=colour, lw=1.3)
        curves.plot(nm, predicted[y, x], color=colour, lw=1.8)
    curves.set_title("spectra of four points: predicted, and dashed the true ones", fontsize=10)
    curves.set_xlabel("nm")
    curves.grid(alpha=0.3)
    figure.savefig(HERE / "hero.png", dpi=110)
    plt.close(figure)


def box(axes: plt.Axes, x: float, y: float, text: str, colour: str, width: float = 2.0) -> None:
    shape = FancyBboxPatch((x, y), width, 0.8, boxstyle="round,pad=0.05", fc=colour, ec="#555555")
    axes.add_patch(shape)
    axes.text(x + width / 2, y + 0.4, text, ha="center", va="center", fontsize=9)


def arrow(axes: plt.Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#333333"})


def sheet(width: float, height: float) -> tuple[plt.Figure, plt.Axes]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(HERE / name, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def data_flow() -> None:
    figure, axes = sheet(11, 2.6)
    steps = [
        ("raw cubes, photos\n.mat ENVI TIFF .h5 ...", SAND),
        ("dataset_setup.py\nchecked, staged", BLUE),
        ("*_training.py\ncheckpoints, log", BLUE),
        ("sharp_inference.py\ncubes, report.html", BLUE),
    ]
    for number, (text, colour) in enumerate(steps):
        box(axes, 0.1 + 2.75 * number, 1.5, text, colour, 2.2)
        if number:
            arrow(axes, (2.75 * number - 0.4, 1.9), (2.75 * number + 0.02, 1.9))
    box(axes, 2.85, 0.2, "--synthetic\nno data needed", SAND, 2.2)
    box(axes, 8.35, 0.2, "a photo\nand weights/", SAND, 2.2)
    arrow(axes, (3.95, 1.05), (3.95, 1.42))
    arrow(axes, (9.45, 1.05), (9.45, 1.42))
    save(figure, "data_flow.svg")


def models() -> None:
    """Both models: the same way from pixels to spectra, with other blocks in the U-net."""
    figure, axes = sheet(11, 4.4)
    box(axes, 0.1, 3.3, "RGB\nlinear light", SAND, 1.4)
    box(axes, 2.0, 3.3, "colour features\nx, chroma, logs", GREEN, 1.9)
    box(axes, 4.4, 3.3, "U-net at 1/2, 1/4, 1/8\nof the resolution", BLUE, 2.4)
    box(axes, 7.3, 3.3, "pixel network, steered\nby the U-net", GREEN, 2.2)
    box(axes, 7.3, 2.0, "gain and term, mixed\nfrom 12 smooth spectra", GREEN, 2.2)
    box(axes, 4.4, 2.0, "direct path: linear map\nfitted in closed form", GREEN, 2.4)
    box(axes, 0.1, 2.0, "cube, 31 bands:\ndirect * exp(gain) + term", SAND, 3.3)
    for start, end in (
        ((1.55, 3.7), (1.92, 3.7)),
        ((3.95, 3.7), (4.32, 3.7)),
        ((6.85, 3.7), (7.22, 3.7)),
        ((8.4, 3.25), (8.4, 2.87)),
        ((7.22, 2.4), (6.88, 2.4)),
        ((4.32, 2.4), (3.48, 2.4)),
    ):
        arrow(axes, start, end)
    box(axes, 0.1, 0.2, "HSIFusionNet: windows with rotary positions | spectral heads", BLUE, 5.0)
    box(axes, 5.4, 0.2, "SHARP: exact top-k and local sparse RBF | spectral heads", BLUE, 5.0)
    axes.text(5.3, 1.3, "A block of the U-net", ha="center", fontsize=9)
    save(figure, "models.svg")


if __name__ == "__main__":
    data_flow()
    models()
    hero()
