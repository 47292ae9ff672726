"""Folders of scenes, staged or raw as ARAD-1K lays them out: what scenes they hold, and a scene's
arrays, whole or patch by patch; and how a staged one is written.

    scenes = find_scenes("ARAD_1K")["train"]             # paths of the cubes and images of a split
    frame = StagedScenes(Path("data/staged"), "val").arrays(0)
"""

import hashlib
import io
import json
import math
import mmap
import os
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

import cube_files
import terminal
from camera_colour import SRGB
from common_utils_v32 import UserError, atomic_write, read_json, write_json
from compute_devices import Ranks, free_memory
from cube_files import CUBE_SUFFIXES, RGB_SUFFIXES, is_system_file, read_cube, reading, scene_name
from file_claims import open_image

BLOCK_BYTES = 4 << 20  # of a file that are hashed at once
IMAGE_BYTES = 64 << 20  # decoded RGB frames that a raw data set keeps
LONGEST_NAME = 200  # bytes of a scene's name: file systems allow 255, and suffixes come after it
INDEX_FORMAT, INDEX_VERSION = "hsi-staged", 2
SPLITS = ("train", "val", "test")
RGB_DTYPES, RGB_ENCODINGS = ("uint8", "uint16"), ("linear", "srgb")


class Scene(NamedTuple):
    """One raw scene. The cube is None for a test image, the RGB is None where no image is there."""

    name: str
    cube_path: Path | None
    rgb_path: Path | None


def find_scenes(root: str | Path) -> dict[str, list[Scene]]:
    """The splits train, val and test of a raw ARAD-1K folder, sorted by name; without list files
    every scene is a training scene. A listed scene keeps the path where its cube should be, so that
    reading it names the missing file."""
    root = Path(root)
    if not (root / "Train_Spec").is_dir():
        raise UserError(
            f"{root}: no Train_Spec folder in it; "
            "give the ARAD-1K folder with Train_Spec and Train_RGB"
        )
    cubes = _by_name(root / "Train_Spec", CUBE_SUFFIXES)
    photos = _by_scene(_by_name(root / "Train_RGB", RGB_SUFFIXES).values(), cubes)
    tests = _by_name(root / "Test_RGB", RGB_SUFFIXES)
    train_list = root / "split_txt" / "train_list.txt"
    val_list = root / "split_txt" / "valid_list.txt"
    val = read_split_list(val_list) if val_list.exists() else []
    if train_list.exists():
        train = read_split_list(train_list)
    else:
        train = [name for name in cubes if name not in val]
    twice = set(train) & set(val)
    if twice:
        raise UserError(f"{val_list}: {min(twice)} is a training scene too; mend the lists")

    def scene(name: str) -> Scene:
        absent = root / "Train_Spec" / f"{name}.mat"
        photo = _only(photos.get(name.lower(), []), name)
        return Scene(name, cubes.get(name, absent), photo)

    return {
        "train": [scene(name) for name in sorted(train)],
        "val": [scene(name) for name in sorted(val)],
        "test": [Scene(name, None, path) for name, path in sorted(tests.items())],
    }


def read_split_list(path: Path) -> list[str]:
    """Scene names of a list file, one a line, in any line ending, with or without a suffix."""
    with reading(path, "a list of scenes"):
        text = path.read_text(encoding="utf-8-sig")
    names: list[str] = []
    for line in text.splitlines():
        name = line.strip()
        if name.lower().endswith(CUBE_SUFFIXES + RGB_SUFFIXES):
            name = name.rsplit(".", 1)[0]
        if name:
            check_scene_name(name, path)
            names.append(name)
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{path}: {name} is listed twice; mend the list")
    return names


def check_scene_name(name: Any, source: Path) -> None:
    """UserError unless a scene's name, written in `source`, can be a file's in its folder."""
    plain = isinstance(name, str) and name.isprintable() and PureWindowsPath(name).name == name
    if not plain or name.startswith(".") or not 0 < len(name.encode()) <= LONGEST_NAME:
        shown = repr(name)[:60]
        raise UserError(f"{source}: {shown} cannot be a scene's name; mend it, no folders in it")


