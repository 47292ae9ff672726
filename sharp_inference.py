"""RGB images in, hyperspectral cubes out; or a checkpoint scored on a data set. Both models: the checkpoint says which.

    python sharp_inference.py --checkpoint best.ckpt --input tests/rgb/frame.png --output outputs/hsis/frame.npy
    python sharp_inference.py --checkpoint best.ckpt --input "photos/*.jpg" --output outputs --format envi --preview
    python sharp_inference.py --checkpoint best.ckpt --evaluate --data_root data/staged --split val --output results
    python sharp_inference.py --checkpoint A=a.ckpt M=mst_plus_plus.pth --mst-root ../MST --evaluate --output results
    python sharp_inference.py --checkpoint best.ckpt --stress --data_root data/staged --output results
    python sharp_inference.py --checkpoint best.ckpt --export artifacts

Cubes are written as the model gives them, unclamped: .npy and .npz (bands, H, W) float32, .mat (MATLAB v7.3) H x W x
bands, ENVI .hdr + .img. A bad input is one line and exit code 2; the other inputs of a batch are still done."""

from __future__ import annotations

import glob
import importlib
import json
import math
import os
import re
import shutil
import struct
import sys
import tempfile
import time
import weakref
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import common_utils_v32 as common
import optimized_dataloader as data
from camera_colour import camera_response, render_rgb
from common_utils_v32 import UserError, cgroup_free, opt
from cube_files import MAPPED_BYTES, WRITTEN, allocate_array, extra, read_photo, release, write_cube
from optimized_dataloader import normalise_rgb
from spectral_evaluation import (
    laplace_calibration,
    mean_metrics,
    report,
    scene_bands,
    scene_metrics,
    summarise,
    write_preview,
)

FACTORIES = {
    "hsifusion": ("hsifusion_v252_complete", "create_hsifusion_lightning_pro"),
    "sharp": ("sharp_v322_hardened", "create_sharp_v32"),
}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".rgb.npy")
MIN_SIDE = 64  # px, the models' least input; smaller images are mirrored at their edges, and the output is cut back
MAX_TILE = 1024  # px
MAX_PIXELS = (
    500_000_000  # a file may claim any size: Pillow warns above this and refuses twice this
)
TILE_BYTES = 2 << 30  # what activations may take on a CPU when an image has to be tiled anyway
UNREADABLE = (
    UserError,
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    zlib.error,
    struct.error,
    Image.DecompressionBombError,
)
STRESS = {"recipe": {}} | {
    f"{key} {value}": {key: value}
    for key, values in {  # changes from the field's recipe
        "exposure": (0.25, 0.5, 2.0, 4.0),
        "electrons": (5000, 200, 50),
        "jpeg_quality": (95, 30, 10),
        "camera": ("analytic2", "nikon5100", "cie1931", "cie1964"),
    }.items()
    for value in values
}
files, computing, scoring = (
    partial(opt, group=group) for group in ("files", "computing", "scoring")
)


