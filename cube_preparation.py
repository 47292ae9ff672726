"""From what a file stores to what a model learns from: the bands chosen, counts made reflectance,
no data filled, values a little outside [0, 1] clipped; and what of that was done, for the record.

    bands = plan_bands(path, every_wavelength, "450-650nm", bad=())
    cube, record, facts = prepare_cube(path, settings, rgb.shape)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common_utils_v32 import UserError
from cube_files import (
    FIELD_BANDS,
    Facts,
    check_wavelengths,
    may_be_clipped,
    outside,
    read_stored,
    reading,
    stored_wavelengths,
)

# A band or a range of them: 7, 3-12, 450-650nm, 449.5..701.2
BAND_RANGE = re.compile(r"(\d+\.?\d*)(?:nm)?(?:(?:-|:|\.\.)(\d+\.?\d*))?(nm)?")


def given_wavelengths(words: Sequence[str], bands: int) -> list[float]:
    """Centres in nm by --wavelengths: first and last, one a band, or a text file of either."""
    text = " ".join(words)
    if len(words) == 1 and not re.fullmatch(r"[\d.]+", text):
        with reading(Path(text), "a list of wavelengths"):
            lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
            text = " ".join(line.partition("#")[0] for line in lines)
    try:
        values = [float(word) for word in re.split(r"[,;\s]+", text) if word]
    except ValueError:
        raise UserError(f"--wavelengths {' '.join(words)}: give numbers in nm alone") from None
    if values and (min(values) < 100 or max(values) > 1e5):
        raise UserError(f"--wavelengths from {min(values):g} to {max(values):g}: give them in nm")
    if len(values) == 2:
        return np.linspace(values[0], values[1], bands).tolist()
    if len(values) != bands:
        raise UserError(
            f"--wavelengths: {len(values)} numbers for {bands} bands; give first and last, or one "
            "a band"
        )
    return values


def find_wavelengths(path: Path, bands: int, given: Sequence[str] | None) -> list[float]:
    """Centres of all stored bands in nm: as given, as the file says, or aloud the field's."""
    if given:
        return given_wavelengths(given, bands)
    nm = stored_wavelengths(path)
    if nm is None and bands == len(FIELD_BANDS):
        print(
            f"{path}: does not say its wavelengths; taken as 400..700 nm, or give --wavelengths",
            flush=True,
        )
        return FIELD_BANDS
    if nm is None or len(nm) != bands:
        raise UserError(
            f"{path}: {bands} bands of unknown wavelengths; give --wavelengths, first and last, or "
            "one a band, in nm"
        )
    return nm


def plan_bands(
    path: Path, nm: Sequence[float], choice: str | None, bad: Sequence[int]
) -> list[int]:
    """Which stored bands to keep, from 0: those not bad of a choice such as `1-12,20` (numbers from
    1) or `450-650nm`. What is no number of a band, or has a point, is nm."""
    centres = np.asarray(nm)
    kept = np.full(len(nm), choice is None)
    for word in re.split(r"[,\s]+", choice or ""):
        found = BAND_RANGE.fullmatch(word.lower())
        if found is None:
            if word:
                raise UserError(f"--bands {word}: give numbers or nm, such as 1-12,20 or 450-650nm")
            continue
        low, high = sorted((float(found[1]), float(found[2] or found[1])))
        if "nm" in word or "." in found[1] or high > len(nm):
            chosen = (centres >= low) & (centres <= high)
            if found[2] is None:
                chosen = np.arange(len(nm)) == np.abs(centres - low).argmin()
        else:
            chosen = (np.arange(len(nm)) + 1 >= low) & (np.arange(len(nm)) + 1 <= high)
        kept |= chosen
    kept[list(bad)] = False
    if not kept.any():
        raise UserError(
            f"{path}: --bands {choice} leaves none of {len(nm)} bands, "
            f"{centres.min():g}..{centres.max():g} nm; choose among those"
        )
    return np.flatnonzero(kept).tolist()


