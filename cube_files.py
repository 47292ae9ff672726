"""Cubes and photos, read from and written to every format of the field: the door to the rooms of
the formats. docs/formats.md tells what is read, assumed and refused.

cube = read_cube("scene.mat")                                 # (H, W, bands) float32
write_cube(Path("out.mat"), prediction, wavelengths, "mat")   # from (bands, H, W) float32"""

import errno
import importlib
import io
import math
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import h5py
import numpy as np
from einops import rearrange
from PIL import ExifTags

import raster_files
import terminal
from array_files import (
    ARRAY_SUFFIXES,
    MAT_HEADER,
    NUMBERS,
    band_arrays,
    open_arrays,
    open_hdf5,
    pick_key,
    state_matlab_classes,
    three_axes,
    value_attributes,
)
from common_utils_v32 import UserError, temporary_prefix
from file_claims import open_image
from raster_files import ENVI_SUFFIXES, Facts, nanometres

RGB_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
TIFF_SUFFIXES = (".tif", ".tiff")
CUBE_SUFFIXES = (*ARRAY_SUFFIXES, ".npy", ".hdr", *TIFF_SUFFIXES)
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "__macosx")  # and all whose name begins with a dot
LAYOUTS = ("hwc", "chw", "cwh", "whc")  # orders of height, width and bands that files have
FIELD_BANDS = [float(nm) for nm in range(400, 701, 10)]  # of ARAD-1K and CAVE
UNIT_TOLERANCE = 1e-4  # how far outside [0, 1] a cube may reach by rounding
MOST_REFLECTANCE = 2.0  # of a shining surface beside the white of the calibration; above are counts
FEW = 0.01  # share of values that may be outliers
WRITTEN = {"npy": ".npy", "mat": ".mat", "envi": ".hdr", "npz": ".npz", "tiff": ".tif"}
# Arrays above this are mapped to files, and pages let go after as much was written.
MAPPED_BYTES = 256 << 20
Shape = tuple[int, ...]


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Whatever a decoder raises becomes one UserError that names the file."""
    if not path.exists():
        raise UserError(f"{path}: no such file; {what} is expected there")
    try:
        yield
    except (UserError, MemoryError):
        raise
    except ImportError as error:  # of an optional package
        package = (error.name or str(error)).split(".")[0]
        raise UserError(f"{path}: to read it, pip install {package}") from None
    except Exception as error:  # every decoder has exceptions of its own; the cause stays chained
        reason = (str(error) or type(error).__name__).splitlines()[0]
        mend = _what_helps(error, reason)
        raise UserError(f"{path}: cannot be read as {what} ({reason}); {mend}") from error


def _what_helps(error: Exception, reason: str) -> str:
    """Another file does only where the file is at fault."""
    if isinstance(error, PermissionError):
        return "give yourself the right to read it"
    if re.search(r"\b(un)?lock(s|ed|ing)?\b", reason):
        return "set HDF5_USE_FILE_LOCKING=FALSE"
    if "imagecodecs" in reason:
        return "pip install imagecodecs"
    if "filter" in reason or "plugin" in reason:
        return "save it without compression or with gzip"
    if "allow_pickle" in reason or "Python objects" in reason:
        return "save plain arrays: Python objects are never loaded"
    if isinstance(error, OSError) and error.errno:
        return "see that its disk can be read"
    return "replace the file"


def extra(module: str) -> ModuleType:
    """A module of an optional package, or a UserError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs the package {error.name}: pip install -r requirements-extra.txt"
        ) from None