@dataclass
class Settings:
    """The command line; dashes and underscores are both accepted."""

    checkpoint: list[str] = files(
        [], ".ckpt, .pth or .safetensors; NAME=FILE names it; several are compared"
    )
    input: list[str] = files([], "images, folders, globs; .npy (H, W, 3) uint8 too")
    output: str | None = files(None, "a file for one input, else a folder")
    format: str | None = files(
        None, "of cubes; default by the suffix of --output, else npy", choices=tuple(WRITTEN)
    )
    preview: bool = files(False, "write sRGB, band montage and spectra beside each cube, as PNG")
    points: list[str] = files([], "pixels X,Y whose spectra the preview shows")
    overwrite: bool = files(False, "replace existing cubes")
    device: str = computing("auto", "auto, cpu, cuda or cuda:N")
    patch_size: int | None = computing(
        None, "side of a tile; default the whole frame if it fits, else what fits"
    )
    overlap: int | None = computing(
        None, "pixels that neighbouring tiles share; default a quarter of the tile"
    )
    batch_size: int = computing(1, "tiles in one forward")
    memory_gb: float | None = computing(
        None, "for activations and output; default half of what is free"
    )
    amp: bool = computing(False, "bfloat16 autocast")
    ensemble: bool = computing(False, "mean of the 8 views by rotation and flip")
    ema: bool = computing(True, "averaged weights where there are any")
    model: str | None = computing(
        None, "for a checkpoint that does not say", choices=tuple(FACTORIES)
    )
    model_size: str = computing("base", "with --model")
    model_options: str = computing("{}", "with --model: other fields of its configuration, as JSON")
    rgb_norm: str | None = computing(
        None, "for a checkpoint that does not say", choices=("per_image", "unit")
    )
    mst_root: str | None = computing(None, "a checkout of MST++, for its .pth files")
    evaluate: bool = scoring(False, "score the scenes of a split")
    stress: bool = scoring(False, "score them under other exposure, noise, JPEG quality, camera")
    export: str | None = scoring(None, "folder for safetensors, configuration, model card and ONNX")
    data_root: str = scoring(
        os.environ.get("HSI_DATA_DIR", "./data/ARAD_1K"), "staged folder or raw ARAD-1K"
    )
    split: str = scoring("val", "which scenes", choices=("train", "val", "test"))
    metric_floor: float = scoring(1e-6, "least denominator of MRAE")

    def __post_init__(self) -> None:
        tile, scores = (
            MAX_TILE if self.patch_size is None else self.patch_size,
            self.evaluate or self.stress,
        )
        for wrong, message in (
            (not self.checkpoint, "--checkpoint is missing"),
            (
                not (self.input or scores or self.export),
                "nothing to do: give --input, --evaluate or --export",
            ),
            (
                (self.input or scores) and not self.output,
                "--output is missing: where shall the results go?",
            ),
            (
                (self.input or self.export) and len(self.checkpoint) > 1,
                "--input and --export take one --checkpoint",
            ),
            (tile < MIN_SIDE, f"--patch_size {tile}: at least {MIN_SIDE}"),
            (
                not 0 <= (self.overlap or 0) < tile,
                f"--overlap {self.overlap}: from 0 to less than --patch_size",
            ),
            (self.metric_floor <= 0, f"--metric_floor {self.metric_floor}: must be above 0"),
            (
                self.batch_size < 1 or (self.memory_gb or 1) <= 0,
                "--batch_size and --memory_gb must be positive",
            ),
            (
                not all(re.fullmatch(r"\d+,\d+", point) for point in self.points),
                "--points: write X,Y of each pixel",
            ),
        ):
            if wrong:
                raise ValueError(message)


@dataclass
class Loaded:
    """A checkpoint ready to use: the module in eval mode, and what is needed to feed it and to read its output."""

    name: str
    path: str
    kind: str
    module: nn.Module
    device: torch.device
    weights: str  # "ema" or "raw"
    config: dict
    data: dict
    rgb_norm: str
    wavelengths: list[float]  # nm
    bands: int
    pixel_bytes: float = 0.0  # that a forward needs for each pixel


