"""Feeds the trainers: readers of the field's file formats, MST++ patch grid, train and validation loaders, the loss.

    train, val = create_optimized_dataloaders(DataConfig(data_root="data/staged"))
    train.set_position(epoch)
    for batch in train:
        rgb, cube = prepare_batch(batch, device)      # (B, 3, p, p) and (B, bands, p, p), float32, channels_last
    for name, rgb, cube in val:                       # whole frames, (1, 3, H, W) and (1, bands, H, W), float32

`data_root` is a folder staged by dataset_setup.py (fast: a patch is read through a memory map, nothing else is touched)
or a raw ARAD-1K folder as MST++ lays it out."""

from __future__ import annotations

import functools
import itertools
import json
import math
import mmap
import os
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common_utils_v32 import UserError, cgroup_free, leave_process_group, opt
from cube_files import (
    CUBE_SUFFIXES,
    RGB_SUFFIXES,
    bands_known,
    check_cube,
    check_wavelengths,
    cube_axes,
    open_arrays,
    pick_key,
    read_cube,
    read_rgb,
    read_wavelengths,
    reading,
)

IMAGE_BYTES = 64 << 20  # decoded RGB frames that a raw data set keeps
PATCHES = ("patch_size", "stride", "patch_grid")  # settings that a grid of patches depends on
Frame = tuple[
    np.ndarray, np.ndarray, tuple[int, int]
]  # cube (H, W, bands), RGB (H, W, 3) uint8, min and max of RGB
_data = functools.partial(opt, group="data")
_free_buffers: defaultdict[tuple, list[np.ndarray]] = defaultdict(
    list
)  # of _buffer, by shape and dtype


def normalise_rgb(
    rgb: Tensor, rgb_norm: str, low: float | Tensor = 0.0, high: float | Tensor = 255.0
) -> Tensor:
    """uint8-valued RGB -> float32: `unit` divides by 255, `per_image` maps the whole image's [low, high] to [0, 1]."""
    rgb = rgb.float()
    if rgb_norm == "unit":
        return rgb / 255.0
    if rgb_norm != "per_image":
        raise UserError(f"rgb_norm {rgb_norm!r}: choose per_image or unit")
    return (rgb - low) / (torch.as_tensor(high, dtype=torch.float32) - low).clamp_min(1.0)


class Scene(NamedTuple):
    """One raw scene. The cube is None for a test image, the RGB is None where no image is there."""

    name: str
    cube_path: Path | None
    rgb_path: Path | None