def allocate_array(shape: Shape, dtype: type, work: Path, copies: int = 1) -> np.ndarray:
    """An empty array in memory, a big one mapped to a file in `work`, where `copies` of it fit."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= MAPPED_BYTES:
        return np.empty(shape, dtype)
    free, needed = shutil.disk_usage(work).free / 2**30, copies * size / 2**30
    if needed > free:
        raise UserError(f"{work.parent}: needs {needed:.1f} GiB there, {free:.1f} GiB are free")
    file = work / f"{np.dtype(dtype)}.npy"
    array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
    reserve(file, file.stat().st_size)
    return array


def reserve(file: Path, size: int) -> None:
    """Take this file's space on its disk now, where the system can: a full disk would end the
    process by a signal when pages of a mapped file are written, and in HDF5."""
    if not hasattr(os, "posix_fallocate"):
        return
    with open(file, "ab") as opened:
        try:
            os.posix_fallocate(opened.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"{file.parent.parent}: the disk is full; make room, run the same again"
                ) from None


def release(array: np.ndarray) -> None:
    """Let go of a mapped array's pages: they stay in its file and the system's cache, no longer in
    this process. Nothing is done for other arrays, or where the system cannot do it."""
    if isinstance(array, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
        array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]  # not in the stubs


def blocks(cube: np.ndarray, rows: int = 1024) -> Iterator[tuple[int, slice]]:
    """(band, rows) pieces that cover a cube (bands, H, W); a mapped one's pages are let go."""
    for band in range(len(cube)):
        for top in range(0, cube.shape[1], rows):
            yield band, slice(top, top + rows)
            release(cube)


def read_rgb(path: str | Path) -> np.ndarray:
    """An 8-bit image (JPEG, PNG, BMP) as (H, W, 3) uint8 RGB, pixels as stored."""
    path = Path(path)
    with reading(path, "an RGB image"), open_image(path) as image:
        if image.mode not in ("RGB", "RGBA", "P", "L"):
            raise UserError(f"{path}: a {image.mode} image; an 8-bit RGB image is needed")
        if any(";16" in str(tile.args) for tile in image.tile):  # Pillow gives the high bytes
            raise UserError(f"{path}: 16 bits a channel; an 8-bit RGB image is needed")
        if image.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
            raise UserError(f"{path}: its EXIF turns it; save it as its cube lies, without EXIF")
        return np.asarray(image.convert("RGB"))


def cube_axes(
    shape: Shape, path: Path, *, axes: str | None, bands: int | None, rgb_shape: Shape | None
) -> str:
    """The three stored axes as NumPy or h5py shows them, such as "cwh", told by the band count and
    the paired RGB's size (H, W, ...). MATLAB is column-major: H x W x bands of a v7.3 file comes
    out as (bands, W, H); elsewhere hwc and chw are usual."""
    if len(shape) != 3 or 0 in shape:
        raise UserError(
            f"{path}: the cube has shape {shape}; three axes are needed (another --cube-key?)"
        )
    if axes is not None and sorted(axes) != ["c", "h", "w"]:
        raise UserError(
            f"--axes {axes}: give the letters h, w and c (bands) in the stored order, such as cwh"
        )

    def fits(layout: str) -> bool:
        height, width, count = (shape[layout.index(letter)] for letter in "hwc")
        if bands is None and rgb_shape is None and axes is None:  # nothing is known: few bands
            return count == 31 or 2 * count < min(height, width)
        if bands is not None and count != bands:
            return False
        return rgb_shape is None or (height, width) == tuple(rgb_shape[:2])

    usual: tuple[str, ...] = ("hwc", "chw")
    if axes is not None:
        usual = (axes,)
    elif path.suffix.lower() == ".mat" and h5py.is_hdf5(path):
        usual = ("cwh",)
    found = [layout for layout in usual if fits(layout)]
    if axes is None and not found:
        found = [layout for layout in LAYOUTS if fits(layout)]
    if len(found) == 1:
        return found[0]
    stated = f" as --axes {axes}" if axes is not None else ""
    problem = "fits in two ways" if found else _what_is_missing(bands, rgb_shape)
    raise UserError(
        f"{path}: shape {shape}{stated} {problem}; mend or leave it out, "
        "or give --axes, the stored order of h, w and c (bands), such as hwc, chw or cwh"
    )


def _what_is_missing(bands: int | None, rgb_shape: Shape | None) -> str:
    missing = f"does not have {bands or 'few'} bands"
    if rgb_shape is not None:
        missing += f" and {rgb_shape[0]} x {rgb_shape[1]} pixels as its RGB"
    return missing


