"""RGB images in, hyperspectral cubes out; or a checkpoint scored on a data set.

    python sharp_inference.py --input photo.jpg --output photo.npy       # the weights that ship
    python sharp_inference.py --checkpoint best.ckpt --input "photos/*.jpg" --output cubes --preview
    python sharp_inference.py --checkpoint best.ckpt --evaluate --data_root staged --output results

Also: --format envi for other files; --stress beside --evaluate; --checkpoint A=a.ckpt B=b.ckpt
M=mst_plus_plus.pth --mst-root MST compares; --export FOLDER for ONNX and safetensors.

For both models: the checkpoint says which. Cubes are written as the model gives them, unclamped:
.npy and .npz (bands, H, W) float32, .mat (MATLAB v7.3) H x W x bands, ENVI .hdr + .img. A bad input
is one line and exit code 2; the other inputs of a batch are still done.
"""

import glob
import os
import re
import shutil
import struct
import sys
import tempfile
import time
import tokenize
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import common_utils_v32 as common
import frame_prediction as prediction
import spectral_evaluation
import terminal
from camera_colour import encode_srgb
from common_utils_v32 import UserError, opt
from compute_devices import Ranks, prepare_cuda, resolve_device, use_threads
from cube_files import WRITTEN, allocate_array, is_system_file, release, write_cube
from evaluation_report import write_cube_page, write_report
from frame_prediction import Loaded, LoadOptions, PredictionOptions, Source, load_model, predict
from model_export import export
from optimized_dataloader import DataConfig, ValScene, decode_light, normalise_rgb, val_loader
from photo_files import IMAGE_SUFFIXES, NOT_READ, read_photo
from round_trip import check_rgb
from spectral_evaluation import STRESS, laplace_calibration, report, scene_metrics, stressed_photo

MAX_PIXELS = 500_000_000  # a file may claim any size: Pillow warns above, refuses twice this
# What decoders raise for a file that they cannot read.
UNREADABLE = (
    UserError,
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    MemoryError,
    tokenize.TokenError,
    zlib.error,
    struct.error,
    Image.DecompressionBombError,
)
HALF_A_BAND = 5  # nm, of ARAD-1K: how far wavelengths of model and data may differ
# What an evaluation leaves in its folder.
EVALUATION_FOLDERS = ("metrics", "hsi", "cubes", "photos", "scale", "figures")
EVALUATION_FILES = (
    "summary.json",
    "table.md",
    "metrics.csv",
    "stress.md",
    "stress.json",
    "report.html",
)
OTHER_LIGHT = (
    "so it is sRGB, and this checkpoint was trained on linear light; use one that was trained on "
    "sRGB"
)
MEAN_SIGNAL = 0.18  # of full scale, where a photo's exposure left no trace

files, computing = partial(opt, group="files"), partial(opt, group="computing")
scoring = partial(opt, group="scoring")


@dataclass
class FileOptions:
    """What is read and written."""

    checkpoint: list[str] = files(
        [],
        ".ckpt, .pth or .safetensors; NAME=FILE names it; several are compared; for --input the "
        "weights that ship, for sRGB photos, unless given",
    )
    input: list[str] = files([], "images, folders, globs; .npy (H, W, 3) too")
    output: str | None = files(None, "a file for one input, else a folder")
    format: str | None = files(
        None, "of cubes; default by the suffix of --output, else npy", choices=tuple(WRITTEN)
    )
    preview: bool = files(False, "write pictures and a page of clickable spectra beside each cube")
    check_rgb: bool = files(False, "render each cube back to a photo and say how they differ")
    points: list[str] = files([], "pixels X,Y whose spectra the preview shows")
    overwrite: bool = files(False, "replace cubes, an evaluation, an export that are there")


