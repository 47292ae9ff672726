"""ENVI files and TIFF cubes: rasters whose header says what the values mean. Only cube_files uses
this room.

    values, facts = read_envi(Path("leaf.bil.hdr"))      # (H, W, bands) float32, NaN: no data
    write_tiff(Path("leaf.tif"), cube, [400.0, 410.0])   # (bands, H, W)"""

import gzip
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from einops import rearrange

from common_utils_v32 import UserError
from file_claims import check_claim, read_packed

# ENVI's `data type`. 6 and 9 are complex; 7, 8, 10 and 11 do not exist.
ENVI_TYPES = {1: "u1", 2: "i2", 3: "i4", 4: "f4", 5: "f8", 12: "u2", 13: "u4", 14: "i8", 15: "u8"}
INTERLEAVES = {"bsq": "(c h w) -> h w c", "bil": "(h c w) -> h w c", "bip": "(h w c) -> h w c"}
# Suffixes of ENVI's data, in the order in which the spectral package looks for them.
ENVI_SUFFIXES = ("", ".img", ".dat", ".sli", ".hyspex", ".raw", ".bin", ".bsq", ".bil", ".bip")
NM_PER_UNIT = {"nm": 1.0, "nanometer": 1.0, "nanom": 1.0, "angstrom": 0.1, "å": 0.1, "um": 1e3}
# A byte that is no UTF-8 was the µ of Latin-1.
NM_PER_UNIT |= dict.fromkeys(("micrometer", "microm", "micron", "µm", "μm", "\ufffdm"), 1e3)
# Units of which a wavelength is a constant over the value: 1/cm, and frequencies.
NM_TIMES_UNIT = {"wavenumber": 1e7, "cm-1": 1e7, "cm^-1": 1e7, "1/cm": 1e7, "ghz": 299792458.0}
NM_TIMES_UNIT |= {"mhz": 299792458e3, "thz": 299792.458}
NO_UNIT = ("", "unknown", "index")
GDAL_METADATA, GDAL_NODATA = 42112, 42113  # TIFF tags


class Facts(NamedTuple):
    """What a file says of its values, beside the values."""

    centres: Any = None  # of every stored band, in `unit`
    unit: str = ""
    bad: tuple[int, ...] = ()  # stored bands, from 0, that are marked bad
    no_data: float | None = None  # the stored value that means none
    factor: float = 1.0  # that the values were divided by already
    remarks: tuple[str, ...] = ()


def nanometres(facts: Facts, path: Path) -> list[float] | None:
    """Centres of all stored bands in nm, None where the numbers are no wavelengths. Without a unit
    0.2 to 20 is micrometres and 200 to 3000 is nm; what is beyond could be Angstroms or
    wavenumbers, and is refused."""
    values = np.asarray([] if facts.centres is None else facts.centres, np.float64).ravel()
    if not values.size or not np.isfinite(values).all() or values.min() <= 0:
        return None
    if values.size == 1 and not 200 <= values[0] <= 3000:  # a count of bands
        return None
    if (values == np.arange(1, len(values) + 1)).all():  # numbers of bands
        return None
    unit = facts.unit.strip().lower().replace("metre", "meter").removesuffix("s")
    nm = values
    if unit in NM_TIMES_UNIT:
        nm = NM_TIMES_UNIT[unit] / values
    elif values.max() < 20 and unit in ("nm", "nanometer", *NO_UNIT):
        nm = values * 1000
    elif unit in NM_PER_UNIT:
        nm = values * NM_PER_UNIT[unit]
    if unit in NO_UNIT and nm.min() < 200:
        return None
    known = unit in (*NO_UNIT, *NM_PER_UNIT, *NM_TIMES_UNIT)
    highest = 3000 if unit in NO_UNIT and nm is values else 1e5
    if not known or nm.min() < 100 or nm.max() > highest:
        raise UserError(
            f"{path}: wavelengths {values.min():g} to {values.max():g} in {facts.unit or 'no unit'}"
            "; give them in nm as dataset_setup.py --wavelengths"
        )
    return nm.tolist()


