"""From what a file stores to what a model learns from: the bands chosen, counts made reflectance,
no data filled, values a little outside [0, 1] clipped; and what of that was done, for the record.

    kept = plan_bands(wavelengths, ["450-650nm"], bad=())
    cube, record, facts = prepare_cube(path, settings, rgb.shape)
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cube_files
import terminal
from common_utils_v32 import UserError
from cube_files import FIELD_BANDS, Facts, outside, reading

MOST_DISTANCE = 20.0  # nm, from a wavelength to its band
# A band or a range of them: 7, 3-12, 450-650nm, 449.5..701.2
BAND_RANGE = re.compile(r"(\d+\.?\d*)(?:nm)?(?:(?:-|:|\.\.)(\d+\.?\d*))?(nm)?")


def find_wavelengths(path: Path, bands: int, given: Sequence[str] | None) -> list[float]:
    """Centres of all stored bands in nm: as given, as the file says, or aloud the field's."""
    if given:
        return _given_wavelengths(given, bands)
    nm = _stated_wavelengths(path, bands)
    if nm is None and bands == len(FIELD_BANDS):
        terminal.say(
            f"{path}: does not say its wavelengths; taken as 400..700 nm, or give --wavelengths"
        )
        return FIELD_BANDS
    if nm is not None and len(nm) != bands:
        raise UserError(f"{path}: {len(nm)} wavelengths of {bands} bands; mend them")
    if nm is None:
        raise UserError(
            f"{path}: {bands} bands of unknown wavelengths; give --wavelengths, FIRST LAST or one "
            "a band, in nm"
        )
    return nm


def _stated_wavelengths(path: Path, bands: int) -> list[float] | None:
    """What the file says of its bands; one number of many bands is their count."""
    nm = cube_files.read_wavelengths(path, every=True)
    return None if nm is not None and len(nm) == 1 < bands else nm


def _given_wavelengths(words: Sequence[str], bands: int) -> list[float]:
    """Centres in nm by --wavelengths: first and last, one a band, or a text file of either."""
    if len(words) == 1 and not re.fullmatch(r"[\d.,]+", words[0]):
        with reading(Path(words[0]), "a list of wavelengths"):
            words = re.sub("#.*", "", Path(words[0]).read_text(encoding="utf-8-sig")).split()
    text = " ".join(words)
    try:
        values = [float(word) for word in re.split(r"[,;\s]+", text) if word]
    except ValueError:
        raise UserError(f"--wavelengths: {text[:60]}; give numbers in nm alone") from None
    if len(values) not in (2, bands):
        raise UserError(
            f"--wavelengths: {len(values)} numbers for {bands} bands; give FIRST LAST or one a band"
        )
    if min(values) < 100:
        raise UserError(f"--wavelengths: {min(values):g} is among them; give them in nm")
    return values if len(values) == bands else np.linspace(values[0], values[1], bands).tolist()


def plan_bands(nm: Sequence[float], choice: Sequence[str] | None, bad: Sequence[int]) -> list[int]:
    """Which stored bands to keep, from 0: those not bad of a choice such as `1-12,20` (numbers from
    1) or `450-650nm`. What is no band's number, or has a point, is nm: the nearest band's."""
    centres, numbers = np.asarray(nm), np.arange(1, len(nm) + 1)
    kept = np.full(len(nm), choice is None)
    for word in re.split(r"[,\s]+", " ".join(choice or ()).lower()):
        found = BAND_RANGE.fullmatch(word)
        if word and not found:
            raise UserError(f"--bands {word}: give numbers or nm, such as 1-12,20 or 450-650nm")
        if not found:
            continue
        ends = (found[1], found[2] or found[1])
        low, high = sorted(map(float, ends))
        in_nm = "nm" in word or "." in "".join(ends) or high > len(nm)
        of = centres if in_nm else numbers
        chosen = (of >= low) & (of <= high)
        if found[2] is None and of is centres:
            distance = np.abs(centres - low)
            chosen = (distance == distance.min()) & (distance < MOST_DISTANCE)
        if not chosen.any():
            raise UserError(
                f"--bands {word}: none of bands 1 to {len(nm)}, {nm[0]:g}..{nm[-1]:g} nm"
            )
        kept |= chosen
    kept[list(bad)] = False
    if not kept.any():
        raise UserError(f"--bands {' '.join(choice or ())}: only bands that the header marks bad")
    return np.flatnonzero(kept).tolist()


