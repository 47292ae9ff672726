"""What a file says that it holds, looked at before any of it is read: a few bytes may claim any
size, and compressed zeros really have it.

    check_claims(Path("scene.mat"))          # UserError where reading it could not end well
    with open_image(path) as image: ..."""

import math
import struct
import zipfile
import zlib
from gzip import GzipFile
from pathlib import Path
from typing import IO

import h5py
from PIL import Image, ImageFile, UnidentifiedImageError

from common_utils_v32 import UserError
from compute_devices import free_memory

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # others run programs, or are no photos
MODEST = 1 << 30  # bytes that any file may claim
GROWTH = 100  # of a file when it is read: measured light is not compressed that well
MAT_START, MAT_COMPRESSED = 128, 15  # of MATLAB v5: length of its header, type of a packed element


def check_claim(path: Path, claimed: float, stored: float) -> None:
    """UserError where a file of `stored` bytes cannot hold the `claimed` ones, or memory cannot."""
    if claimed <= MODEST:
        return
    size = f"{claimed / 2**30:.1f} GiB"
    if claimed > GROWTH * stored:
        raise UserError(f"{path}: claims to hold {size} in {stored / 2**20:.1f} MiB; replace it")
    free = free_memory()
    if claimed > free:
        raise UserError(f"{path}: needs {size} of memory, {free / 2**30:.1f} are free; cut it up")


def open_image(path: Path) -> ImageFile.ImageFile:
    """Pillow's image of a photo; nothing is decoded."""
    try:
        image = Image.open(path, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise UserError(
            f"{path}: damaged, or not a picture that is read; give a JPEG, PNG, TIFF, BMP or WebP"
        ) from None
    check_claim(path, image.width * image.height * len(image.getbands()), path.stat().st_size)
    return image


def read_packed(path: Path, unpacked: IO[bytes] | GzipFile) -> bytearray:
    """All bytes of the packed file at `path`, given open, until there are too many."""
    content = bytearray()
    while block := unpacked.read(1 << 24):
        content += block
        check_claim(path, len(content), path.stat().st_size)
    return content


def check_claims(path: Path) -> None:
    """check_claim of the arrays of a .npz or .mat file."""
    stored, suffix = path.stat().st_size, path.suffix.lower()
    if suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            check_claim(path, sum(part.file_size for part in archive.infolist()), stored)
    elif h5py.is_hdf5(path):
        with h5py.File(path, "r", locking=False) as file:  # some file systems have no locks
            check_claim(path, _largest_dataset(file), stored)
    elif suffix == ".mat" and GROWTH * stored > MODEST // 10:  # zlib packs to a thousandth at best
        _check_packed_elements(path, stored)


def _largest_dataset(file: h5py.File) -> int:
    sizes = [0]

    def note(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            sizes.append(math.prod(item.shape) * item.dtype.itemsize)

    file.visititems(note)
    return max(sizes)


def _check_packed_elements(path: Path, stored: int) -> None:
    """Unpack what a MATLAB v5 file holds, keeping none of it, until it has become too large."""
    total = 0
    with open(path, "rb") as file:
        order = "<" if file.read(MAT_START)[-2:] == b"IM" else ">"
        while len(tag := file.read(8)) == 8:
            kind, size = struct.unpack(f"{order}2I", tag)
            if kind != MAT_COMPRESSED:
                file.seek(size, 1)
                continue
            unpack = zlib.decompressobj()
            packed = file.read(size)
            while packed and not unpack.eof:
                total += len(unpack.decompress(packed, 1 << 20))
                packed = unpack.unconsumed_tail
                check_claim(path, total, stored)