def envi_header(path: Path) -> dict[str, str]:
    """The fields of an ENVI header by their names in small letters; lists without their braces."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    text = re.sub(r"\r\n?", "\n", text).lstrip("\ufeff \n")
    if not text.upper().startswith("ENVI"):
        raise UserError(f"{path}: not an ENVI header, its first line is not ENVI; convert the file")
    text = re.sub(r"^[ \t]*;.*", "", text, flags=re.MULTILINE)  # comments, in lists too
    found = re.findall(r"^[ \t]*([^=\n]+?)[ \t]*=(\s*\{[^}]*\}|[^\n]*)", text, re.MULTILINE)
    return {" ".join(name.lower().split()): value.strip("{} \t\r\n") for name, value in found}


def _numbers(fields: dict[str, str], name: str, path: Path, count: int = 0) -> list[float]:
    """A field that is a list of numbers, `count` of them unless 0; empty where it is missing."""
    try:
        values = [float(word) for word in re.split(r"[,\s]+", fields.get(name, "")) if word]
    except ValueError:
        raise UserError(f"{path}: {name} is not of numbers alone; mend the header") from None
    if count and values and len(values) != count:
        raise UserError(f"{path}: {len(values)} values of {name}, not {count}; mend the header")
    return values


def _whole(fields: dict[str, str], name: str, path: Path, default: int | None = None) -> int:
    if name not in fields and default is not None:
        return default
    values = _numbers(fields, name, path, 1)
    if not values:
        raise UserError(f"{path}: no line `{name} =` in the header; add it")
    if values[0] < 0 or not values[0].is_integer():
        raise UserError(f"{path}: {name} = {fields[name]}; write a whole number, 0 or above")
    return int(values[0])


def _named_centres(names: Iterable[str]) -> tuple[list[float], str]:
    """Band centres in names such as "Band 3 (450.5 nm)", and their unit; none unless in each."""
    found = [re.search(r"(\d+\.?\d*) *(nm|nanom|[uµμ]m|microm)", name, re.I) for name in names]
    words = [word for word in found if word]
    if not words or len(words) < len(found):
        return [], ""
    return [float(word[1]) for word in words], words[0][2]


def envi_data_file(path: Path) -> Path:
    """The data of an ENVI header: named as it without .hdr, or with a usual suffix; gzip too."""
    own = "." + envi_header(path).get("interleave", "").lower()
    for suffix in (*ENVI_SUFFIXES[:-3], own, *ENVI_SUFFIXES[-3:]):
        packed = suffix + ".gz"
        for ending in (suffix, suffix.upper(), packed, packed.upper()):
            file = path.with_name(path.stem + ending)
            if file.is_file():
                return file
    raise UserError(
        f"{path}: no data file beside it; name it {path.stem}, or that with one of "
        f"{' '.join(ENVI_SUFFIXES[1:])}"
    )


def _envi_type(fields: dict[str, str], path: Path) -> np.dtype:
    number, order = _whole(fields, "data type", path), _whole(fields, "byte order", path, 0)
    if number not in ENVI_TYPES:
        kind = "complex" if number in (6, 9) else "not one of ENVI's"
        raise UserError(f"{path}: data type {number} is {kind}; save the cube as real numbers")
    if order not in (0, 1):
        raise UserError(f"{path}: byte order = {order}; write 0 (little-endian) or 1 (big-endian)")
    return np.dtype(ENVI_TYPES[number]).newbyteorder(">" if order else "<")


def envi_facts(path: Path) -> Facts:
    """What an ENVI header says of the values."""
    fields = envi_header(path)
    file_type = fields.get("file type", "")
    if re.search("library|classification", file_type, re.IGNORECASE):
        raise UserError(f"{path}: {file_type}, not an image of bands; leave it out")
    bands = _whole(fields, "bands", path)
    remarks = []
    if "byte order" not in fields and _envi_type(fields, path).itemsize > 1:
        remarks.append("its header has no byte order; read as little-endian")
    marks = _numbers(fields, "bbl", path, bands)
    bad = tuple(band for band, good in enumerate(marks) if not good)
    if len(bad) == bands:
        raise UserError(f"{path}: its header marks every band bad; mend or remove its bbl")
    if bad:
        listed = ", ".join(str(band + 1) for band in bad)
        remarks.append(f"{len(bad)} of {bands} bands are marked bad (bbl), dropped: {listed}")
    factor = _numbers(fields, "reflectance scale factor", path, 1) or [1.0]
    if not factor[0] > 0:
        raise UserError(f"{path}: reflectance scale factor = {factor[0]:g}; mend the header")
    no_data = _numbers(fields, "data ignore value", path, 1)
    centres, unit = _numbers(fields, "wavelength", path, bands), fields.get("wavelength units", "")
    if not centres:
        centres, unit = _named_centres(fields.get("band names", "").split(","))
    mark = no_data[0] if no_data else None
    return Facts(centres, unit, bad, mark, factor[0], tuple(remarks))


def read_envi(path: Path) -> tuple[np.ndarray, Facts]:
    """All stored bands as (H, W, bands) float32, divided by the header's reflectance scale factor,
    or its gains applied; NaN where a value means no data."""
    fields, facts = envi_header(path), envi_facts(path)
    interleave = fields.get("interleave", "").lower()
    if interleave not in INTERLEAVES:
        raise UserError(f"{path}: interleave = {interleave}; write bsq, bil or bip there")
    frames = _numbers(fields, "major frame offsets", path)
    if any(frames + _numbers(fields, "minor frame offsets", path)):
        raise UserError(f"{path}: frame offsets are not read; save the cube without them")
    height, width, bands = (_whole(fields, name, path) for name in ("lines", "samples", "bands"))
    kind, start = _envi_type(fields, path), _whole(fields, "header offset", path, 0)
    content = _envi_bytes(path, _whole(fields, "file compression", path, 0) > 0)
    end = start + height * width * bands * kind.itemsize
    if not start < end <= len(content):
        raise UserError(
            f"{envi_data_file(path)}: holds {len(content)} bytes, {path.name} speaks of {end}; "
            "mend the header or copy the file anew"
        )
    if len(content) > end:
        remark = f"{len(content) - end} bytes more than its header says are left out"
        facts = facts._replace(remarks=(*facts.remarks, remark))
    stored = content[start:end].view(kind)
    stored = rearrange(stored, INTERLEAVES[interleave], h=height, w=width, c=bands)
    values = to_values(stored, facts)
    gains = _numbers(fields, "data gain values", path, bands) or [1.0]
    offsets = _numbers(fields, "data offset values", path, bands) or [0.0]
    if set(gains) != {1} or set(offsets) != {0}:
        if facts.factor != 1:
            raise UserError(f"{path}: both a scale factor and gains; remove what was applied")
        values = values * np.array(gains, np.float32) + np.array(offsets, np.float32)
        facts = facts._replace(remarks=(*facts.remarks, "its gains and offsets are applied"))
    return values, facts


def _envi_bytes(path: Path, compressed: bool) -> Any:
    """The data of a header, mapped or unpacked."""
    file = envi_data_file(path)
    if not file.stat().st_size:
        return np.empty(0, np.uint8)
    if not compressed and file.suffix.lower() != ".gz":
        return np.memmap(file, np.uint8, "r")
    try:
        with gzip.open(file) as unpacked:
            return np.frombuffer(read_packed(file, unpacked), np.uint8)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{file}: not whole gzip data ({error}); copy it anew, or mend file compression in "
            f"{path.name}"
        ) from None


def to_values(stored: np.ndarray, facts: Facts) -> np.ndarray:
    """float32, divided by the factor, NaN for what means no data."""
    with np.errstate(over="ignore"):  # infinite values are told of later
        values = np.array(stored, np.float32, order="C")
    if facts.no_data is not None:
        values[stored == facts.no_data] = np.nan
    values /= np.float32(facts.factor)
    return values


def read_tiff(path: Path) -> tuple[np.ndarray, str | None, Facts]:
    """The biggest array of a TIFF as float32, divided by GDAL's factor, NaN where GDAL_NODATA
    stands; its order of h, w and c, None where the writer did not say; what GDAL's tags say."""
    facts = tiff_facts(path)
    with _open_tiff(path) as file:
        series = max(file.series, key=lambda series: series.size)
        check_claim(path, series.nbytes, path.stat().st_size)
        stored = series.asarray()
        # Thumbnails; but a page of another size than the others would be one too.
        others = [image for image in file.series if not image.keyframe.is_reduced]
    if len(others) > 1:
        remark = f"images left out, as smaller than the cube: {len(others) - 1}"
        facts = facts._replace(remarks=(*facts.remarks, remark))
    axes = "".join({"Y": "h", "X": "w"}.get(letter, "c") for letter in series.axes)
    if axes == "hw" and len(facts.centres or []) == 1:
        stored, axes = stored[None], "chw"
    if stored.dtype.kind not in "iuf" or sorted(axes) != ["c", "h", "w"]:
        raise UserError(
            f"{path}: {stored.dtype} of axes {series.axes}; give real numbers, a page or a sample "
            "a band"
        )
    return to_values(stored, facts), None if "Q" in series.axes else axes, facts