@dataclass
class Settings(LoadOptions, PredictionOptions, FileOptions):
    """The command line; dashes and underscores are both accepted."""

    device: str = computing("auto", "auto, cpu, cuda or cuda:N")
    threads: int | None = computing(None, "threads of a CPU (default: all cores)")
    report: bool = scoring(True, "write report.html beside an evaluation's tables")
    evaluate: bool = scoring(False, "score the scenes of a split")
    stress: bool = scoring(False, "score them under other exposure, noise, JPEG quality, camera")
    export: str | None = scoring(None, "folder for safetensors, configuration, model card and ONNX")
    data_root: str = scoring(
        os.environ.get("HSI_DATA_DIR", "./data/ARAD_1K"), "staged folder or raw ARAD-1K"
    )
    split: str = scoring("val", "which scenes", choices=("train", "val", "test"))
    metric_floor: float = scoring(1e-6, "least denominator of MRAE")

    def __post_init__(self) -> None:
        self._check_what_to_do()
        tile = prediction.MAX_TILE if self.patch_size is None else self.patch_size
        if tile < prediction.MIN_SIDE:
            raise ValueError(f"--patch_size {tile}: at least {prediction.MIN_SIDE}")
        if self.overlap is not None and not 0 <= self.overlap < tile:
            raise ValueError(f"--overlap {self.overlap}: from 0 to less than --patch_size")
        if self.metric_floor <= 0:
            raise ValueError(f"--metric_floor {self.metric_floor}: must be above 0")
        if self.batch_size < 1:
            raise ValueError(f"--batch_size {self.batch_size}: must be positive")
        if self.memory_gb is not None and self.memory_gb <= 0:
            raise ValueError(f"--memory_gb {self.memory_gb}: must be positive")
        for point in self.points:
            if not re.fullmatch(r"\d+,\d+", point):
                raise ValueError(f"--points {point}: write X,Y of each pixel")

    def _check_what_to_do(self) -> None:
        scores = self.evaluate or self.stress
        if not self.checkpoint:
            if scores or self.export:
                raise ValueError(
                    f"--checkpoint is missing: a run's best.ckpt, or {prediction.SHIPPED_WEIGHTS}"
                )
            self.checkpoint = [str(prediction.SHIPPED_WEIGHTS)]
        if not (self.input or scores or self.export):
            raise ValueError("nothing to do: give --input, --evaluate or --export")
        if (self.input or scores) and not self.output:
            raise ValueError("--output is missing: give a file such as photo.npy, or a folder")
        if (self.input or self.export) and len(self.checkpoint) > 1:
            raise ValueError("--input and --export take one --checkpoint")
        if self.points and not self.preview:
            raise ValueError("--points needs --preview, whose pictures show them")
        if scores and not self.input and self.format not in (None, "npy", "mat"):
            raise ValueError(f"--format {self.format}: an evaluation writes npy, and mat if asked")


def photo_source(rgb: np.ndarray, norm: str, encoding: str = "linear") -> tuple[Source, int, int]:
    """A reader of rgb's tiles (H, W, 3), linear and normalised, and the whole image's range."""
    low, high = int(rgb.min()), int(rgb.max())

    def source(y0: int, y1: int, x0: int, x1: int) -> Tensor:
        light, dark, bright = decode_light(np.array(rgb[y0:y1, x0:x1]), low, high, encoding)
        release(rgb)
        return normalise_rgb(torch.from_numpy(light).permute(2, 0, 1), norm, dark, bright)

    return source, low, high


