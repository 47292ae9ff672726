"""From a checkpoint to a predictor of frames of any size: loading, small images, eight views, tiles
that fit the memory, and what a forward costs.

    model = load_model("best.ckpt", torch.device("cpu"))
    cube, tile = predict(model, source, (height, width), PredictionOptions(), allocate)"""

import importlib
import json
import math
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import terminal
from checkpoint_files import build_model, load_weights, read_checkpoint
from common_utils_v32 import UserError, opt
from compute_devices import first_output, free_cuda_memory, free_memory, is_out_of_memory
from cube_files import MAPPED_BYTES, release

FACTORIES = {
    "hsifusion": ("hsifusion_v252_complete", "create_hsifusion_lightning_pro"),
    "sharp": ("sharp_v322_hardened", "create_sharp_v32"),
}
SHIPPED_WEIGHTS = Path(__file__).parent / "weights" / "hsifusion_tiny_srgb.safetensors"
RIVAL = "mst++"  # whose checkpoints are scored too
# px, the models' least input; smaller images are mirrored at their edges, the output is cut back.
MIN_SIDE = 64
MAX_TILE = 1024  # px
TILE_BYTES = 2 << 30  # what activations may take on a CPU when an image has to be tiled anyway
SCRATCH = 1.3  # memory of a forward over that of its tensors: the kernels' own scratch
PHOTO_FACTS = {"rgb_norm": ("per_image", "unit"), "rgb_encoding": ("linear", "srgb")}
FIELD_RANGE = (400, 700)  # nm, of ARAD-1K
_how = partial(opt, group="computing")

Forward = Callable[[Tensor], Tensor]  # x (B, 3, h, w) -> (B, C, h, w)
Source = Callable[[int, int, int, int], Tensor]  # (y0, y1, x0, x1) -> (3, h, w)
Allocate = Callable[[int], np.ndarray]  # channels -> an array (channels, H, W) to fill
Tick = Callable[[float], Any]  # told of pixels that are done


@dataclass
class LoadOptions:
    """What a checkpoint may not say; every field is a flag of sharp_inference.py."""

    ema: bool = _how(True, "averaged weights where there are any")
    model: str | None = _how(None, "for a checkpoint that does not say", choices=tuple(FACTORIES))
    model_size: str = _how("base", "with --model")
    model_options: str = _how("{}", "with --model: other fields of its configuration, JSON")
    rgb_norm: str | None = _how(
        None, "for a checkpoint that does not say", choices=PHOTO_FACTS["rgb_norm"]
    )
    rgb_encoding: str | None = _how(
        None, "the same, of its photos' light; else linear", choices=PHOTO_FACTS["rgb_encoding"]
    )
    mst_root: str | None = _how(None, "a checkout of MST++, for its .pth files")


@dataclass
class PredictionOptions:
    """How a frame is predicted; every field is a flag of sharp_inference.py."""

    patch_size: int | None = _how(
        None, "side of a tile; default the whole frame if it fits, else what fits"
    )
    overlap: int | None = _how(None, "pixels that neighbours share; default an eighth of the tile")
    batch_size: int = _how(1, "tiles in one forward")
    memory_gb: float | None = _how(None, "for activations and output; default half of the free")
    amp: bool = _how(False, "bfloat16 autocast")
    ensemble: bool = _how(False, "mean of the 8 views by rotation and flip")


@dataclass
class Loaded:
    """A checkpoint ready to use: the module in eval mode, how to feed and read it."""

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
    encoding: str = "linear"  # of the photos that it was trained on, or srgb
    pixel_bytes: float = 0.0  # that a forward needs for each pixel

    @property
    def gives_scale(self) -> bool:
        """Whether its output goes on with a scale of each value: its uncertainty."""
        return bool(self.config.get("estimate_uncertainty"))


def load_model(
    spec: str | Path | None = None,
    device: torch.device | str = "cpu",
    options: LoadOptions | None = None,
) -> Loaded:
    """Read CHECKPOINT or NAME=CHECKPOINT, by default the weights that ship, for sRGB photos; a
    pickle that would run code is refused.

    UserError where the file is none, does not say what it is, or does not fit."""
    options, device = options or LoadOptions(), torch.device(device)
    name, path = _split_name(str(spec or SHIPPED_WEIGHTS))
    checkpoint = read_checkpoint(path)
    weights = "ema" if options.ema and checkpoint["ema"] else "raw"
    state = checkpoint["ema" if weights == "ema" else "state_dict"]
    kind, config = _identify(checkpoint, state, path, options)
    module: Any = _build(kind, config, state, path, options)
    load_weights(module, state, path)
    bands = int(config.get("out_channels") or module.config.out_channels)
    facts = dict(checkpoint["data"] or {})
    norm = _photo_fact("rgb_norm", facts, options, path)
    if norm is None and kind != RIVAL:
        raise UserError(
            f"{path}: does not say how its RGB was normalised; give --rgb_norm per_image or unit"
        )
    facts["rgb_norm"] = norm or "per_image"
    # NTIRE's photos are linear.
    facts["rgb_encoding"] = _photo_fact("rgb_encoding", facts, options, path) or "linear"
    facts["wavelengths"] = _band_centres(facts.get("wavelengths"), bands, path)
    module.to(device)
    module.to(memory_format=torch.channels_last)
    model = Loaded(
        name=name,
        path=path,
        kind=kind,
        module=module.eval(),
        device=device,
        weights=weights,
        config=config,
        data=facts,
        rgb_norm=facts["rgb_norm"],
        encoding=facts["rgb_encoding"],
        wavelengths=facts["wavelengths"],
        bands=bands,
    )
    side = 2 * MIN_SIDE
    model.pixel_bytes = peak_bytes(model, torch.rand(1, 3, side, side)) / side**2
    return model


