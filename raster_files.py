"""ENVI files and TIFF cubes: rasters whose header says what the values mean. Only cube_files uses
this room.

    values, facts = read_envi(Path("leaf.bil.hdr"))      # (H, W, bands) float32, NaN: no data
    write_tiff(Path("leaf.tif"), cube, [400.0, 410.0])   # (bands, H, W)
"""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from einops import rearrange

from common_utils_v32 import UserError

# ENVI's `data type`. 6 and 9 are complex; 7, 8, 10 and 11 do not exist.
ENVI_TYPES = {1: "u1", 2: "i2", 3: "i4", 4: "f4", 5: "f8", 12: "u2", 13: "u4", 14: "i8", 15: "u8"}
INTERLEAVES = {
    "bsq": "(c h w) -> h w c",
    "bil": "(h c w) -> h w c",
    "bip": "(h w c) -> h w c",
}
# Suffixes of ENVI's data, in the order in which the spectral package looks for them; then comes the
# header's own interleave.
ENVI_SUFFIXES = ("", ".img", ".dat", ".sli", ".hyspex", ".raw", ".bin")
INTERLEAVES_OF_FILES = (".bsq", ".bil", ".bip")
NM_PER_UNIT = {"nanometer": 1.0, "nanom": 1.0, "nm": 1.0, "angstrom": 0.1, "å": 0.1}
NM_PER_UNIT |= dict.fromkeys(("micrometer", "micron", "um", "µm", "μm", "microm"), 1e3)
# Units of which a wavelength is a constant over the value: 1/cm, and frequencies.
NM_TIMES_UNIT = {"wavenumber": 1e7, "cm-1": 1e7, "1/cm": 1e7}
NM_TIMES_UNIT |= {"ghz": 299792458.0, "mhz": 299792458e3, "thz": 299792.458}
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
    if values.size < 2 or not np.isfinite(values).all() or values.min() <= 0:
        return None
    unit = facts.unit.strip().lower().replace("metre", "meter").removesuffix("s")
    if unit in NM_TIMES_UNIT:
        values = NM_TIMES_UNIT[unit] / values
    elif values.max() < 20 and unit in ("nm", "nanometer", *NO_UNIT):
        if (values == values.round()).all():  # numbers of bands
            return None
        values = values * 1000
    elif unit in NM_PER_UNIT:
        values = values * NM_PER_UNIT[unit]
    elif unit not in NO_UNIT:
        raise UserError(f"{path}: wavelengths in {facts.unit}; give them in nm as --wavelengths")
    elif values.min() > 200 and values.max() > 3000:
        raise UserError(
            f"{path}: wavelengths {values[0]:g}..{values[-1]:g} without a unit; "
            "give them in nm as --wavelengths"
        )
    if unit not in NO_UNIT and (values.min() < 100 or values.max() > 1e5):
        raise UserError(
            f"{path}: wavelengths {values[0]:g}..{values[-1]:g} nm, read as {facts.unit}, cannot "
            "be; give them in nm as --wavelengths"
        )
    return values.tolist() if values.min() > 100 else None


# --- ENVI