def read_cube(path: str | Path, *, bands: int | None = None, **how: Any) -> np.ndarray:
    """One cube as (H, W, bands) float32 in any memory order, as read_stored gives it but without
    the bands that its header marks bad; `bands` counts those that are left."""
    path = Path(path)
    stored_bands = None if path.suffix.lower() == ".hdr" else bands
    values, facts = read_stored(path, bands=stored_bands, **how)
    values = np.delete(values, facts.bad, axis=2) if facts.bad else values
    for remark in facts.remarks:
        terminal.say_first(remark, f"{path}: {remark}")
    if bands is not None and values.shape[2] != bands:
        raise UserError(f"{path}: does not have {bands} bands but {values.shape[2]}; leave it out")
    return values


def read_stored(
    path: Path,
    *,
    key: str | None = None,
    axes: str | None = None,
    bands: int | None = None,
    rgb_shape: Shape | None = None,
) -> tuple[np.ndarray, Facts]:
    """All stored bands of a cube, (H, W, bands) float32 in any memory order, and what the file says
    of them. Values as stored, but for what a header states: a scale factor is applied, no data is
    NaN; PNG bands are divided by full scale. MATLAB v7.3 and v5 `.mat`, HDF5, `.npy`, `.npz`, ENVI
    `.hdr`, TIFF, or a CAVE folder of one PNG a band. `bands` and `rgb_shape` (H, W, ...) are
    checked, and tell the axes apart. Values are not judged here: see check_cube."""
    suffix, facts = path.suffix.lower(), Facts()
    hints: dict[str, Any] = {"bands": bands, "rgb_shape": rgb_shape}
    with reading(path, "a hyperspectral cube"):
        if path.is_dir():
            axes = "hwc"
            stored = _read_band_images(path)
        elif suffix == ".hdr":
            axes = "hwc"
            stored, facts = raster_files.read_envi(path)
        elif suffix in TIFF_SUFFIXES:
            stored, stated, facts = raster_files.read_tiff(path)
            axes = axes or stated
        elif suffix == ".npy":
            # Mapped first: the size that its header claims is not taken on trust.
            stored = np.array(np.lib.format.open_memmap(path, mode="r"))
        elif suffix in ARRAY_SUFFIXES:
            with open_arrays(path) as arrays:
                array = arrays[pick_key(arrays, key, path)]
                shape = three_axes(array.shape)
                axes = cube_axes(shape, path, axes=axes, **hints)  # before it is decoded
                facts = attribute_facts(array, path)
                stored = raster_files.to_values(array[()], facts)
        else:
            raise UserError(
                f"{path}: not a cube; give {', '.join(CUBE_SUFFIXES)} or a folder of band images"
            )
        if stored.dtype.kind not in NUMBERS:
            raise UserError(f"{path}: holds {stored.dtype}, not real numbers")
    stored = stored.reshape(three_axes(stored.shape))
    layout = cube_axes(stored.shape, path, axes=axes, **hints)
    with np.errstate(over="ignore"):  # infinite values are told of later
        values = np.asarray(stored, np.float32)
    return values.transpose([layout.index(letter) for letter in "hwc"]), facts


def attribute_facts(array: Any, path: Path) -> Facts:
    """What the attributes of an HDF5 data set say of its values."""
    no_data, factor = value_attributes(array, path)
    remarks = (f"its scale_factor is applied: divided by {factor:g}",) if factor != 1 else ()
    return Facts(no_data=no_data, factor=factor, remarks=remarks)


def cube_sources(path: Path) -> list[Path]:
    """The files that a cube is read from."""
    if path.is_dir():
        return band_images(path)
    if path.suffix.lower() == ".hdr":
        return [path, raster_files.envi_data_file(path)]
    return [path]


def is_system_file(path: Path) -> bool:
    """Files that macOS and Windows leave beside data, `._x` and Thumbs.db, hold no data."""
    return path.name.startswith(".") or path.name.lower() in SYSTEM_FILES