def load_model(spec: str, args: Settings, device: torch.device) -> Loaded:
    """Read CHECKPOINT or NAME=CHECKPOINT, with weights_only: a pickle that would run code is refused."""
    name, _, path = spec.rpartition("=") if not os.path.exists(spec) else ("", "", spec)
    blob, file = common.read_checkpoint(path), Path(path)
    name = name or (file.parent.name if file.stem in ("best", "last", "model") else "") or file.stem
    weights = "ema" if args.ema and blob["ema"] else "raw"
    state, facts = blob["ema" if weights == "ema" else "state_dict"], blob["data"] or {}
    kind, config = blob["model"] or args.model, dict(blob["model_config"] or {})
    if kind is None and any("embedding.weight" in key for key in state):
        kind, config = "mst++", {"out_channels": 31}
    if kind not in (*FACTORIES, "mst++"):
        raise UserError(
            f"{path}: does not say which model it is (found {kind}); give --model and --model_size"
        )
    try:
        config = config or {"model_size": args.model_size} | json.loads(args.model_options)
        script, factory = FACTORIES.get(kind, (None, None))
        module = (
            getattr(importlib.import_module(script), factory)(**config)
            if script
            else mst_plus_plus(args.mst_root)
        )
        if getattr(module.config if script else None, "in_channels", 3) != 3:
            raise ValueError(f"it takes {module.config.in_channels} channels, an image has 3")
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its configuration does not fit {kind}: {error}") from None
    common.load_weights(module, state, path)
    bands = config.get("out_channels") or getattr(module.config, "out_channels", 31)
    rgb_norm = facts.get("rgb_norm") or args.rgb_norm or ("per_image" if kind == "mst++" else None)
    if rgb_norm is None or args.rgb_norm not in (None, rgb_norm):
        raise UserError(
            f"{path}: "
            + (
                f"was trained with --rgb_norm {rgb_norm}"
                if rgb_norm
                else "does not say how its RGB was normalised; give --rgb_norm per_image or unit"
            )
        )
    wavelengths = [
        float(w) for w in facts.get("wavelengths") or np.linspace(400, 700, bands)
    ]  # ARAD-1K's range
    model = Loaded(
        name,
        path,
        kind,
        module.to(device, memory_format=torch.channels_last).eval(),
        device,
        weights,
        config,
        facts | {"rgb_norm": rgb_norm, "wavelengths": wavelengths},
        rgb_norm,
        wavelengths,
        bands,
    )
    with LiveBytes() as live:
        forward(model, torch.rand(1, 3, 2 * MIN_SIDE, 2 * MIN_SIDE), args)
    model.pixel_bytes = live.peak / (2 * MIN_SIDE) ** 2
    return model


def mst_plus_plus(root: str | None) -> nn.Module:
    """MST_Plus_Plus from the one file of it in a checkout of its toolbox."""
    scripts = sorted(Path(root).glob("**/architecture/MST_Plus_Plus.py")) if root else []
    if not scripts:
        raise UserError(f"--mst_root {root}: these are weights of MST++; give a checkout of it")
    sys.path.append(str(scripts[0].parent))
    return importlib.import_module("MST_Plus_Plus").MST_Plus_Plus()


def forward(model: Loaded, rgb: Tensor, args: Settings) -> Tensor:
    """(B, 3, h, w) -> (B, bands, h, w) float32, followed by the scale's channels where the model has one."""

    def one(x: Tensor) -> Tensor:
        x = x.to(model.device, memory_format=torch.channels_last)
        with (
            torch.no_grad(),
            torch.autocast(x.device.type, torch.bfloat16) if args.amp else nullcontext(),
        ):
            out = model.module(x)
            return (torch.cat(out, 1) if isinstance(out, tuple) else out).float()

    height, width = rgb.shape[-2:]
    if min(height, width) < MIN_SIDE:
        rows, columns = (
            np.pad(np.arange(n), (0, max(MIN_SIDE - n, 0)), "symmetric") for n in (height, width)
        )
        rgb = rgb[..., rows[:, None], columns]  # mirrored at its ends as often as it takes
    if not args.ensemble:
        return one(rgb)[..., :height, :width]
    return sum(
        torch.rot90(one(torch.rot90(rgb.flip(flip), turns, (-2, -1))), -turns, (-2, -1)).flip(flip)
        / 8
        for turns in range(4)
        for flip in ([-1], [])
    )[..., :height, :width]  # [-1] mirrors the columns