def envi_header(path: Path) -> dict[str, str]:
    """The fields of an ENVI header by their names in small letters; lists without their braces."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    if not text.lstrip("\ufeff").startswith("ENVI"):
        raise UserError(f"{path}: not an ENVI header, its first line is not ENVI; convert the file")
    found = re.findall(r"^[ \t]*([^;=\n]+?)[ \t]*=[ \t]*(\{[^}]*\}|[^\n]*)", text, re.MULTILINE)
    return {" ".join(name.lower().split()): value.strip("{} \t\r\n") for name, value in found}


def _whole(fields: dict[str, str], name: str, path: Path, default: int | None = None) -> int:
    """A field that is a whole number."""
    if name not in fields and default is not None:
        return default
    try:
        return int(fields[name])
    except KeyError:
        raise UserError(f"{path}: no line `{name} =` in the header; add it") from None
    except ValueError:
        raise UserError(
            f"{path}: {name} = {fields[name]} is no whole number; mend the header"
        ) from None


def _numbers(fields: dict[str, str], name: str, path: Path, count: int = 0) -> list[float]:
    """A field that is a list of numbers, `count` of them unless 0; empty where it is missing."""
    words = [word for word in re.split(r"[,\s]+", fields.get(name, "")) if word]
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise UserError(f"{path}: {name} holds more than numbers; mend the header") from None
    if count and values and len(values) != count:
        raise UserError(f"{path}: {len(values)} values of {name}, not {count}; mend the header")
    return values


def envi_data_file(path: Path) -> Path:
    """The data of an ENVI header: the file of its name without .hdr, else with a usual suffix, else
    the only file of its name that is as long as the header says. gzip may be around it."""
    stem, fields = path.with_suffix(""), envi_header(path)
    own = "." + fields.get("interleave", "").lower()
    for suffix in (*ENVI_SUFFIXES, own, *INTERLEAVES_OF_FILES):
        for ending in (suffix, suffix.upper(), suffix + ".gz"):
            if Path(f"{stem}{ending}").is_file():
                return Path(f"{stem}{ending}")
    kind = np.dtype(ENVI_TYPES.get(_whole(fields, "data type", path), "u1"))
    size = _whole(fields, "header offset", path, 0) + kind.itemsize * int(
        np.prod([_whole(fields, name, path) for name in ("lines", "samples", "bands")])
    )
    others = path.parent.glob("*")
    found = [other for other in others if other.stem == stem.name and other.is_file()]
    found = [other for other in found if other != path and other.stat().st_size == size]
    if len(found) != 1:
        raise UserError(
            f"{path}: no data file beside it; name it {stem.name}, or {stem.name} and one of "
            f"{' '.join((*ENVI_SUFFIXES[1:], *INTERLEAVES_OF_FILES))}"
        )
    return found[0]


def is_envi_data(name: Path) -> bool:
    """Whether a name is that of ENVI data by its suffix, as in leaf.bil.hdr."""
    return name.suffix.lower() in (*ENVI_SUFFIXES[1:], *INTERLEAVES_OF_FILES)


def _envi_type(fields: dict[str, str], path: Path) -> np.dtype:
    number = _whole(fields, "data type", path)
    if number not in ENVI_TYPES:
        kind = "complex" if number in (6, 9) else "not one of ENVI's"
        raise UserError(f"{path}: data type {number} is {kind}; save the cube as real numbers")
    order = _whole(fields, "byte order", path, 0)
    if order not in (0, 1):
        raise UserError(f"{path}: byte order = {order}; write 0 (little-endian) or 1 (big-endian)")
    return np.dtype(ENVI_TYPES[number]).newbyteorder(">" if order else "<")


def envi_facts(path: Path) -> Facts:
    """What an ENVI header says of the values."""
    fields = envi_header(path)
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
    return Facts(
        centres=_numbers(fields, "wavelength", path, bands) or None,
        unit=fields.get("wavelength units", ""),
        bad=bad,
        no_data=next(iter(_numbers(fields, "data ignore value", path, 1)), None),
        factor=factor[0],
        remarks=tuple(remarks),
    )


def read_envi(path: Path) -> tuple[np.ndarray, Facts]:
    """All stored bands as (H, W, bands) float32, divided by the header's reflectance scale factor,
    its gains applied; NaN where a value means no data."""
    fields, facts = envi_header(path), envi_facts(path)
    if "spectral library" in fields.get("file type", "").lower():
        raise UserError(f"{path}: a spectral library, not an image; leave it out")
    for name in ("major frame offsets", "minor frame offsets"):
        if any(_numbers(fields, name, path)):
            raise UserError(f"{path}: {name} are not read; save the cube without them")
    interleave = fields.get("interleave", "").lower()
    if interleave not in INTERLEAVES:
        raise UserError(f"{path}: interleave = {interleave}; write bsq, bil or bip there")
    height, width, bands = (_whole(fields, name, path) for name in ("lines", "samples", "bands"))
    kind, offset = _envi_type(fields, path), _whole(fields, "header offset", path, 0)
    file = envi_data_file(path)
    content: Any
    if file.suffix == ".gz" or _whole(fields, "file compression", path, 0):
        with gzip.open(file) as unpacked:
            content = np.frombuffer(unpacked.read(), np.uint8)
    else:
        content = np.memmap(file, np.uint8, "r")
    size = height * width * bands * kind.itemsize
    if size <= 0 or len(content) < offset + size:
        raise UserError(
            f"{file}: holds {len(content)} bytes, {path.name} speaks of {offset + size} "
            f"({height} x {width} x {bands} of {kind.itemsize} bytes after {offset}); "
            "mend the header or copy the file anew"
        )
    if len(content) > offset + size:
        extra = f"{len(content) - offset - size} bytes more than its header says are left out"
        facts = facts._replace(remarks=(*facts.remarks, extra))
    stored = content[offset : offset + size].view(kind)
    stored = rearrange(stored, INTERLEAVES[interleave], h=height, w=width, c=bands)
    gains = _numbers(fields, "data gain values", path, bands)
    offsets = _numbers(fields, "data offset values", path, bands)
    return _to_numbers(stored, facts, gains, offsets, path)


def _to_numbers(
    stored: np.ndarray, facts: Facts, gains: list[float], offsets: list[float], path: Path
) -> tuple[np.ndarray, Facts]:
    """Stored values (H, W, bands) as float32: NaN for no data, gain and offset of each band
    applied, divided by the factor."""
    if stored.dtype.kind not in "iuf":
        raise UserError(f"{path}: holds {stored.dtype}, not real numbers")
    values = np.array(stored, np.float32, order="C")
    if facts.no_data is not None:
        values[stored == facts.no_data] = np.nan
    if any(gain != 1 for gain in gains) or any(offsets):
        if facts.factor != 1:
            raise UserError(
                f"{path}: both a scale factor and gains; remove the one that was applied"
            )
        values *= np.asarray(gains or 1, np.float32)
        values += np.asarray(offsets or 0, np.float32)
        facts = facts._replace(remarks=(*facts.remarks, "its gains and offsets are applied"))
    if facts.factor != 1:
        values /= np.float32(facts.factor)
    return values, facts


# --- TIFF


def tiff_axes(path: Path) -> tuple[tuple[int, ...], str | None]:
    """Shape of a TIFF's biggest array, and its order of h, w and c; None where the writer did not
    say: arrays that tifffile was given without a word."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        series = _main_series(file)
        if "Q" in series.axes:
            return series.shape, None
        axes = "".join({"Y": "h", "X": "w"}.get(letter, "c") for letter in series.axes)
        if sorted(axes) != ["c", "h", "w"]:
            raise UserError(
                f"{path}: its axes are {series.axes} of {series.shape}; give one picture a band, "
                "or one with a sample a band"
            )
        return series.shape, axes