def _split_name(spec: str) -> tuple[str, str]:
    """NAME=FILE, or a file, which is called by its folder where its own name says little. A file's
    path may hold a = too: the first after which there is one ends the name."""
    name, path = "", spec
    for found in re.finditer("=", spec):
        if os.path.exists(path):
            break
        name, path = spec[: found.start()], spec[found.end() :]
    file = Path(path)
    if not name and file.stem in ("best", "last", "model"):
        name = file.parent.name
    return name or file.stem, path


def _identify(checkpoint: dict, state: dict, path: str, options: LoadOptions) -> tuple[str, dict]:
    """Which model a checkpoint holds, and its configuration."""
    kind = checkpoint["model"] or options.model
    config = dict(checkpoint["model_config"] or {})
    if kind is None and any("embedding.weight" in key for key in state):
        return RIVAL, {"out_channels": 31}
    if kind not in (*FACTORIES, RIVAL):
        raise UserError(
            f"{path}: does not say which model it is (found {kind}); give --model and --model_size"
        )
    if not config:
        try:
            config = {"model_size": options.model_size} | json.loads(options.model_options)
        except (TypeError, ValueError) as error:
            raise UserError(f"--model_options {options.model_options}: {error}") from None
    return kind, config


def _build(kind: str, config: dict, state: dict, path: str, options: LoadOptions) -> nn.Module:
    if kind == RIVAL:
        return mst_plus_plus(options.mst_root)
    script, factory = FACTORIES[kind]
    create = getattr(importlib.import_module(script), factory)
    module: Any = build_model(create, config, state, path)
    channels = module.config.in_channels
    if channels != 3:
        raise UserError(f"{path}: it takes {channels} channels, an image has 3")
    return module


def _band_centres(recorded: Any, bands: int, path: str) -> list[float]:
    """nm, as recorded; else evenly over the field's range."""
    if recorded is None:
        return np.linspace(*FIELD_RANGE, bands).tolist()
    numbers = isinstance(recorded, list) and all(isinstance(nm, (int, float)) for nm in recorded)
    if not numbers or len(recorded) != bands or not all(0 < nm < 1e6 for nm in recorded):
        raise UserError(f"{path}: damaged, its wavelengths are not {bands} in nm")
    return [float(nm) for nm in recorded]


def _photo_fact(name: str, facts: dict, options: LoadOptions, path: str) -> str | None:
    """What a checkpoint says of its photos, rgb_norm or rgb_encoding; else what is asked for."""
    recorded, asked, choices = facts.get(name), getattr(options, name), PHOTO_FACTS[name]
    if recorded not in (None, *choices):
        raise UserError(f"{path}: damaged, its {name} is not {' or '.join(choices)}")
    if recorded and asked not in (None, recorded):
        raise UserError(f"{path}: was trained with --{name} {recorded}")
    return recorded or asked


def mst_plus_plus(root: str | None) -> nn.Module:
    """MST_Plus_Plus from the one file of it in a checkout of its toolbox."""
    scripts = sorted(Path(root).glob("**/architecture/MST_Plus_Plus.py")) if root else []
    if not scripts:
        raise UserError(f"--mst_root {root}: these are weights of MST++; give a checkout of it")
    sys.path.append(str(scripts[0].parent))
    return importlib.import_module("MST_Plus_Plus").MST_Plus_Plus()


def forward(model: Loaded, rgb: Tensor, options: PredictionOptions) -> Tensor:
    """(B, 3, h, w) -> (B, bands, h, w) float32, then the scale's channels where there are any."""
    height, width = rgb.shape[-2:]
    if min(height, width) < MIN_SIDE:
        rgb = rgb[..., _mirrored(height)[:, None], _mirrored(width)]
    if not options.ensemble:
        return _forward_once(model, rgb, options)[..., :height, :width]
    total = torch.zeros(())
    for turns in range(4):
        for flip in ([-1], []):  # -1 mirrors the columns
            view = torch.rot90(rgb.flip(flip), turns, (-2, -1))
            out = torch.rot90(_forward_once(model, view, options), -turns, (-2, -1))
            total = total + out.flip(flip) / 8
    return total[..., :height, :width]