def read_split_list(path: Path) -> list[str]:
    """Scene names of a list file, one a line, with or without a last newline, in any line ending."""
    with reading(path, "a list of scenes"):
        lines = [
            line.strip()
            for line in path.read_text(encoding="utf-8-sig").splitlines()
            if line.strip()
        ]
    names = [
        line.rsplit(".", 1)[0] if line.lower().endswith(CUBE_SUFFIXES + RGB_SUFFIXES) else line
        for line in lines
    ]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: {max(names, key=names.count)} is listed twice; mend the list")
    return names


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files by scene name; of two suffixes for one scene the first of `suffixes` wins."""
    files = (
        [p for p in sorted(folder.iterdir()) if p.suffix.lower() in suffixes]
        if folder.is_dir()
        else []
    )
    return {p.stem: p for p in sorted(files, key=lambda p: -suffixes.index(p.suffix.lower()))}


def find_scenes(root: str | Path) -> dict[str, list[Scene]]:
    """The splits of a raw ARAD-1K folder, sorted by name; without list files every scene is a training scene.
    A listed scene keeps the path where its cube should be, so that reading it names the missing file."""
    root = Path(root)
    if not (root / "Train_Spec").is_dir():
        raise UserError(
            f"{root}: no Train_Spec folder in it; give the ARAD-1K folder with Train_Spec and Train_RGB"
        )
    cubes, images = (
        _by_stem(root / "Train_Spec", CUBE_SUFFIXES),
        _by_stem(root / "Train_RGB", RGB_SUFFIXES),
    )
    lists = {
        "train": root / "split_txt" / "train_list.txt",
        "val": root / "split_txt" / "valid_list.txt",
    }
    listed = {split: read_split_list(path) for split, path in lists.items() if path.exists()}
    val = listed.get("val", [])
    train = listed.get("train", [name for name in cubes if name not in val])
    if set(train) & set(val):
        raise UserError(
            f"{lists['val']}: {min(set(train) & set(val))} is a training scene too; mend the lists"
        )

    def scene(name: str) -> Scene:
        return Scene(name, cubes.get(name, root / "Train_Spec" / f"{name}.mat"), images.get(name))

    tests = [
        Scene(name, None, path)
        for name, path in sorted(_by_stem(root / "Test_RGB", RGB_SUFFIXES).items())
    ]
    return {"train": [*map(scene, sorted(train))], "val": [*map(scene, sorted(val))], "test": tests}


def patch_grid(
    height: int, width: int, patch: int, stride: int, mode: str = "floor"
) -> tuple[list[int], list[int]]:
    """Top and left offsets of the patches of a frame. `floor` is MST++'s grid (45 x 49 = 2205 patches of 128 at
    stride 8 in 482 x 512); `cover` adds the offset that reaches the border where the stride stops short of it."""
    if patch > min(height, width):
        raise UserError(
            f"--patch_size {patch}: larger than a frame of {height} x {width}; give a smaller one"
        )
    lasts = height - patch, width - patch
    return tuple(
        sorted({*range(0, last + 1, stride), *([last] if mode == "cover" else [])})
        for last in lasts
    )


def _mapped(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A staged `.npy` as a memory map, which goes away with the array: opening one takes 20 us, so none is kept."""
    with reading(path, "a staged array"):
        with open(path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = math.prod(shape)
        offset = len(memory) - count * np.dtype(dtype).itemsize
        if offset % 64 or not 64 <= offset <= 4096:  # the header, whose facts are in the index
            raise UserError(
                f"{path}: its size is not that of {shape} {dtype}; delete it and run dataset_setup.py"
            )
        return np.frombuffer(memory, dtype, count, offset).reshape(shape)


class _Scenes:
    """The scenes of a split: names, shapes (H, W), bands, wavelengths, dtype of patches, and arrays(scene) -> Frame."""

    frames: list[Frame] = []  # all scenes, once they are in RAM
    dtype = "float32"

    def copy_patch(
        self, scene: int, top: int, left: int, cube: np.ndarray, rgb: np.ndarray
    ) -> tuple[int, int]:
        """Copy the patch at (top, left), of the size of `cube`, into `cube` and `rgb`; gives the frame's RGB range."""
        stored, image, rgb_range = self.frames[scene] if self.frames else self.arrays(scene)
        rows, cols = slice(top, top + cube.shape[0]), slice(left, left + cube.shape[1])
        cube[...], rgb[...] = stored[rows, cols], image[rows, cols]
        return rgb_range

    def into_ram(self, dtype: str, copies: int) -> None:
        """Keep all scenes as `dtype`. UserError before anything is read when they do not fit beside what runs."""
        pixels = sum(height * width for height, width in self.shapes)
        needed = copies * pixels * (self.bands * np.dtype(dtype).itemsize + 3)
        free = min(psutil.virtual_memory().available, cgroup_free())
        if needed > free:
            raise UserError(
                f"{len(self.names)} scenes take {needed / 2**30:.1f} GB of RAM and {max(free, 0) / 2**30:.1f} "
                "are free; use --memory_mode lazy"
            )
        bar = tqdm(
            range(len(self.names)), desc=f"scenes into RAM as {dtype}", disable=None, leave=False
        )
        frames = (self.arrays(scene) for scene in bar)
        self.frames, self.dtype = (
            [(c.astype(dtype, order="C"), image.copy(), ends) for c, image, ends in frames],
            dtype,
        )


class StagedScenes(_Scenes):
    """A split of a staged folder."""

    def __init__(self, root: Path, split: str):
        self.root, path = root, root / "index.json"
        with reading(path, "the index of a staged folder"):
            index = json.loads(path.read_text())
            if (index.get("format"), index.get("version")) != ("hsi-staged", 1):
                raise UserError(
                    f"{path}: not the index of a staged folder of version 1; run dataset_setup.py again"
                )
            self.entries, self.bands, self.settings = (
                index["splits"].get(split, []),
                index["bands"],
                index.get("settings", {}),
            )
            self.wavelengths = bands_known(index["wavelengths"], self.bands, path)
            for entry in self.entries:
                if "cube" not in entry:
                    raise UserError(f"{root}: split {split} has no cubes; choose train or val")
                if entry["shape"][2] != self.bands:
                    raise UserError(
                        f"{root / entry['cube']}: {entry['shape'][2]} bands, the others have {self.bands}"
                    )
            self.names = [entry["name"] for entry in self.entries]
            self.shapes = [tuple(entry["shape"][:2]) for entry in self.entries]
            self.dtype = (
                "float16"
                if {entry["dtype"] for entry in self.entries} == {"float16"}
                else "float32"
            )
        for scene in range(
            len(self.names)
        ):  # missing and cut files show now, not in the middle of a run
            self.arrays(scene)

    def arrays(self, scene: int) -> Frame:
        entry, shape = self.entries[scene], self.shapes[scene]
        cube = _mapped(self.root / entry["cube"], (*shape, self.bands), entry["dtype"])
        return (
            cube,
            _mapped(self.root / entry["rgb"], (*shape, 3), "uint8"),
            tuple(entry["rgb_range"]),
        )


class RawScenes(_Scenes):
    """A split of a raw ARAD-1K folder. A patch is one hyperslab of its HDF5 file."""

    def __init__(self, root: Path, split: str, config: DataConfig):
        self.key, self.axes, self.scenes = config.cube_key, config.axes, find_scenes(root)[split]
        self.names, self.shapes, self.bands, self.wavelengths = (
            [scene.name for scene in self.scenes],
            [],
            0,
            [],
        )
        self.images: dict[int, tuple[np.ndarray, tuple[int, int]]] = {}
        self.layouts: list[
            tuple[str, str] | None
        ] = []  # key and axes; None for a file that only decodes as a whole
        for number, (name, path, rgb_path) in enumerate(self.scenes):
            if path is None:
                raise UserError(f"{root}: split {split} has no cubes; choose train or val")
            if rgb_path is None:
                raise UserError(
                    f"{root / 'Train_RGB' / name}.jpg: no such image; add it, or stage with --render-rgb"
                )
            with reading(rgb_path, "an RGB image"), Image.open(rgb_path) as image:
                self.shapes.append((image.height, image.width))
            with reading(path, "a hyperspectral cube"):
                self.layouts.append(None)
                if h5py.is_hdf5(path):
                    with open_arrays(path) as arrays:
                        key = pick_key(arrays, self.key, path)
                        axes = cube_axes(
                            arrays[key].shape,
                            path,
                            True,
                            self.axes,
                            self.bands or None,
                            self.shapes[-1],
                        )
                        self.layouts[-1], self.bands = (
                            (key, axes),
                            arrays[key].shape[axes.index("c")],
                        )
                self.bands = self.bands or self.arrays(number)[0].shape[2]
            nm = bands_known(read_wavelengths(path), self.bands, path)
            self.wavelengths = self.wavelengths or nm
            check_wavelengths(nm, self.wavelengths, path)

    def image(self, scene: int) -> tuple[np.ndarray, tuple[int, int]]:
        """RGB and its range, from a cache of bounded size: JPEG does not decode in part."""
        if scene not in self.images:
            rgb = read_rgb(self.scenes[scene].rgb_path)
            while (
                self.images
                and rgb.nbytes + sum(image.nbytes for image, _ in self.images.values())
                > IMAGE_BYTES
            ):
                self.images.pop(next(iter(self.images)))
            self.images[scene] = rgb, (int(rgb.min()), int(rgb.max()))
        return self.images[scene]

    def arrays(self, scene: int) -> Frame:
        path, shape = self.scenes[scene].cube_path, self.shapes[scene]
        cube = read_cube(
            path, key=self.key, axes=self.axes, bands=self.bands or None, rgb_shape=shape
        )
        check_cube(cube, path)
        return cube, *self.image(scene)

    def copy_patch(
        self, scene: int, top: int, left: int, cube: np.ndarray, rgb: np.ndarray
    ) -> tuple[int, int]:
        if self.frames:
            return super().copy_patch(scene, top, left, cube, rgb)
        path, (key, axes) = self.scenes[scene].cube_path, self.layouts[scene]
        cuts = {
            "h": slice(top, top + cube.shape[0]),
            "w": slice(left, left + cube.shape[1]),
            "c": slice(None),
        }
        with reading(path, "a hyperspectral cube"), h5py.File(path, "r") as file:
            patch = file[key].astype(np.float32)[tuple(cuts[letter] for letter in axes)]
        cube[...] = patch.transpose([axes.index(letter) for letter in "hwc"])
        check_cube(cube, path, constant_bands=False)
        image, rgb_range = self.image(scene)
        rgb[...] = image[cuts["h"], cuts["w"]]
        return rgb_range


@dataclass
class DataConfig:
    """What the loaders need to know. A staged or a raw folder; rank and world_size come from the process group."""

    data_root: str = _data(
        "./data/ARAD_1K", "staged folder (dataset_setup.py) or raw ARAD-1K folder"
    )
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
        "RGB to [0, 1] by the frame's min and max (MST++), or by 255",
        choices=("per_image", "unit"),
    )
    iterations_per_epoch: int = _data(1000, "batches in an epoch; 0 = one pass over all patches")
    num_workers: int = _data(
        -1, "loader processes; -1 = 2 with a GPU, else none (a batch takes some ms)"
    )
    seed: int = _data(42, "seed of order and augmentation")
    augment: bool = _data(True, "random rotations and flips of training patches")
    rank: int = 0
    world_size: int = 1
    cube_key: str | None = _data(None, "name of the cube in raw files, where it is not a usual one")
    axes: str | None = _data(
        None, "stored order of h, w and c in raw files, where it cannot be told"
    )
    val_split: str = _data("val", "split to validate on", choices=("train", "val", "test"))

    def __post_init__(self) -> None:
        for field in fields(DataConfig):
            choices, value = field.metadata.get("choices"), getattr(self, field.name)
            if choices and value not in choices:
                raise UserError(f"--{field.name} {value}: choose from {', '.join(choices)}")
        for name, value in {
            "patch_size": 1,
            "stride": 1,
            "batch_size": 1,
            "iterations_per_epoch": 0,
        }.items():
            if getattr(self, name) < value:
                raise UserError(f"--{name} {getattr(self, name)}: give {value} or more")


