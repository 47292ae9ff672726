"""Cubes and photos, read from and written to every format of the field.

cube = read_cube("scene.mat")                                 # (H, W, bands) float32
write_cube(Path("out.mat"), prediction, wavelengths, "mat")   # from (bands, H, W) float32
"""

from __future__ import annotations

import importlib
import io
import math
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import h5py
import numpy as np
from einops import rearrange
from PIL import Image, ImageFile, ImageOps

from common_utils_v32 import UserError, temporary_prefix
from file_claims import check_claim, check_claims, open_image

CUBE_KEYS = ("cube", "reflectance", "rad", "hsi", "hyper", "data")
BAND_KEYS = ("bands", "wavelengths", "wavelength", "Wavelengths", "Wavelength", "lambda", "wl")
RGB_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
CUBE_SUFFIXES = (".mat", ".npy", ".npz", ".hdr")
LAYOUTS = ("hwc", "chw", "cwh", "whc")  # orders of height, width and bands that files have
FIELD_BANDS = [float(nm) for nm in range(400, 701, 10)]  # of ARAD-1K and CAVE
UNIT_TOLERANCE = 1e-4  # how far outside [0, 1] a cube may reach by rounding
WRITTEN = {"npy": ".npy", "mat": ".mat", "envi": ".hdr", "npz": ".npz"}
NUMBERS = "iuf"  # NumPy's kinds of integers and floats
EXIF_ORIENTATION = 0x0112
# Arrays above this are mapped to files, and pages let go after as much was written.
MAPPED_BYTES = 256 << 20
# The first bytes of a MATLAB v7.3 file, before its HDF5: text, no subsystem data, version 2,
# little-endian.
MAT_HEADER = (
    b"MATLAB 7.3 MAT-file, Platform: Python, HDF5 schema 1.00 .".ljust(116)
    + bytes(8)
    + b"\x00\x02IM"
)


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
        raise UserError(f"{path}: cannot be read as {what} ({reason}); replace the file") from error


def extra(module: str) -> ModuleType:
    """A module of an optional package, or a UserError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs the package {error.name}: pip install -r requirements-extra.txt"
        ) from None


def allocate_array(shape: tuple[int, ...], dtype: type, work: Path) -> np.ndarray:
    """An empty array: in memory when it is small, else mapped to a file in `work`."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= MAPPED_BYTES:
        return np.empty(shape, dtype)
    free = shutil.disk_usage(work).free
    if size > free:
        raise UserError(
            f"{work.parent}: needs {size / 2**30:.1f} GiB there, {free / 2**30:.1f} GiB are free"
        )
    file = work / f"{np.dtype(dtype)}.npy"
    return np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)


def release(array: np.ndarray) -> None:
    """Let go of a mapped array's pages: they stay in its file and the system's cache, no longer in
    this process. Nothing is done for other arrays, or where the system cannot do it."""
    if isinstance(array, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
        array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]  # not in the stubs


def blocks(cube: np.ndarray, rows: int = 1024) -> Iterator[tuple[int, slice]]:
    """(band, rows) pieces that cover a cube (bands, H, W); a mapped one's pages are let go on the
    way."""
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
        return np.asarray(image.convert("RGB"))


def read_photo(path: Path, work: Path) -> tuple[np.ndarray, list[str]]:
    """An image file or .npy as (H, W, 3) uint8 RGB, and what was changed to make it so. Big ones
    are mapped to a file in the folder `work`."""
    if path.suffix == ".npy":
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        if stored.dtype != np.uint8 or stored.ndim != 3 or stored.shape[2] != 3:
            raise UserError(f"expected (H, W, 3) uint8, found {stored.shape} {stored.dtype}")
        return stored, []
    with open_image(path) as image:
        if image.mode == "F":
            raise UserError("floating-point pixels; save it with 8 bits a channel")
        remarks = _photo_remarks(image)
        deep = image.mode.startswith("I")  # one channel of 16 bits
        upright: Image.Image = ImageOps.exif_transpose(image) if _is_turned(image) else image
        rgb = allocate_array((upright.height, upright.width, 3), np.uint8, work)
        for top in range(0, upright.height, 1024):
            bottom = min(top + 1024, upright.height)
            strip = upright.crop((0, top, upright.width, bottom))
            if deep:
                eight_bits = (np.asarray(strip) / 257).round().clip(0, 255)
                rgb[top:bottom] = eight_bits[..., None]
            else:
                rgb[top:bottom] = np.asarray(strip.convert("RGB"))
            release(rgb)
    return rgb, remarks


