"""Cubes and photos, read from and written to every format of the field."""

from __future__ import annotations

import importlib
import io
import math
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image, ImageOps

from common_utils_v32 import UserError

CUBE_KEYS = ("cube", "reflectance", "rad", "hsi", "hyper", "data")
WAVELENGTH_KEYS = (
    "bands",
    "wavelengths",
    "wavelength",
    "Wavelengths",
    "Wavelength",
    "lambda",
    "wl",
)
RGB_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
CUBE_SUFFIXES = (".mat", ".npy", ".npz", ".hdr")
FIELD_BANDS = [float(nm) for nm in range(400, 701, 10)]  # of ARAD-1K and CAVE
UNIT_TOLERANCE = 1e-4  # how far outside [0, 1] a cube may reach by rounding
WRITTEN = {"npy": ".npy", "mat": ".mat", "envi": ".hdr", "npz": ".npz"}
MAPPED_BYTES = (
    256 << 20
)  # arrays above this are mapped to files, and pages let go after as much was written
# The first bytes of a MATLAB v7.3 file, before its HDF5: text, no subsystem data, version 2, little-endian.
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
        raise UserError(
            f"{path}: to read it, pip install {(error.name or str(error)).split('.')[0]}"
        ) from None
    except Exception as error:  # every decoder has exceptions of its own; the cause stays chained
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read as {what} ({reason}); replace the file") from error


def cube_axes(
    shape: tuple[int, ...],
    path: Path,
    hdf5: bool,
    axes: str | None,
    bands: int | None,
    rgb_shape: tuple[int, ...] | None,
) -> str:
    """The three stored axes as numpy or h5py shows them, such as "cwh", told by the band count and the paired RGB's size.
    MATLAB is column-major: H x W x bands of a v7.3 file comes out as (bands, W, H); elsewhere hwc and chw are usual."""
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
        if bands is None and rgb_shape is None and axes is None:
            return count == 31 or 2 * count < min(height, width)
        return bands in (None, count) and (
            rgb_shape is None or (height, width) == tuple(rgb_shape[:2])
        )

    usual = (axes,) if axes else ("cwh",) if hdf5 else ("hwc", "chw")
    found = list(filter(fits, usual)) or list(
        filter(fits, () if axes else ("hwc", "chw", "cwh", "whc"))
    )
    if len(found) == 1:
        return found[0]
    size = (
        f" and {rgb_shape[0]} x {rgb_shape[1]} pixels as its RGB" if rgb_shape is not None else ""
    )
    problem = "fits in two ways" if found else f"does not have {bands or 'few'} bands{size}"
    raise UserError(
        f"{path}: shape {shape}{f' as --axes {axes}' if axes else ''} {problem}; mend or leave it out, "
        "or give --axes, the stored order of h, w and c (bands), such as hwc, chw or cwh"
    )


def pick_key(arrays: Mapping[str, Any], key: str | None, path: Path) -> str:
    """The cube among the arrays of a file: the key given, else a usual name, else the only array with three axes."""
    cubes = [name for name, array in arrays.items() if len(array.shape) == 3]
    usual = [name for name in cubes if name.lower() in CUBE_KEYS]
    for names in ([key] if key in arrays else [], usual, cubes):
        if len(names) == 1 and key in (None, names[0]):
            return names[0]
    problem = f"no array {key} in it" if key else "which array is the cube?"
    raise UserError(
        f"{path}: {problem} give --cube-key, one of: {', '.join(arrays) or 'none, there are no arrays'}"
    )