def prepare_cube(
    path: Path, settings: dict[str, Any], rgb_shape: tuple[int, ...] | None
) -> tuple[np.ndarray, dict[str, Any], Facts]:
    """A cube (H, W, bands) float32 as asked for, not judged; its record; what its file says."""
    how = {"key": settings["cube_key"], "axes": settings["axes"], "rgb_shape": rgb_shape}
    cube, facts = cube_files.read_stored(path, bands=len(settings["stored_wavelengths"]), **how)
    nm = _own_wavelengths(path, cube.shape[2], settings) or settings["stored_wavelengths"]
    if len(nm) != cube.shape[2]:
        raise UserError(f"{path}: {len(nm)} wavelengths of {cube.shape[2]} bands; mend them")
    kept = plan_bands(nm, settings["chosen_bands"], facts.bad)
    cube_files.check_wavelengths([nm[band] for band in kept], settings["wavelengths"], path)
    if facts.factor != 1 and (settings["scale"] != 1 or settings["white"]):
        flag = "--white" if settings["white"] else "--scale"
        raise UserError(
            f"{path}: its header's scale factor {facts.factor:g} is applied already; leave {flag} "
            "out"
        )
    if settings["no_data"] is not None:
        facts = facts._replace(no_data=settings["no_data"])
        cube[cube == np.float32(settings["no_data"]) / np.float32(facts.factor)] = np.nan
    if settings["white"]:
        cube = _calibrate(cube, settings)
    if len(kept) < cube.shape[2]:
        cube = cube[..., kept]
    cube = cube / np.float32(settings["scale"])
    record: dict[str, Any] = {"remarks": list(facts.remarks)}
    if settings["fill"] is not None and not np.isfinite(cube.sum()):
        pixels = ~np.isfinite(cube).all(axis=2)
        cube[~np.isfinite(cube)] = settings["fill"]
        record["filled"] = {"pixels": pixels.sum(), "share": pixels.mean()}
        record["remarks"].append("pixels of no data filled (--fill), counted in index.json")
    if settings["clip"] and cube_files.may_be_clipped(cube) and outside(cube)[0] > 0:
        share, excess = outside(cube)
        cube = cube.clip(0, 1)
        record["clipped"] = {"share": share, "largest_excess": excess}
        record["remarks"].append("values cut to [0, 1] (--clip), counted in index.json")
    return cube, record, facts


def _own_wavelengths(path: Path, bands: int, settings: dict[str, Any]) -> list[float] | None:
    """What the file says of its bands; what it says in no known unit is passed over where
    --wavelengths is given."""
    try:
        return _stated_wavelengths(path, bands)
    except UserError:
        if not settings["given_wavelengths"]:
            raise
    return None


def _calibrate(cube: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """Reflectance of counts: (counts - dark) / (white - dark), by column and band."""
    white = _reference("white", settings, cube.shape)
    dark = _reference("dark", settings, cube.shape) if settings["dark"] else 0 * white
    span = white - dark
    if np.mean(span > 0) < 0.5:
        raise UserError(
            f"--white {settings['white']}: not brighter than --dark {settings['dark']}; give each "
            "its file"
        )
    span[span <= 0] = np.nan  # a dead pixel of the camera measures nothing
    return (cube - dark) / span


def _reference(name: str, settings: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """A reference (columns or 1, bands) float32, averaged over lines; an .npy may be already."""
    path = Path(settings[name])
    average: np.ndarray = np.empty(0)
    if path.suffix.lower() == ".npy":
        with reading(path, "a reference"):
            average = np.atleast_2d(np.load(path).astype(np.float32))
    if average.ndim != 2:
        stored, _ = cube_files.read_stored(path, bands=shape[2])
        average = stored.mean(axis=0, dtype=np.float64).astype(np.float32)
    if average.shape not in (shape[1:], (1, shape[2])):
        raise UserError(
            f"--{name} {path}: {average.shape[0]} columns of {average.shape[1]} bands, the cubes "
            f"have {shape[1]} of {shape[2]}; give the reference of this camera and binning"
        )
    return average


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
    return lines