def _is_turned(image: Image.Image) -> bool:
    return image.getexif().get(EXIF_ORIENTATION, 1) != 1


def _photo_remarks(image: ImageFile.ImageFile) -> list[str]:
    """What read_photo changes in this image."""
    remarks = []
    # Of 16-bit RGB, Pillow gives the high bytes: only the mode of the stored tiles tells.
    if image.mode.startswith("I") or ";16" in str(image.tile):
        remarks.append("16 bit reduced to 8")
    if _is_turned(image):
        remarks.append("turned as its EXIF says")
    if "A" in image.mode or "transparency" in image.info:
        remarks.append("alpha dropped")
    if image.mode.startswith(("I", "1", "L")):
        remarks.append("grey repeated into R, G and B")
    return remarks


def pick_key(arrays: Mapping[str, Any], key: str | None, path: Path) -> str:
    """The cube among the arrays of a file: the key given, else a usual name, else the only array
    with three axes."""
    if key is None:
        cubes = [name for name, array in arrays.items() if len(array.shape) == 3]
        usual = [name for name in cubes if name.lower() in CUBE_KEYS]
        for names in (usual, cubes):
            if len(names) == 1:
                return names[0]
        problem = "which array is the cube?"
    elif key in arrays:
        return key
    else:
        problem = f"no array {key} in it;"
    listed = ", ".join(arrays) or "none, there are no arrays"
    raise UserError(f"{path}: {problem} give --cube-key, one of: {listed}")


def cube_axes(
    shape: tuple[int, ...],
    path: Path,
    *,
    hdf5: bool,
    axes: str | None,
    bands: int | None,
    rgb_shape: tuple[int, ...] | None,
) -> str:
    """The three stored axes as NumPy or h5py shows them, such as "cwh", told by the band count and
    the paired RGB's size (H, W, ...). MATLAB is column-major: H x W x bands of a v7.3 file comes
    out as (bands, W, H); elsewhere hwc and chw are usual."""
    if len(shape) != 3:
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

    if axes is not None:
        usual: tuple[str, ...] = (axes,)
        possible: tuple[str, ...] = (axes,)
    else:
        usual = ("cwh",) if hdf5 else ("hwc", "chw")
        possible = LAYOUTS
    found = [layout for layout in usual if fits(layout)]
    found = found or [layout for layout in possible if fits(layout)]
    if len(found) == 1:
        return found[0]
    stated = f" as --axes {axes}" if axes is not None else ""
    problem = "fits in two ways" if found else _what_is_missing(bands, rgb_shape)
    raise UserError(
        f"{path}: shape {shape}{stated} {problem}; mend or leave it out, "
        "or give --axes, the stored order of h, w and c (bands), such as hwc, chw or cwh"
    )


def _what_is_missing(bands: int | None, rgb_shape: tuple[int, ...] | None) -> str:
    missing = f"does not have {bands or 'few'} bands"
    if rgb_shape is not None:
        missing += f" and {rgb_shape[0]} x {rgb_shape[1]} pixels as its RGB"
    return missing