def tile_offsets(side: int, tile: int, overlap: int) -> list[int]:
    """First pixels of evenly spaced tiles that cover a side, neighbours sharing at least `overlap` pixels."""
    count = 1 if side <= tile else math.ceil((side - tile) / (tile - overlap)) + 1
    return [i * (side - tile) // max(count - 1, 1) for i in range(count)]


def ramp(length: int) -> Tensor:
    """Weight of the later tile across an overlap: 0 in its first quarter (which saw too little), 1 in the last, sin^2 between."""
    x = (torch.arange(length) + 0.5) / length
    return torch.sin((2 * x - 0.5).clamp(0, 1) * (math.pi / 2)) ** 2


def blend_tiles(
    run: Callable,
    source: Callable,
    size: tuple[int, int],
    patch: int,
    overlap: int,
    batch: int,
    allocate: Callable,
    tick: Callable = lambda pixels: None,
) -> np.ndarray:
    """Predict an image of `size` (H, W) in tiles, row by row, holding a few tiles in memory beside the output.
    run(x (B, 3, h, w)) -> (B, C, h, w); source(y0, y1, x0, x1) -> (3, h, w); allocate(C) -> array (C, H, W) to fill,
    mapped or not. Overlaps are a + w (b - a), so equal tiles give exactly their value; outer edges stay the image's."""
    (height, width), out, written = size, None, 0
    tile_h, tile_w = min(patch, height), min(patch, width)
    rows, cols = tile_offsets(height, tile_h, overlap), tile_offsets(width, tile_w, overlap)
    for i, y in enumerate(rows):
        above = (
            rows[i - 1] + tile_h - y if i else 0
        )  # rows shared with the strip above, which are in `out`
        carry = None  # columns shared with the tile on the left
        for first in range(0, len(cols), batch):
            group = cols[first : first + batch]
            tiles = run(torch.stack([source(y, y + tile_h, x, x + tile_w) for x in group])).cpu()
            out = allocate(tiles.shape[1]) if out is None else out
            for j, (x, tile) in enumerate(zip(group, tiles, strict=True), start=first):
                if carry is not None:
                    shared = tile[..., : carry.shape[-1]]
                    shared.copy_(torch.lerp(carry, shared, ramp(carry.shape[-1])))
                end = (
                    cols[j + 1] if j + 1 < len(cols) else width
                )  # later tiles touch nothing left of here
                carry, tile = tile[..., end - x :], tile[..., : end - x]
                into = torch.from_numpy(out[:, y : y + tile_h, x:end])
                into[:, :above] = torch.lerp(into[:, :above], tile[:, :above], ramp(above)[:, None])
                if (
                    tile.shape == out.shape
                ):  # four times as fast from channels_last as the plain copy
                    into.flatten(1).copy_(tile.permute(1, 2, 0).flatten(0, 1).t())
                else:
                    into[:, above:] = tile[:, above:]
                written = written + tile.nbytes if written < MAPPED_BYTES else release(out)
            tick(len(group) * height * width / (len(rows) * len(cols)))
    return out


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors alive at once: a forward's peak memory on any device, without kernels' scratch."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = weakref.WeakSet(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.alive.update(
            leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)
        )
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.alive))
        return result


def plan_tile(model: Loaded, size: tuple[int, int], args: Settings) -> int:
    """The longer side of the image when the whole frame fits the memory budget, else the side of a tile that does."""
    cuda = model.device.type == "cuda"
    free = (
        torch.cuda.mem_get_info(model.device)[0]
        if cuda
        else min(psutil.virtual_memory().available, cgroup_free())
    )
    budget = (args.memory_gb or free / 2**30 / 2) * 2**30
    per_pixel = (
        1.3 * model.pixel_bytes + 8 * model.bands
    )  # 1.3 for the kernels' own scratch; 8: a cube and a copy
    if size[0] * size[1] * per_pixel <= budget:
        return max(size)
    budget = budget if cuda else min(budget, TILE_BYTES)
    return max(
        MIN_SIDE, min(MAX_TILE, int(math.sqrt(budget / per_pixel / args.batch_size))) // 32 * 32
    )