@contextmanager
def _open_tiff(path: Path) -> Iterator[Any]:
    """tifffile's reader. What it has to say is not printed, but a page that it cannot find, and
    would leave out, is an error."""
    import tifffile

    lost: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if re.search("invalid page offset|invalid offset to|tag list of page", message):
            lost.append(message)
        return False

    logger = logging.getLogger("tifffile")
    logger.addFilter(note)
    try:
        with tifffile.TiffFile(path) as file:
            len(file.pages)  # all are looked for
            if lost:
                raise UserError(f"{path}: is cut, pages are missing; copy it anew")
            yield file
    finally:
        logger.removeFilter(note)


def _tag_number(text: str, name: str, path: Path) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{path}: its {name} is {text}, not a number; mend its metadata") from None


def tiff_facts(path: Path) -> Facts:
    """What GDAL's tags say of the values, or else what the pages' descriptions say."""
    named: dict[str, dict[int, str]] = {}
    with _open_tiff(path) as file:
        tags, samples = file.pages.first.tags, file.pages.first.samplesperpixel
        no_data = tags[GDAL_NODATA].value.strip("\0 ") if GDAL_NODATA in tags else ""
        metadata = tags[GDAL_METADATA].value if GDAL_METADATA in tags else "<none/>"
        texts = {page.index: getattr(page, "description", "") for page in file.pages}
    for item in ElementTree.fromstring(metadata).iter("Item"):
        if "sample" in item.attrib:
            name = item.get("role") or item.get("name") or ""
            named.setdefault(name.lower(), {})[int(item.attrib["sample"])] = item.text or ""
    scales, offsets = (named.get(name, {}) for name in ("scale", "offset"))
    several = len(set(scales.values())) > 1 or 0 < len(scales) < samples
    if several or any(_tag_number(text, "offset", path) for text in offsets.values()):
        raise UserError(f"{path}: bands of several scales, or offsets; apply them first")
    scale = _tag_number(next(iter(scales.values()), "1"), "scale", path)
    if not 0 < scale < np.inf:
        raise UserError(f"{path}: a scale of {scale:g}; mend its metadata")
    mark = _tag_number(no_data, "no-data value", path) if no_data else None
    facts = Facts(no_data=mark, factor=1 / scale)
    for name, unit in (("central_wavelength_um", "um"), ("wavelength", "")):
        if len(named.get(name, {})) > 1:
            centres = [float(text) for _, text in sorted(named[name].items())]
            stated = named.get("wavelength_units", {}).get(0, "")
            return facts._replace(centres=centres, unit=unit or stated)
    names = named.get("description", texts)
    centres, unit = _named_centres(text for _, text in sorted(names.items()))
    return facts._replace(centres=centres, unit=unit)


def write_tiff(file: Path, cube: np.ndarray, wavelengths: list[float]) -> None:
    """(bands, H, W) as one TIFF of that many samples, in planes, with GDAL's names of bands."""
    import tifffile

    names = [
        f'<Item name="DESCRIPTION" sample="{band}" role="description">{nm:g} nm</Item>'
        for band, nm in enumerate(wavelengths)
    ]
    metadata = f"<GDALMetadata>{''.join(names)}</GDALMetadata>"
    several = len(cube) > 1
    tifffile.imwrite(
        file,
        cube if several else cube[0],
        photometric="minisblack",
        planarconfig="separate" if several else None,
        metadata=None,
        extratags=[(GDAL_METADATA, "s", 0, metadata, True)],
    )
