"""The protocol's metrics, their intervals, records of a scene, summaries, tables and figures, of arrays and plain records.

Metrics take (C, H, W) or (1, C, H, W) tensors in any memory layout and compute in float64, as defined by the NTIRE 2022
spectral reconstruction challenge (run by the MST++ toolbox), with a floor on MRAE's denominator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from camera_colour import cube_to_srgb
from common_utils_v32 import UserError, atomic_write, write_json, write_text
from cube_files import blocks

COVERAGES = (
    10,
    20,
    30,
    40,
    50,
    60,
    70,
    80,
    90,
    95,
)  # percent, nominal intervals of the calibration


# Of (C, H, W) or (1, C, H, W) tensors in any memory layout, in float64, as defined by the NTIRE 2022 spectral reconstruction
# challenge (run by the MST++ toolbox), with a floor on MRAE's denominator.
def _pair(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    pred, target = pred.detach().double(), target.detach().double()
    if pred.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(pred.shape)} and target {tuple(target.shape)} differ in shape"
        )
    return (pred[0], target[0]) if pred.ndim == 4 else (pred, target)


def mrae(pred: Tensor, target: Tensor, floor: float = 1e-6) -> float:
    """Mean relative absolute error: mean(|pred - target| / max(target, floor))."""
    pred, target = _pair(pred, target)
    return ((pred - target).abs() / target.clamp_min(floor)).mean().item()


def rmse(pred: Tensor, target: Tensor) -> float:
    """Root mean squared error over all pixels and bands."""
    pred, target = _pair(pred, target)
    return (pred - target).square().mean().sqrt().item()


def psnr(pred: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, both clamped to [0, 1], peak 1."""
    error = rmse(pred.clamp(0, 1), target.clamp(0, 1))
    return -20 * math.log10(error) if error else math.inf


def sam(pred: Tensor, target: Tensor, dark: float = 0.01) -> float:
    """Mean spectral angle in degrees over the pixels whose mean target is above `dark` (a black one has no angle), or NaN."""
    pred, target = _pair(pred, target)
    lit = target.mean(dim=0) > dark
    a, b = F.normalize(pred[:, lit], dim=0), F.normalize(target[:, lit], dim=0)
    # atan2 of the two half-angle chords stays exact near 0, where acos of a rounded cosine gives 1e-6 degrees of noise
    return torch.rad2deg(2 * torch.atan2((a - b).norm(dim=0), (a + b).norm(dim=0))).mean().item()


def ergas(pred: Tensor, target: Tensor) -> float:
    """Relative dimensionless global error in synthesis (Wald 2000), ratio 1, in percent; bands of mean zero are left out."""
    pred, target = _pair(pred, target)
    mean = target.mean(dim=(1, 2))
    ratio = (pred - target).square().mean(dim=(1, 2))[mean > 0] / mean[mean > 0].square()
    return 100 * ratio.mean().sqrt().item()


def ssim(pred: Tensor, target: Tensor) -> float:
    """Structural similarity, 11x11 Gaussian window, peak 1, mean over bands (torchmetrics)."""
    try:
        from torchmetrics.functional.image import (
            structural_similarity_index_measure as torchmetrics_ssim,
        )
    except ImportError:
        raise UserError("SSIM needs torchmetrics: pip install -r requirements-extra.txt") from None
    pred, target = (x[None].float().contiguous().clamp(0, 1) for x in _pair(pred, target))
    return torchmetrics_ssim(pred, target, data_range=1.0).item()