def read_cube(
    path: str | Path,
    *,
    key: str | None = None,
    axes: str | None = None,
    bands: int | None = None,
    rgb_shape: tuple[int, ...] | None = None,
) -> np.ndarray:
    """One cube as (H, W, bands) float32 in any memory order, values as stored (PNG bands: divided
    by full scale). MATLAB v7.3 and v5 `.mat`, `.npy`, `.npz`, ENVI `.hdr`, or a CAVE folder of one
    PNG a band. `bands` and `rgb_shape` (H, W, ...) are checked, and tell the axes apart. Values are
    not judged here: see check_cube."""
    path = Path(path)
    suffix = path.suffix.lower()
    with reading(path, "a hyperspectral cube"):
        if path.is_dir():
            axes = "hwc"
            stored = _read_band_images(path)
        elif suffix == ".hdr":  # load() applies the reflectance scale factor
            axes = "hwc"
            stored = _open_envi(path).load(dtype=np.float32)
        elif suffix == ".npy":
            stored = np.load(path, mmap_mode="r", allow_pickle=False)  # nothing is taken on trust
        elif suffix in (".npz", ".mat"):
            with open_arrays(path) as arrays:
                array = arrays[pick_key(arrays, key, path)]
                hdf5 = isinstance(array, h5py.Dataset)
                axes = cube_axes(  # complains before anything is decoded
                    array.shape, path, hdf5=hdf5, axes=axes, bands=bands, rgb_shape=rgb_shape
                )
                stored = array.astype(np.float32)[()]
        else:
            raise UserError(
                f"{path}: not a cube; give {', '.join(CUBE_SUFFIXES)} or a folder of band images"
            )
        if stored.dtype.kind not in NUMBERS:
            raise UserError(f"{path}: holds {stored.dtype}, not real numbers")
    layout = cube_axes(stored.shape, path, hdf5=False, axes=axes, bands=bands, rgb_shape=rgb_shape)
    return np.asarray(stored, np.float32).transpose([layout.index(letter) for letter in "hwc"])


def write_cube(path: Path, cube: np.ndarray, wavelengths: list[float], kind: str) -> None:
    """Write (bands, H, W) float32, in memory or mapped, as `kind` of WRITTEN; wavelengths in nm.
    The final name appears only when the file is complete. A mapped array's file may become the
    cube's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=temporary_prefix("cube"), dir=path.parent) as work:
        file = Path(work) / path.name
        if kind == "npy":
            _write_npy(file, cube)
        elif kind == "npz":
            np.savez(file, cube=cube, wavelengths=np.array(wavelengths, np.float32))
        elif kind == "mat":
            _write_mat(file, cube, wavelengths)
        else:
            _write_envi(file, cube, wavelengths)
        for written in sorted(Path(work).iterdir(), reverse=True):  # ENVI's data before its header
            os.replace(written, path.parent / written.name)


def _write_npy(file: Path, cube: np.ndarray) -> None:
    if isinstance(cube, np.memmap) and cube.filename is not None:
        os.replace(cube.filename, file)
    else:
        np.save(file, cube)


@contextmanager
def open_arrays(path: Path, only: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The numeric arrays of a `.mat` or `.npz` file by name (where it saves reading, `only` these);
    those of MATLAB v7.3 are read when indexed."""
    check_claims(path)
    if path.suffix.lower() == ".npz":
        with np.load(path, allow_pickle=False) as file:
            yield {name: file[name] for name in file.files if only is None or name in only}
    elif h5py.is_hdf5(path):
        with h5py.File(path, "r") as file:
            yield _hdf5_arrays(file)
    else:  # MATLAB v5
        from scipy.io import loadmat  # takes a moment to import

        found = loadmat(path, variable_names=only)
        arrays = {name: item for name, item in found.items() if isinstance(item, np.ndarray)}
        yield {name: array for name, array in arrays.items() if array.dtype.kind in NUMBERS}


def _hdf5_arrays(file: h5py.File) -> dict[str, h5py.Dataset]:
    """The numeric datasets of a file, at any depth; "#refs#" and the like are MATLAB's own."""
    found: dict[str, h5py.Dataset] = {}

    def note(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset) and not name.startswith("#"):
            found[name] = item

    file.visititems(note)
    return {name: item for name, item in found.items() if item.dtype.kind in NUMBERS}