def scene_name(path: Path) -> str:
    """The name of a cube's scene: leaf of leaf.mat and of leaf.bil.hdr."""
    if path.is_dir():
        return path.name
    stem = Path(path.stem)
    with_data = path.suffix.lower() == ".hdr" and stem.suffix.lower() in ENVI_SUFFIXES[1:]
    return stem.stem if with_data else stem.name


def write_cube(
    path: Path, cube: np.ndarray, wavelengths: list[float], kind: str, move: bool = False
) -> None:
    """Write (bands, H, W) float32, in memory or mapped, as `kind` of WRITTEN; wavelengths in nm.
    The name appears when the file is complete. move: the cube is all of its .npy file where it is
    mapped, which may become the cube's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=temporary_prefix("cube"), dir=path.parent) as work:
        file = Path(work) / path.name
        if kind != "npy":
            reserve(file, cube.nbytes)
            file.unlink(missing_ok=True)
        if kind == "npy":
            if move and isinstance(cube, np.memmap) and cube.filename is not None:
                os.replace(cube.filename, file)
            else:
                np.save(file, cube)
        elif kind == "npz":
            np.savez(file, cube=cube, wavelengths=np.array(wavelengths, np.float32))
        elif kind == "mat":
            _write_mat(file, cube, wavelengths)
        elif kind == "tiff":
            extra("tifffile")
            raster_files.write_tiff(file, cube, wavelengths)
        else:
            _write_envi(file, cube, wavelengths)
        for written in sorted(Path(work).iterdir(), reverse=True):  # ENVI's data before its header
            os.replace(written, path.parent / written.name)


class StoredCube(NamedTuple):
    """Where a cube lies in an HDF5 file (MATLAB v7.3)."""

    path: Path
    key: str
    axes: str  # stored order of h, w and c
    bands: int


def find_stored_cube(
    path: Path, key: str | None, axes: str | None, bands: int | None, rgb_shape: Shape | None
) -> StoredCube | None:
    """What read_window needs, nothing decoded; None for a file that decodes as a whole alone."""
    with reading(path, "a hyperspectral cube"):
        if not h5py.is_hdf5(path):
            return None
        with open_arrays(path) as arrays:
            key = pick_key(arrays, key, path)
            shape = arrays[key].shape
            if len(shape) > 3 or attribute_facts(arrays[key], path) != Facts():
                return None
    axes = cube_axes(shape, path, axes=axes, bands=bands, rgb_shape=rgb_shape)
    return StoredCube(path, key, axes, shape[axes.index("c")])


def read_window(stored: StoredCube, rows: slice, columns: slice) -> np.ndarray:
    """Rows and columns of a cube, (h, w, bands) float32; nothing else of it is decoded."""
    cuts = {"h": rows, "w": columns, "c": slice(None)}
    with reading(stored.path, "a hyperspectral cube"), open_hdf5(stored.path) as file:
        window = file[stored.key].astype(np.float32)[tuple(cuts[axis] for axis in stored.axes)]
    return window.transpose([stored.axes.index(axis) for axis in "hwc"])


def _write_mat(path: Path, cube: np.ndarray, wavelengths: list[float]) -> None:
    """MATLAB v7.3, HDF5 after 512 bytes; column-major, so H x W x bands is (bands, W, H)."""
    bands, height, width = cube.shape
    with h5py.File(path, "w", userblock_size=512, locking=False) as file:
        target = file.create_dataset("cube", (bands, width, height), np.float32)
        for band, rows in blocks(cube):
            target[band, :, rows] = cube[band, rows].T
        file["bands"] = np.array(wavelengths, np.float64)[:, None]
        state_matlab_classes(file)
    with open(path, "r+b") as header:
        header.write(MAT_HEADER)


def arad_mat(cube: np.ndarray, wavelengths: np.ndarray) -> memoryview:
    """A cube (H, W, bands) as the bytes of a MATLAB v7.3 file like those of ARAD-1K."""
    memory = io.BytesIO()
    stored = rearrange(cube, "h w c -> c w h")  # MATLAB is column-major
    with h5py.File(memory, "w", userblock_size=512) as file:
        file.create_dataset(
            "cube", data=stored, chunks=(31, 64, 64), compression="gzip", compression_opts=1
        )
        file["bands"] = wavelengths[:, None]
        file["norm_factor"] = np.ones((1, 1))
        state_matlab_classes(file)
    memory.getbuffer()[: len(MAT_HEADER)] = MAT_HEADER
    return memory.getbuffer()


def _write_envi(path: Path, cube: np.ndarray, wavelengths: list[float]) -> None:
    header = {"wavelength": [f"{nm:g}" for nm in wavelengths], "wavelength units": "Nanometers"}
    bands, height, width = cube.shape
    image = extra("spectral.io.envi").create_image(
        str(path),
        header,
        ext=".img",
        shape=(height, width, bands),
        dtype=np.float32,
        interleave="bsq",
    )
    reserve(path.with_suffix(".img"), cube.nbytes)
    target = image.open_memmap(interleave="source", writable=True)  # (bands, H, W)
    for band, rows in blocks(cube):
        target[band, rows] = cube[band, rows]
        release(target)


def band_images(folder: Path) -> list[Path]:
    """The PNGs `<scene>_ms_01.png` .. of a CAVE folder (or of the folder in it), by number."""
    # A link to a scene may have another name.
    for place in (folder, folder / folder.name, folder / folder.resolve().name):
        numbered: dict[int, Path] = {}
        for path in place.glob("*.png"):
            number = re.search(r"(\d+)$", path.stem)
            if number and not is_system_file(path):
                numbered[int(number[1])] = path
        if not numbered:
            continue
        missing = min(set(range(1, max(numbered))) - set(numbered), default=None)
        if missing is not None:
            raise UserError(f"{place}: band image number {missing} is missing; replace the folder")
        return [numbered[number] for number in sorted(numbered)]
    raise UserError(f"{folder}: no numbered band images (PNG) in it")


def _read_band_images(folder: Path) -> np.ndarray:
    """A CAVE scene: 16-bit PNGs over 65535, the 8-bit RGBA ones of one scene over 255."""
    planes: list[np.ndarray] = []
    for path in band_images(folder):
        with reading(path, "a band image"), open_image(path) as image:
            if image.mode not in ("L", "I", "I;16", "I;16B", "RGB", "RGBA"):
                raise UserError(f"{path}: a {image.mode} image; give grey of 8 or 16 bits")
            plane = np.asarray(image)
        full_scale = np.float32(255 if plane.dtype == np.uint8 else 65535)
        if plane.ndim == 3:
            if (plane[..., :3] != plane[..., :1]).any():
                raise UserError(f"{path}: a colour picture, not one band; replace it")
            plane = plane[..., 0]
        if planes and plane.shape != planes[0].shape:
            raise UserError(f"{path}: {plane.shape} pixels, not {planes[0].shape}; replace it")
        planes.append(plane.astype(np.float32) / full_scale)
    return np.stack(planes, axis=-1)


def read_wavelengths(path: str | Path, every: bool = False) -> list[float] | None:
    """Band centres in nm where the file has them (headers, `bands` or `wavelengths` arrays, a CAVE
    folder of 31 bands), else None; of bands that a header marks bad only with `every`."""
    path = Path(path)
    suffix = path.suffix.lower()
    with reading(path, "a hyperspectral cube"):
        if path.is_dir():
            return FIELD_BANDS if len(band_images(path)) == len(FIELD_BANDS) else None
        if suffix == ".hdr":
            facts = raster_files.envi_facts(path)
            bad = () if every else facts.bad
            nm = nanometres(facts, path)
            return None if nm is None else [nm[band] for band in range(len(nm)) if band not in bad]
        if suffix in TIFF_SUFFIXES:
            return nanometres(raster_files.tiff_facts(path), path)
        if suffix in ARRAY_SUFFIXES:
            for values, unit in band_arrays(path):
                nm = nanometres(Facts(values, unit), path)
                if nm is not None:
                    return nm
    return None


def bands_known(wavelengths: list[float] | None, bands: int, path: Path) -> list[float]:
    """The band centres: those of the file, else the field's where the count is the field's."""
    if wavelengths is None and bands == len(FIELD_BANDS):
        return FIELD_BANDS
    if wavelengths is None or len(wavelengths) != bands:
        raise UserError(
            f"{path}: {len(wavelengths or [])} wavelengths of {bands} bands; "
            "store them, in nm, as `bands`"
        )
    return list(wavelengths)


def check_cube(
    cube: np.ndarray, path: str | Path, constant_bands: bool = True, facts: Facts | None = None
) -> None:
    """UserError for values of a cube (H, W, bands) that spoil training: NaN, infinite, outside [0,
    1], with `constant_bands` a band of one value. `facts`: what its file says, for the advice."""
    facts = facts or Facts()
    low, high = float(cube.min()), float(cube.max())
    if not math.isfinite(low) or not math.isfinite(high):
        what = f"{(~np.isfinite(cube)).sum()} values are NaN or infinite"
        if facts.no_data is not None:
            pixels = np.isnan(cube).any(axis=2).sum()
            what = f"{pixels} pixels hold no data (the value {facts.no_data:g})"
        raise UserError(
            f"{path}: {what}; leave out this scene, or stage with dataset_setup.py --fill VALUE"
        )
    if low < -UNIT_TOLERANCE or high > 1 + UNIT_TOLERANCE:
        raise UserError(
            f"{path}: values from {low:g} to {high:g}, outside [0, 1]; {_range_advice(cube, facts)}"
        )
    if not constant_bands:
        return
    bands = cube.shape[2]
    for band in range(bands):
        if np.ptp(cube[..., band]) == 0:
            raise UserError(
                f"{path}: band {band + 1} of {bands} is constant; leave out this scene, or stage "
                "with dataset_setup.py --bands and the others"
            )


def outside(cube: np.ndarray) -> tuple[float, float]:
    """Share of values outside [0, 1], and how far the farthest is."""
    share = float(np.mean((cube < 0) | (cube > 1)))
    return share, max(float(-cube.min()), float(cube.max()) - 1, 0.0)


def _has_marks(cube: np.ndarray) -> bool:
    """Whether low values look like a mark of no data: far off, or a pixel's in all its bands."""
    low = cube.min()
    return bool(low <= -1 or (low < 0 and (cube == low).all(axis=2).any()))


