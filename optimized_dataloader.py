"""Feeds the trainers: staged and raw data sets, MST++ patch grid, loaders, augmentation, the loss.

    train, val = create_optimized_dataloaders(DataConfig(data_root="data/staged"))
    train.set_position(epoch)
    for batch in train:
        rgb, cube = prepare_batch(batch, device)      # (B, 3, p, p) and (B, bands, p, p) float32
    for name, rgb, cube in val:                       # frames (1, 3, H, W) and (1, bands, H, W)

`data_root` is a folder staged by dataset_setup.py (fast: a patch is read through a memory map,
nothing else is touched) or a raw ARAD-1K folder as MST++ lays it out."""

from __future__ import annotations

import functools
import math
import os
import shutil
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from camera_colour import linear_light
from common_utils_v32 import UserError, opt
from scene_folders import FileCheck, RawScenes, Scenes, StagedScenes
from training_runs import leave_process_group

RGB_DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16}
WORKER_PATIENCE = 120  # seconds to a batch; a worker that could not hand one over says nothing
SHARED_MEMORY = Path("/dev/shm")  # by which workers hand over batches, on Linux
GRID_SETTINGS = ("patch_size", "stride", "patch_grid")  # what a grid of patches depends on
_data = functools.partial(opt, group="data")
# Memory of _buffer that is free, by shape and dtype.
_free_buffers: defaultdict[tuple, list[np.ndarray]] = defaultdict(list)


def normalise_rgb(rgb: Tensor, rgb_norm: str, low: float | Tensor, high: float | Tensor) -> Tensor:
    """RGB values -> float32. `unit`: over full scale of integers as stored, linear light in [0, 1]
    as it is; `per_image` maps the whole image's [low, high] to [0, 1]."""
    if rgb_norm == "unit" and rgb.is_floating_point():
        return rgb
    if rgb_norm == "unit":
        return rgb.float() / float(torch.iinfo(rgb.dtype).max)
    if rgb_norm != "per_image":
        raise UserError(f"rgb_norm {rgb_norm!r}: choose per_image or unit")
    return (rgb.float() - low) / (torch.as_tensor(high, dtype=torch.float32) - low).clamp_min(1e-6)


def decode_light(
    rgb: np.ndarray, low: int, high: int, encoding: str
) -> tuple[np.ndarray, float, float]:
    """RGB as stored, its range -> in linear light: sRGB as float32 in [0, 1], linear as it is."""
    if encoding == "linear":
        return rgb, low, high
    ends = linear_light(np.array([low, high], rgb.dtype))
    return linear_light(rgb), float(ends[0]), float(ends[1])


def patch_grid(
    height: int, width: int, patch: int, stride: int, mode: str = "floor"
) -> tuple[list[int], list[int]]:
    """Top and left offsets of the patches of a frame. `floor` is MST++'s grid (45 x 49 = 2205
    patches of 128 at stride 8 in 482 x 512); `cover` adds the offset that reaches the border where
    the stride stops short of it."""
    if patch > min(height, width):
        raise UserError(
            f"--patch_size {patch}: larger than a frame of {height} x {width}; give a smaller one"
        )

    def offsets(last: int) -> list[int]:
        border = [last] if mode == "cover" and last % stride else []
        return [*range(0, last + 1, stride), *border]

    return offsets(height - patch), offsets(width - patch)