def predict(
    model: Loaded,
    source: Callable,
    size: tuple[int, int],
    args: Settings,
    allocate: Callable,
    patch: int = 0,
    channels: int | None = None,
    tick: Callable = lambda pixels: None,
) -> tuple[np.ndarray, int]:
    """What `forward` gives for an image of any size, and the tile that was used; running out of memory halves it."""
    patch = patch or args.patch_size or plan_tile(model, size, args)
    while True:
        overlap = min(
            patch // 4 if args.overlap is None else args.overlap,
            patch - 1 if patch == args.patch_size else patch // 2,
        )
        try:
            return blend_tiles(
                lambda x: forward(model, x, args)[:, :channels],
                source,
                size,
                patch,
                overlap,
                args.batch_size,
                allocate,
                tick,
            ), patch
        except (
            RuntimeError,
            MemoryError,
        ) as error:  # a CPU's allocator raises a plain RuntimeError
            if type(error) is RuntimeError and "can't allocate memory" not in str(error):
                raise
            if min(patch, max(size)) < 2 * MIN_SIDE:
                raise UserError(
                    f"out of memory even with a tile of {patch} px; free some memory"
                ) from None
            tried, patch = patch, min(patch, max(size)) // 2 // 8 * 8
        torch.cuda.empty_cache()
        tqdm.write(
            f"out of memory with a tile of {tried} px: going on with {patch} px", file=sys.stderr
        )


def photo_source(rgb: np.ndarray, rgb_norm: str) -> tuple[Callable, int, int]:
    """A reader of tiles in the training normalisation, and its range: the whole image's, never a tile's."""
    low, high = int(rgb.min()), int(rgb.max())

    def source(y0: int, y1: int, x0: int, x1: int) -> Tensor:
        tile = torch.from_numpy(np.array(rgb[y0:y1, x0:x1])).permute(2, 0, 1)
        release(rgb)
        return normalise_rgb(tile, rgb_norm, low, high)

    return source, low, high


def output_paths(inputs: list[Path], output: Path, kind: str | None) -> tuple[list[Path], str]:
    """Where each cube goes: `output` itself when it names a cube file, else <output>/<name of the image>."""
    kinds = {".npy": "npy", ".npz": "npz", ".mat": "mat", ".hdr": "envi", ".img": "envi"}
    named = None if output.is_dir() else kinds.get(output.suffix.lower())
    if named and (len(inputs) > 1 or kind not in (None, named)):
        raise UserError(
            f"--output {output}: one {named} file; give a folder for several inputs or for {kind}"
        )
    kind = named or kind or "npy"
    targets = [output / (path.stem.removesuffix(".rgb") + WRITTEN[kind]) for path in inputs]
    return [output.with_suffix(WRITTEN[kind])] if named else targets, kind


def reconstruct(model: Loaded, path: Path, target: Path, kind: str, args: Settings) -> str:
    """One image to one cube file, and the line that says what was done."""
    for written in (target, target.with_suffix(".img")) if kind == "envi" else (target,):
        if written.exists() and not args.overwrite:
            raise UserError(f"{written}: exists; give --overwrite to replace it")
    start = time.perf_counter()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".inference-", dir=target.parent) as work:
        rgb, remarks = read_photo(path, Path(work))
        (source, low, high), (height, width) = photo_source(rgb, model.rgb_norm), rgb.shape[:2]
        remarks += [f"mirrored up to {MIN_SIDE} px"] * (min(height, width) < MIN_SIDE)
        with tqdm(
            total=height * width,
            unit="MPixel",
            unit_scale=1e-6,
            desc=path.name,
            leave=False,
            disable=None,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining} {rate_fmt}",
        ) as bar:
            cube, patch = predict(
                model,
                source,
                (height, width),
                args,
                channels=model.bands,
                tick=bar.update,
                allocate=lambda bands: allocate_array(
                    (bands, height, width), np.float32, Path(work)
                ),
            )
        write_cube(target, cube, model.wavelengths, kind)
        if args.preview:
            points = [
                (x, y)
                for x, y in (map(int, p.split(",")) for p in args.points)
                if x < width and y < height
            ]
            write_preview(target.with_suffix(""), cube, model.wavelengths, points)
    seconds = time.perf_counter() - start
    norm = (
        f"per_image, {low}..{high} of the whole image to 0..1"
        if model.rgb_norm == "per_image"
        else "unit, /255"
    )
    how = "whole frame" if patch >= max(height, width) else f"tiles of {patch} px"
    return "; ".join(
        [
            f"{path} -> {target} {(model.bands, height, width)}",
            f"RGB {norm}",
            *remarks,
            how,
            f"{seconds:.1f} s, {height * width / 1e6 / seconds:.2f} MPixel/s",
        ]
    )