def _main_series(file: Any) -> Any:
    return max(file.series, key=lambda series: series.size)  # the others are thumbnails


def read_tiff(path: Path, axes: str) -> tuple[np.ndarray, Facts]:
    """A TIFF whose array has these axes as (H, W, bands) float32, values as stored but for scale
    and offset that GDAL's metadata state; NaN where GDAL_NODATA stands."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        stored = rearrange(_main_series(file).asarray(), f"{' '.join(axes)} -> h w c")
        named = _named_items(file)
    gains, offsets = (
        [float(named[name].get(band, default)) for band in range(stored.shape[2])]
        if name in named
        else []
        for name, default in (("scale", 1), ("offset", 0))
    )
    return _to_numbers(stored, tiff_facts(path), gains, offsets, path)


def _named_items(file: Any) -> dict[str, dict[int, str]]:
    """What GDAL's metadata, or else the pages' descriptions, say of each band, by name."""
    series = _main_series(file)
    tags = series.keyframe.tags
    if GDAL_METADATA not in tags:
        texts = [getattr(page, "description", "") for page in file.pages]
        return {"description": dict(enumerate(texts))}
    named: dict[str, dict[int, str]] = {}
    for item in ElementTree.fromstring(tags[GDAL_METADATA].value).iter("Item"):
        name = item.get("role") or item.get("name") or ""
        if "sample" in item.attrib:
            named.setdefault(name.lower(), {})[int(item.attrib["sample"])] = item.text or ""
    return named


def tiff_facts(path: Path) -> Facts:
    """What GDAL's tags say of the values."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        named, tags = _named_items(file), _main_series(file).keyframe.tags
        no_data = tags[GDAL_NODATA].value.strip("\0 ") if GDAL_NODATA in tags else ""
    facts = Facts(no_data=float(no_data) if no_data else None)
    for name in ("central_wavelength_um", "wavelength", "description"):
        texts = [text for _, text in sorted(named.get(name, {}).items())]
        if name == "description":  # "Band 3 (450.5 nm)"; other numbers in it say nothing
            found = [
                re.search(r"(\d+\.?\d*)\s*(nm|nanom|[uµμ]m|microm)", text, re.I) for text in texts
            ]
        else:
            found = [re.fullmatch(r"\s*(\d+\.?\d*)()\s*", text) for text in texts]
        words = [match.groups() for match in found if match]
        if len(words) > 1 and len(words) == len(texts):
            stated = words[0][1] or named.get("wavelength_units", {}).get(0, "")
            unit = "um" if name == "central_wavelength_um" else stated
            return facts._replace(centres=[float(number) for number, _ in words], unit=unit)
    return facts


def write_tiff(file: Path, cube: np.ndarray, wavelengths: list[float]) -> None:
    """(bands, H, W) as one TIFF of that many samples, in planes, with GDAL's names of bands."""
    import tifffile

    items = []
    for band, nm in enumerate(wavelengths):
        items += [
            f'<Item name="DESCRIPTION" sample="{band}" role="description">{nm:g} nm</Item>',
            f'<Item name="wavelength" sample="{band}">{nm:g}</Item>',
            f'<Item name="wavelength_units" sample="{band}">Nanometers</Item>',
        ]
    metadata = f"<GDALMetadata>{''.join(items)}</GDALMetadata>"
    tifffile.imwrite(
        file,
        cube,
        photometric="minisblack",
        planarconfig="separate",
        metadata=None,
        extratags=[(GDAL_METADATA, "s", 0, metadata, True)],
    )