class RawBatch(NamedTuple):
    """A batch as stored, still to be augmented and normalised by prepare_batch."""

    rgb: Tensor  # (B, p, p, 3) uint8
    cube: Tensor  # (B, p, p, bands) float16 or float32
    augment: Tensor  # (B,) uint8, element of the dihedral group, 0 to 7
    rgb_range: Tensor  # (B, 2) float32, what becomes 0 and 1
    index: Tensor  # (B,) int64, patch of the data set


def _buffer(shape: tuple[int, ...], dtype: str) -> Tensor:
    """An uninitialised CPU tensor whose memory is used again once no tensor holds it. Allocations over 32 MB come fresh
    from the system, and the page faults of a batch of 20 (40 MB) take eight times as long as filling it."""
    free = _free_buffers[shape, dtype]
    memory = free.pop() if free else np.empty(shape, dtype)
    view = memory[...]  # dies with the last tensor on it; the memory outlives it
    weakref.finalize(view, free.append, memory).atexit = False
    return torch.from_numpy(view)


class PatchDataset(Dataset):
    """All patches of the training scenes. An item is the whole batch at (epoch, iteration), so that workers hand over
    few big tensors; which patches and which augmentation is a function of seed, epoch and sample alone."""

    def __init__(self, scenes: _Scenes, config: DataConfig):
        self.scenes, self.config = scenes, config
        self.grids = [
            patch_grid(h, w, config.patch_size, config.stride, config.patch_grid)
            for h, w in scenes.shapes
        ]
        self.starts = np.cumsum([0, *(len(rows) * len(cols) for rows, cols in self.grids)])
        self._shuffled: tuple = (
            None,
        )  # of the last pass: key, order of all patches, augmentation of each

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, patch: int) -> tuple[int, int, int]:
        """Number of a patch -> (scene, top, left): scene by scene, row-major in the grid of each."""
        scene = int(np.searchsorted(self.starts, patch, side="right")) - 1
        rows, cols = self.grids[scene]
        row, col = divmod(int(patch - self.starts[scene]), len(cols))
        return scene, rows[row], cols[col]

    def samples(self, epoch: int, iteration: int) -> tuple[np.ndarray, np.ndarray]:
        """Patch numbers and augmentations of this rank's slice of a global batch; the order wraps into new passes."""
        config, count = self.config, len(self)
        first = (iteration * config.world_size + config.rank) * config.batch_size
        patches, codes = [], []
        for turn, positions in itertools.groupby(
            range(first, first + config.batch_size), lambda i: i // count
        ):
            key = (config.seed % 2**64, epoch, turn)
            if self._shuffled[0] != key:
                rng = np.random.default_rng(key)
                order = rng.permutation(np.arange(count, dtype=np.uint32))
                self._shuffled = (
                    key,
                    order,
                    rng.integers(0, 8 if config.augment else 1, count, dtype=np.uint8),
                )
            patches.append(
                self._shuffled[1][[position % count for position in positions]].astype(np.int64)
            )
            codes.append(self._shuffled[2][patches[-1]])
        return np.concatenate(patches), np.concatenate(codes)

    def __getitem__(self, position: tuple[int, int]) -> RawBatch:
        return self.read(*self.samples(*position))

    def read(self, patches: np.ndarray, codes: np.ndarray) -> RawBatch:
        batch, side = len(patches), self.config.patch_size
        cube = _buffer((batch, side, side, self.scenes.bands), self.scenes.dtype)
        rgb = torch.empty((batch, side, side, 3), dtype=torch.uint8)
        ranges = np.full((batch, 2), (0, 255), np.float32)
        for i, patch in enumerate(patches):
            found = self.scenes.copy_patch(*self.place(patch), cube[i].numpy(), rgb[i].numpy())
            if self.config.rgb_norm == "per_image":
                ranges[i] = found
        return RawBatch(rgb, cube, *(torch.from_numpy(array) for array in (codes, ranges, patches)))