def predict_image(model: Loaded, rgb: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """A photo's cube (bands, H, W) float32 and its wavelengths in nm.

    rgb: (H, W, 3) uint8 or uint16 as a file holds it, in the encoding of the model's training
    (`model.encoding`), or a PIL image of it, whose EXIF and colour profile are not looked at.
    ValueError for anything else. What a model says of its uncertainty is left out."""
    rgb = np.asarray(rgb)
    rgb = rgb.astype(rgb.dtype.newbyteorder("="), copy=False)
    if rgb.ndim != 3 or rgb.shape[2] != 3 or not rgb.size or rgb.dtype not in (np.uint8, np.uint16):
        advice = "; round 65535 times what is from 0 to 1" if rgb.dtype.kind == "f" else ""
        raise ValueError(
            f"rgb must be (H, W, 3) uint8 or uint16, not {rgb.shape} {rgb.dtype}{advice}"
        )
    size = (rgb.shape[0], rgb.shape[1])
    source, _, _ = photo_source(rgb, model.rgb_norm, model.encoding)
    options, allocate = PredictionOptions(), prediction.in_memory(size)
    cube, _ = predict(model, source, size, options, allocate, channels=model.bands)
    return cube, list(model.wavelengths)


def find_inputs(patterns: list[str]) -> list[Path]:
    """Images named, matched, or in folders, each once; what matches nothing fails when read."""
    inputs: list[Path] = []
    for pattern in map(Path, patterns):
        if pattern.is_dir():
            names = sorted(path for path in pattern.iterdir() if not is_system_file(path))
            found = [path for path in names if path.name.lower().endswith(IMAGE_SUFFIXES)]
            others = [path.name for path in names if path.suffix.lower() in NOT_READ]
            if others:
                print(f"{pattern}: not read: {', '.join(others)}", file=sys.stderr)
            if not found:
                raise UserError(f"{pattern}: no image in it ({' '.join(IMAGE_SUFFIXES)})")
        elif pattern.exists():
            found = [pattern]
        else:
            found = sorted(map(Path, glob.glob(str(pattern), recursive=True)))
        inputs += found or [pattern]
    return list(dict.fromkeys(inputs))


def output_paths(inputs: list[Path], output: Path, kind: str | None) -> tuple[list[Path], str]:
    """Where each cube goes, and its format: `output` where it names a cube file, else in it."""
    kinds = {suffix: name for name, suffix in WRITTEN.items()} | {".img": "envi", ".tiff": "tiff"}
    named = None if output.is_dir() else kinds.get(output.suffix.lower())
    if named and (len(inputs) > 1 or kind not in (None, named)):
        raise UserError(
            f"--output {output}: one {named} file; give a folder for several inputs or for {kind}"
        )
    if named:
        return [output.with_suffix(WRITTEN[named])], named
    if output.suffix.lower() in (*IMAGE_SUFFIXES, ".txt", ".h5") and not output.is_dir():
        raise UserError(f"--output {output}: give a folder, or a file {', '.join(kinds)}")
    kind = kind or "npy"
    names = [path.stem.removesuffix(".rgb") + WRITTEN[kind] for path in inputs]
    return [output / name for name in names], kind


def files_of(model: Loaded, target: Path) -> list[Path]:
    """The files that a photo becomes: its cube, and the scale of a model that gives one."""
    scale = target.with_name(f"{target.stem}_scale{target.suffix}")
    return [target, scale] if model.gives_scale else [target]


def check_absent(targets: list[Path], kind: str) -> None:
    """UserError where one of these files, or the data of an ENVI header, is there."""
    data = [target.with_suffix(".img") for target in targets] if kind == "envi" else []
    for file in (*targets, *data):
        if file.exists():
            raise UserError(f"{file}: exists; give --overwrite to replace it")


def reconstruct(model: Loaded, path: Path, target: Path, kind: str, args: Settings) -> str:
    """One image to one cube file, and the line that says what was done."""
    files = files_of(model, target)
    if not args.overwrite:
        check_absent(files, kind)
    start = time.perf_counter()
    page: list[str] = []
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = common.temporary_prefix("inference")
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as folder:
        work = Path(folder)
        rgb, remarks, ordinary = read_photo(path, work)
        if ordinary and model.encoding == "linear":
            remarks.append(f"WARNING: {ordinary}, {OTHER_LIGHT}")
        source, low, high = photo_source(rgb, model.rgb_norm, model.encoding)
        height, width = rgb.shape[:2]

        def allocate(channels: int) -> np.ndarray:
            # Other files, and parts of it, are written from a mapped .npy.
            copies = 1 if kind == "npy" and channels == model.bands else 2
            return allocate_array((channels, height, width), np.float32, work, copies)

        def predicted() -> tuple[np.ndarray, int]:
            with progress(height * width, path.name) as bar:
                size = (height, width)
                return predict(model, source, size, args, allocate, tick=bar.update)

        values, patch = predicted()
        cube = values[: model.bands]
        write_cube(target, cube, model.wavelengths, kind, move=not model.gives_scale)
        if model.gives_scale:
            write_cube(files[1], values[model.bands :], model.wavelengths, kind)
            remarks.append(f"its uncertainty, a Laplace scale: {files[1]}")
        if args.preview:
            page = [f"look at {write_pictures(target, rgb, cube, model, args)}"]
        if args.check_rgb:
            light = source(0, height, 0, width).permute(1, 2, 0).numpy()
            name = target.with_name(f"{target.stem}_round_trip.png")
            picture = name if args.preview else None
            remarks.append(
                check_rgb(model, light, cube, lambda: predicted()[0][: model.bands], picture)
            )
    if min(height, width) < prediction.MIN_SIDE:
        remarks.append(f"mirrored up to {prediction.MIN_SIDE} px")
    seconds = time.perf_counter() - start
    how = "whole frame" if patch >= max(height, width) else f"tiles of {patch} px"
    speed = f"{seconds:.1f} s, {height * width / 1e6 / seconds:.2f} MPixel/s"
    what = f"{path} -> {target} {(model.bands, height, width)}"
    return "; ".join([what, f"RGB {_normalised(model, low, high)}", *remarks, how, speed, *page])


def write_pictures(
    target: Path, rgb: np.ndarray, cube: np.ndarray, model: Loaded, args: Settings
) -> Path:
    """What --preview asks for, beside the cube; -> the page."""
    height, width = rgb.shape[:2]
    points = [(int(x), int(y)) for x, y in (point.split(",") for point in args.points)]
    outside = [point for point in points if point[0] >= width or point[1] >= height]
    if outside:
        terminal.say(f"{target}: {width} x {height} pixels, without --points {outside}")
    points = [point for point in points if point not in outside]
    spectral_evaluation.write_preview(target.with_suffix(""), cube, model.wavelengths, points)
    shallow = rgb if rgb.dtype == np.uint8 else (rgb >> 8).astype(np.uint8)
    page = target.with_name(f"{target.stem}_preview.html")
    write_cube_page(page, shallow, cube, model.wavelengths)
    return page


def _normalised(model: Loaded, low: int, high: int) -> str:
    """How the RGB was read, in words."""
    if model.rgb_norm == "per_image":
        return f"{model.encoding}, per_image, {low}..{high} of the whole image to 0..1"
    return f"{model.encoding}, unit"


def progress(pixels: int, name: str) -> Any:
    """A bar of pixels that are done."""
    return terminal.bar(
        total=pixels,
        unit="MPixel",
        unit_scale=1e-6,
        desc=name,
        leave=False,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining} {rate_fmt}",
    )