def _mirrored(side: int) -> np.ndarray:
    """Indices that make a side at least MIN_SIDE long, mirrored at its ends."""
    return np.pad(np.arange(side), (0, max(MIN_SIDE - side, 0)), "symmetric")


def _forward_once(model: Loaded, rgb: Tensor, options: PredictionOptions) -> Tensor:
    rgb = rgb.to(model.device, memory_format=torch.channels_last)
    autocast = torch.autocast(rgb.device.type, torch.bfloat16) if options.amp else nullcontext()
    with torch.no_grad(), autocast:
        out = model.module(rgb)
    if isinstance(out, tuple):
        out = torch.cat(out, 1)
    return out.float()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors alive at once: a forward's peak, without kernels' scratch."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: weakref.WeakSet = weakref.WeakSet()
        self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.alive.add(leaf.untyped_storage())
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.alive))
        return result


def peak_bytes(model: Loaded, rgb: Tensor, options: PredictionOptions | None = None) -> int:
    """Bytes of tensors alive at once in a forward of rgb (B, 3, h, w)."""
    with LiveBytes() as live:
        forward(model, rgb, options or PredictionOptions())
    return live.peak


def macs_256(model: Loaded, options: PredictionOptions) -> int:
    """Multiply-adds of a 256 x 256 frame, with plain attention: a CPU's fast one counts as 0."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        forward(model, torch.rand(1, 3, 256, 256), replace(options, ensemble=False))
    return counter.get_total_flops() // 2


def tile_offsets(side: int, tile: int, overlap: int) -> list[int]:
    """First pixels of evenly spaced tiles that cover a side and share at least `overlap` pixels."""
    if side <= tile:
        return [0]
    count = math.ceil((side - tile) / (tile - overlap)) + 1
    return [i * (side - tile) // (count - 1) for i in range(count)]


def tile_overlap(side: int, options: PredictionOptions) -> int:
    """As asked, by default an eighth of the tile; at most half of a tile that memory made small."""
    overlap = side // 8 if options.overlap is None else options.overlap
    return min(overlap, side - 1 if side == options.patch_size else side // 2)


def ramp(length: int) -> Tensor:
    """Weight of the later tile across an overlap: 0 in its first quarter (which saw too little), 1
    in the last, sin^2 between."""
    x = (torch.arange(length) + 0.5) / length
    return torch.sin((2 * x - 0.5).clamp(0, 1) * (math.pi / 2)) ** 2


def blend_tiles(
    run: Forward,
    source: Source,
    size: tuple[int, int],
    patch: int,
    overlap: int,
    batch: int,
    allocate: Allocate,
    tick: Tick = lambda pixels: None,
) -> np.ndarray:
    """Predict an image of `size` (H, W) in tiles, row by row, holding a few tiles in memory beside
    the output.

    run(x (B, 3, h, w)) -> (B, C, h, w). Overlaps are a + w (b - a), so equal tiles give exactly
    their value; outer edges stay the image's."""
    height, width = size
    tile_height, tile_width = min(patch, height), min(patch, width)
    rows = tile_offsets(height, tile_height, overlap)
    columns = tile_offsets(width, tile_width, overlap)
    out, unreleased = None, 0
    for i, y in enumerate(rows):
        above = rows[i - 1] + tile_height - y if i else 0  # rows that the strip above has written
        carry = None  # columns shared with the tile on the left
        bottom = y + tile_height
        for j, x, tile in _predicted(run, source, (y, bottom), columns, tile_width, batch):
            if out is None:
                out = allocate(len(tile))
            if carry is not None:
                shared = tile[..., : carry.shape[-1]]
                shared.copy_(torch.lerp(carry, shared, ramp(carry.shape[-1])))
            end = columns[j + 1] if j + 1 < len(columns) else width  # later tiles begin there
            carry, tile = tile[..., end - x :], tile[..., : end - x]
            _place(tile, out, y, x, above)
            unreleased += tile.nbytes
            if unreleased > MAPPED_BYTES:
                release(out)
                unreleased = 0
            tick(height * width / (len(rows) * len(columns)))
    assert out is not None  # an image has a tile
    return out


def _predicted(
    run: Forward, source: Source, rows: tuple[int, int], columns: list[int], width: int, batch: int
) -> Iterator[tuple[int, int, Tensor]]:
    """(number, left, tile (C, h, w)) of a strip's tiles, `batch` of them in a forward."""
    for first in range(0, len(columns), batch):
        group = columns[first : first + batch]
        tiles = [source(*rows, x, x + width) for x in group]
        outputs = run(torch.stack(tiles)).cpu()
        for number, (x, tile) in enumerate(zip(group, outputs, strict=True), start=first):
            yield number, x, tile