def dihedral(x: Tensor, code: int) -> Tensor:
    """Element `code` (0 to 7) of the symmetries of the square, on the first two axes: flips, then a transpose."""
    flips = [axis for axis in (0, 1) if code >> axis & 1]
    x = x.flip(flips) if flips else x
    return x.transpose(0, 1) if code & 4 else x


def _turned(stored: Tensor, codes: list[int]) -> Tensor:
    """(B, p, p, C) of any type -> float32, each sample turned by its code."""
    turned = (
        _buffer(tuple(stored.shape), "float32")
        if stored.is_cpu
        else torch.empty_like(stored, dtype=torch.float32)
    )
    for i, code in enumerate(codes):
        flipped = dihedral(
            stored[i], code & 3
        )  # converted apart: a copy that transposes too converts one by one
        turned[i].copy_(flipped.float().transpose(0, 1) if code & 4 else flipped)
    return turned


def prepare_batch(batch: RawBatch, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """RGB (B, 3, p, p), normalised, and cube (B, bands, p, p), float32, augmented alike; channels_last, as they are stored."""
    codes = batch.augment.tolist()
    rgb, cube, ranges = (
        x.to(device, non_blocking=True) for x in (batch.rgb, batch.cube, batch.rgb_range)
    )  # and grow there
    low, high = (ranges[:, i, None, None, None] for i in (0, 1))
    rgb = normalise_rgb(_turned(rgb, codes), "per_image", low, high)
    return rgb.permute(0, 3, 1, 2), _turned(cube, codes).permute(0, 3, 1, 2)


class TrainLoader:
    """Iterates over the RawBatches of one epoch, from the position set, and then stands at the start of the next."""

    def __init__(self, dataset: PatchDataset, config: DataConfig):
        self.dataset, self.config = dataset, config
        self.wavelengths, self.bands = dataset.scenes.wavelengths, dataset.scenes.bands
        whole_pass = math.ceil(len(dataset) / (config.batch_size * config.world_size))
        self.iterations = config.iterations_per_epoch or whole_pass
        self.positions: list[
            tuple[int, int]
        ] = []  # (epoch, iteration) still to come; the loader's sampler
        workers = config.num_workers if config.num_workers >= 0 else 2 * torch.cuda.is_available()
        in_ram = bool(dataset.scenes.frames)
        if in_ram and "fork" not in torch.multiprocessing.get_all_start_methods():
            workers = 0  # a spawned worker would copy all scenes
        self.loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=self.positions,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=leave_process_group,
            generator=torch.Generator(),  # else each pass would draw from the model's
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context="fork" if in_ram and workers else None,
        )
        self.set_position(0)

    def set_position(self, epoch: int, iteration: int = 0) -> None:
        """Where the next iteration starts; `iteration` batches of the epoch are left out."""
        if epoch < 0 or not 0 <= iteration <= len(self):
            raise ValueError(
                f"epoch {epoch}, iteration {iteration}: an epoch has {len(self)} iterations"
            )
        self.epoch, self.positions[:] = epoch, [(epoch, i) for i in range(iteration, len(self))]

    def __len__(self) -> int:
        return self.iterations

    def __iter__(self) -> Iterator[RawBatch]:
        try:
            yield from self.loader
        except UserError as error:  # a worker's error comes with its traceback as text
            raise UserError(str(error).rstrip().rsplit("UserError: ", 1)[-1]) from None
        self.set_position(self.epoch + 1)

    def spread(self, pixels: int) -> tuple[Tensor, Tensor]:
        """At least `pixels` pixels where there are so many, as prepare_batch gives them, from patches spread over all
        scenes, not augmented: the same whatever the seed, the batch size and the ranks."""
        count = min(len(self.dataset), math.ceil(pixels / self.config.patch_size**2))
        patches = np.linspace(0, len(self.dataset) - 1, count).round().astype(np.int64)
        return prepare_batch(self.dataset.read(patches, np.zeros(count, np.uint8)))

    def describe(self) -> str:
        scenes, config = self.dataset.scenes, self.config
        error = ", off by a 2048th at most, or 3e-8" if scenes.dtype == "float16" else ""
        staged = (
            [scenes.settings.get(name) for name in PATCHES]
            if isinstance(scenes, StagedScenes)
            else None
        )
        if staged and None not in staged and staged != [getattr(config, name) for name in PATCHES]:
            error += f"; staged for patch, stride and grid {staged}"
        return (
            f"{len(scenes.names)} training scenes, {len(self.dataset)} patches of {config.patch_size} px, "
            f"{scenes.bands} bands, {config.memory_mode} ({scenes.dtype}{error}), {len(self)} batches an epoch"
        )


