"""Photos as cameras and people save them: every bit depth kept, colour profiles converted, upright.

photo = read_photo(Path("photo.jpg"), work_folder)        # photo.rgb (H, W, 3), photo.remarks"""

import io
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps

from common_utils_v32 import UserError
from cube_files import allocate_array, extra, release
from file_claims import open_image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".rgb.npy")
RAW_SUFFIXES = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".rw2", ".orf", ".pef", ".srw")
# Photos and films that are in folders of them, and are not read.
NOT_READ = (*RAW_SUFFIXES, ".heic", ".heif", ".avif", ".gif", ".mp4", ".mov", ".avi", ".mkv")
STRIP = 1024  # rows that are converted at a time
EXIF_ORIENTATION, EXIF_MAKER = 274, 271
TIFF_BITS, TIFF_DNG_VERSION, TIFF_RGB = 258, 50706, 2
TWELVE_BITS, SIXTEEN_BITS = 4095, 65535
Profile = ImageCms.ImageCmsProfile


class Photo(NamedTuple):
    """What was read, and what was changed to make it so."""

    rgb: np.ndarray  # (H, W, 3) uint8, or uint16 of a deep file
    remarks: list[str]
    ordinary: str = ""  # why it looks like a camera's own sRGB photo


def read_photo(path: Path, work: Path) -> Photo:
    """An image file or .npy. Big ones are mapped to a file in the folder `work`."""
    refuse_unreadable(path)
    if path.suffix == ".npy":
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
        known = stored.dtype in (np.uint8, np.uint16) and stored.size > 0
        if not known or stored.ndim != 3 or stored.shape[2] != 3:
            raise UserError(
                f"expected (H, W, 3) uint8 or uint16, found {stored.shape} {stored.dtype}"
            )
        return Photo(stored, [])
    with open_image(path) as image:
        # Of 16-bit RGB Pillow gives the high bytes: only the stored tiles tell, and they are gone
        # once its EXIF is asked for, which may load the pixels.
        tags = getattr(image, "tag_v2", {})
        tiles = str(image.tile)
        deep = image.mode.startswith("I") or ";16B" in tiles or ";16L" in tiles
        if "LA;16" in tiles:
            raise UserError("grey and alpha of 16 bits; save it as grey, or as RGB")
        if image.mode == "F":
            raise UserError("floating-point pixels; save it with 8 or 16 bits a channel")
        if TIFF_DNG_VERSION in tags:
            raise UserError(f"{path}: {_RAW_ADVICE}")
        remarks, ordinary = _remarks(image), _looks_ordinary(image)
        foreign = _profile(image)
        packed = not deep and max(tags.get(TIFF_BITS, (8,))) > 8
        if deep:
            rgb = _deep_pixels(path)
        elif packed:
            rgb = _deep_tiff(path, image.getexif().get(EXIF_ORIENTATION, 1))
        else:
            rgb = _shallow_pixels(image, foreign, work, remarks)
        if (deep or packed) and foreign is not None:
            remarks.append(f"colour profile {_name_of(foreign)} left as it is, at 16 bits")
    if image.format in ("TIFF", "WEBP"):  # JPEGs of phones hold other things
        remarks += _other_images(path)
    if rgb.dtype == np.uint16 and 255 < rgb.max() <= TWELVE_BITS:
        remarks.append("taken as 12 bits: no value is above 4095")
        rgb = (rgb.astype(np.uint32) * SIXTEEN_BITS // TWELVE_BITS).astype(np.uint16)
    return Photo(rgb, remarks, ordinary)


_RAW_ADVICE = "a camera raw file; develop it to a TIFF or PNG first, or give the camera's JPEG"


def refuse_unreadable(path: Path) -> None:
    """UserError for kinds of files that are no photo to read, by name."""
    suffix = path.suffix.lower()
    if suffix in RAW_SUFFIXES:
        raise UserError(f"{path}: {_RAW_ADVICE}")
    if suffix in NOT_READ:
        raise UserError(f"{path}: {suffix[1:].upper()} is not read; convert it to JPEG or PNG")


def _shallow_pixels(
    image: ImageFile.ImageFile, profile: Profile | None, work: Path, remarks: list[str]
) -> np.ndarray:
    """(H, W, 3) uint8, upright, in sRGB where a colour profile says what it is in."""
    upright: Image.Image = ImageOps.exif_transpose(image) if _is_turned(image) else image
    convert = None
    if profile is not None and upright.mode in ("RGB", "RGBA"):
        kind = upright.mode
        convert = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), kind, "RGB")
        remarks.append(f"colour profile {_name_of(profile)} converted to sRGB")
    rgb = allocate_array((upright.height, upright.width, 3), np.uint8, work)
    for top in range(0, upright.height, STRIP):
        bottom = min(top + STRIP, upright.height)
        strip = upright.crop((0, top, upright.width, bottom))
        converted = ImageCms.applyTransform(strip, convert) if convert else strip.convert("RGB")
        assert converted is not None  # it is one only where it changes the image in place
        rgb[top:bottom] = np.asarray(converted)
        release(rgb)
    return rgb