def run_images(model: Loaded, args: Settings, ranks: common.Ranks) -> None:
    """Each rank its share of the inputs. What fails is listed when the others are done."""
    inputs: list[Path] = []
    for pattern in map(Path, args.input):
        if pattern.is_dir():
            found = sorted(
                path for path in pattern.iterdir() if path.name.lower().endswith(IMAGE_SUFFIXES)
            )
        else:
            found = (
                [pattern]
                if pattern.exists()
                else sorted(map(Path, glob.glob(str(pattern), recursive=True)))
            )
        inputs += found or [pattern]  # reading it fails, and says so, when the others are done
    inputs = list(dict.fromkeys(inputs))
    targets, kind = output_paths(inputs, Path(args.output), args.format)
    pairs, failures = list(zip(inputs, targets, strict=True)), []
    first = dict(
        reversed(list(zip(targets, inputs, strict=True)))
    )  # the first input that gives a target
    for path, target in pairs[ranks.rank :: ranks.world_size]:
        try:
            if not path.is_file():
                raise UserError("no such image, folder of images, or match")
            if first[target] != path:
                raise UserError(f"{first[target]} gives {target.name} already; rename one")
            print(reconstruct(model, path, target, kind, args))
        except UNREADABLE as error:
            failures.append(f"{path}: {error}")
    failures = sum(ranks.gather(failures), [])  # of all ranks, when all are done
    if failures and ranks.is_main:
        raise UserError(
            f"{len(failures)} of {len(inputs)} inputs failed: " * (len(inputs) > 1)
            + "; ".join(failures)
        )


def evaluate(models: list[Loaded], args: Settings, ranks: common.Ranks) -> None:
    """Score every model on the split, each rank its share of the scenes; rank 0 writes what concerns all of them."""
    output, summaries, stress = Path(args.output), [], []
    folders = [output / model.name if len(models) > 1 else output for model in models]
    for folder in folders if ranks.is_main else ():
        if (
            folder / "metrics"
        ).exists() and not args.overwrite:  # else the two would be averaged by those who read it
            raise UserError(
                f"--output {folder}: holds an evaluation; give --overwrite to replace it, or another folder"
            )
    for model, folder in zip(models, folders, strict=True):
        loader = data.val_loader(
            data.DataConfig(
                args.data_root,
                rgb_norm=model.rgb_norm,
                val_split=args.split,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )
        )
        if loader.bands != model.bands:
            raise UserError(
                f"{model.path}: gives {model.bands} bands, {args.data_root} has {loader.bands}"
            )
        if (
            np.abs(np.subtract(loader.wavelengths, model.wavelengths)).max() > 5
        ):  # nm, half a band of ARAD-1K
            raise UserError(
                f"{model.path}: was trained on {model.wavelengths[0]:g}..{model.wavelengths[-1]:g} nm, "
                f"{args.data_root} has {loader.wavelengths[0]:g}..{loader.wavelengths[-1]:g} nm"
            )
        for part in ("metrics", "hsi", "cubes") if ranks.is_main else ():
            shutil.rmtree(folder / part, ignore_errors=True)
        ranks.gather(None)  # the others write when that is done
        mine, peak = [], 0
        for scene in tqdm(loader, desc=model.name, disable=None):
            if (
                not peak
            ):  # this forward also warms up, so that the first one timed is like the others
                with LiveBytes() as live:
                    forward(model, scene.rgb[..., : args.patch_size, : args.patch_size], args)
                peak = live.peak
            mine.append(score(model, scene, args, folder))
            for change, settings in STRESS.items() if args.stress else ():
                cube = predict_scene(model, render(model, scene, **settings), args)[0][
                    : model.bands
                ]
                mine[-1]["stress"][change] = scene_metrics(
                    cube, scene.cube[0], floor=args.metric_floor
                )
        records = sorted(sum(ranks.gather(mine), []), key=lambda record: record["scene_id"])
        if ranks.is_main:
            stressed = [record.pop("stress") for record in records]
            facts = describe(model, args) | {
                "target_dtype": loader.scenes.dtype,
                "peak_memory_mb": peak / 2**20,
            }
            summaries.append(summarise(records, facts, folder))
            for change in stressed[0]:
                mean = mean_metrics([scene[change] for scene in stressed])
                stress.append(
                    {
                        "model": model.name,
                        "change": change,
                        **{k: mean[k] for k in ("mrae", "rmse", "sam")},
                    }
                )
    if ranks.is_main:
        report(summaries, stress, output)