def check_inside(root: Path, name: Any, source: Path) -> None:
    """UserError where a file's name, written in `source`, leads out of `root`: by being absolute,
    by .., or by a link that neither this user nor the owner of `root` made."""
    parts = PureWindowsPath(name).parts  # it takes both kinds of slash for one
    if not parts or PureWindowsPath(name).anchor or ".." in parts:
        raise UserError(f"{source}: {name!r} leads out of {root}; stage again")
    trusted = {root.stat().st_uid, os.getuid() if hasattr(os, "getuid") else 0}
    path = root
    for part in parts:
        path = path / part
        if path.is_symlink() and path.lstat().st_uid not in trusted:
            raise UserError(f"{path}: a link that somebody else made; remove it, stage again")


def _by_name(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files by scene name; of two suffixes for one scene the first of `suffixes` wins."""
    found: dict[str, Path] = {}
    if not folder.is_dir():
        return found
    files = sorted(path for path in folder.iterdir() if not is_system_file(path))
    for suffix in reversed(suffixes):
        for path in files:
            if path.suffix.lower() == suffix:
                found[scene_name(path)] = path
    return found


def find_folder_scenes(root: Path, leave_out: Sequence[Path] = ()) -> list[Scene]:
    """The cubes in a folder but for those to leave out, each with the image of its name anywhere
    below: of CAVE <scene>_ms/<scene>_ms_01.png, a folder deeper often, and <scene>_RGB.bmp."""
    apart = [path.resolve() for path in leave_out]
    cubes: dict[str, list[Path]] = {}
    for path in root.iterdir():
        if is_system_file(path) or path.resolve() in apart:
            continue
        band_folder = path.is_dir() and any(path.rglob("*_01.png"))
        if band_folder or path.suffix.lower() in CUBE_SUFFIXES:
            cubes.setdefault(scene_name(path).removesuffix("_ms"), []).append(path)
    photos = _by_scene(_files_below(root), cubes)
    scenes = []
    for name in sorted(cubes):
        cube = _only(cubes[name], name)
        assert cube is not None
        # A link to a scene may have another name than what it leads to.
        real = scene_name(cube.resolve()).removesuffix("_ms").lower()
        photo = _only(photos.get(name.lower()) or photos.get(real, []), name)
        scenes.append(Scene(name, cube, photo))
    return scenes


def _only(paths: list[Path], name: str) -> Path | None:
    """The one file of a scene, if any; links to it are no second one."""
    files = {path.resolve(): path for path in sorted(paths, reverse=True)}
    if len(files) > 1:
        first, second, *_ = files.values()
        raise UserError(f"{first} and {second} are both scene {name}; rename or remove one")
    return next(iter(files.values()), None)


def _by_scene(files: Iterable[Path], scenes: Iterable[str]) -> dict[str, list[Path]]:
    """The photos among files by scene in small letters: that of their name, else without what CAVE
    and NTIRE 2020 add, _RGB, _clean and _RealWorld."""
    known = {scene.lower() for scene in scenes}
    found: dict[str, list[Path]] = {}
    for path in files:
        if path.suffix.lower() in RGB_SUFFIXES:
            name = path.stem.lower()
            if name not in known:
                name = re.sub("_(rgb|clean|realworld)$", "", name)
            found.setdefault(name, []).append(path)
    return found


def _files_below(root: Path) -> Iterator[Path]:
    """Files in a folder and those in it, through links too, but for the systems' own."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        entered = [] if real in seen else sorted(folders)
        folders[:] = [name for name in entered if not is_system_file(Path(name))]
        seen.add(real)
        yield from (Path(folder, name) for name in files if not is_system_file(Path(name)))


class RgbFacts(NamedTuple):
    """What the RGB of a data set is: how it is stored, how its light is encoded, whose it is."""

    dtype: str = "uint8"
    encoding: str = "linear"
    camera: str | None = None  # None: unknown

    @property
    def full_scale(self) -> int:
        return int(np.iinfo(self.dtype).max)


class Frame(NamedTuple):
    """One whole scene as stored."""

    cube: np.ndarray  # (H, W, bands)
    rgb: np.ndarray  # (H, W, 3) uint8 or uint16
    rgb_range: tuple[int, int]  # min and max of the RGB


class Scenes:
    """The scenes of a split. A staged or a raw folder fills the attributes and gives `arrays`."""

    names: list[str]
    shapes: list[tuple[int, int]]  # H, W
    bands: int
    wavelengths: list[float]  # nm
    rgb: RgbFacts
    dtype: str = "float32"  # of the patches' cubes
    settings: dict[str, Any] = {}  # that a folder was staged with
    frames: Sequence[Frame] = ()  # all scenes, once they are in RAM
    checksums: Sequence[tuple[Path, str]] = ()  # SHA-256 of its files, where they are known

    def arrays(self, scene: int) -> Frame:
        """The whole scene, mapped or decoded."""
        raise NotImplementedError

    def identity(self) -> list:
        """What tells these scenes from others, wherever they lie."""
        return [self.names, [digest for _, digest in self.checksums]]

    def copy_patch(
        self, scene: int, top: int, left: int, cube: np.ndarray, rgb: np.ndarray
    ) -> tuple[int, int]:
        """Copy the patch at (top, left) to `cube` (p, p, bands), `rgb` (p, p, 3); -> RGB range."""
        frame = self.frames[scene] if self.frames else self.arrays(scene)
        rows, cols = slice(top, top + cube.shape[0]), slice(left, left + cube.shape[1])
        cube[...] = frame.cube[rows, cols]
        rgb[...] = frame.rgb[rows, cols]
        return frame.rgb_range

    def into_ram(self, dtype: str, copies: int) -> None:
        """Keep all scenes as `dtype`; UserError before that where `copies` of them do not fit."""
        pixels = sum(height * width for height, width in self.shapes)
        rgb_bytes = 3 * np.dtype(self.rgb.dtype).itemsize
        needed = copies * pixels * (self.bands * np.dtype(dtype).itemsize + rgb_bytes)
        free = free_memory()
        if needed > free:
            raise UserError(
                f"{len(self.names)} scenes take {needed / 2**30:.1f} GB of RAM and "
                f"{max(free, 0) / 2**30:.1f} are free; use --memory_mode lazy"
            )
        frames = []
        what = f"scenes into RAM as {dtype}"
        for scene in terminal.bar(range(len(self.names)), desc=what, leave=False):
            cube, rgb, rgb_range = self.arrays(scene)
            frames.append(Frame(cube.astype(dtype, order="C"), rgb.copy(), rgb_range))
        self.frames = frames
        self.dtype = dtype


def _mapped(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A staged `.npy` as a memory map. Opening one takes 20 us, so none is kept."""
    with reading(path, "a staged array"):
        with open(path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = math.prod(shape)
        offset = len(memory) - count * np.dtype(dtype).itemsize
        if offset % 64 or not 64 <= offset <= 4096:  # the header, whose facts are in the index
            raise UserError(
                f"{path}: its size is not that of {shape} {dtype}; delete it and stage again"
            )
        return np.frombuffer(memory, dtype, count, offset).reshape(shape)


def _read_rgb_facts(index: dict[str, Any], path: Path) -> RgbFacts:
    """What an index (at `path`) says of the RGB. Version 1 knew uint8 in linear light alone."""
    if index["version"] == 1:
        return RgbFacts()
    dtype, encoding = index["rgb"]["dtype"], index["rgb"]["encoding"]
    if dtype not in RGB_DTYPES or encoding not in RGB_ENCODINGS:
        raise UserError(
            f"{path}: RGB is {dtype} {encoding}, not uint8 or uint16, linear or srgb; stage again"
        )
    return RgbFacts(dtype, encoding, index["rgb"]["camera"])


def _checksums(root: Path, entries: list[dict[str, Any]]) -> list[tuple[Path, str]]:
    """Files of the scenes, and the SHA-256 that the index has of them."""
    found = []
    for entry in entries:
        for kind in ("cube", "rgb"):
            if f"{kind}_sha256" in entry:
                found.append((root / entry[kind], entry[f"{kind}_sha256"]))
    return found


class StagedScenes(Scenes):
    """A split of a staged folder, whose index.json is of version 1 or 2."""

    def __init__(self, root: Path, split: str) -> None:
        self.root = root
        path = root / "index.json"
        with reading(path, "the index of a staged folder"):
            index = json.loads(path.read_text(encoding="utf-8"))
            version = index.get("version")
            if index.get("format") != INDEX_FORMAT or version not in (1, INDEX_VERSION):
                raise UserError(
                    f"{path}: not the index of a staged folder of version 1 or 2; stage it again"
                )
            self.entries = index["splits"].get(split, [])
            self.bands = index["bands"]
            self.settings = index.get("settings", {})
            self.wavelengths = cube_files.bands_known(index["wavelengths"], self.bands, path)
            self.rgb = _read_rgb_facts(index, path)
            for entry in self.entries:
                check_scene_name(entry["name"], path)
                for kind in {"cube", "rgb"} & entry.keys():
                    check_inside(root, entry[kind], path)
                if "cube" not in entry:
                    raise UserError(f"{root}: split {split} has no cubes; choose train or val")
                if entry["shape"][2] != self.bands:
                    raise UserError(
                        f"{root / entry['cube']}: {entry['shape'][2]} bands, "
                        f"the others have {self.bands}"
                    )
            self.checksums = _checksums(root, self.entries)
            self.names = [entry["name"] for entry in self.entries]
            self.shapes = [tuple(entry["shape"][:2]) for entry in self.entries]
            if {entry["dtype"] for entry in self.entries} == {"float16"}:
                self.dtype = "float16"
        for scene in range(len(self.names)):  # missing and cut files show now, not in a run's midst
            self.arrays(scene)

    def arrays(self, scene: int) -> Frame:
        entry, shape = self.entries[scene], self.shapes[scene]
        cube = _mapped(self.root / entry["cube"], (*shape, self.bands), entry["dtype"])
        rgb = _mapped(self.root / entry["rgb"], (*shape, 3), self.rgb.dtype)
        return Frame(cube, rgb, tuple(entry["rgb_range"]))


def synthetic_camera(root: Path) -> str | None:
    """The camera of the photos of a synthetic raw folder; None in any other folder."""
    facts = root / "synthetic.json"
    return read_json(facts).get("camera") if facts.exists() else None


def encoding_of(camera: str | None) -> str:
    """How the photos that `camera` is known to make are encoded."""
    return "srgb" if camera == SRGB else "linear"


class RawScenes(Scenes):
    """A split of a raw ARAD-1K folder. A patch is one hyperslab of its HDF5 file."""

    def __init__(self, root: Path, split: str, key: str | None, axes: str | None) -> None:
        self.key = key
        self.axes = axes
        camera = synthetic_camera(root)
        self.rgb = RgbFacts(encoding=encoding_of(camera), camera=camera)
        self.names, self.shapes, self.wavelengths = [], [], []
        self.bands = 0
        self.cube_paths: list[Path] = []
        self.rgb_paths: list[Path] = []
        self.stored: dict[int, cube_files.StoredCube] = {}  # others decode as a whole
        self.images: dict[int, tuple[np.ndarray, tuple[int, int]]] = {}
        for name, cube_path, rgb_path in find_scenes(root)[split]:
            if cube_path is None:
                raise UserError(f"{root}: split {split} has no cubes; choose train or val")
            if rgb_path is None:
                image = root / "Train_RGB" / f"{name}.jpg"
                raise UserError(f"{image}: no such image; add it, or stage with --render-rgb")
            self.names.append(name)
            self.cube_paths.append(cube_path)
            self.rgb_paths.append(rgb_path)
            self._inspect(cube_path, rgb_path)

    def identity(self) -> list:
        """Their files' places, sizes and times, as nothing is known of what is in them."""
        files = []
        for path in (*self.cube_paths, *self.rgb_paths):
            facts = path.stat()
            files.append([str(path.resolve()), facts.st_size, facts.st_mtime_ns])
        return files

    def _inspect(self, path: Path, rgb_path: Path) -> None:
        """Note shape, layout and bands of the next scene, from headers where there are any."""
        scene = len(self.shapes)
        with reading(rgb_path, "an RGB image"), open_image(rgb_path) as image:
            shape = (image.height, image.width)
        self.shapes.append(shape)
        stored = cube_files.find_stored_cube(path, self.key, self.axes, self.bands or None, shape)
        if stored is not None:
            self.stored[scene] = stored
            self.bands = stored.bands
        elif not self.bands:
            self.bands = self.arrays(scene).cube.shape[2]
        nm = cube_files.bands_known(cube_files.read_wavelengths(path), self.bands, path)
        self.wavelengths = self.wavelengths or nm
        cube_files.check_wavelengths(nm, self.wavelengths, path)

    def check_lazy(self) -> None:
        """UserError unless a patch of each scene can be read by itself."""
        for scene, path in enumerate(self.cube_paths):
            if scene not in self.stored:
                raise UserError(
                    f"{path}: not MATLAB v7.3, decodes only as a whole; "
                    "stage it or use --memory_mode float16"
                )

    def image(self, scene: int) -> tuple[np.ndarray, tuple[int, int]]:
        """RGB and its range, from a cache of bounded size: JPEG does not decode in part."""
        if scene not in self.images:
            rgb = cube_files.read_rgb(self.rgb_paths[scene])
            kept = sum(image.nbytes for image, _ in self.images.values())
            while self.images and rgb.nbytes + kept > IMAGE_BYTES:
                oldest, _ = self.images.pop(next(iter(self.images)))
                kept -= oldest.nbytes
            self.images[scene] = rgb, (int(rgb.min()), int(rgb.max()))
        return self.images[scene]

    def arrays(self, scene: int) -> Frame:
        path = self.cube_paths[scene]
        bands, shape = self.bands or None, self.shapes[scene]
        cube = read_cube(path, key=self.key, axes=self.axes, bands=bands, rgb_shape=shape)
        cube_files.check_cube(cube, path)
        return Frame(cube, *self.image(scene))

    def copy_patch(
        self, scene: int, top: int, left: int, cube: np.ndarray, rgb: np.ndarray
    ) -> tuple[int, int]:
        if self.frames:
            return super().copy_patch(scene, top, left, cube, rgb)
        rows, cols = slice(top, top + cube.shape[0]), slice(left, left + cube.shape[1])
        stored = self.stored[scene]
        cube[...] = cube_files.read_window(stored, rows, cols)
        cube_files.check_cube(cube, stored.path, constant_bands=False)
        image, rgb_range = self.image(scene)
        rgb[...] = image[rows, cols]
        return rgb_range


def save_array(path: Path, array: np.ndarray) -> str:
    """Write an array as .npy; -> the file's SHA-256."""
    memory = io.BytesIO()
    np.save(memory, array)
    atomic_write(path, lambda file: file.write(memory.getbuffer()))
    return hashlib.sha256(memory.getbuffer()).hexdigest()


def cube_facts(cube: np.ndarray, grid: tuple[int, int]) -> dict[str, Any]:
    """Shape and statistics by band of a cube (H, W, bands), and its grid of patches."""
    return {
        "shape": list(cube.shape),
        "range": [cube.min(), cube.max()],
        "min": cube.min((0, 1)),
        "max": cube.max((0, 1)),
        "mean": cube.mean((0, 1), np.float64),
        "std": cube.std((0, 1), np.float64),
        "zeros": np.mean(cube == 0),
        "grid": list(grid),
        "patches": grid[0] * grid[1],
    }


def rgb_facts(entries: list[dict], settings: dict[str, Any], given: str | None) -> RgbFacts:
    """How the photos are stored, how their light is encoded, and which camera saw them: `given`
    those that came with the data, the settings' the rendered ones; None where unknown or mixed."""
    dtypes: dict[str, str] = {}  # and a photo that has it
    cameras = set()
    for entry in entries:
        dtypes.setdefault(entry.get("rgb_dtype", "uint8"), entry["rgb"])
        cameras.add(settings["camera"] if entry.get("rendered") else given)
    if len(dtypes) > 1:
        found = ", ".join(f"{dtype} ({path})" for dtype, path in dtypes.items())
        raise UserError(f"photos are stored in more than one way: {found}; stage them apart")
    camera = cameras.pop() if len(cameras) == 1 else None
    return RgbFacts(next(iter(dtypes)), settings["rgb_encoding"], camera)


def write_index(
    root: Path, splits: dict[str, list[dict]], settings: dict[str, Any], camera: str | None
) -> dict[str, Any]:
    """index.json: what loaders need, pooled statistics. camera: of photos of the data set."""
    entries = [entry for split in SPLITS for entry in splits[split]]
    index = {
        "format": INDEX_FORMAT,
        "version": INDEX_VERSION,
        "bands": settings["bands"],
        "wavelengths": settings["wavelengths"],
        "rgb": rgb_facts(entries, settings, camera)._asdict(),
        "settings": settings,
        "splits": splits,
        "statistics": _pooled_statistics(splits["train"] or splits["val"]),
        "normalisation": {
            "rgb": "as stored; rgb_range: of the whole frame, for per_image",
            "cube": f"raw values / {settings['scale']:g}",
        },
    }
    write_json(root / "index.json", index)
    return index


def _pooled_statistics(entries: list[dict]) -> dict[str, Any]:
    """By band and by colour, of all pixels of the scenes."""
    pixels = [entry["shape"][0] * entry["shape"][1] for entry in entries]
    statistics = {
        "min": np.min([entry["min"] for entry in entries], axis=0),
        "max": np.max([entry["max"] for entry in entries], axis=0),
    }
    for kind in ("", "rgb_"):
        means = np.array([entry[kind + "mean"] for entry in entries])
        stds = np.array([entry[kind + "std"] for entry in entries])
        mean = np.average(means, axis=0, weights=pixels)
        square = np.average(stds**2 + means**2, axis=0, weights=pixels)
        statistics[f"{kind}mean"] = mean
        statistics[f"{kind}std"] = np.sqrt(np.maximum(square - mean**2, 0))
    return statistics


def is_intact(root: Path, entry: dict[str, Any]) -> bool:
    """Whether the files of a scene's record are as they were written."""
    files = _checksums(root, [entry])
    complete = len(files) == ("cube" in entry) + ("rgb" in entry)
    return complete and all(file.exists() and file_sha256(file) == sha for file, sha in files)


def file_sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            sha.update(block)
    return sha.hexdigest()


class FileCheck:
    """Holds files against their SHA-256 in a thread of its own, while other work goes on."""

    def __init__(self, checksums: Sequence[tuple[Path, str]]) -> None:
        self.checksums = checksums
        self.problems: list[str] = []
        self.finished = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        for path, digest in self.checksums:
            try:
                intact = file_sha256(path) == digest
            except OSError as error:
                self.problems.append(f"{path}: {error}")
                continue
            if not intact:
                self.problems.append(f"{path}: not as it was staged, damaged; stage again")

    def finish(self, ranks: Ranks) -> None:
        """Wait for the end, on all ranks. UserError, on all of them, where a file differs."""
        if self.finished:
            return
        self.thread.join()
        problems = ranks.gather_lists(self.problems)
        if problems:
            count = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
            raise UserError(problems[0] + count)
        self.finished = True
