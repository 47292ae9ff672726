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


def leaf(name: str) -> str:
    """hcube/DataCube -> datacube"""
    return name.rsplit("/")[-1].lower()


def pick_key(arrays: Mapping[str, Any], key: str | None, path: Path) -> str:
    """The cube among the arrays of a file: the key given, whole or its last part, in small letters
    or capitals; else a usual name, else the only array with three axes."""
    if not arrays:
        raise UserError(f"{path}: there are no arrays of real numbers in it; save the cube as one")
    if key is None:
        cubes = [name for name, array in arrays.items() if len(array.shape) == 3]
        usual = [name for name in cubes if leaf(name) in CUBE_KEYS]
        for names in (usual, cubes):
            if len(names) == 1:
                return names[0]
        problem = "which array is the cube?"
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
    raise UserError(f"{path}: {problem} give --cube-key, one of: {', '.join(arrays)}")


def band_arrays(path: Path) -> list[np.ndarray]:
    """What a file may say of its bands, at any depth: the usual names first."""
    with open_arrays(path, BAND_KEYS) as arrays:
        names = [name for name in arrays if leaf(name) in BAND_KEYS]
        names.sort(key=lambda name: (name.count("/"), BAND_KEYS.index(leaf(name))))
        found = [np.asarray(arrays[name][()]) for name in names]
        return sorted(found, key=lambda values: values.size == 1)  # which may count the bands


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
        with np.load(path, allow_pickle=False) as file:
            names = [name for name in file.files if not only or leaf(name) in only]
            yield {name: file[name] for name in names}
    elif h5py.is_hdf5(path):
        with open_hdf5(path) as file:
            _collect_hdf5("", file, found)
            yield found
    elif path.suffix.lower() in HDF5_SUFFIXES:
        raise OSError("not an HDF5 file")
    else:
        for name, item in _load_v5(path, only).items():
            _collect_v5(name, item, found)
        yield found


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


def _collect_hdf5(name: str, item: h5py.Group | h5py.Dataset, found: dict[str, Any]) -> None:
    """The same of HDF5, where MATLAB keeps what cells and arrays of structs hold in #refs#."""
    if isinstance(item, h5py.Group):
        for field in item:  # soft links are second names, or lead back up
            hard = isinstance(item.get(field, getlink=True), h5py.HardLink)
            if hard and not field.startswith("#"):
                _collect_hdf5(f"{name}/{field}".lstrip("/"), item[field], found)
    elif h5py.check_ref_dtype(item.dtype) is h5py.Reference:
        references = item[()].ravel()
        for number, reference in enumerate(references, 1):
            if reference:
                part = name if references.size == 1 else f"{name}/{number}"
                _collect_hdf5(part, item.file[reference], found)
    elif item.dtype.kind in NUMBERS and _is_numeric(item):
        found[name] = item


def _is_numeric(item: h5py.Dataset) -> bool:
    """MATLAB stores text as uint16, logicals as uint8, of an empty array the size."""
    kind = np.bytes_(item.attrs.get("MATLAB_class", b"double")).decode().lstrip("u")
    return kind.startswith(("double", "single", "int")) and "MATLAB_empty" not in item.attrs
