"""One HTML page of an evaluation: opens from disk without a network, pictures and numbers inside.

    write_report(Path("results"), summaries, folders, stress)      # -> results/report.html

The page is report_page/template.html with report_page/report.js; here its data are gathered from
what the evaluation wrote: summaries, metrics/, hsi/, photos/ and scale/ of each model's folder."""

import base64
import io
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from camera_colour import cube_to_srgb
from common_utils_v32 import read_json, to_json, write_text
from spectral_evaluation import HEADLINE, figure
from training_runs import environment_record

PAGE = Path(__file__).parent / "report_page"
SHOWN = 10  # scenes with pictures and spectra, of all models together
GRID = 128  # pixels a side whose spectra can be looked at
LEVELS = 4096  # of a value in a spectrum
MOST_BYTES = 28e6  # of the page; pictures and spectra of fewer scenes where all would be more
PICTURE = 420  # pixels, longer side
FLOOR = 0.01  # of the relative error that the map shows
CURVED = ("mrae", "rmse")  # per-band curves


def write_report(
    output: Path, summaries: list[dict], folders: list[Path], stress: list[dict]
) -> Path:
    """Write <output>/report.html; -> its path. summaries: of `summarise`, one for each model, and
    the folders of their scenes. stress: rows of the stress report, or none."""
    first, each = summaries[0], max(2, SHOWN // len(summaries))
    models, rows = [], []
    for summary, folder in zip(summaries, folders, strict=True):
        records = [read_json(path) for path in sorted((folder / "metrics").glob("*.json"))]
        records.sort(key=lambda record: math.inf if record["mrae"] is None else record["mrae"])
        rows += [
            [summary["name"], record["scene_id"], *(record[key] for key in HEADLINE)]
            for record in records
        ]
        models.append(_model(summary, folder, _chosen(records, each)))
    _leave_out_scenes(models)
    count = "1 scene" if first["scenes"] == 1 else f"{first['scenes']} scenes"
    about = f"{count} of {first['split']} ({first['data_root']}); "
    about += "{} rows and {} columns left out on each side".format(*first["border"])
    names = ", ".join(summary["name"] for summary in summaries)
    columns = list(stress[0]) if stress else []
    page = {
        "title": f"Evaluation of {names}",
        "about": f"{about}, MRAE floor {first['metric_floor']:g}",
        "headline": {"head": ["model", *HEADLINE], "rows": [_headline(s) for s in summaries]},
        "scenes": {"head": ["model", "scene", *HEADLINE], "rows": rows},
        "stress": {"head": columns, "rows": [list(row.values()) for row in stress]},
        "models": models,
        "levels": LEVELS,
        "settings": _settings(summaries),
    }
    return _write_page(output / "report.html", page)


def write_cube_page(path: Path, photo: np.ndarray, cube: np.ndarray, nm: list[float]) -> None:
    """One cube (bands, H, W) as such a page: the photo (H, W, 3) uint8, bands by a slider, spectra
    of clicked pixels."""
    name, small = path.stem.removesuffix("_preview"), _sample(cube, GRID)
    top = float(max(small.max(), 1e-6))
    seen = _sample(photo.transpose(2, 0, 1), PICTURE).transpose(1, 2, 0)
    scene = {"name": name, "why": "", "photo": _picture(seen)} | _shown_cube(cube, small, top, nm)
    learning: dict[str, list] = {"steps": [], "mrae": []}
    model = {"name": "", "wavelengths": nm, "learning": learning, "shown": [scene]}
    page: dict[str, Any] = {"title": name, "settings": "", "levels": LEVELS, "models": [model]}
    page["about"] = f"{cube.shape[2]} x {cube.shape[1]} pixels, {len(nm)} bands"
    for part in ("headline", "scenes", "stress"):
        page[part] = {"head": [], "rows": []}
    _write_page(path, page)


def _write_page(path: Path, data: dict) -> Path:
    page = (PAGE / "template.html").read_text(encoding="utf-8")
    script = (PAGE / "report.js").read_text(encoding="utf-8")
    inside = to_json(data).replace("</", "<\\/")  # "</" would end the script element early
    write_text(path, page.replace("__SCRIPT__", script).replace("__DATA__", inside))
    return path


def _headline(summary: dict) -> list[str]:
    cells = [summary["name"]]
    for key in HEADLINE:
        low, high = summary["interval_95"][key]
        interval = f"\n{low:.4g} to {high:.4g}" if summary["scenes"] > 1 else ""
        cells.append(f"{summary['mean'][key]:.4g}{interval}")
    return cells


def _settings(summaries: list[dict]) -> str:
    shown = []
    for summary in summaries:
        shown.append({k: v for k, v in summary.items() if isinstance(v, (str, int, float))})
    return json.dumps({"models": shown, "environment": environment_record()}, indent=2)


def _chosen(records: list[dict], count: int) -> list[tuple[str, dict]]:
    """(why, record) of the best, the worst, and others between them, evenly by their error."""
    places = np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int)
    chosen = []
    for place in dict.fromkeys(places.tolist()):
        why = f"{place + 1} of {len(records)}"
        if place in (0, len(records) - 1):
            why = "best" if place == 0 else "worst"
        chosen.append((why, records[place]))
    return chosen