@dataclass
class DataConfig:
    """What the loaders need to know; `rank`, `world_size` and `on_gpu` come from the process."""

    data_root: str = _data("./data/ARAD_1K", "folder staged by dataset_setup.py, or raw ARAD-1K")
    memory_mode: str = _data(
        "float16",
        "training cubes in RAM as float32 (standard) or float16, or patch by patch",
        choices=("standard", "float16", "lazy"),
    )
    patch_size: int = _data(128, "side of a training patch, pixels")
    stride: int = _data(8, "distance of patches, pixels")
    patch_grid: str = _data(
        "floor", "MST++'s grid, or one that reaches the border too", choices=("floor", "cover")
    )
    batch_size: int = _data(20, "patches in a batch of one rank")
    rgb_norm: str = _data(
        "per_image",
        "RGB to [0, 1] by the frame's min and max (MST++), or by full scale",
        choices=("per_image", "unit"),
    )
    iterations_per_epoch: int = _data(1000, "batches in an epoch; 0 = one pass over all patches")
    # Without a GPU none: a batch takes some ms.
    num_workers: int = _data(-1, "loader processes; -1 = 2 with a GPU, else none")
    seed: int = _data(42, "seed of order and augmentation")
    augment: bool = _data(True, "random rotations and flips of training patches")
    mix_root: str | None = _data(None, "a second training set, mixed into the batches of the first")
    mix_share: float = _data(0.25, "its share of a batch at first; none at the end of the run")
    mix_until: int = 0  # iterations of the run, from which on nothing is mixed in
    rank: int = 0
    world_size: int = 1
    on_gpu: bool = False  # batches go to one: they are pinned, and read by workers
    cube_key: str | None = _data(None, "name of the cube in raw files, if it is not a usual one")
    axes: str | None = _data(None, "stored order of h, w and c in raw files, if it cannot be told")
    verify: bool = _data(
        True, "hold staged files against their checksums meanwhile; no checkpoint before that ends"
    )
    val_split: str = _data("val", "split to validate on", choices=("train", "val", "test"))

    def __post_init__(self) -> None:
        for field in fields(DataConfig):
            choices, value = field.metadata.get("choices"), getattr(self, field.name)
            if choices and value not in choices:
                raise UserError(f"--{field.name} {value}: choose from {', '.join(choices)}")
        for name in ("patch_size", "stride", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: give 1 or more")
        if not 0 <= self.mix_share < 1:
            raise UserError(f"--mix_share {self.mix_share}: give 0 or more, below 1")
        if self.iterations_per_epoch < 0:
            raise UserError(f"--iterations_per_epoch {self.iterations_per_epoch}: give 0 or more")


class RawBatch(NamedTuple):
    """A batch as stored, still to be augmented and normalised by prepare_batch."""

    rgb: Tensor  # (B, p, p, 3) uint8 or uint16, of sRGB photos float32 in linear light
    cube: Tensor  # (B, p, p, bands) float16 or float32
    augment: Tensor  # (B,) uint8, element of the dihedral group, 0 to 7
    rgb_range: Tensor  # (B, 2) float32, what becomes 0 and 1
    patches: Tensor  # (B,) int64, numbers of the patches in the data set


def _buffer(shape: tuple[int, ...], dtype: str) -> Tensor:
    """An uninitialised CPU tensor whose memory is used again once no tensor holds it. Allocations
    over 32 MB come fresh from the system, and the page faults of a batch of 20 (40 MB) take eight
    times as long as filling it."""
    free = _free_buffers[shape, dtype]
    memory = free.pop() if free else np.empty(shape, dtype)
    view = memory[...]  # dies with the last tensor on it; the memory outlives it
    weakref.finalize(view, free.append, memory).atexit = False
    return torch.from_numpy(view)


@functools.lru_cache(maxsize=1)  # the next batch is of the same pass mostly
def shuffled_pass(count: int, elements: int, key: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Patch numbers in the order of `key`, uint32, and an augmentation below `elements` of each."""
    rng = np.random.default_rng(key)
    order = rng.permutation(np.arange(count, dtype=np.uint32))
    return order, rng.integers(0, elements, count, dtype=np.uint8)


class PatchDataset(Dataset[RawBatch]):
    """All patches of the training scenes. An item is the whole batch at (epoch, iteration), so that
    workers hand over few big tensors; it is a function of seed, epoch and sample alone."""

    def __init__(self, scenes: Scenes, config: DataConfig, mixed: PatchDataset | None = None):
        self.scenes = scenes
        self.config = config
        self.mixed = mixed  # the patches of `mix_root`
        self.grids = [
            patch_grid(height, width, config.patch_size, config.stride, config.patch_grid)
            for height, width in scenes.shapes
        ]
        counts = [len(rows) * len(cols) for rows, cols in self.grids]
        self.starts = np.cumsum([0, *counts])  # number of each scene's first patch, and their count

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def iterations(self) -> int:
        """Batches of an epoch, on each rank."""
        config = self.config
        whole_pass = math.ceil(len(self) / (config.batch_size * config.world_size))
        return config.iterations_per_epoch or whole_pass

    def place(self, patch: int) -> tuple[int, int, int]:
        """Number of a patch -> (scene, top, left), row-major in the grid of each scene."""
        scene = int(np.searchsorted(self.starts, patch, side="right")) - 1
        rows, cols = self.grids[scene]
        row, col = divmod(int(patch - self.starts[scene]), len(cols))
        return scene, rows[row], cols[col]

    def samples(self, epoch: int, iteration: int) -> tuple[np.ndarray, np.ndarray]:
        """Patch numbers and augmentations of this rank's slice of a global batch."""
        config, count = self.config, len(self)
        elements = 8 if config.augment else 1
        first = (iteration * config.world_size + config.rank) * config.batch_size
        end = first + config.batch_size
        patches, augment = [], []
        for turn in range(first // count, (end - 1) // count + 1):
            key = (config.seed % 2**64, epoch, turn)
            order, codes = shuffled_pass(count, elements, key)
            start = turn * count
            chosen = order[max(first - start, 0) : end - start].astype(np.int64)
            patches.append(chosen)
            augment.append(codes[chosen])
        return np.concatenate(patches), np.concatenate(augment)

    def __getitem__(self, position: tuple[int, int]) -> RawBatch:
        patches, augment = self.samples(*position)
        count = 0 if self.mixed is None else self.mixed_in(*position)
        if self.mixed is None or not count:
            return self.read(patches, augment)
        others, codes = self.mixed.samples(*position)
        mine = self.read(patches[count:], augment[count:])
        theirs = self.mixed.read(others[:count], codes[:count])
        return RawBatch(*(torch.cat(pair) for pair in zip(theirs, mine, strict=True)))

    def mixed_in(self, epoch: int, iteration: int) -> int:
        """How many samples of a batch are of the second set: a falling share, rounded by chance."""
        config, done = self.config, epoch * self.iterations + iteration
        share = config.mix_share * max(0.0, 1 - done / max(1, config.mix_until))
        chance = np.random.default_rng((config.seed % 2**64, epoch, iteration, 1)).random()
        return int(share * config.batch_size + chance)

    def read(self, patches: np.ndarray, augment: np.ndarray) -> RawBatch:
        batch, side, scenes = len(patches), self.config.patch_size, self.scenes
        cube = _buffer((batch, side, side, scenes.bands), scenes.dtype)
        rgb = torch.empty((batch, side, side, 3), dtype=RGB_DTYPES[scenes.rgb.dtype])
        ranges = np.full((batch, 2), (0, scenes.rgb.full_scale), np.float32)
        for i, patch in enumerate(patches):
            rgb_range = scenes.copy_patch(*self.place(patch), cube[i].numpy(), rgb[i].numpy())
            if self.config.rgb_norm == "per_image":
                ranges[i] = rgb_range
        if scenes.rgb.encoding != "linear":
            rgb = torch.from_numpy(linear_light(rgb.numpy()))
            ranges = linear_light(ranges.astype(scenes.rgb.dtype))
        facts = [torch.from_numpy(array) for array in (augment, ranges, patches)]
        return RawBatch(rgb, cube, *facts)


def dihedral(x: Tensor, code: int) -> Tensor:
    """Element `code` (0 to 7) of the symmetries of the square, on axes 0 and 1 of `x`."""
    flips = [axis for axis in (0, 1) if code >> axis & 1]
    x = x.flip(flips) if flips else x
    return x.transpose(0, 1) if code & 4 else x


@functools.lru_cache(maxsize=4)
def turned_places(side: int, device: torch.device) -> Tensor:
    """(8, side^2) int64: for each element of the dihedral group, which pixel each one shows."""
    places = torch.arange(side**2, device=device).view(side, side)
    return torch.stack([dihedral(places, code).flatten() for code in range(8)])


def turned_by_gather(stored: Tensor, codes: Tensor) -> Tensor:
    """What `turned_one_by_one` gives, in a few launches for the whole batch: for a GPU."""
    places = turned_places(stored.shape[1], stored.device)[codes.to(stored.device).long()]
    pixels = stored.flatten(1, 2)
    chosen = pixels.gather(1, places[..., None].expand(-1, -1, stored.shape[3]))
    return chosen.float().view(stored.shape)


def turned_one_by_one(stored: Tensor, codes: Tensor) -> Tensor:
    """(B, p, p, C) of any type -> float32, each sample turned by its code."""
    turned = _buffer(tuple(stored.shape), "float32")
    for i, code in enumerate(codes.tolist()):
        flipped = dihedral(stored[i], code & 3)
        if code & 4:  # converted apart: a copy that transposes too converts one by one
            turned[i].copy_(flipped.float().transpose(0, 1))
        else:
            turned[i].copy_(flipped)
    return turned


def prepare_batch(batch: RawBatch, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """RGB (B, 3, p, p), normalised, and cube (B, bands, p, p), both float32, augmented alike, on
    `device`; channels_last, as they are stored."""
    codes = batch.augment
    # They go over as stored, which is smaller, and grow there.
    rgb = batch.rgb.to(device, non_blocking=True)
    cube = batch.cube.to(device, non_blocking=True)
    ranges = batch.rgb_range.to(device, non_blocking=True)
    if rgb.dtype == torch.uint16:  # torch turns few of these on every device, but converts all
        rgb = rgb.float()
    low, high = ranges[:, 0, None, None, None], ranges[:, 1, None, None, None]
    turn = turned_one_by_one if rgb.is_cpu else turned_by_gather
    rgb = normalise_rgb(turn(rgb, codes), "per_image", low, high)
    return rgb.permute(0, 3, 1, 2), turn(cube, codes).permute(0, 3, 1, 2)


def check_shared_memory(dataset: PatchDataset, workers: int) -> None:
    """UserError where the workers' batches do not fit in SHARED_MEMORY; they would die of it."""
    if not workers or not SHARED_MEMORY.is_dir():
        return
    config, scenes = dataset.config, dataset.scenes
    rgb_bytes = np.dtype(scenes.rgb.dtype).itemsize if scenes.rgb.encoding == "linear" else 4
    pixel = scenes.bands * np.dtype(scenes.dtype).itemsize + 3 * rgb_bytes
    batches = 2 * workers + 1  # two of each worker wait, one is in use
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if config.world_size > 1 else 1
    needed = ranks_here * batches * config.batch_size * config.patch_size**2 * pixel
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"{SHARED_MEMORY}: {workers} loader workers need {needed / 2**20:.0f} MB of shared "
            f"memory and {free / 2**20:.0f} are free; give --num_workers 0, or more of it (docker "
            "run --shm-size=2g)"
        )


class TrainLoader:
    """Iterates over the RawBatches of an epoch from the position set, then of the next."""

    def __init__(self, dataset: PatchDataset, config: DataConfig):
        self.dataset = dataset
        self.config = config
        self.wavelengths = dataset.scenes.wavelengths
        self.rgb = dataset.scenes.rgb
        self.check = FileCheck([])  # of the files that are read
        # (epoch, iteration) still to come; the loader's sampler.
        self.positions: list[tuple[int, int]] = []
        workers = config.num_workers
        if workers < 0:
            workers = 2 if config.on_gpu else 0
        in_ram = bool(dataset.scenes.frames)
        if in_ram and "fork" not in torch.multiprocessing.get_all_start_methods():
            workers = 0  # a spawned worker would copy all scenes
        check_shared_memory(dataset, workers)
        self.loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=self.positions,
            num_workers=workers,
            timeout=WORKER_PATIENCE if workers else 0,
            persistent_workers=workers > 0,
            worker_init_fn=leave_process_group,
            generator=torch.Generator(),  # else each pass would draw from the model's
            pin_memory=config.on_gpu,
            multiprocessing_context="fork" if in_ram and workers else None,
        )
        self.set_position(0)

    def start_workers(self) -> None:
        """Fork the loader's workers now, before NCCL has threads, which a fork does not survive."""
        if self.loader.num_workers:
            to_come, self.positions[:] = list(self.positions), []
            iter(self.loader)
            self.positions[:] = to_come

    def set_position(self, epoch: int, iteration: int = 0) -> None:
        """Where the next iteration starts; `iteration` batches of the epoch are left out."""
        if epoch < 0 or not 0 <= iteration <= len(self):
            raise ValueError(
                f"epoch {epoch}, iteration {iteration}: an epoch has {len(self)} iterations"
            )
        self.epoch = epoch
        self.positions[:] = [(epoch, number) for number in range(iteration, len(self))]

    def __len__(self) -> int:
        return self.dataset.iterations

    def __iter__(self) -> Iterator[RawBatch]:
        try:
            yield from self.loader
        except UserError as error:  # a worker's error comes with its traceback as text
            raise UserError(str(error).rstrip().rsplit("UserError: ", 1)[-1]) from None
        except (EOFError, ConnectionError) as error:  # it was handing over a batch
            raise RuntimeError("a DataLoader worker ended") from error
        self.set_position(self.epoch + 1)

    def spread(self, pixels: int) -> tuple[Tensor, Tensor]:
        """At least `pixels` pixels, as prepare_batch gives them, from patches spread over all
        scenes, not augmented: the same whatever the seed, the batch size and the ranks."""
        count = min(len(self.dataset), math.ceil(pixels / self.config.patch_size**2))
        patches = np.linspace(0, len(self.dataset) - 1, count).round().astype(np.int64)
        return prepare_batch(self.dataset.read(patches, np.zeros(count, np.uint8)))

    def describe(self) -> str:
        scenes, config = self.dataset.scenes, self.config
        remarks = ""
        if scenes.dtype == "float16":
            remarks += ", off by a 2048th at most, or 3e-8"
        staged = [scenes.settings.get(name) for name in GRID_SETTINGS]
        if None not in staged and staged != [getattr(config, name) for name in GRID_SETTINGS]:
            remarks += f"; staged for patch, stride and grid {staged}"
        return (
            f"{len(scenes.names)} training scenes, {len(self.dataset)} patches of "
            f"{config.patch_size} px, {scenes.bands} bands, --memory_mode "
            f"{config.memory_mode} (cubes are {scenes.dtype}{remarks}), "
            f"{len(self)} batches an epoch"
        )


class ValScene(NamedTuple):
    """A frame: rgb (1, 3, H, W), normalised, and cube (1, bands, H, W); float32, channels_last."""

    name: str
    rgb: Tensor
    cube: Tensor


class ValLoader:
    """Whole frames of this rank (every world_size-th), one in memory at a time."""

    def __init__(self, scenes: Scenes, config: DataConfig):
        self.scenes = scenes
        self.wavelengths = scenes.wavelengths
        self.rgb = scenes.rgb
        self.rgb_norm = config.rgb_norm
        self.mine = range(config.rank, len(scenes.names), config.world_size)

    def __len__(self) -> int:
        return len(self.mine)

    def __iter__(self) -> Iterator[ValScene]:
        for scene in self.mine:
            frame = self.scenes.arrays(scene)
            # Copies, as maps cannot be written to: (H, W, C) -> (1, C, H, W), channels_last.
            cube = torch.from_numpy(np.array(frame.cube, order="C")).permute(2, 0, 1)[None]
            light, low, high = decode_light(frame.rgb, *frame.rgb_range, self.rgb.encoding)
            rgb = torch.from_numpy(np.array(light, order="C")).permute(2, 0, 1)[None]
            rgb = normalise_rgb(rgb, self.rgb_norm, low, high)
            yield ValScene(self.scenes.names[scene], rgb, cube.float())


def _open_scenes(config: DataConfig, split: str) -> Scenes:
    root = Path(config.data_root)
    scenes: Scenes
    if (root / "index.json").exists():
        scenes = StagedScenes(root, split)
    elif (root / "Train_Spec").is_dir():
        scenes = RawScenes(root, split, config.cube_key, config.axes)
    else:
        raise UserError(
            f"--data_root {root}: neither index.json nor Train_Spec in it; "
            "make it with dataset_setup.py"
        )
    if not scenes.names:
        raise UserError(
            f"--data_root {root}: no scenes in split {split}; "
            "stage with dataset_setup.py --val-fraction"
        )
    return scenes


def _training_scenes(config: DataConfig) -> Scenes:
    """Opened, and in RAM where `memory_mode` says so; UserError where that does not fit."""
    scenes = _open_scenes(config, "train")
    if config.memory_mode != "lazy":
        dtype = "float16" if config.memory_mode == "float16" else "float32"
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if config.world_size > 1 else 1
        scenes.into_ram(dtype, copies=ranks_here)
    elif isinstance(scenes, RawScenes):
        scenes.check_lazy()
    return scenes


def train_loader(config: DataConfig) -> TrainLoader:
    """The training patches. UserError when `memory_mode` needs more RAM than there is."""
    scenes = _training_scenes(config)
    return TrainLoader(PatchDataset(scenes, config, _mixed_patches(scenes, config)), config)


def _mixed_patches(scenes: Scenes, config: DataConfig) -> PatchDataset | None:
    """The patches of `mix_root`, if any. UserError where its scenes are not of the same kind."""
    if config.mix_root is None:
        return None
    other = replace(config, data_root=config.mix_root, mix_root=None)
    try:
        mixed = PatchDataset(_training_scenes(other), other)
    except UserError as error:
        raise UserError(str(error).replace("--data_root", "--mix_root")) from None
    for what, mine, theirs, remedy in (
        ("bands", scenes.wavelengths, mixed.scenes.wavelengths, "stage the same of both"),
        ("RGB type and encoding", scenes.rgb[:2], mixed.scenes.rgb[:2], "take photos of one kind"),
        ("type of cubes", scenes.dtype, mixed.scenes.dtype, "give --memory_mode float16"),
    ):
        if mine != theirs:
            raise UserError(
                f"--mix_root {config.mix_root}: differs from {config.data_root} in its {what}; "
                f"{remedy}"
            )
    return mixed


def val_loader(config: DataConfig) -> ValLoader:
    """Full frames of `val_split`. Targets are float32, of training scenes float16 on request."""
    scenes = _open_scenes(config, config.val_split)
    if config.val_split != "train" and scenes.dtype == "float16":
        folder = Path(config.data_root) / config.val_split
        raise UserError(f"{folder}: float16 cubes, validation needs float32; stage it again")
    return ValLoader(scenes, config)


def create_optimized_dataloaders(config: DataConfig) -> tuple[TrainLoader, ValLoader]:
    """Both loaders of a data set. UserError where their scenes differ in what a model is for."""
    train, val = train_loader(config), val_loader(config)
    what = ""
    if val.wavelengths != train.wavelengths:
        what = "bands"
    elif (val.rgb.dtype, val.rgb.encoding) != (train.rgb.dtype, train.rgb.encoding):
        what = "RGB type or encoding"
    if what:
        raise UserError(
            f"--data_root {config.data_root}: training and validation scenes differ in their "
            f"{what}; stage it again"
        )
    if config.verify:
        checksums = [*train.dataset.scenes.checksums, *val.scenes.checksums]
        if train.dataset.mixed is not None:
            checksums += train.dataset.mixed.scenes.checksums
        train.check = FileCheck(checksums[config.rank :: config.world_size])
    return train, val


class MSTPlusPlusLoss(nn.Module):
    """mean(|pred - target| / max(target, floor)) in float32 whatever the autocast: MST++'s loss
    (Cai et al., CVPRW 2022) with a floor, for targets that hold zeros. With `floor_start` the floor
    goes geometrically from there to `floor` in `floor_steps` steps, so that dark pixels join late;
    the trainer sets `step`, and there is no state to save."""

    def __init__(self, floor: float = 1e-2, floor_start: float | None = None, floor_steps: int = 0):
        super().__init__()
        for name, value in (("train_floor", floor), ("train_floor_start", floor_start)):
            if value is not None and value <= 0:
                raise UserError(f"--{name} {value}: the floor of the loss must be above 0")
        self.floor = floor
        self.floor_start = floor_start
        self.floor_steps = floor_steps
        self.step = 0

    def floor_at(self, step: int) -> float:
        if self.floor_start is None or step >= self.floor_steps:
            return self.floor
        return self.floor_start * (self.floor / self.floor_start) ** (step / self.floor_steps)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        if pred.shape != target.shape:
            raise ValueError(
                f"prediction {tuple(pred.shape)} and target {tuple(target.shape)} differ in shape"
            )
        with torch.autocast(pred.device.type, enabled=False):
            target = target.float()
            error = (pred.float() - target).abs()
            return (error / target.clamp_min(self.floor_at(self.step))).mean()