def _deep_pixels(path: Path) -> np.ndarray:
    """(H, W, 3) uint16, upright."""
    with open_image(path) as image:
        if image.mode.startswith("I"):
            grey = np.asarray(ImageOps.exif_transpose(image))
            if grey.min() < 0 or grey.max() > SIXTEEN_BITS:
                raise UserError("values beyond 16 bits; save it with 8 or 16 bits a channel")
            return np.repeat(grey.astype(np.uint16)[..., None], 3, axis=2)
        high = np.asarray(ImageOps.exif_transpose(image.convert("RGB")))
    with open_image(path) as image:
        tiles = []
        for tile in image.tile:
            mode = str(tile.args if isinstance(tile.args, str) else tile.args[0])
            # The other byte order reads the other byte of each value.
            swapped = mode[:-1] + ("L" if mode.endswith("B") else "B")
            args = swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:])
            tiles.append(tile._replace(args=args))
        image.tile = tiles
        low = np.asarray(ImageOps.exif_transpose(image.convert("RGB")))
    return high.astype(np.uint16) << 8 | low


def _deep_tiff(path: Path, orientation: int) -> np.ndarray:
    """(H, W, 3) uint16, upright, of a TIFF that Pillow cuts to 8 bits, or reads wrongly."""
    try:
        with extra("tifffile").TiffFile(path) as file:
            page = file.pages[0]
            pixels, axes, colours = page.asarray(), page.axes, page.photometric
    except (
        ValueError,
        KeyError,
        zlib.error,
        struct.error,
    ) as error:  # packages that unpack it are missing, or it is damaged
        raise UserError(f"{error}; save it as PNG, or as a TIFF without compression") from None
    if axes == "SYX":
        pixels, axes = pixels.transpose(1, 2, 0), "YXS"
    if axes != "YXS" or colours != TIFF_RGB or pixels.dtype != np.uint16:
        raise UserError(f"{axes} {pixels.dtype} pixels; save it as RGB of 8 or 16 bits a channel")
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::rows, ::columns, :3]


def _is_turned(image: Image.Image) -> bool:
    return image.getexif().get(EXIF_ORIENTATION, 1) != 1


def _profile(image: Image.Image) -> Profile | None:
    """Its colour profile, where it has one that is not sRGB."""
    stored = image.info.get("icc_profile")
    if not stored:
        return None
    try:
        profile = Profile(io.BytesIO(stored))
        name = _name_of(profile)
    except (OSError, ImageCms.PyCMSError):
        return None
    return None if "sRGB" in name else profile


def _name_of(profile: Profile) -> str:
    return ImageCms.getProfileDescription(profile).strip()


def _looks_ordinary(image: Image.Image) -> str:
    """What tells that a camera made this photo, gamma and all; empty where nothing does."""
    if image.getexif().get(EXIF_MAKER):
        return "its EXIF names a camera"
    return "it has a colour profile" if image.info.get("icc_profile") else ""


def _other_images(path: Path) -> list[str]:
    """What to say of a file of several images."""
    with open_image(path) as image:  # anew: a file may be damaged beyond its first image
        try:
            images = getattr(image, "n_frames", 1)
        except (OSError, ValueError, TypeError, KeyError, EOFError, SyntaxError):
            return ["the first of several images, the others are damaged"]
    return [f"the first of {images} images"] if images > 1 else []


def _remarks(image: ImageFile.ImageFile) -> list[str]:
    remarks = []
    if _is_turned(image):
        remarks.append("turned as its EXIF says")
    if image.mode.endswith("A") or "transparency" in image.info:
        remarks.append("alpha dropped")
    if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
        remarks.append("grey repeated into R, G and B")
    return remarks