def _place(tile: Tensor, out: np.ndarray, y: int, x: int, above: int) -> None:
    """Write a tile (C, h, w) at (y, x), its first `above` rows blended into what is there."""
    rows, columns = tile.shape[1:]
    into = torch.from_numpy(out[:, y : y + rows, x : x + columns])
    into[:, :above] = torch.lerp(into[:, :above], tile[:, :above], ramp(above)[:, None])
    if tile.shape == out.shape:  # a whole frame: four times as fast from channels_last as below
        into.flatten(1).copy_(tile.permute(1, 2, 0).flatten(0, 1).t())
    else:
        into[:, above:] = tile[:, above:]


def in_memory(size: tuple[int, int]) -> Allocate:
    """What allocates the output for a frame of `size` (H, W) that memory holds."""
    return lambda channels: np.empty((channels, *size), np.float32)


def tiles_of(rgb: Tensor) -> Source:
    """A reader of the tiles of a frame (1, 3, H, W)."""
    return lambda y0, y1, x0, x1: rgb[0, :, y0:y1, x0:x1]


def plan_tile(model: Loaded, size: tuple[int, int], options: PredictionOptions) -> int:
    """The longer side of the image when the whole frame fits the memory budget, else the side of a
    tile that does, of which few pixels are predicted twice."""
    on_gpu = model.device.type == "cuda"
    free = free_cuda_memory(model.device) if on_gpu else free_memory()
    budget = options.memory_gb * 2**30 if options.memory_gb else free / 2
    cube_and_copy = 2 * 4 * model.bands
    per_pixel = SCRATCH * model.pixel_bytes + cube_and_copy
    if size[0] * size[1] * per_pixel <= budget:
        return max(size)
    if not on_gpu:
        budget = min(budget, TILE_BYTES)
    fits = int(math.sqrt(budget / per_pixel / options.batch_size))
    most = max(MIN_SIDE, min(MAX_TILE, fits) // 32 * 32)

    def pixels(side: int) -> int:
        overlap = tile_overlap(side, options)
        rows, columns = (len(tile_offsets(length, side, overlap)) for length in size)
        return rows * columns * side**2

    return min(range(most, max(MIN_SIDE, most * 3 // 4) - 1, -32), key=pixels)


def predict_frame(network: nn.Module, rgb: Tensor, device: torch.device) -> Tensor:
    """(1, 3, H, W) -> the network's cube (1, bands, H, W) on `device`; on the CPU where the frame
    took more memory than there is and was predicted in tiles, which is said."""

    def run(x: Tensor) -> Tensor:
        return first_output(network(x.to(device)))

    try:
        return run(rgb)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise

    size = (rgb.shape[-2], rgb.shape[-1])

    def tiled(tile: int) -> np.ndarray:
        return blend_tiles(run, tiles_of(rgb), size, tile, tile // 8, 1, in_memory(size))

    cube, _ = in_smaller_tiles(tiled, smaller_tile(max(size)))
    return torch.from_numpy(cube)[None]


def smaller_tile(tried: int) -> int:
    """The side to go on with where `tried` pixels were too much; UserError where none is left."""
    if tried < 2 * MIN_SIDE:
        raise UserError(f"out of memory even with a tile of {tried} px; free some memory")
    patch = tried // 2 // 8 * 8
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    terminal.say(f"out of memory with a tile of {tried} px: going on with {patch} px")
    return patch


def in_smaller_tiles(
    tiled: Callable[[int], np.ndarray], patch: int, most: int = sys.maxsize
) -> tuple[np.ndarray, int]:
    """tiled(side of a tile), and that side: `patch`, halved as often as memory runs out."""
    while True:
        try:
            return tiled(patch), patch
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        patch = smaller_tile(min(patch, most))


def predict(
    model: Loaded,
    source: Source,
    size: tuple[int, int],
    options: PredictionOptions,
    allocate: Allocate,
    *,
    patch: int | None = None,
    channels: int | None = None,
    tick: Tick = lambda pixels: None,
) -> tuple[np.ndarray, int]:
    """`forward` of an image of any size (H, W), its first `channels` channels; the tile used."""
    patch = patch or options.patch_size or plan_tile(model, size, options)

    def run(x: Tensor) -> Tensor:
        return forward(model, x, options)[:, :channels]

    def tiled(side: int) -> np.ndarray:
        overlap = tile_overlap(side, options)
        return blend_tiles(run, source, size, side, overlap, options.batch_size, allocate, tick)

    return in_smaller_tiles(tiled, patch, max(size))
