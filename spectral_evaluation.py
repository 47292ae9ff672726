"""The protocol's metrics, their intervals, records of a scene, summaries, tables and figures: of
arrays and plain records.

Metrics take (C, H, W) or (1, C, H, W) tensors in any memory layout and compute in float64, as
defined by the NTIRE 2022 spectral reconstruction challenge (run by the MST++ toolbox), with a floor
on MRAE's denominator."""

import csv
import io
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

import terminal
from camera_colour import camera_response, cube_to_srgb, render_rgb
from common_utils_v32 import UserError, atomic_write, write_json, write_text
from cube_files import blocks

BORDER = 128  # pixels that the protocol leaves out on each side
SMALL_SIDE = 320  # pixels; on shorter sides the border is a quarter of them
FLOORS = (0.01, 1e-6)  # of MRAE, reported beside the chosen one
COVERAGES = (10, 20, 30, 40, 50, 60, 70, 80, 90, 95)  # percent, nominal intervals
SAMPLES = 2000  # of a bootstrap
HEADLINE = ("mrae", "rmse", "psnr", "sam", "ssim", "ergas", "mrae_full", "sam_full")
SHEET_SCENES = 12  # that a contact sheet shows
# Told apart with every kind of colour vision (Okabe and Ito 2008), the pale ones darkened.
COLOURS = ("#0072B2", "#D55E00", "#1B1B1B", "#009E73", "#BE5C98", "#6E5600")
CLEARLY_MORE = 0.2  # correlation with the photo, of a cube turned over the cube as it stands
PREVIEW_SIDE = 2048  # pixels, of a picture's longer side at most
# Changes of the field's recipe for a photo, one at a time.
STRESS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "exposure 0.25": {"exposure": 0.25},
    "exposure 0.5": {"exposure": 0.5},
    "exposure 2.0": {"exposure": 2.0},
    "exposure 4.0": {"exposure": 4.0},
    "electrons 5000": {"electrons": 5000},
    "electrons 200": {"electrons": 200},
    "electrons 50": {"electrons": 50},
    "jpeg_quality 95": {"jpeg_quality": 95},
    "jpeg_quality 30": {"jpeg_quality": 30},
    "jpeg_quality 10": {"jpeg_quality": 10},
    "camera analytic2": {"camera": "analytic2"},
    "camera nikon5100": {"camera": "nikon5100"},
    "camera cie1931": {"camera": "cie1931"},
    "camera cie1964": {"camera": "cie1964"},
}