def run_images(model: Loaded, args: Settings, ranks: Ranks) -> None:
    """Each rank its share of the inputs. What fails is listed when the others are done."""
    inputs = find_inputs(args.input)
    targets, kind = output_paths(inputs, Path(args.output or "."), args.format)
    for folder in {target.parent for target in targets}:
        common.make_folder(folder, "--output")
        common.remove_leftovers(folder)
    first: dict[Path, Path] = {}  # the first input that gives a target
    for path, target in zip(inputs, targets, strict=True):
        for file in files_of(model, target):
            first.setdefault(file, path)
    failures = []
    mine = slice(ranks.rank, None, ranks.world_size)
    jobs = list(zip(inputs[mine], targets[mine], strict=True))
    for path, target in terminal.bar(jobs, desc="photos", unit="photo"):
        try:
            if not path.is_file():
                raise UserError("no such image, folder of images, or match")
            for file in files_of(model, target):
                if first[file] != path:
                    raise UserError(f"{first[file]} gives {file.name} already; rename one")
            terminal.say(reconstruct(model, path, target, kind, args))
        except UNREADABLE as error:
            failures.append(f"{path}: {str(error).removeprefix(f'{path}: ')}")
    failures = ranks.gather_lists(failures)  # of all ranks, when all are done
    if failures and ranks.is_main:
        count = f"{len(failures)} of {len(inputs)} inputs failed: " if len(inputs) > 1 else ""
        raise UserError(count + "; ".join(failures))


def evaluate(models: list[Loaded], args: Settings, ranks: Ranks) -> None:
    """Score every model on the split, each rank its share; rank 0 writes what concerns all."""
    output = Path(args.output or ".")
    folders = [output / model.name if len(models) > 1 else output for model in models]
    if ranks.is_main:
        for folder in (output, *folders):
            check_room(folder, args.overwrite)
        if len(models) > 1:
            remove_evaluation(output)
    summaries, stress = [], []
    for model, folder in zip(models, folders, strict=True):
        summary, rows = evaluate_one(model, folder, args, ranks)
        if summary is not None:
            summaries.append(summary)
            stress += rows
    if ranks.is_main:
        report(summaries, stress, output)
        if args.report:
            terminal.say(f"look at {write_report(output, summaries, folders, stress)}")


def evaluation_parts(folder: Path) -> list[Path]:
    """What is in a folder of what an evaluation leaves there."""
    names = (*EVALUATION_FILES, *EVALUATION_FOLDERS)
    return [folder / name for name in names if (folder / name).exists()]