class ValScene(NamedTuple):
    """A whole frame: rgb (1, 3, H, W) normalised and cube (1, bands, H, W), float32, channels_last."""

    name: str
    rgb: Tensor
    cube: Tensor


class ValLoader:
    """Whole frames of this rank (every world_size-th), one in memory at a time."""

    def __init__(self, scenes: StagedScenes | RawScenes, config: DataConfig):
        self.scenes, self.wavelengths, self.bands, self.rgb_norm = (
            scenes,
            scenes.wavelengths,
            scenes.bands,
            config.rgb_norm,
        )
        self.mine = range(config.rank, len(scenes.names), config.world_size)

    def __len__(self) -> int:
        return len(self.mine)

    def __iter__(self) -> Iterator[ValScene]:
        for scene in self.mine:
            cube, rgb, (low, high) = self.scenes.arrays(scene)
            cube, rgb = (
                torch.from_numpy(np.array(x, order="C")).permute(2, 0, 1)[None] for x in (cube, rgb)
            )  # maps: read-only
            yield ValScene(
                self.scenes.names[scene], normalise_rgb(rgb, self.rgb_norm, low, high), cube.float()
            )


def _open_scenes(config: DataConfig, split: str) -> StagedScenes | RawScenes:
    root = Path(config.data_root)
    staged = (root / "index.json").exists()
    if not staged and not (root / "Train_Spec").is_dir():
        raise UserError(
            f"--data_root {root}: neither index.json nor Train_Spec in it; make it with dataset_setup.py"
        )
    scenes = StagedScenes(root, split) if staged else RawScenes(root, split, config)
    if not scenes.names:
        raise UserError(
            f"--data_root {root}: no scenes in split {split}; stage with dataset_setup.py --val-fraction"
        )
    return scenes


