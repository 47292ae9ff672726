"""Measured reflectances and lights, from colour-science's tables, at bands of 10 nm.

table = measured_reflectances()             # (n, 31), 400 to 700 nm
power = measured_light("FL2")               # (31,), peak 1"""

import functools

import numpy as np

WAVELENGTHS = np.arange(400.0, 701.0, 10.0)
CHECKERS = ("BabelColor Average", "ColorChecker N Ohta", "ISO 17321-1", "PMC")
DAYLIGHT = ("D50", "D55", "D60", "D65", "D75")
# CIE 015:2018: tungsten, fluorescent lamps, high-pressure discharge lamps, white LEDs.
LAMPS: dict[str, tuple[str, ...]] = {
    "tungsten": ("A",),
    "fluorescent": ("FL2", "FL3", "FL7", "FL8", "FL11", "FL12", "FL3.4", "FL3.10", "FL3.15"),
    "discharge": ("HP2", "HP4", "HP5"),
    "led": ("LED-B1", "LED-B2", "LED-B3", "LED-B5", "LED-BH1", "LED-RGB1", "LED-V1", "LED-V2"),
}


@functools.cache
def measured_reflectances() -> np.ndarray:
    """Reflectances (n, 31): the 99 samples of CIE 224:2017, and patches of colour charts."""
    import colour
    from colour.quality.cfi2017 import load_TCS_CIE2017

    samples = load_TCS_CIE2017(colour.SpectralShape(380, 780, 5))
    rows = [np.interp(WAVELENGTHS, samples.wavelengths, column) for column in samples.values.T]
    for name in CHECKERS:
        for patch in colour.SDS_COLOURCHECKERS[name].values():
            rows.append(np.interp(WAVELENGTHS, patch.wavelengths, patch.values))
    return np.clip(rows, 0.0, 1.0)


@functools.cache
def measured_light(name: str) -> np.ndarray:
    """Power of a CIE illuminant (31,), peak 1: its mean over each band, as lamps have lines."""
    import colour

    light = colour.SDS_ILLUMINANTS[name]
    fine = np.arange(WAVELENGTHS[0] - 5, WAVELENGTHS[-1] + 5)
    power = np.interp(fine + 0.5, light.wavelengths, light.values)
    bands = power.reshape(len(WAVELENGTHS), -1).mean(axis=1)
    return bands / bands.max()