def _pair(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (C, H, W) float64."""
    if pred.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(pred.shape)} and target {tuple(target.shape)} differ in shape"
        )
    pred, target = pred.detach().double(), target.detach().double()
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
    """Mean spectral angle in degrees over pixels of a mean target above `dark`; NaN without any."""
    pred, target = _pair(pred, target)
    lit = target.mean(dim=0) > dark
    a, b = F.normalize(pred[:, lit], dim=0), F.normalize(target[:, lit], dim=0)
    # atan2 of the two half-angle chords stays exact near 0, where acos of a rounded cosine gives
    # 1e-6 degrees of noise.
    angle = 2 * torch.atan2((a - b).norm(dim=0), (a + b).norm(dim=0))
    return torch.rad2deg(angle).mean().item()


def ergas(pred: Tensor, target: Tensor) -> float:
    """Relative global error in synthesis (Wald 2000), ratio 1, percent; no bands of mean 0."""
    pred, target = _pair(pred, target)
    mean = target.mean(dim=(1, 2))
    squared = (pred - target).square().mean(dim=(1, 2))
    return 100 * (squared[mean > 0] / mean[mean > 0].square()).mean().sqrt().item()


def ssim(pred: Tensor, target: Tensor) -> float:
    """Structural similarity, 11 x 11 Gaussian window, peak 1, mean over bands (torchmetrics)."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        raise UserError("SSIM needs torchmetrics: pip install -r requirements-extra.txt") from None
    pred, target = _pair(pred, target)
    pred, target = (x[None].float().contiguous().clamp(0, 1) for x in (pred, target))
    similarity = structural_similarity_index_measure(pred, target, data_range=1.0)
    assert isinstance(similarity, Tensor)  # it returns more only when asked
    return similarity.item()


def crop_border(height: int, width: int, border: int = BORDER) -> tuple[int, int]:
    """Pixels removed at top and bottom, and at left and right, before scoring."""
    sides = (height, width)
    rows, columns = (min(border, side // 4) if side < SMALL_SIDE else border for side in sides)
    return rows, columns


def centre_crop(x: Tensor, border: int = BORDER) -> Tensor:
    """The protocol's centre, without the border: 226 x 256 of 482 x 512."""
    height, width = x.shape[-2:]
    rows, columns = crop_border(height, width, border)
    if border < 0 or 2 * rows >= height or 2 * columns >= width:
        raise UserError(
            f"a crop border of {border} px of a frame of {height} x {width}: give one from 0 to "
            f"{(min(height, width) - 1) // 2}"
        )
    return x[..., rows : height - rows, columns : width - columns]


def scene_metrics(
    pred: Tensor,
    target: Tensor,
    *,
    floor: float = 1e-6,
    border: int = BORDER,
    with_ssim: bool = False,
) -> dict[str, Any]:
    """All metrics of a scene: of the centre crop, `_full` of the frame; MRAE by FLOORS too."""
    result: dict[str, Any] = {}
    cropped = centre_crop(pred, border), centre_crop(target, border)
    for suffix, (p, t) in {"": cropped, "_full": (pred, target)}.items():
        scores = {"mrae": mrae(p, t, floor), "rmse": rmse(p, t), "psnr": psnr(p, t)}
        scores |= {"sam": sam(p, t), "ergas": ergas(p, t)}
        for other in FLOORS:
            scores[f"mrae_floor_{other:g}"] = mrae(p, t, other)
        if with_ssim:
            scores["ssim"] = ssim(p, t)
        for name, value in scores.items():
            result[name + suffix] = value
    height, width = target.shape[-2:]
    result["border"] = list(crop_border(height, width, border))
    result["metric_floor"] = floor
    return result


def per_band_metrics(pred: Tensor, target: Tensor, floor: float = 1e-6) -> dict[str, list[float]]:
    """MRAE, RMSE, PSNR, ERGAS and SSIM of every band (one band has no spectral angle)."""
    preds, targets = _pair(pred, target)
    bands = [(p[None], t[None]) for p, t in zip(preds, targets, strict=True)]
    return {
        "mrae": [mrae(p, t, floor) for p, t in bands],
        "rmse": [rmse(p, t) for p, t in bands],
        "psnr": [psnr(p, t) for p, t in bands],
        "ergas": [ergas(p, t) for p, t in bands],
        "ssim": [ssim(p, t) for p, t in bands],
    }


def scene_bands(pred: Tensor, target: Tensor, floor: float) -> dict[str, list[float]]:
    """per_band_metrics of the centre crop, and with `_full` of the whole frame."""
    bands = per_band_metrics(centre_crop(pred), centre_crop(target), floor)
    for name, values in per_band_metrics(pred, target, floor).items():
        bands[f"{name}_full"] = values
    return bands


def laplace_calibration(
    pred: Tensor, target: Tensor, scale: Tensor
) -> tuple[dict[str, float], list[list[float]]]:
    """How far the scale of a Laplace distribution, P(|error| <= t) = 1 - exp(-t / scale), tells the
    error: the share of values inside each interval of COVERAGES; and [mean scales, mean absolute
    errors] of ten parts of the values, the surest first."""
    error = (pred - target).abs()
    ratio = error / scale
    inside = {}
    for percent in COVERAGES:
        limit = -math.log(1 - percent / 100)
        inside[f"coverage_{percent}"] = float((ratio <= limit).double().mean())
    tenths = scale.flatten().argsort().tensor_split(10)
    scales = [float(scale.flatten()[part].mean()) for part in tenths]
    errors = [float(error.flatten()[part].mean()) for part in tenths]
    return inside, [scales, errors]


def mean_metrics(scenes: list[dict]) -> dict[str, float]:
    """Means over scenes of scene_metrics' numbers; black scenes, without an angle, not in SAM's."""
    means = {}
    for name, value in scenes[0].items():
        if isinstance(value, float):
            average = np.nanmean if name.startswith("sam") else np.mean
            means[name] = float(average([scene[name] for scene in scenes]))
    return means


def bootstrap_interval(values: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over scenes but for NaN (SAM of a black one)."""
    numbers = np.asarray(values, float)
    numbers = numbers[~np.isnan(numbers)]
    if not len(numbers):
        return math.nan, math.nan
    draws = np.random.default_rng(0).integers(0, len(numbers), (SAMPLES, len(numbers)))
    low, high = np.percentile(numbers[draws].mean(axis=1), [2.5, 97.5]).tolist()
    return low, high


def validation_record(scores: list[tuple[str, dict]]) -> dict[str, Any]:
    """The mean over (name, metrics) of all scenes, in any order, and the interval of MRAE."""
    scenes = [metrics for _, metrics in sorted(scores, key=lambda score: score[0])]
    record: dict[str, Any] = dict(mean_metrics(scenes))
    record["mrae_interval_95"] = list(bootstrap_interval([scene["mrae"] for scene in scenes]))
    return record | {"border": scenes[0]["border"], "scenes": len(scenes)}


def stressed_photo(
    cube: np.ndarray,
    wavelengths: list[float],
    name: str,
    mean_signal: float,
    *,
    exposure: float = 1.0,
    camera: str = "analytic",
    **recipe: Any,
) -> np.ndarray:
    """The photo (H, W, 3) uint8 of a scene's cube (H, W, bands), made again with one of STRESS. The
    mean signal is `exposure` times `mean_signal` of full scale; `name` seeds the noise."""
    response = camera_response(camera, wavelengths)
    gain = exposure * mean_signal / float((cube @ response).mean())
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    photo, _ = render_rgb(cube, response, rng=rng, exposure=gain, **recipe)
    return photo


def summarise(records: list[dict], facts: dict, folder: Path) -> dict:
    """Write metrics.csv, summary.json (means over scenes with bootstrap intervals, per band, costs)
    and figures; -> the summary.

    records: one for each scene: `scene_id`, its metrics, `bands`, `seconds`, `tile` and
    `reliability`. facts: what else the summary says; `wavelengths` is needed. The cubes of the
    scenes are in <folder>/hsi."""
    rows, parts = [], []
    for record in records:
        row = dict(record)
        parts.append({key: row.pop(key) for key in ("bands", "seconds", "tile", "reliability")})
        rows.append(row)
    mean = mean_metrics(rows)
    mean.pop("metric_floor")
    rows_by_error = sorted(rows, key=lambda row: np.nan_to_num(row["mrae"], nan=np.inf))
    ordered = [row["scene_id"] for row in rows_by_error]
    tiles = [part["tile"] for part in parts if part["tile"]]
    intervals = {key: bootstrap_interval([row[key] for row in rows]) for key in mean}
    per_band = {}
    for key in parts[0]["bands"]:
        per_band[key] = np.mean([part["bands"][key] for part in parts], axis=0).tolist()
    summary = facts | {
        "tile": min(tiles, default=None),  # None: whole frames
        "scenes": len(rows),
        "border": rows[0]["border"],
        "mean": mean,
        "interval_95": intervals,
        "per_band": per_band,
        "seconds_per_frame": float(np.median([part["seconds"] for part in parts])),
        "best": ordered[0],
        "worst": ordered[-1],
    }
    if parts[0]["reliability"]:
        scale, error = np.mean([part["reliability"] for part in parts], axis=0).tolist()
        summary["calibration"] = {"scale": scale, "mean_absolute_error": error}
    write_text(folder / "metrics.csv", _csv(rows))
    write_json(folder / "summary.json", summary)
    for rank in ("best", "worst"):
        write_scene_figure(folder, summary[rank], rank, summary["wavelengths"])
    write_curves(folder / "figures" / "curves.png", summary)
    return summary


def _csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([list(rows[0]), *(list(row.values()) for row in rows)])
    return text.getvalue()


def markdown_table(rows: list[dict]) -> str:
    """One line for each row, floats with four digits."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        cells = row.values()
        lines.append([f"{x:.4f}" if isinstance(x, float) else str(x) for x in cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report(summaries: list[dict], stress: list[dict], output: Path) -> None:
    """Write table.md, of several models summary.json, stress.* if any; print the tables."""
    first = summaries[0]
    header = (
        f"scenes of {first['split']}: {first['scenes']}; mean [95 % interval over scenes], "
        f"{first['border']} px of border left out (`_full`: none), "
        f"MRAE floor {first['metric_floor']:g}"
    )
    text = f"{header}\n\n{markdown_table([_headline_row(summary) for summary in summaries])}"
    write_text(output / "table.md", text)
    print(text)
    if len(summaries) > 1:
        write_json(output / "summary.json", {"models": summaries})
    if stress:
        norms = ", ".join(dict.fromkeys(summary["rgb_norm"] for summary in summaries))
        table = markdown_table(stress)
        write_text(output / "stress.md", f"{header}, rgb_norm {norms}\n\n{table}")
        write_json(output / "stress.json", {"metric_floor": first["metric_floor"], "rows": stress})
        print(table)
        write_stress_figure(output / "figures" / "stress.png", stress)


def _headline_row(summary: dict) -> dict[str, str]:
    how = f"{summary['weights']} weights, rgb {summary['rgb_norm']}"
    if summary["ensemble"]:
        how += ", 8 views"
    if summary["tile"]:
        how += f", tiles of {summary['tile']} px"
    row = {"model": f"{summary['name']} ({how})"}
    for key in HEADLINE:
        low, high = summary["interval_95"][key]
        interval = f" [{low:.4f}, {high:.4f}]" if summary["scenes"] > 1 else ""
        row[key] = f"{summary['mean'][key]:.4f}{interval}"
    row["params M"] = f"{summary['parameters'] / 1e6:.2f}"
    row["GMAC 256x256"] = f"{summary['macs_256'] / 1e9:.2f}"
    row["s/frame"] = f"{summary['seconds_per_frame']:.3f}"
    row["peak MB"] = f"{summary['peak_memory_mb']:.0f}"
    return row


@contextmanager
def figure(path: str | Path, columns: int, width: float, height: float) -> Iterator[np.ndarray]:
    """Axes in a row to draw on, width and height in inches; written as PNG in the end."""
    from matplotlib.figure import Figure  # not pyplot, which chooses a backend for the process

    sheet = Figure(figsize=(width, height), layout="constrained")
    axes = sheet.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.set_prop_cycle(color=COLOURS)
    yield axes
    save_figure(sheet, path)


def save_figure(sheet: Any, path: str | Path) -> None:
    """A matplotlib figure as PNG."""
    atomic_write(path, lambda file: sheet.savefig(file, format="png", dpi=110))


def scene_figure(
    rgb: Tensor, pred: Tensor, target: Tensor, wavelengths: list[float], title: str = "RGB"
) -> Any:
    """A matplotlib figure of a scene, all (C, H, W): picture, prediction, error, spectra."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(16, 4), layout="constrained")
    picture, rendered, errors, spectra = sheet.subplots(1, 4)
    picture.imshow(rearrange(rgb, "c h w -> h w c").clamp(0, 1).numpy())
    rendered.imshow(cube_to_srgb(rearrange(pred, "c h w -> h w c").numpy(), wavelengths))
    error = ((pred - target).abs() / target.clamp_min(0.01)).mean(0)
    shown = errors.imshow(error.numpy(), vmin=0, vmax=0.5, cmap="magma")
    sheet.colorbar(shown, ax=errors)
    height, width = target.shape[1:]
    points = [(height // 4, width // 4), (height // 2, width // 2), (3 * height // 4, width // 3)]
    for (y, x), colour in zip(points, COLOURS, strict=False):
        for cube, name, style in ((target, f"({x}, {y}) measured", "-"), (pred, "predicted", "--")):
            spectra.plot(wavelengths, cube[:, y, x].numpy(), style, color=colour, label=name)
        picture.plot(x, y, "o", color=colour, markeredgecolor="white")
    for axis in (picture, rendered, errors):
        axis.set(xticks=[], yticks=[])
    spectra.set(xlabel="wavelength, nm", ylabel="reflectance")
    spectra.legend(fontsize=7)
    picture.set_title(title)
    rendered.set_title("predicted cube in daylight")
    errors.set_title("relative error")
    return sheet


def write_scene_figure(folder: Path, scene: str, name: str, wavelengths: list[float]) -> None:
    """figures/<name>.png of a scene whose cubes are in <folder>/hsi."""
    cube = torch.from_numpy(np.nan_to_num(np.load(folder / "hsi" / f"{scene}.npy")))
    target = torch.from_numpy(np.load(folder / "hsi" / f"{scene}_target.npy"))
    measured = cube_to_srgb(rearrange(target, "c h w -> h w c").numpy(), wavelengths)
    seen = rearrange(torch.from_numpy(measured), "h w c -> c h w") / 255
    sheet = scene_figure(seen, cube, target, wavelengths, f"{scene}, measured")
    save_figure(sheet, folder / "figures" / f"{name}.png")


def write_curves(path: Path, summary: dict) -> None:
    """Metrics per band, and the calibration where there is one."""
    calibrated = "calibration" in summary
    with figure(path, 5 if calibrated else 3, 20 if calibrated else 12, 3.6) as axes:
        for axis, key in zip(axes[:3], ("mrae", "rmse", "psnr"), strict=True):
            axis.plot(summary["wavelengths"], summary["per_band"][key], marker=".")
            axis.set(xlabel="wavelength, nm", title=f"{key.upper()} per band")
        if calibrated:
            inside = [100 * summary["mean"][f"coverage_{percent}"] for percent in COVERAGES]
            axes[3].plot([0, 100], [0, 100], "k:", COVERAGES, inside, "o-")
            axes[3].set(xlabel="nominal interval, %", title="values inside, %")
            scale = summary["calibration"]["scale"]
            error = summary["calibration"]["mean_absolute_error"]
            axes[4].loglog(scale, scale, "k:", scale, error, "o-")
            axes[4].minorticks_off()  # their numbers would overlap
            axes[4].set(xlabel="predicted scale, tenths of the values", title="mean absolute error")


def write_stress_figure(path: Path, stress: list[dict]) -> None:
    """MRAE and SAM of each model under each change."""
    names = dict.fromkeys(row["model"] for row in stress)
    with figure(path, 2, 12, 4.5) as axes:
        for axis, key in zip(axes, ("mrae", "sam"), strict=True):
            for name in names:
                mine = {row["change"]: row[key] for row in stress if row["model"] == name}
                axis.plot(list(mine.values()), list(mine), "o", label=name)
            axis.set(xlabel="MRAE" if key == "mrae" else "SAM, degrees")
            axis.invert_yaxis()  # the photo as given comes first
            axis.grid(alpha=0.3)
            axis.legend()


def write_preview(
    stem: Path, cube: np.ndarray, wavelengths: list[float], points: list[tuple[int, int]]
) -> None:
    """Pictures of a cube (bands, H, W): sRGB, a montage, spectra at points (x, y) or at six."""
    height, width = cube.shape[1:]
    step = math.ceil(max(height, width) / PREVIEW_SIDE)
    small = np.stack([cube[band, ::step, ::step].copy() for band, _ in blocks(cube, height)])
    picture = cube_to_srgb(rearrange(small, "c h w -> h w c"), wavelengths)
    atomic_write(f"{stem}_preview.png", lambda file: Image.fromarray(picture).save(file, "png"))
    _write_montage(f"{stem}_bands.png", small[:, ::2, ::2], wavelengths)
    points = list(points)
    if not points:
        for row in (1, 3):
            points += [(width * column // 6, height * row // 4) for column in (1, 3, 5)]
    with figure(f"{stem}_spectra.png", 2, 10, 4) as (left, right):
        left.imshow(picture)
        left.set(xticks=[], yticks=[])
        for x, y in points:
            (line,) = right.plot(wavelengths, cube[:, y, x], label=f"x {x}, y {y}")
            mark = {"color": line.get_color(), "markeredgecolor": "white"}
            left.plot(x / step, y / step, "o", **mark)
        right.set(xlabel="wavelength, nm", ylabel="reflectance")
        right.legend(fontsize=8)


def _write_montage(path: str, cube: np.ndarray, wavelengths: list[float]) -> None:
    """All bands of (bands, h, w) as grey pictures in one sheet, each with its wavelength."""
    bands, height, width = cube.shape
    columns = math.ceil(math.sqrt(bands))
    rows = math.ceil(bands / columns)
    padded = np.pad(cube, [(0, rows * columns - bands), (0, 0), (0, 0)])
    sheet = rearrange(padded, "(r c) h w -> (r h) (c w)", r=rows)
    brightest = float(np.percentile(cube, 99.5))
    inches = min(40, 12 * rows * height / (columns * width))
    with figure(path, 1, 12, inches) as (axis,):
        axis.imshow(sheet, cmap="gray", vmin=0, vmax=brightest)
        axis.set(xticks=[], yticks=[])
        for i, wavelength in enumerate(wavelengths):
            x, y = i % columns * width, i // columns * height
            axis.text(x, y, f"{wavelength:g} nm", color="w", backgroundcolor="k", va="top")


def seems_turned(photo: np.ndarray, rendered: np.ndarray) -> str:
    """How a rendered cube (H, W, 3) seems to lie to its photo of the same size; empty where it is
    as much like the photo as it stands."""
    photo, rendered = (image - image.mean(axis=(0, 1)) for image in (photo, rendered))
    lengths = max(float(np.linalg.norm(photo) * np.linalg.norm(rendered)), 1e-9)
    views = {"": rendered, "upside down": rendered[::-1], "mirrored": rendered[:, ::-1]}
    views["turned by 180 degrees"] = rendered[::-1, ::-1]
    if photo.shape[0] == photo.shape[1]:
        views["transposed"] = rendered.swapaxes(0, 1)
        views["turned by 90 degrees"] = rendered.swapaxes(0, 1)[::-1]
        views["turned by -90 degrees"] = rendered.swapaxes(0, 1)[:, ::-1]
    like = {name: (photo * view).sum() / lengths for name, view in views.items()}
    best = max(like, key=lambda name: like[name])
    return best if like[best] > like[""] + CLEARLY_MORE else ""


def contact_sheet(root: Path, index: dict[str, Any]) -> None:
    """contact_sheet.png of a staged folder; a cube turned against its photo shows, and is said."""
    from matplotlib.figure import Figure  # takes a second to import

    scenes, nm = index["splits"]["train"] + index["splits"]["val"], index["wavelengths"]
    shown = np.linspace(0, len(scenes) - 1, min(SHEET_SCENES, len(scenes))).astype(int)
    bands = [len(nm) // 6, len(nm) // 2, len(nm) * 5 // 6]
    sheet = Figure(figsize=(13, 2.1 * len(shown)), layout="constrained", dpi=70)
    rows = sheet.subplots(len(shown), 6, squeeze=False)
    doubtful = []
    for row, entry in zip(rows, [scenes[i] for i in shown], strict=True):
        step = max(max(entry["shape"]) // 256, 1)
        rgb = np.load(root / entry["rgb"], mmap_mode="r")[::step, ::step]
        cube = np.load(root / entry["cube"], mmap_mode="r")[::step, ::step].astype(np.float32)
        full_scale = np.iinfo(rgb.dtype).max
        top = float(cube.max())
        rendered = cube_to_srgb(cube, nm)
        how = seems_turned(rgb, rendered)
        doubtful += [f"{entry['name']} ({how})"] if how else []
        its_cube = f"its cube: {how}?" if how else "its cube"
        pictures = {entry["name"]: rgb / full_scale, its_cube: rendered}
        pictures |= {f"{nm[band]:.0f} nm, white {top:.2g}": cube[..., band] for band in bands}
        for axis, (title, picture) in zip(row, pictures.items(), strict=False):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=top)
            axis.set(title=title, xticks=[], yticks=[])
        row[1].title.set_color("#B00020" if how else "#1B1B1B")
        middle = len(cube) // 2
        row[5].plot(nm, cube[:middle].mean((0, 1)), nm, cube[middle:].mean((0, 1)))
        row[5].legend(["top half", "bottom half"], fontsize=6)
        row[5].set_title("mean spectra, nm")
    sheet.suptitle("right where photo and cube show the same, the same way round")
    atomic_write(root / "contact_sheet.png", lambda file: sheet.savefig(file, format="png"))
    if doubtful:
        terminal.say(
            f"WARNING: cubes that seem to lie otherwise than their photos: {', '.join(doubtful)}; "
            "give --axes (whc where they are transposed), or turn the photos"
        )