def predict_scene(model: Loaded, rgb: Tensor, args: Settings) -> tuple[Tensor, int | None]:
    """`forward` of a frame (1, 3, H, W) from the loader, and the tile that it took: None for the whole frame, which it is
    unless --patch_size or --memory_gb says otherwise, or memory runs out."""
    size = tuple(rgb.shape[-2:])
    out, patch = predict(
        model,
        lambda y0, y1, x0, x1: rgb[0, :, y0:y1, x0:x1],
        size,
        args,
        lambda channels: np.empty((channels, *size), np.float32),
        patch=args.patch_size or (0 if args.memory_gb else max(size)),
    )
    return torch.from_numpy(out), None if patch >= max(size) else patch


def render(
    model: Loaded, scene, exposure: float = 1.0, camera: str = "analytic", **settings
) -> Tensor:
    """The scene's RGB (1, 3, H, W), made again from its cube; `exposure` is relative to the given one."""
    cube = scene.cube[0].permute(1, 2, 0).contiguous().numpy()
    response = camera_response(camera, model.wavelengths)
    mean = (
        float(scene.rgb.mean()) if model.rgb_norm == "unit" else 0.18
    )  # min-max leaves no trace of the exposure
    rgb, _ = render_rgb(
        cube,
        response,
        rng=np.random.default_rng(zlib.crc32(scene.name.encode())),
        exposure=exposure * mean / float((cube @ response).mean()),
        **settings,
    )
    return photo_source(rgb, model.rgb_norm)[0](0, rgb.shape[0], 0, rgb.shape[1])[None]


def score(model: Loaded, scene, args: Settings, folder: Path) -> dict:
    """A scene's metrics, and its files in the layout that hsi_viz_suite reads."""
    start, target, name = time.perf_counter(), scene.cube[0].float(), scene.name
    out, tile = predict_scene(model, scene.rgb, args)
    seconds, cube, reliability = time.perf_counter() - start, out[: model.bands], []
    record = {
        "scene_id": name,
        "rgb_norm": model.rgb_norm,
        **scene_metrics(cube, target, floor=args.metric_floor, with_ssim=True),
    }
    if len(out) > model.bands:
        coverage, reliability = laplace_calibration(cube, target, out[model.bands :])
        record |= coverage
    common.write_json(folder / "metrics" / f"{name}_metrics.json", record)
    written = [
        ("hsi", "npy", cube, name),
        ("hsi", "npy", target, f"{name}_target"),
        ("cubes", "mat", cube, name),
    ]
    for place, kind, array, stem in written if args.format == "mat" else written[:2]:
        write_cube(
            folder / place / (stem + WRITTEN[kind]),
            array.clamp(0, 1).contiguous().numpy(),
            model.wavelengths,
            kind,
        )
    bands = scene_bands(cube, target, args.metric_floor)
    stress = {"as given": record} if args.stress else {}
    return record | {
        "bands": bands,
        "seconds": seconds,
        "tile": tile,
        "reliability": reliability,
        "stress": stress,
    }