def _model(summary: dict, folder: Path, chosen: list[tuple[str, dict]]) -> dict[str, Any]:
    log = read_log(Path(summary["checkpoint"]).parent / "metrics.jsonl")["val"]
    return {
        "name": summary["name"],
        "wavelengths": summary["wavelengths"],
        "per_band": {key: summary["per_band"][key] for key in CURVED},
        "calibration": summary.get("calibration"),
        "learning": {"steps": [row["step"] for row in log], "mrae": [row["mrae"] for row in log]},
        "shown": [_scene(folder, summary, why, record) for why, record in chosen],
    }


def _leave_out_scenes(models: list[dict]) -> None:
    """Scenes between best and worst go until the page is of a size that browsers open."""
    while max(len(model["shown"]) for model in models) > 2 and len(to_json(models)) > MOST_BYTES:
        for model in models:
            if len(model["shown"]) > 2:
                del model["shown"][len(model["shown"]) // 2]


def read_log(path: Path) -> dict[str, list[dict]]:
    """The lines of a run's metrics.jsonl by kind, `train` and `val`; none where there is no log."""
    lines: dict[str, list[dict]] = {"train": [], "val": []}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.endswith("}"):  # the last one of a killed run may be cut
                row = json.loads(line)
                lines[row["kind"]].append(row)
    return lines


def write_run_figure(folder: Path) -> None:
    """run.png of a run's folder: what its metrics.jsonl says of errors and learning rate."""
    lines = read_log(folder / "metrics.jsonl")
    curves = [
        ("MRAE", "training patches", "train", "mrae"),
        ("MRAE", "validation", "val", "mrae"),
        ("SAM of the validation, degrees", "", "val", "sam"),
        ("learning rate", "", "train", "lr"),
    ]
    titles = [title for title, _, kind, _ in curves if lines[kind]]
    if not titles:
        return
    with figure(folder / "run.png", len(set(titles)), 5 * len(set(titles)), 3.6) as axes:
        places = dict(zip(dict.fromkeys(titles), axes, strict=True))
        for title, label, kind, key in curves:
            if title in places and lines[kind]:
                steps = [row["step"] for row in lines[kind]]
                values = [math.nan if row[key] is None else row[key] for row in lines[kind]]
                places[title].plot(steps, values, ".-", markersize=3, label=label)
        for title, axis in places.items():
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.3)
        if "MRAE" in places:
            places["MRAE"].set_yscale("log")
            places["MRAE"].yaxis.set_major_formatter("{x:g}")
            places["MRAE"].yaxis.set_minor_formatter("{x:g}")
            places["MRAE"].legend(fontsize=8)


def _scene(folder: Path, summary: dict, why: str, record: dict) -> dict[str, Any]:
    name = record["scene_id"]
    predicted = np.load(folder / "hsi" / f"{name}.npy", mmap_mode="r")
    measured = np.load(folder / "hsi" / f"{name}_target.npy", mmap_mode="r")
    small, truth = _sample(predicted, GRID), _sample(measured, GRID)
    top = float(max(small.max(), truth.max(), 1e-6))
    error, error_top = _error_map(_sample(predicted, PICTURE), _sample(measured, PICTURE))
    with Image.open(folder / "photos" / f"{name}.jpg") as image:
        image.thumbnail((PICTURE, PICTURE))
        photo = _picture(np.asarray(image.convert("RGB")))
    scene = {
        "name": name,
        "why": why,
        "mrae": record["mrae"],
        "photo": photo,
        "error": error,
        "error_top": error_top,
        "measured": _packed(truth, top),
        **_shown_cube(predicted, small, top, summary["wavelengths"]),
    }
    scale = folder / "scale" / f"{name}.npy"
    if scale.exists():
        scene["scale"] = _packed(_sample(np.load(scale, mmap_mode="r"), GRID), top)
    return scene


def _shown_cube(cube: np.ndarray, small: np.ndarray, top: float, nm: list[float]) -> dict[str, Any]:
    """What the page shows of a cube (bands, H, W) and its sample `small`, from 0 to `top`."""
    rendered = cube_to_srgb(_sample(cube, PICTURE).transpose(1, 2, 0), nm)
    return {
        "height": cube.shape[1],
        "width": cube.shape[2],
        "top": top,
        "grid": small.shape[1:],
        "predicted": _packed(small, top),
        "rendered": _picture(rendered),
    }


def _sample(cube: np.ndarray, most: int) -> np.ndarray:
    """The pixels of a cube (bands, H, W) at the middles of an even grid, `most` a side or fewer; 0
    for NaN."""
    places = []
    for side in cube.shape[1:]:
        count = min(side, most)
        places.append(((np.arange(count) + 0.5) * side / count).astype(int))
    return np.nan_to_num(cube[:, places[0]][:, :, places[1]])


def _packed(cube: np.ndarray, top: float) -> str:
    """Values from 0 to `top` in LEVELS steps, from band to band: uint16, deflated, base64."""
    steps = np.rint(np.clip(cube / top, 0, 1) * (LEVELS - 1)).astype("<u2")
    steps[1:] -= steps[:-1].copy()
    return base64.b64encode(zlib.compress(steps.tobytes(), 9)).decode()


def _error_map(predicted: np.ndarray, measured: np.ndarray) -> tuple[str, float]:
    """A picture of the relative error of each pixel, and the error at its bright end."""
    from matplotlib import colormaps

    error = np.mean(np.abs(predicted - measured) / np.maximum(measured, FLOOR), axis=0)
    top = float(np.quantile(error, 0.98)) or 1.0
    colours = colormaps["cividis"](np.clip(error / top, 0, 1))[..., :3]
    return _picture(np.rint(colours * 255).astype(np.uint8)), top


def _picture(pixels: np.ndarray) -> str:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()