def crop_border(height: int, width: int, border: int = 128) -> tuple[int, int]:
    """Border removed before scoring, in pixels per side; a quarter of the side on sides under 320 pixels."""
    return tuple(min(border, side // 4) if side < 320 else border for side in (height, width))


def centre_crop(x: Tensor, border: int = 128) -> Tensor:
    """The protocol's centre: the border removed from the last two dimensions (226 x 256 of 482 x 512)."""
    height, width = x.shape[-2:]
    bh, bw = crop_border(height, width, border)
    if border < 0 or 2 * bh >= height or 2 * bw >= width:
        raise UserError(
            f"a crop border of {border} px of a frame of {height} x {width}: give one from 0 to what leaves pixels"
        )
    return x[..., bh : height - bh, bw : width - bw]


def scene_metrics(
    pred: Tensor, target: Tensor, *, floor: float = 1e-6, border: int = 128, with_ssim: bool = False
) -> dict:
    """All metrics of one scene: of the centre crop, and with `_full` of the whole frame; MRAE with floors 0.01 and 1e-6 too."""
    result: dict[str, Any] = {}
    for suffix, p, t in (
        ("", centre_crop(pred, border), centre_crop(target, border)),
        ("_full", pred, target),
    ):
        scores = {
            "mrae": mrae(p, t, floor),
            "rmse": rmse(p, t),
            "psnr": psnr(p, t),
            "sam": sam(p, t),
            "ergas": ergas(p, t),
            "mrae_floor_0.01": mrae(p, t, 0.01),
            "mrae_floor_1e-06": mrae(p, t, 1e-6),
        }
        if with_ssim:
            scores["ssim"] = ssim(p, t)
        result |= {name + suffix: value for name, value in scores.items()}
    return result | {"border": list(crop_border(*target.shape[-2:], border)), "metric_floor": floor}


def per_band_metrics(pred: Tensor, target: Tensor, floor: float = 1e-6) -> dict[str, list[float]]:
    """MRAE, RMSE, PSNR, ERGAS and SSIM of every band (one band has no spectral angle)."""
    bands = [(p[None], t[None]) for p, t in zip(*_pair(pred, target), strict=True)]
    return {"mrae": [mrae(*band, floor) for band in bands]} | {
        metric.__name__: [metric(*band) for band in bands] for metric in (rmse, psnr, ergas, ssim)
    }


def mean_metrics(scenes: list[dict]) -> dict[str, float]:
    """Mean over scenes of every number that scene_metrics gives; a black scene has no angle and is left out of SAM's."""
    columns = {
        name: [scene[name] for scene in scenes]
        for name, value in scenes[0].items()
        if isinstance(value, float)
    }
    return {
        name: float((np.nanmean if name.startswith("sam") else np.mean)(column))
        for name, column in columns.items()
    }


def bootstrap_interval(
    values: list[float], samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over scenes; a NaN (SAM of a scene without a lit pixel) is left out."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    draws = values[
        np.random.default_rng(seed).integers(0, len(values), (samples, len(values)))
    ].mean(axis=1)
    return tuple(np.percentile(draws, [2.5, 97.5]).tolist())


def scene_figure(
    rgb: Tensor, pred: Tensor, target: Tensor, wavelengths: list[float], title: str = "RGB"
) -> Any:
    """A matplotlib figure of one scene, all (C, H, W): a picture, the prediction rendered, its error, and spectra."""
    from matplotlib.figure import (
        Figure,
    )  # no pyplot: it would choose a backend for the whole process

    figure = Figure(figsize=(16, 4), layout="constrained")
    axes = figure.subplots(1, 4)
    axes[0].imshow(rgb.movedim(0, -1).clamp(0, 1).numpy())
    axes[1].imshow(cube_to_srgb(pred.movedim(0, -1).numpy(), np.asarray(wavelengths)))
    error = ((pred - target).abs() / target.clamp_min(0.01)).mean(0)
    figure.colorbar(axes[2].imshow(error.numpy(), vmin=0, vmax=0.5, cmap="magma"), ax=axes[2])
    h, w = target.shape[1:]
    for i, (y, x) in enumerate([(h // 4, w // 4), (h // 2, w // 2), (3 * h // 4, w // 3)]):
        axes[3].plot(wavelengths, target[:, y, x].numpy(), f"C{i}-", label=f"({x}, {y}) measured")
        axes[3].plot(wavelengths, pred[:, y, x].numpy(), f"C{i}--", label="predicted")
        axes[0].plot(x, y, f"C{i}o")
    axes[3].set_xlabel("wavelength (nm)")
    axes[3].legend(fontsize=7)
    for axis, name in zip(axes, (title, "prediction", "relative error", "spectra"), strict=True):
        axis.set_title(name)
    return figure


@contextmanager
def figure(path: str | Path, columns: int, width: float, height: float) -> Iterator[np.ndarray]:
    """Axes in a row to draw on; written as PNG in the end."""
    from matplotlib.figure import (
        Figure,
    )  # not pyplot, which chooses a backend for the whole process

    sheet = Figure(figsize=(width, height), layout="constrained")
    yield sheet.subplots(1, columns, squeeze=False)[0]
    atomic_write(path, lambda file: sheet.savefig(file, format="png", dpi=110))


def write_preview(
    stem: Path, cube: np.ndarray, wavelengths: list[float], points: list[tuple[int, int]]
) -> None:
    """_preview.png (sRGB), _bands.png (a montage), _spectra.png at points (x, y)."""
    (bands, height, width), columns = cube.shape, math.ceil(math.sqrt(len(cube)))
    step, rows = math.ceil(max(height, width) / 2048), math.ceil(bands / columns)
    small = np.stack([cube[band, ::step, ::step].copy() for band, _ in blocks(cube, height)])
    picture = cube_to_srgb(small.transpose(1, 2, 0), wavelengths)
    atomic_write(f"{stem}_preview.png", lambda file: Image.fromarray(picture).save(file, "png"))
    small = np.pad(small[:, ::2, ::2], [(0, rows * columns - bands), (0, 0), (0, 0)])
    h, w = small.shape[1:]
    sheet = small.reshape(rows, columns, h, w).swapaxes(1, 2).reshape(rows * h, columns * w)
    with figure(f"{stem}_bands.png", 1, 12, min(40, 12 * rows * h / (columns * w))) as (axis,):
        axis.imshow(sheet, cmap="gray", vmin=0, vmax=float(np.percentile(small[:bands], 99.5)))
        axis.set(xticks=[], yticks=[])
        for i, wavelength in enumerate(wavelengths):
            axis.text(
                i % columns * w,
                i // columns * h,
                f"{wavelength:g} nm",
                color="w",
                backgroundcolor="k",
                va="top",
            )
    with figure(f"{stem}_spectra.png", 2, 10, 4) as (left, right):
        left.imshow(picture)
        left.set(xticks=[], yticks=[])
        for x, y in points or [
            (width * c // 6, height * r // 4) for r in (1, 3) for c in (1, 3, 5)
        ]:
            (line,) = right.plot(wavelengths, cube[:, y, x], label=f"x {x}, y {y}")
            left.plot(x / step, y / step, "o", color=line.get_color(), markeredgecolor="white")
        right.set(xlabel="wavelength, nm")
        right.legend(fontsize=8)


def laplace_calibration(
    pred: Tensor, target: Tensor, scale: Tensor
) -> tuple[dict[str, float], list[list[float]]]:
    """How far the scale of a Laplace distribution, P(|error| <= t) = 1 - exp(-t / scale), tells the error: the shares of
    values inside the intervals of COVERAGES, and [mean scales, mean absolute errors] of ten parts, the surest first."""
    error = (pred - target).abs()
    ratio, tenths = error / scale, scale.flatten().argsort().tensor_split(10)
    inside = {
        f"coverage_{p}": float((ratio <= -math.log(1 - p / 100)).double().mean()) for p in COVERAGES
    }
    return inside, [[float(x.flatten()[part].mean()) for part in tenths] for x in (scale, error)]


def scene_bands(pred: Tensor, target: Tensor, floor: float) -> dict[str, list[float]]:
    """per_band_metrics of the centre crop, and with `_full` of the whole frame."""
    bands = per_band_metrics(centre_crop(pred), centre_crop(target), floor)
    return bands | {
        f"{key}_full": values for key, values in per_band_metrics(pred, target, floor).items()
    }


def summarise(records: list[dict], facts: dict, folder: Path) -> dict:
    """metrics.csv, summary.json (means over scenes with bootstrap intervals, per band, costs) and the figures.

    records: one of each scene, its metrics and `bands`, `seconds`, `tile`, `reliability`. facts: what else the summary says;
    `wavelengths` and `metric_floor` are needed. The cubes of the scenes are in <folder>/hsi."""
    bands, seconds, tiles, reliability = (
        [record.pop(key) for record in records]
        for key in ("bands", "seconds", "tile", "reliability")
    )
    mean = {key: value for key, value in mean_metrics(records).items() if key != "metric_floor"}
    ordered = [record["scene_id"] for record in sorted(records, key=lambda record: record["mrae"])]
    summary = facts | {
        "tile": min(filter(None, tiles), default=None),  # None: whole frames
        "scenes": len(records),
        "border": records[0]["border"],
        "mean": mean,
        "interval_95": {
            key: bootstrap_interval([record[key] for record in records]) for key in mean
        },
        "per_band": {key: np.mean([b[key] for b in bands], 0).tolist() for key in bands[0]},
        "seconds_per_frame": float(np.median(seconds)),
        "best": ordered[0],
        "worst": ordered[-1],
    }
    if reliability[0]:
        summary["calibration"] = dict(
            zip(("scale", "mean_absolute_error"), np.mean(reliability, 0).tolist(), strict=True)
        )
    cells = [
        records[0],
        *([f'"{v}"' if "," in str(v) else str(v) for v in record.values()] for record in records),
    ]
    write_text(folder / "metrics.csv", "".join(",".join(row) + "\n" for row in cells))
    write_json(folder / "summary.json", summary)
    for rank in ("best", "worst"):
        write_scene_figure(folder, summary[rank], rank, summary["wavelengths"])
    write_curves(folder / "figures" / "curves.png", summary)
    return summary


def write_scene_figure(folder: Path, scene: str, name: str, wavelengths: list[float]) -> None:
    """figures/<name>.png of a scene whose cubes are in <folder>/hsi."""
    cube, target = (
        torch.from_numpy(np.load(folder / "hsi" / f"{scene}{end}.npy")) for end in ("", "_target")
    )
    seen = (
        torch.from_numpy(cube_to_srgb(target.movedim(0, -1).numpy(), wavelengths)).movedim(-1, 0)
        / 255
    )
    sheet = scene_figure(seen, cube, target, wavelengths, f"{scene}, measured")
    atomic_write(folder / "figures" / f"{name}.png", partial(sheet.savefig, format="png", dpi=110))


def write_curves(path: Path, summary: dict) -> None:
    """Metrics per band, and the calibration where there is one."""
    inside = {
        p: 100 * summary["mean"][f"coverage_{p}"]
        for p in COVERAGES
        if f"coverage_{p}" in summary["mean"]
    }
    with figure(path, 5, 20, 3.6) as axes:
        for axis, (key, values) in zip(axes[:3], summary["per_band"].items(), strict=False):
            axis.plot(summary["wavelengths"], values, marker=".")
            axis.set(xlabel="wavelength, nm", title=f"{key.upper()} per band")
        axes[3].plot([0, 100], [0, 100], "k:", list(inside), list(inside.values()), "o-")
        axes[3].set(
            xlabel="nominal interval, %",
            title="values inside, %" if inside else "no calibration: no scale",
        )
        if "calibration" in summary:
            scale, error = summary["calibration"].values()
            axes[4].loglog(scale, scale, "k:", scale, error, "o-")
            axes[4].set(xlabel="predicted scale, tenths of the values", title="mean absolute error")


def markdown_table(rows: list[dict]) -> str:
    """One line for each row, floats with four digits."""
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    cells = (
        [f"{cell:.4f}" if isinstance(cell, float) else cell for cell in line] for line in lines
    )
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def report(summaries: list[dict], stress: list[dict], output: Path) -> None:
    """table.md, for several models summary.json, and stress.* where there are rows of it; tables are printed too."""
    rows, first = [], summaries[0]
    for s in summaries:
        rows.append(
            {
                "model": f"{s['name']} ({s['weights']} weights, rgb {s['rgb_norm']}{', 8 views' * s['ensemble']})"
            }
            | {
                key: "{:.4f} [{:.4f}, {:.4f}]".format(s["mean"][key], *s["interval_95"][key])
                for key in ("mrae", "rmse", "psnr", "sam", "ssim", "ergas", "mrae_full", "sam_full")
            }
            | {
                "params M": f"{s['parameters'] / 1e6:.2f}",
                "GMAC 256x256": f"{s['macs_256'] / 1e9:.2f}",
                "s/frame": f"{s['seconds_per_frame']:.3f}",
                "peak MB": f"{s['peak_memory_mb']:.0f}",
            }
        )
    header = (
        f"{first['scenes']} scenes of {first['split']}, mean [95 % interval], {first['border']} px of border "
        f"left out (`_full`: none), MRAE floor {first['metric_floor']:g}"
    )
    text = f"{header}\n\n{markdown_table(rows)}"
    write_text(output / "table.md", text)
    print(text)
    if len(summaries) > 1:
        write_json(output / "summary.json", {"models": summaries})
    if stress:
        norms = ", ".join(dict.fromkeys(s["rgb_norm"] for s in summaries))
        write_text(output / "stress.md", f"{header}, rgb_norm {norms}\n\n{markdown_table(stress)}")
        write_json(output / "stress.json", {"metric_floor": first["metric_floor"], "rows": stress})
        print(markdown_table(stress))
        write_stress_figure(
            output / "figures" / "stress.png", [s["name"] for s in summaries], stress
        )


def write_stress_figure(path: Path, names: list[str], stress: list[dict]) -> None:
    with figure(path, 2, 12, 4.5) as axes:
        for axis, key in zip(axes, ("mrae", "sam"), strict=True):
            for name in names:
                mine = {row["change"]: row[key] for row in stress if row["model"] == name}
                axis.plot(list(mine.values()), list(mine), "o-", label=name)
            axis.set(xlabel=key.upper())
            axis.legend()