class StoredCube(NamedTuple):
    """Where a cube lies in an HDF5 file (MATLAB v7.3)."""

    path: Path
    key: str
    axes: str  # stored order of h, w and c
    bands: int


def find_stored_cube(
    path: Path,
    key: str | None,
    axes: str | None,
    bands: int | None,
    rgb_shape: tuple[int, ...] | None,
) -> StoredCube | None:
    """What read_window needs, nothing decoded; None for a file that only decodes as a whole. The
    hints and errors are those of read_cube."""
    with reading(path, "a hyperspectral cube"):
        if not h5py.is_hdf5(path):
            return None
        with open_arrays(path) as arrays:
            key = pick_key(arrays, key, path)
            shape = arrays[key].shape
    axes = cube_axes(shape, path, hdf5=True, axes=axes, bands=bands, rgb_shape=rgb_shape)
    return StoredCube(path, key, axes, shape[axes.index("c")])


def read_window(stored: StoredCube, rows: slice, columns: slice) -> np.ndarray:
    """Rows and columns of a cube, (h, w, bands) float32; nothing else of it is decoded."""
    cuts = {"h": rows, "w": columns, "c": slice(None)}
    with reading(stored.path, "a hyperspectral cube"), h5py.File(stored.path, "r") as file:
        window = file[stored.key].astype(np.float32)[tuple(cuts[axis] for axis in stored.axes)]
    return window.transpose([stored.axes.index(axis) for axis in "hwc"])


def _write_mat(path: Path, cube: np.ndarray, wavelengths: list[float]) -> None:
    """MATLAB v7.3: HDF5 after 512 bytes. MATLAB is column-major: its H x W x bands is
    (bands, W, H) here."""
    bands, height, width = cube.shape
    with h5py.File(path, "w", userblock_size=512) as file:
        target = file.create_dataset("cube", (bands, width, height), np.float32)
        for band, rows in blocks(cube):
            target[band, :, rows] = cube[band, rows].T
        file["bands"] = np.array(wavelengths, np.float64)[:, None]
        _state_matlab_classes(file)
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
        _state_matlab_classes(file)
    memory.getbuffer()[: len(MAT_HEADER)] = MAT_HEADER
    return memory.getbuffer()


def _state_matlab_classes(file: h5py.File) -> None:
    """MATLAB reads an array only when its class is stated."""
    for item in file.values():
        name = "single" if item.dtype == np.float32 else "double"
        item.attrs["MATLAB_class"] = np.bytes_(name)


def _open_envi(path: Path) -> Any:
    image = importlib.import_module("spectral.io.envi").open(str(path))
    claimed = math.prod(image.shape) * np.dtype(image.dtype).itemsize + image.offset
    stored = os.path.getsize(image.filename)
    if claimed > stored:
        raise UserError(f"{image.filename}: {stored} bytes, its header says {claimed}; replace it")
    check_claim(path, math.prod(image.shape) * 4, stored)
    return image


def envi_files(header: Path) -> list[Path]:
    """The files that may hold the data of an ENVI header: those beside it of its name."""
    return sorted(header.parent.glob(f"{header.stem}.*"))


def _write_envi(path: Path, cube: np.ndarray, wavelengths: list[float]) -> None:
    header = {
        "wavelength": [f"{nm:g}" for nm in wavelengths],
        "wavelength units": "Nanometers",
    }
    bands, height, width = cube.shape
    image = extra("spectral.io.envi").create_image(
        str(path),
        header,
        ext=".img",
        shape=(height, width, bands),
        dtype=np.float32,
        interleave="bsq",
    )
    target = image.open_memmap(interleave="source", writable=True)  # (bands, H, W)
    for band, rows in blocks(cube):
        target[band, rows] = cube[band, rows]
        release(target)