def train_loader(config: DataConfig) -> TrainLoader:
    """The training patches. UserError when `memory_mode` needs more RAM than there is."""
    scenes = _open_scenes(config, "train")
    if config.memory_mode != "lazy":
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if config.world_size > 1 else 1
        scenes.into_ram(
            "float16" if config.memory_mode == "float16" else "float32", copies=ranks_here
        )
    elif isinstance(scenes, RawScenes) and None in scenes.layouts:
        path = scenes.scenes[scenes.layouts.index(None)].cube_path
        raise UserError(
            f"{path}: not MATLAB v7.3, decodes only as a whole; stage it or use --memory_mode float16"
        )
    return TrainLoader(PatchDataset(scenes, config), config)


def val_loader(config: DataConfig) -> ValLoader:
    """Full frames of `val_split`. Targets are float32; float16 ones are refused, except training scenes on request."""
    scenes = _open_scenes(config, config.val_split)
    if (
        config.val_split != "train"
        and isinstance(scenes, StagedScenes)
        and scenes.dtype == "float16"
    ):
        raise UserError(
            f"{scenes.root / config.val_split}: float16 cubes, validation needs float32; stage it again"
        )
    return ValLoader(scenes, config)


def create_optimized_dataloaders(config: DataConfig) -> tuple[TrainLoader, ValLoader]:
    train, val = train_loader(config), val_loader(config)
    if val.wavelengths != train.wavelengths:
        raise UserError(
            f"--data_root {config.data_root}: training and validation scenes differ in their bands; stage it again"
        )
    return train, val


class MSTPlusPlusLoss(nn.Module):
    """mean(|pred - target| / max(target, floor)) in float32 whatever the autocast: MST++'s loss (Cai et al., CVPRW 2022)
    with a floor, for targets that hold zeros. With `floor_start` the floor goes geometrically from there to `floor` in
    `floor_steps` steps, so that dark pixels join late; the trainer sets `step`, and there is no state to save."""

    def __init__(self, floor: float = 1e-2, floor_start: float | None = None, floor_steps: int = 0):
        super().__init__()
        if floor <= 0 or (floor_start is not None and floor_start <= 0):
            raise UserError(f"--train_floor {floor}: the floor of the loss must be above 0")
        self.floor, self.floor_start, self.floor_steps, self.step = (
            floor,
            floor_start,
            floor_steps,
            0,
        )

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
            return (
                (pred.float() - target).abs() / target.clamp_min(self.floor_at(self.step))
            ).mean()