def check_room(folder: Path, overwrite: bool) -> None:
    """UserError where an evaluation may not be written: over another one, whose scenes would stay
    beside the new ones, or over what is none."""
    parts = evaluation_parts(folder)
    if not parts:
        return
    # Of a training run there is a summary.json too.
    if not any([*folder.glob("metrics/*_metrics.json"), *folder.glob("table.md")]):
        raise UserError(f"--output {folder}: {parts[0]} is of no evaluation; give another folder")
    if not overwrite:
        raise UserError(
            f"--output {folder}: holds an evaluation; give --overwrite to replace it, or another "
            "folder"
        )


def remove_evaluation(folder: Path) -> None:
    for part in evaluation_parts(folder):
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def evaluate_one(
    model: Loaded, folder: Path, args: Settings, ranks: Ranks
) -> tuple[dict | None, list[dict]]:
    """One model's summary (on rank 0, else None) and its rows of the stress report."""
    config = DataConfig(
        args.data_root,
        rgb_norm=model.rgb_norm,
        val_split=args.split,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    loader = val_loader(config)
    check_bands(model, loader.wavelengths, args.data_root)
    if ranks.is_main:
        remove_evaluation(folder)
    ranks.gather(None)  # the others write when that is done
    mine, peak = [], 0
    for scene in terminal.bar(loader, desc=model.name, unit="scene"):
        if not peak:  # this forward also warms up, so that the first one timed is like the others
            corner = scene.rgb[..., : args.patch_size, : args.patch_size]
            peak = prediction.peak_bytes(model, corner, args)
        mine.append(score(model, scene, args, folder))
    records = sorted(ranks.gather_lists(mine), key=lambda record: record["scene_id"])
    if not ranks.is_main:
        return None, []
    stressed = [record.pop("stress") for record in records]
    facts = describe(model, args)
    facts |= {"target_dtype": loader.scenes.dtype, "peak_memory_mb": peak / 2**20}
    rows = []
    for change in stressed[0]:
        mean = spectral_evaluation.mean_metrics([scene[change] for scene in stressed])
        row = {"model": model.name, "change": change}
        rows.append(row | {key: mean[key] for key in ("mrae", "rmse", "sam")})
    return spectral_evaluation.summarise(records, facts, folder), rows


def check_bands(model: Loaded, wavelengths: list[float], data_root: str) -> None:
    """UserError where the data's bands are not those that the model gives."""
    nm = model.wavelengths
    if len(wavelengths) != model.bands:
        raise UserError(
            f"{model.path}: gives {model.bands} bands, {data_root} has {len(wavelengths)}"
        )
    if np.abs(np.subtract(wavelengths, nm)).max() > HALF_A_BAND:
        raise UserError(
            f"{model.path}: was trained on {nm[0]:g}..{nm[-1]:g} nm, "
            f"{data_root} has {wavelengths[0]:g}..{wavelengths[-1]:g} nm"
        )


def predict_scene(model: Loaded, rgb: Tensor, args: Settings) -> tuple[Tensor, int | None]:
    """`forward` of the loader's frame (1, 3, H, W), and the tile that it took: None for the whole
    frame, which it is unless --patch_size, --memory_gb or too little memory says otherwise."""
    height, width = rgb.shape[-2:]
    longer = max(height, width)
    whole = args.patch_size is None and args.memory_gb is None
    patch = longer if whole else args.patch_size
    source, allocate = prediction.tiles_of(rgb), prediction.in_memory((height, width))
    out, tile = predict(model, source, (height, width), args, allocate, patch=patch)
    return torch.from_numpy(out), None if tile >= longer else tile


def score(model: Loaded, scene: ValScene, args: Settings, folder: Path) -> dict:
    """A scene's record, and its files in the layout that hsi_viz_suite reads."""
    start, target, name = time.perf_counter(), scene.cube[0].float(), scene.name
    out, tile = predict_scene(model, scene.rgb, args)
    seconds, cube = time.perf_counter() - start, out[: model.bands]
    metrics = scene_metrics(cube, target, floor=args.metric_floor, with_ssim=True)
    record = {"scene_id": name, "rgb_norm": model.rgb_norm} | metrics
    reliability: list[list[float]] = []
    if len(out) > model.bands:
        coverage, reliability = laplace_calibration(cube, target, out[model.bands :])
        record |= coverage
    common.write_json(folder / "metrics" / f"{name}_metrics.json", record)
    clamped = cube.clamp(0, 1).contiguous().numpy()
    measured = target.clamp(0, 1).contiguous().numpy()
    write_cube(folder / "hsi" / f"{name}.npy", clamped, model.wavelengths, "npy")
    write_cube(folder / "hsi" / f"{name}_target.npy", measured, model.wavelengths, "npy")
    save_picture(folder / "photos" / f"{name}.jpg", scene.rgb[0])
    if len(out) > model.bands:
        scale = out[model.bands :].contiguous().numpy()
        write_cube(folder / "scale" / f"{name}.npy", scale, model.wavelengths, "npy")
    if args.format == "mat":
        write_cube(folder / "cubes" / f"{name}.mat", clamped, model.wavelengths, "mat")
    stress = {}
    if args.stress:
        stress = {"as given": metrics} | score_stressed(model, scene, args)
    return record | {
        "bands": spectral_evaluation.scene_bands(cube, target, args.metric_floor),
        "seconds": seconds,
        "tile": tile,
        "reliability": reliability,
        "stress": stress,
    }


def save_picture(path: Path, rgb: Tensor) -> None:
    """Linear RGB (3, H, W) in [0, 1] as a JPEG to look at."""
    picture = encode_srgb(rgb.permute(1, 2, 0).clamp(0, 1).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.rint(picture * 255).astype(np.uint8)).save(path, quality=90)


def score_stressed(model: Loaded, scene: ValScene, args: Settings) -> dict[str, dict]:
    """Metrics of a scene whose photo is made again, by the change of STRESS."""
    cube = scene.cube[0].permute(1, 2, 0).contiguous().numpy()
    # Scaling by the image's own range leaves no trace of the exposure.
    mean_signal = float(scene.rgb.mean()) if model.rgb_norm == "unit" else MEAN_SIGNAL
    found = {}
    for change, recipe in STRESS.items():
        photo = stressed_photo(cube, model.wavelengths, scene.name, mean_signal, **recipe)
        source, _, _ = photo_source(photo, model.rgb_norm)
        rgb = source(0, photo.shape[0], 0, photo.shape[1])[None]
        out, _ = predict_scene(model, rgb, args)
        found[change] = scene_metrics(out[: model.bands], scene.cube[0], floor=args.metric_floor)
    return found


def describe(model: Loaded, args: Settings) -> dict:
    """What a summary says of the model and of how it was scored."""
    return {
        "name": model.name,
        "checkpoint": model.path,
        "model": model.kind,
        "weights": model.weights,
        "amp": args.amp,
        "rgb_norm": model.rgb_norm,
        "ensemble": args.ensemble,
        "device": str(model.device),
        "data_root": args.data_root,
        "split": args.split,
        "metric_floor": args.metric_floor,
        "wavelengths": model.wavelengths,
        "parameters": sum(p.numel() for p in model.module.parameters()),
        "macs_256": prediction.macs_256(model, args),
    }


def _place(model: Loaded) -> str:
    """Where a model comes from, in words."""
    if Path(model.path) == prediction.SHIPPED_WEIGHTS:
        return "the weights that ship, trained on synthetic sRGB photos"
    return model.path


def main(argv: list[str] | None = None) -> None:
    args = common.parse_dataclass(Settings, argv, __doc__)
    prepare_cuda()
    use_threads(args.threads)
    ranks = Ranks.announced()
    device = resolve_device(args.device, ranks.local_rank)
    ranks.join(device)
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    models = [load_model(spec, device, args) for spec in args.checkpoint]
    for model in models if ranks.is_main else []:
        nm = model.wavelengths
        terminal.say(
            f"{model.name}: {_place(model)}, {model.kind}, {model.weights} weights, "
            f"rgb_norm {model.rgb_norm}, {model.bands} bands {nm[0]:g}..{nm[-1]:g} nm, on {device}"
        )
    if len({model.name for model in models}) < len(models):
        raise UserError("--checkpoint: two have the same name; write NAME=FILE")
    if args.evaluate or args.stress:
        evaluate(models, args, ranks)
    if args.input:
        run_images(models[0], args, ranks)
    if args.export and ranks.is_main:
        export(models[0], Path(args.export), args.patch_size, args.overwrite)
    ranks.leave()


if __name__ == "__main__":
    common.run_cli(main)