def band_images(folder: Path) -> list[Path]:
    """The PNGs `<scene>_ms_01.png` .. of a CAVE folder (or of the folder in it), in the order of
    their numbers."""
    for place in (folder, folder / folder.name):
        numbered: dict[int, Path] = {}
        for path in place.glob("*.png"):
            number = re.search(r"(\d+)$", path.stem)
            if number:
                numbered[int(number[1])] = path
        if not numbered:
            continue
        missing = set(range(1, max(numbered))) - set(numbered)
        if missing:
            raise UserError(
                f"{place}: band image number {min(missing)} is missing; replace the folder"
            )
        return [numbered[number] for number in sorted(numbered)]
    raise UserError(f"{folder}: no numbered band images (PNG) in it")


def _read_band_images(folder: Path) -> np.ndarray:
    """A CAVE scene: 16-bit PNGs over 65535; the 8-bit RGBA ones of one scene over 255 (their three
    channels agree)."""
    planes: list[np.ndarray] = []
    for path in band_images(folder):
        with reading(path, "a band image"), open_image(path) as image:
            plane = np.asarray(image)
        full_scale = np.float32(255 if plane.dtype == np.uint8 else 65535)
        if plane.ndim == 3:
            if (plane[..., :3] != plane[..., :1]).any():
                raise UserError(f"{path}: a colour picture, not one band; replace it")
            plane = plane[..., 0]
        planes.append(plane.astype(np.float32) / full_scale)
    return np.stack(planes, axis=-1)


def read_wavelengths(path: str | Path) -> list[float] | None:
    """Band centres in nm where the file has them (ENVI header, `bands` or `wavelengths` arrays, a
    CAVE folder of 31 bands), else None."""
    path = Path(path)
    with reading(path, "a hyperspectral cube"):
        stored = _stored_wavelengths(path)
    values = np.asarray([] if stored is None else stored, dtype=np.float64).ravel()
    if values.size < 2 or not np.isfinite(values).all():
        return None
    if values.max() < 20:  # micrometres, as in some files
        values = values * 1000
    return values.tolist() if values.min() > 200 else None


def _stored_wavelengths(path: Path) -> Any:
    """What a file says of its bands, in any unit, or None."""
    if path.is_dir():
        return FIELD_BANDS if len(band_images(path)) == len(FIELD_BANDS) else None
    if path.suffix.lower() == ".hdr":
        return _open_envi(path).bands.centers
    if path.suffix.lower() in (".npz", ".mat"):
        with open_arrays(path, BAND_KEYS) as arrays:
            for name in BAND_KEYS:
                if name in arrays:
                    return arrays[name][()]
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


def check_cube(cube: np.ndarray, path: str | Path, constant_bands: bool = True) -> None:
    """UserError for values of a cube (H, W, bands) that spoil a training run: NaN, infinite,
    outside [0, 1], and, with `constant_bands`, a band all of one value."""
    low, high = float(cube.min()), float(cube.max())
    if not math.isfinite(low) or not math.isfinite(high):
        count = (~np.isfinite(cube)).sum()
        raise UserError(f"{path}: {count} values are NaN or infinite; mend or leave out this scene")
    if low < -UNIT_TOLERANCE or high > 1 + UNIT_TOLERANCE:
        raise UserError(
            f"{path}: values from {low:g} to {high:g}, outside [0, 1]; "
            "stage with dataset_setup.py --scale"
        )
    if not constant_bands:
        return
    bands = cube.shape[2]
    for band in range(bands):
        if np.ptp(cube[..., band]) == 0:
            raise UserError(
                f"{path}: band {band + 1} of {bands} is constant; mend or leave out this scene"
            )


def check_wavelengths(nm: list[float], others: list[float], path: Path) -> None:
    """UserError unless a scene's band centres are the others', within 1 nm: one model cannot learn
    two sets of bands."""
    if len(nm) != len(others) or np.abs(np.subtract(nm, others)).max() > 1:
        raise UserError(
            f"{path}: {nm[0]:g}..{nm[-1]:g} nm, not {others[0]:g}..{others[-1]:g} as the other "
            "scenes or by --wavelengths; use it apart"
        )