@contextmanager
def open_arrays(path: Path, only: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
    """The numeric arrays of a `.mat` or `.npz` file by name (`only` these); in v7.3 they are read when indexed."""
    if path.suffix.lower() == ".npz":
        with np.load(path, allow_pickle=False) as file:
            yield {name: file[name] for name in file.files if only is None or name in only}
    elif h5py.is_hdf5(path):
        with h5py.File(path, "r") as file:
            found: dict[str, Any] = {}
            file.visititems(
                lambda name, item: (
                    found.update({name: item}) if isinstance(item, h5py.Dataset) else None
                )
            )
            yield {
                k: v for k, v in found.items() if v.dtype.kind in "iuf" and not k.startswith("#")
            }
    else:
        found = importlib.import_module("scipy.io").loadmat(
            path, variable_names=only and list(only)
        )
        yield {
            k: v for k, v in found.items() if isinstance(v, np.ndarray) and v.dtype.kind in "iuf"
        }


def read_cube(
    path: str | Path,
    *,
    key: str | None = None,
    axes: str | None = None,
    bands: int | None = None,
    rgb_shape: tuple[int, ...] | None = None,
) -> np.ndarray:
    """One cube as (H, W, bands) float32 in any memory order, values as stored (PNG bands: divided by full scale).
    MATLAB v7.3 and v5 `.mat`, `.npy`, `.npz`, ENVI `.hdr`, or a CAVE folder of one PNG a band. `bands` and `rgb_shape`
    (H, W, ...) are checked, and tell the axes apart. Values are not judged here: see check_cube."""
    path = Path(path)
    suffix, hdf5 = path.suffix.lower(), False
    with reading(path, "a hyperspectral cube"):
        if path.is_dir():
            stored, axes = _read_band_images(path), "hwc"
        elif suffix == ".hdr":  # load() applies the reflectance scale factor
            stored, axes = (
                importlib.import_module("spectral.io.envi").open(str(path)).load(dtype=np.float32),
                "hwc",
            )
        elif suffix == ".npy":
            stored = np.load(path, allow_pickle=False)
        elif suffix in (".npz", ".mat"):
            with open_arrays(path) as arrays:
                array = arrays[pick_key(arrays, key, path)]
                hdf5 = isinstance(array, h5py.Dataset)
                axes = cube_axes(
                    array.shape, path, hdf5, axes, bands, rgb_shape
                )  # complain before decoding
                stored = array.astype(np.float32)[()]
        else:
            raise UserError(
                f"{path}: not a cube; give {', '.join(CUBE_SUFFIXES)} or a folder of band images"
            )
        if stored.dtype.kind not in "iuf":
            raise UserError(f"{path}: holds {stored.dtype}, not real numbers")
    layout = cube_axes(stored.shape, path, hdf5, axes, bands, rgb_shape)
    return np.asarray(stored, np.float32).transpose([layout.index(letter) for letter in "hwc"])


def band_images(folder: Path) -> list[Path]:
    """The PNGs `<scene>_ms_01.png` .. of a CAVE folder (or of the folder in it), in the order of their numbers."""
    for place in (folder, folder / folder.name):
        numbered = {
            int(number[1]): p
            for p in place.glob("*.png")
            if (number := re.search(r"(\d+)$", p.stem))
        }
        if numbered:
            if missing := set(range(1, max(numbered))) - set(numbered):
                raise UserError(
                    f"{place}: band image number {min(missing)} is missing; replace the folder"
                )
            return [numbered[number] for number in sorted(numbered)]
    raise UserError(f"{folder}: no numbered band images (PNG) in it")


def _read_band_images(folder: Path) -> np.ndarray:
    """A CAVE scene: 16-bit PNGs over 65535; the 8-bit RGBA ones of one scene over 255 (their three channels agree)."""
    planes: list[np.ndarray] = []
    for path in band_images(folder):
        with reading(path, "a band image"), Image.open(path) as image:
            plane = np.asarray(image)
        full_scale = np.float32(255 if plane.dtype == np.uint8 else 65535)
        if plane.ndim == 3:
            if (plane[..., :3] != plane[..., :1]).any():
                raise UserError(f"{path}: a colour picture, not one band; replace it")
            plane = plane[..., 0]
        planes.append(plane.astype(np.float32) / full_scale)
    return np.stack(planes, axis=-1)


def read_wavelengths(path: str | Path) -> list[float] | None:
    """Band centres in nm where the file has them (ENVI header, `bands` or `wavelengths` arrays), else None."""
    path, found = Path(path), None
    with reading(path, "a hyperspectral cube"):
        if path.is_dir():
            found = FIELD_BANDS if len(band_images(path)) == len(FIELD_BANDS) else None
        elif path.suffix.lower() == ".hdr":
            found = importlib.import_module("spectral.io.envi").open(str(path)).bands.centers
        elif path.suffix.lower() in (".npz", ".mat"):
            with open_arrays(path, WAVELENGTH_KEYS) as arrays:
                found = next((arrays[name][()] for name in WAVELENGTH_KEYS if name in arrays), None)
    values = np.asarray([] if found is None else found, dtype=np.float64).ravel()
    values = (
        values * 1000 if values.size and values.max() < 20 else values
    )  # some files are in micrometres
    return (
        values.tolist()
        if values.size > 1 and values.min() > 200 and np.isfinite(values).all()
        else None
    )


def read_rgb(path: str | Path) -> np.ndarray:
    """An 8-bit image (JPEG, PNG, BMP) as (H, W, 3) uint8 RGB, pixels as stored."""
    path = Path(path)
    with reading(path, "an RGB image"), Image.open(path) as image:
        if image.mode not in ("RGB", "RGBA", "P", "L"):
            raise UserError(f"{path}: a {image.mode} image; an 8-bit RGB image is needed")
        return np.asarray(image.convert("RGB"))


def check_cube(cube: np.ndarray, path: str | Path, constant_bands: bool = True) -> None:
    """UserError for values that spoil a training run: NaN, infinite, outside [0, 1], a band all of one value."""
    low, high = float(cube.min()), float(cube.max())
    if not math.isfinite(low) or not math.isfinite(high):
        raise UserError(
            f"{path}: {(~np.isfinite(cube)).sum()} values are NaN or infinite; mend or leave out this scene"
        )
    if low < -UNIT_TOLERANCE or high > 1 + UNIT_TOLERANCE:
        raise UserError(
            f"{path}: values from {low:g} to {high:g}, outside [0, 1]; stage with dataset_setup.py --scale"
        )
    flat = (
        [band for band in range(cube.shape[2]) if np.ptp(cube[..., band]) == 0]
        if constant_bands
        else []
    )
    if flat:
        raise UserError(
            f"{path}: band {flat[0] + 1} of {cube.shape[2]} is constant; mend or leave out this scene"
        )


def bands_known(wavelengths: list[float] | None, bands: int, path: Path) -> list[float]:
    """The band centres: those of the file, else the field's where the count is the field's."""
    if wavelengths is None and bands == len(FIELD_BANDS):
        return FIELD_BANDS
    if wavelengths is None or len(wavelengths) != bands:
        raise UserError(
            f"{path}: {len(wavelengths or [])} wavelengths of {bands} bands; store them, in nm, as `bands`"
        )
    return list(wavelengths)


def check_wavelengths(nm: list[float], others: list[float], path: Path) -> None:
    """UserError unless a scene's band centres are the others', within 1 nm: one model cannot learn two sets of bands."""
    if len(nm) != len(others) or np.abs(np.subtract(nm, others)).max() > 1:
        raise UserError(
            f"{path}: {nm[0]:g}..{nm[-1]:g} nm, not {others[0]:g}..{others[-1]:g} as the other scenes or by "
            "--wavelengths; use it apart"
        )


def read_photo(path: Path, work: Path) -> tuple[np.ndarray, list[str]]:
    """An image file or .npy as (H, W, 3) uint8 RGB, big ones mapped to a file in `work`, and what was changed."""
    if path.suffix == ".npy":
        rgb = np.load(path, mmap_mode="r", allow_pickle=False)
        if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
            raise UserError(f"expected (H, W, 3) uint8, found {rgb.shape} {rgb.dtype}")
        return rgb, []
    with Image.open(path) as image:
        wide, turned = (
            image.mode[0] == "I",
            image.getexif().get(0x0112, 1) != 1,
        )  # 0x0112: orientation
        remarks = [
            remark
            for remark, so in {
                "16 bit reduced to 8": wide
                or ";16" in str(image.tile),  # of 16-bit RGB, Pillow gives the high bytes
                "turned as its EXIF says": turned,
                "alpha dropped": "A" in image.mode or "transparency" in image.info,
                "grey repeated into R, G and B": image.mode[0] in "I1L",
            }.items()
            if so
        ]
        if image.mode == "F":
            raise UserError("floating-point pixels; save it with 8 bits a channel")
        image = ImageOps.exif_transpose(image) if turned else image
        rgb = allocate_array((image.height, image.width, 3), np.uint8, work)
        for y in range(0, image.height, 1024):
            strip = image.crop((0, y, image.width, min(y + 1024, image.height)))
            pixels = np.asarray(strip if wide else strip.convert("RGB"))
            rgb[y : y + 1024] = (pixels / 257).round().clip(0, 255)[..., None] if wide else pixels
            release(rgb)
    return rgb, remarks


def allocate_array(shape: tuple[int, ...], dtype: type, work: Path) -> np.ndarray:
    """An empty array: in memory when it is small, else mapped to a file in `work`."""
    size, free = math.prod(shape) * np.dtype(dtype).itemsize, shutil.disk_usage(work).free
    if size <= MAPPED_BYTES:
        return np.empty(shape, dtype)
    if size > free:
        raise UserError(
            f"{work.parent}: needs {size / 2**30:.1f} GiB there, {free / 2**30:.1f} GiB are free"
        )
    return np.lib.format.open_memmap(
        work / f"{np.dtype(dtype)}.npy", mode="w+", dtype=dtype, shape=shape
    )


def release(array: np.ndarray) -> int:
    """Let go of a mapped array's pages: they stay in its file and the system's cache, no longer in this process."""
    if isinstance(array, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
        array._mmap.madvise(mmap.MADV_DONTNEED)
    return 0


def extra(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs the package {error.name}: pip install -r requirements-extra.txt"
        ) from None


def blocks(cube: np.ndarray, rows: int = 1024) -> Iterator[tuple[int, slice]]:
    """(band, rows) pieces that cover a cube; the pages of a mapped one are let go on the way."""
    for band, block in np.ndindex(len(cube), math.ceil(cube.shape[1] / rows)):
        yield band, slice(block * rows, (block + 1) * rows)
        release(cube)


def write_cube(path: Path, cube: np.ndarray, wavelengths: list[float], kind: str) -> None:
    """Write (bands, H, W) float32, in memory or mapped; the final name appears only when the file is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".cube-", dir=path.parent) as work:
        file = Path(work) / path.name
        if kind == "npy" and isinstance(cube, np.memmap):
            os.replace(cube.filename, file)
        elif kind == "npy":
            np.save(file, cube)
        elif kind == "npz":
            np.savez(file, cube=cube, wavelengths=np.float32(wavelengths))
        elif (
            kind == "mat"
        ):  # v7.3: HDF5 after 512 bytes; MATLAB is column-major: its H x W x bands is (bands, W, H) here
            with h5py.File(file, "w", userblock_size=512) as mat:
                target = mat.create_dataset("cube", (len(cube), *cube.shape[:0:-1]), np.float32)
                for band, rows in blocks(cube):
                    target[band, :, rows] = cube[band, rows].T
                mat["bands"] = np.float64(wavelengths)[:, None]
                target.attrs["MATLAB_class"], mat["bands"].attrs["MATLAB_class"] = (
                    np.bytes_("single"),
                    np.bytes_("double"),
                )
            with open(file, "r+b") as header:
                header.write(MAT_HEADER)
        else:
            about = {
                "wavelength": [f"{w:g}" for w in wavelengths],
                "wavelength units": "Nanometers",
            }
            image = extra("spectral.io.envi").create_image(
                str(file),
                about,
                ext=".img",
                shape=(*cube.shape[1:], len(cube)),
                dtype=np.float32,
                interleave="bsq",
            )
            target = image.open_memmap(interleave="source", writable=True)  # (bands, H, W)
            for band, rows in blocks(cube):
                target[band, rows] = cube[band, rows]
                release(target)
        for file in sorted(Path(work).iterdir(), reverse=True):  # ENVI's data before its header
            os.replace(file, path.parent / file.name)


def arad_mat(cube: np.ndarray, wavelengths: np.ndarray) -> memoryview:
    """A cube (H, W, bands) as the bytes of a MATLAB v7.3 file like those of ARAD-1K."""
    memory, stored = (
        io.BytesIO(),
        cube.transpose(2, 1, 0),
    )  # MATLAB is column-major: h5py sees bands, W, H
    with h5py.File(memory, "w", userblock_size=512) as file:
        file.create_dataset(
            "cube", data=stored, chunks=(31, 64, 64), compression="gzip", compression_opts=1
        )
        file["bands"], file["norm_factor"] = wavelengths[:, None], np.ones((1, 1))
        for item in file.values():
            item.attrs["MATLAB_class"] = np.bytes_(
                "single" if item.dtype == np.float32 else "double"
            )
    memory.getbuffer()[: len(MAT_HEADER)] = MAT_HEADER
    return memory.getbuffer()
