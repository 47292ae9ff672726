"""MATLAB, HDF5 and NumPy archives: files of arrays that have names, structs and cells inside. Only
cube_files uses this room.

    with open_arrays(Path("scene.mat")) as arrays:
        cube = arrays[pick_key(arrays, None, path)]
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from common_utils_v32 import UserError
from file_claims import check_claims

CUBE_KEYS = ("cube", "reflectance", "rad", "hsi", "hyper", "data", "datacube")
BAND_KEYS = ("bands", "wavelengths", "wavelength", "lambda", "wl", "centers", "wavelengths_nm")
NUMBERS = "iuf"  # NumPy's kinds of integers and floats
NOT_NUMBERS = ("char", "logical", "sparse", "function", "object", "opaque")  # MATLAB's classes
HDF5_SUFFIXES = (".h5", ".hdf5", ".he5", ".nc")
ARRAY_SUFFIXES = (".npz", ".mat", *HDF5_SUFFIXES)
# What other files of these suffixes begin with.
OLDER_FORMATS = {b"CDF": "netCDF-3", b"\x0e\x03\x13\x01": "HDF4"}
# Attributes of an HDF5 data set, in small letters.
NO_DATA = ("_fillvalue", "missing_value", "data_ignore_value")

# The first bytes of a MATLAB v7.3 file, before its HDF5: text, no subsystem data, version 2,
# little-endian.
MAT_HEADER = (
    b"MATLAB 7.3 MAT-file, Platform: Python, HDF5 schema 1.00 .".ljust(116)
    + bytes(8)
    + b"\x00\x02IM"
)


def leaf(name: str) -> str:
    """hcube/DataCube -> datacube"""
    return name.rsplit("/")[-1].lower()


def three_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the axes of length 1 that are one too many, as of a batch of one cube."""
    kept = list(shape)
    while len(kept) > 3 and 1 in kept:
        kept.remove(1)
    return tuple(kept)


def pick_key(arrays: Mapping[str, Any], key: str | None, path: Path) -> str:
    """The cube among the arrays of a file: the key given, whole or its last part, in small letters
    or capitals; else a usual name, else the only array with three axes."""
    if not arrays:
        raise UserError(f"{path}: there are no arrays of real numbers in it; save the cube as one")
    listed = list(arrays)
    if key is None:
        cubes = [name for name, array in arrays.items() if len(three_axes(array.shape)) == 3]
        usual = [name for name in cubes if leaf(name) in CUBE_KEYS]
        for names in (usual, cubes):
            if len(names) == 1:
                return names[0]
        if not cubes:
            shown = ", ".join(listed)
            raise UserError(f"{path}: no array of three axes, only {shown}; save the cube as one")
        problem, listed = "which array is the cube?", cubes
    elif key in arrays:
        return key
    else:
        wanted = key.strip("/").replace(".", "/").lower()
        whole = [name for name in arrays if name.lower() == wanted]
        last = [name for name in arrays if leaf(name) == wanted]
        for names in (whole, last):
            if len(names) == 1:
                return names[0]
        problem = f"no array {key} in it;"
    raise UserError(f"{path}: {problem} give --cube-key, one of: {', '.join(listed)}")


def band_arrays(path: Path) -> list[tuple[np.ndarray, str]]:
    """What a file may say of its bands, and in which unit, at any depth: the usual names first."""
    with open_arrays(path, BAND_KEYS) as arrays:
        names = [name for name in arrays if leaf(name) in BAND_KEYS]
        names.sort(key=lambda name: (name.count("/"), BAND_KEYS.index(leaf(name))))
        found = []
        for name in names:
            try:
                values = np.asarray(arrays[name][()], np.float64)
            except ValueError:  # names of bands
                continue
            found.append((values, _stated_unit(arrays[name])))
        return sorted(found, key=lambda item: item[0].size == 1)  # which may count the bands


def _stated_unit(array: Any) -> str:
    """What an HDF5 data set's attribute `units` says; empty where there is none."""
    for name in getattr(array, "attrs", ()):
        if name.lower() in ("unit", "units"):
            value = np.ravel(array.attrs[name])[0]
            if isinstance(value, bytes):
                return value.decode("utf-8", "replace")
            return "" if isinstance(value, h5py.Empty) else str(value)
    return ""


def value_attributes(array: Any, path: Path) -> tuple[float | None, float]:
    """What the attributes of an HDF5 data set say of its values: the one that means no data, and a
    factor, which NEON divides by (10000) and the CF conventions multiply by (0.0001)."""
    if getattr(array, "is_virtual", False) or getattr(array, "external", None):
        raise UserError(f"{path}: its values lie in other files; save the cube in one file")
    said: dict[str, float] = {}
    for name in getattr(array, "attrs", ()):
        if name.lower() in ("scale_factor", "add_offset", *NO_DATA):
            said[name.lower()] = _one_number(array.attrs[name], name, path)
    if said.get("add_offset", 0):
        raise UserError(f"{path}: its values have an add_offset; apply it first")
    factor = said.get("scale_factor", 1.0)
    if not 0 < factor < np.inf:
        raise UserError(f"{path}: a scale_factor of {factor:g}; mend the file")
    return next((said[name] for name in NO_DATA if name in said), None), max(factor, 1 / factor)