def may_be_clipped(cube: np.ndarray) -> bool:
    """Whether a cube is reflectance a little outside [0, 1], not counts, nor has marks in it."""
    few = cube.max() <= MOST_REFLECTANCE or outside(cube)[0] <= FEW
    return bool(few and not _has_marks(cube))


def _range_advice(cube: np.ndarray, facts: Facts) -> str:
    """The ways in that are open to values outside [0, 1]."""
    ways = []
    if _has_marks(cube):
        ways.append("--no-data=VALUE if the lowest (as stored) means none")
    if cube.max() > MOST_REFLECTANCE and facts.factor == 1:
        ways.append("--scale VALUE or --white FILE if these are counts")
    if may_be_clipped(cube):
        ways.append("--clip to cut what is outside")
    if not ways:
        return "mend or leave out this scene"
    return f"stage with dataset_setup.py {', or '.join(ways)}"


def check_wavelengths(nm: list[float], others: list[float], path: Path) -> None:
    """UserError unless a scene's band centres are the others', within 1 nm."""
    if len(nm) != len(others):
        raise UserError(f"{path}: {len(nm)} bands, {len(others)} in the others; use it apart")
    if np.abs(np.subtract(nm, others)).max() > 1:
        raise UserError(
            f"{path}: {nm[0]:g}..{nm[-1]:g} nm, not {others[0]:g}..{others[-1]:g} as the other "
            "scenes or by --wavelengths; use it apart"
        )