def describe(model: Loaded, args: Settings) -> dict:
    """What a summary says of the model and of how it was scored."""
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # a CPU's fast kernel counts as 0
        forward(model, torch.rand(1, 3, 256, 256), replace(args, ensemble=False))
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
        "macs_256": counter.get_total_flops() // 2,
    }


def export(model: Loaded, args: Settings) -> None:
    """Safetensors, configuration, model card, and an ONNX file of one input size, held against torch's output."""
    onnxruntime, _ = extra("onnxruntime"), extra("onnxscript")
    folder, side, module, failure = (
        Path(args.export),
        args.patch_size or 256,
        model.module.cpu(),
        "",
    )
    common.save_weights(
        folder / "model.safetensors",
        module.state_dict(),
        model.kind,
        model.config,
        model.data,
        model.weights == "ema",
    )
    example, file = torch.rand(1, 3, side, side), folder / "model.onnx"
    try:
        with torch.no_grad():
            expected = tree_leaves(module(example))[0].numpy()
            torch.onnx.export(
                module, (example,), file, input_names=["rgb"], external_data=False, verbose=False
            )
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        error = float(np.abs(session.run(None, {"rgb": example.numpy()})[0] - expected).max())
        if not error <= 1e-3 * max(1.0, np.abs(expected).max()):
            failure = f"{file}: differs from torch by {error:.2g}; do not use it"
    except torch.onnx.OnnxExporterError as reason:
        error, failure = (
            math.nan,
            f"{file}: not written, the other files are: {re.findall('>: (.+)', str(reason))[:1]}",
        )
    facts = {
        "model": model.kind,
        "weights": f"{model.weights} of {Path(model.path).name}",
        "rgb_norm": model.rgb_norm,
        "input": "(B, 3, H, W) float32 RGB: per_image = (x - min) / (max - min) of the whole image, unit = x / 255",
        "least_side": MIN_SIDE,
        "wavelengths": model.wavelengths,
        "output": f"(B, {model.bands}, H, W) float32",
        "parameters": sum(p.numel() for p in module.parameters()),
        "model_config": model.config,
        "data": model.data,
        "onnx_input": [1, 3, side, side],
        "onnx_difference": error,
    }
    common.write_json(folder / "config.json", facts)
    common.write_text(
        folder / "README.md",
        f"# {model.name}: RGB to {model.bands} spectral bands\n\n"
        + "".join(f"- {key}: {value}\n" for key, value in facts.items())
        + "\nThree channels do not determine a spectrum: "
        "trust this for cameras, light and scenes like those of its training data.\n\n"
        "    python sharp_inference.py --checkpoint model.safetensors --input photo.jpg --output photo.npy\n",
    )
    if failure:
        raise UserError(failure)
    print(
        f"{folder}: model.safetensors, config.json, README.md, model.onnx ({side} px, within {error:.1e} of torch)"
    )


def main(argv: list[str] | None = None) -> None:
    args = common.parse_dataclass(Settings, argv, __doc__.split("\n")[0])
    common.set_default_environment()
    ranks, device = common.init_process_group(args.device)
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    models = [load_model(spec, args, device) for spec in args.checkpoint]
    for model in models if ranks.is_main else []:
        print(
            f"{model.name}: {model.path}, {model.kind}, {model.weights} weights, rgb_norm {model.rgb_norm}, "
            f"{model.bands} bands {model.wavelengths[0]:g}..{model.wavelengths[-1]:g} nm, on {device}"
        )
    if len({model.name for model in models}) < len(models):
        raise UserError("--checkpoint: two have the same name; write NAME=FILE")
    if args.evaluate or args.stress:
        evaluate(models, args, ranks)
    if args.input:
        run_images(models[0], args, ranks)
    if args.export and ranks.is_main:
        export(models[0], args)


if __name__ == "__main__":
    common.run_cli(main)