def _one_number(value: Any, name: str, path: Path) -> float:
    """An attribute that is a number, or the same one many times."""
    try:
        values = set(np.ravel(value).astype(np.float64).tolist())
    except (TypeError, ValueError):
        values = set()
    if len(values) != 1:
        raise UserError(f"{path}: its {name} is not one number; apply it first and remove it")
    return values.pop()


def open_hdf5(path: Path) -> h5py.File:
    """An HDF5 file to read. Reading needs no lock, and some file systems have none."""
    return h5py.File(path, "r", locking=False)


@contextmanager
def open_arrays(path: Path, only: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """The arrays of numbers in a file by name, hcube/DataCube for a field of a struct; those of
    HDF5 are read when indexed. `only`: names in small letters, where that saves reading."""
    found: dict[str, Any] = {}
    check_claims(path)
    if path.suffix.lower() == ".npz":
        yield _load_npz(path, only)
    elif h5py.is_hdf5(path):
        with open_hdf5(path) as file:
            _collect_hdf5("", file, found, set())
            yield found
    elif path.suffix.lower() in HDF5_SUFFIXES:
        with open(path, "rb") as opened:
            start = opened.read(4)
        for magic, kind in OLDER_FORMATS.items():
            if start.startswith(magic):
                raise UserError(f"{path}: is {kind}; convert it to HDF5 or netCDF-4")
        raise OSError("not an HDF5 file")
    else:
        for name, item in _load_v5(path, only).items():
            _collect_v5(name, item, found)
        yield found


def _load_npz(path: Path, only: tuple[str, ...]) -> dict[str, Any]:
    """The arrays of numbers in an archive, and of text, which may be numbers of bands."""
    found = {}
    with np.load(path, allow_pickle=False) as file:
        for name in file.files:
            if only and leaf(name) not in only:
                continue
            try:
                array = file[name]
            except ValueError as error:
                if "Object arrays" not in str(error):
                    raise
                continue
            if isinstance(array, np.ndarray) and array.dtype.kind in NUMBERS + "SU":
                found[name] = array
    return found


def _load_v5(path: Path, only: tuple[str, ...]) -> dict[str, Any]:
    """The variables of a MATLAB file before v7.3 that may hold numbers."""
    from scipy.io import loadmat, whosmat  # takes a moment to import

    wanted = []
    for name, _, kind in whosmat(path):
        named = not only or name.lower() in only
        if kind in ("struct", "cell") or (named and kind not in NOT_NUMBERS):
            wanted.append(name)
    loaded = loadmat(path, variable_names=list(wanted))  # which empties the list
    return {name: loaded[name] for name in wanted}


def _collect_v5(name: str, item: np.ndarray, found: dict[str, Any]) -> None:
    """Note the arrays of numbers in an item: name/field of structs, name/1 .. of cells."""
    if item.dtype.names:
        for field in item.dtype.names:
            _collect_v5(f"{name}/{field}", item[field], found)
    elif item.dtype.kind == "O":
        for number, part in enumerate(item.ravel(order="F"), 1):
            if isinstance(part, np.ndarray):
                _collect_v5(name if item.size == 1 else f"{name}/{number}", part, found)
    elif item.dtype.kind in NUMBERS:
        found[name] = item


def _collect_hdf5(name: str, item: Any, found: dict[str, Any], entered: set[Any]) -> None:
    """The same of an HDF5 file, where MATLAB keeps what cells and arrays of structs hold in #refs#
    and refers to it; and of attributes those that may say the bands. `entered`: what was gone
    into, as links and references may lead back up."""
    for attribute in getattr(item, "attrs", ()):
        if attribute.lower() in BAND_KEYS:
            values = np.asarray(item.attrs[attribute])
            if values.dtype.kind in NUMBERS:
                found[f"{name}/{attribute}".lstrip("/")] = values
    if isinstance(item, h5py.Group) and item not in entered:
        entered.add(item)
        for field in item:  # soft links are second names; other files are not followed
            hard = isinstance(item.get(field, getlink=True), h5py.HardLink)
            if hard and not field.startswith("#"):
                _collect_hdf5(f"{name}/{field}".lstrip("/"), item[field], found, entered)
    elif not isinstance(item, h5py.Dataset) or item.shape is None or item in entered:
        return
    elif h5py.check_ref_dtype(item.dtype) is h5py.Reference:
        entered.add(item)
        references = item[()].ravel()
        for number, reference in enumerate(references, 1):
            if reference:
                part = name if references.size == 1 else f"{name}/{number}"
                _collect_hdf5(part, item.file[reference], found, entered)
    elif item.dtype.kind in NUMBERS and _is_numeric(item):
        found[name] = item


def _is_numeric(item: h5py.Dataset) -> bool:
    """MATLAB stores text as uint16, logicals as uint8, tables as numbers of objects, and of an
    empty array the size."""
    kind = np.bytes_(item.attrs.get("MATLAB_class", b"double")).decode()
    return kind.lstrip("u").startswith(("double", "single", "int")) and (
        "MATLAB_empty" not in item.attrs
    )


def state_matlab_classes(file: h5py.File) -> None:
    """MATLAB reads an array only when its class is stated."""
    for item in file.values():
        name = "single" if item.dtype == np.float32 else "double"
        item.attrs["MATLAB_class"] = np.bytes_(name)