def prepare_cube(
    path: Path, settings: dict[str, Any], rgb_shape: tuple[int, ...] | None
) -> tuple[np.ndarray, dict[str, Any], Facts]:
    """A cube (H, W, bands) float32 as the settings ask for, not judged; what was done to it, for
    its record; and what its file says."""
    centres = settings["stored_wavelengths"]
    how = {"key": settings["cube_key"], "axes": settings["axes"]}
    cube, facts = read_stored(path, bands=len(centres), rgb_shape=rgb_shape, **how)
    own = _own_wavelengths(path, settings)
    kept = plan_bands(path, own or centres, settings["chosen_bands"], facts.bad)
    check_wavelengths([(own or centres)[band] for band in kept], settings["wavelengths"], path)
    if facts.factor != 1:
        for flag in ("scale", "white"):
            if settings[flag] not in (None, 1):
                raise UserError(
                    f"{path}: its header's scale factor {facts.factor:g} is applied already; leave "
                    f"--{flag} out"
                )
    if settings["no_data"] is not None:
        facts = facts._replace(no_data=settings["no_data"])
        cube = np.where(cube == np.float32(settings["no_data"] / facts.factor), np.nan, cube)
    if settings["white"]:
        cube = _calibrate(cube, settings)
    cube = cube[..., kept] / np.float32(settings["scale"])
    record: dict[str, Any] = {"remarks": list(facts.remarks)}
    missing = ~np.isfinite(cube)
    if settings["fill"] is not None and missing.any():
        pixels = missing.any(axis=2)
        record["filled"] = {"pixels": pixels.sum(), "share": pixels.mean()}
        cube[missing] = settings["fill"]
    share, excess = outside(cube)
    if settings["clip"] and share > 0 and may_be_clipped(cube):
        record["clipped"] = {"share": share, "largest_excess": excess}
        cube = cube.clip(0, 1)
    return cube, record, facts


def _own_wavelengths(path: Path, settings: dict[str, Any]) -> list[float] | None:
    """What the file says of its bands; what it says in no known unit is passed over where
    --wavelengths is given."""
    try:
        return stored_wavelengths(path)
    except UserError:
        if not settings["given_wavelengths"]:
            raise
    return None


def _calibrate(cube: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """Reflectance of counts: (counts - dark) / (white - dark), by column and band."""
    white = _reference("--white", settings["white"], cube.shape)
    dark = _reference("--dark", settings["dark"], cube.shape) if settings["dark"] else white * 0
    span = white - dark
    if np.mean(span > 0) < 0.5:
        raise UserError(
            f"--white {settings['white']}: not brighter than --dark {settings['dark']}; give each "
            "its file"
        )
    return (cube - dark) / np.where(span > 0, span, np.nan)


def _reference(flag: str, file: str, shape: tuple[int, ...]) -> np.ndarray:
    """A reference averaged over its lines, (columns or 1, bands) float32. Arrays may be averaged
    already: (columns, bands) or (bands,)."""
    path = Path(file)
    values = None
    if path.suffix.lower() == ".npy":
        with reading(path, "a reference"):
            values = np.load(path, allow_pickle=False)
    if values is None or values.ndim == 3:
        stored, _ = read_stored(path, bands=shape[2])
        values = np.nanmean(stored, axis=0, dtype=np.float64)
    values = np.atleast_2d(values).astype(np.float32)
    if values.shape not in ((shape[1], shape[2]), (1, shape[2])):
        raise UserError(
            f"{flag} {file}: {values.shape[0]} columns of {values.shape[1]} bands, the cubes have "
            f"{shape[1]} of {shape[2]}; give the reference of this camera and binning"
        )
    return values


def remark_lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    """What was done to the scenes of these records, one line for each thing."""
    scenes: dict[str, list[str]] = {}
    for entry in entries:
        for remark in entry.get("remarks", ()):
            scenes.setdefault(remark, []).append(entry["name"])
    lines = []
    for remark, names in scenes.items():
        others = f" and {len(names) - 1} others" if len(names) > 1 else ""
        lines.append(f"{names[0]}{others}: {remark}")
    filled = [entry["filled"] for entry in entries if "filled" in entry]
    if filled:
        pixels = sum(record["pixels"] for record in filled)
        lines.append(f"--fill took in {pixels} pixels of no data, in {len(filled)} scenes")
    clipped = [entry["clipped"] for entry in entries if "clipped" in entry]
    if clipped:
        share = max(record["share"] for record in clipped)
        excess = max(record["largest_excess"] for record in clipped)
        lines.append(
            f"--clip changed values of {len(clipped)} scenes, {share:.3%} of one at most, by "
            f"{excess:.4g} at most"
        )
    return lines
