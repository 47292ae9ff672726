"""Synthetic scenes: cubes of 31 bands made of measured and physical spectra, light, shapes and
textures.

    cube = synthetic_cube(np.random.default_rng(0), 256, 256)      # (H, W, 31) float32 in [0, 1]

Scenes are dead leaves (Lee, Mumford and Huang, IJCV 2001): opaque objects with radii by r^-3, so
edges come at all scales. Reflectances are Kubelka and Munk's (1931): absorption over scattering K/S
is a sum of pigments, or that of a measured sample, so spectra are smooth, in (0, 1), on a curved
manifold. A family of materials has its own texture: a leaf and a green plastic of the same RGB are
told apart by their surroundings. There are gradients, writing and lines, glints, dark scenes, and
parts out of focus. The cube is radiance relative to a white in the brightest light, the same for
all scenes, and so is the camera's exposure: brightness means something, and `unit` RGB keeps it.
With `neutral` light the cube is reflectance times shading times exposure instead: a white in full
light is the same in every band.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from camera_colour import Lobe, sum_of_lobes
from measured_spectra import DAYLIGHT, LAMPS, WAVELENGTHS, measured_light, measured_reflectances

Rng = np.random.Generator
MATERIALS = 48  # in a scene
FRESNEL = 0.012  # reflection at the surface, so that nothing is quite black
EXPOSURE = 1.4  # camera gain at which the mean over scenes is about 0.18 of full scale
# Absorption as lobes near the bands known for each pigment.
PIGMENTS: dict[str, list[Lobe]] = {
    "chlorophyll": [
        (1, 435, 40, 18),
        (0.75, 470, 20, 16),
        (0.3, 600, 50, 25),
        (0.45, 648, 16, 14),
        (1, 677, 13, 11),
    ],
    "carotenoid": [(0.7, 425, 40, 15), (1, 450, 16, 15), (0.85, 480, 15, 14)],
    "melanin": [(1, 350, 60, 130)],
    "anthocyanin": [(1, 535, 40, 30), (0.35, 420, 40, 40)],
    "delphinidin": [(1, 590, 45, 32), (0.25, 410, 30, 30)],
    "haematite": [(1, 480, 120, 50), (0.25, 640, 40, 60)],
    "goethite": [(1, 430, 60, 45), (0.15, 650, 40, 60)],
    "quinacridone": [(0.8, 525, 35, 14), (1, 560, 14, 14)],
    "phthalo blue": [(1, 615, 35, 25), (0.9, 680, 22, 40)],
    "phthalo green": [(1, 645, 45, 45), (0.5, 430, 40, 25)],
    "cadmium orange": [(1, 470, 120, 45)],
    "tannin": [(1, 360, 60, 90)],
    "cadmium red": [(1, 510, 140, 40)],
    "azo": [(1, 430, 50, 32)],
    "indigo": [(1, 650, 60, 40)],
    "smalt": [(1, 600, 45, 45)],
}


class Family(NamedTuple):
    """Materials of one kind."""

    pigments: list[str]
    second: list[str]  # pigments that often join
    texture: str
    strength: float  # of the texture, in log K/S
    gloss: float
    grey: tuple[float, float]  # range of K/S of the grey part
    amount: tuple[float, float]  # range of K/S of the pigments


PAINTS = ["cadmium orange", "cadmium red", "phthalo blue", "phthalo green", "quinacridone", "azo"]
DYES = ["indigo", "smalt", "quinacridone", "azo", "anthocyanin", "tannin"]
PETALS = ["carotenoid", "anthocyanin", "delphinidin"]
FAMILIES = {
    "foliage": Family(["chlorophyll"], ["carotenoid"], "mottle", 0.25, 0.03, (0.05, 1), (2, 25)),
    "blossom": Family(PETALS, ["anthocyanin"], "veins", 0.2, 0.02, (0.01, 0.2), (1, 25)),
    "wood": Family(["tannin", "melanin"], ["goethite"], "grain", 0.35, 0.02, (0.02, 2), (1, 16)),
    "earth": Family(["haematite", "goethite"], ["melanin"], "mottle", 0.3, 0.0, (0.05, 2), (1, 16)),
    "plastic": Family(
        PAINTS, ["azo", "phthalo green", "smalt"], "smooth", 0.0, 0.25, (0.005, 2), (0.6, 40)
    ),
    "textile": Family(
        DYES, ["azo", "indigo", "quinacridone"], "weave", 0.35, 0.0, (0.01, 3), (0.6, 30)
    ),
    "neutral": Family([], ["melanin", "haematite"], "mottle", 0.15, 0.05, (0.004, 14), (0.02, 0.5)),
}
# Chance that a material is a measured one, by family; living ones are mostly of our pigments.
MEASURED = {"foliage": 0.15, "blossom": 0.15}
USUALLY_MEASURED = 0.6
# Shares of the families, in their order.
OUTDOOR = (0.28, 0.12, 0.13, 0.2, 0.09, 0.08, 0.1)
INDOOR = (0.06, 0.07, 0.14, 0.07, 0.27, 0.25, 0.14)


def draw_material(family: str, rng: Rng) -> np.ndarray:
    """The K/S spectrum of one material: a grey part, a main pigment and often a second one."""
    kind = FAMILIES[family]
    grey = np.exp(rng.uniform(*np.log(kind.grey)))
    ks = grey * (WAVELENGTHS / 550) ** rng.uniform(-0.6, 0.2)
    for pigments, share, chance in ((kind.pigments, 1.0, 1.0), (kind.second, 0.6, 0.7)):
        if pigments and rng.random() < chance:
            lobes = _varied(PIGMENTS[pigments[rng.integers(len(pigments))]], rng)
            amount = share * np.exp(rng.uniform(*np.log(kind.amount)))
            ks = ks + amount * sum_of_lobes(WAVELENGTHS, lobes)
    return ks


def measured_material(rng: Rng) -> np.ndarray:
    """K/S of a measured sample, or of a mixture of two, faded or deepened."""
    table = measured_reflectances()
    first, second = rng.integers(0, len(table), 2)
    ks = absorption(table[first])
    if rng.random() < 0.45:
        share = rng.uniform(0.1, 0.9)
        ks = share * ks + (1 - share) * absorption(table[second])
    return ks * np.exp(rng.normal(0, 0.4)) + np.exp(rng.uniform(np.log(5e-4), np.log(0.03)))


def absorption(reflected: np.ndarray) -> np.ndarray:
    """K/S whose `reflectance` it is."""
    body = np.clip((reflected - FRESNEL) / (1 - FRESNEL), 2e-3, 0.999)
    return (1 - body) ** 2 / (2 * body)


def _varied(lobes: list[Lobe], rng: Rng) -> list[Lobe]:
    """A pigment's lobes, moved by some nm and a little wider or narrower."""
    varied: list[Lobe] = []
    for height, peak, below, above in lobes:
        moved = peak + rng.normal(0, 2)
        wider = rng.uniform(0.92, 1.08, 2)
        varied.append((height, moved, wider[0] * below, wider[1] * above))
    return varied


def reflectance(ks: np.ndarray) -> np.ndarray:
    """Kubelka and Munk: reflectance of a thick layer of absorption over scattering K/S."""
    return FRESNEL + (1 - FRESNEL) * (1 + ks - np.sqrt(ks * (ks + 2)))


def draw_illuminants(outdoor: bool, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """Direct and ambient light, peak 1: sun or daylight and sky, or a lamp or window."""
    if outdoor:
        direct = _blackbody_between(5000, 6000, rng)
        if rng.random() < 0.5:
            direct = measured_light(DAYLIGHT[rng.integers(len(DAYLIGHT))])
        tint = -rng.uniform(0.8, 2)
    else:
        tint = rng.uniform(0.1, 0.8)
        daylight = rng.uniform(0.08, 0.35)
        direct = (1 - daylight) * _draw_lamp(rng)
        direct = direct + daylight * _blackbody_between(6000, 7000, rng)
    ambient = direct * (WAVELENGTHS / 550) ** tint
    return (direct / direct.max()).astype(np.float32), (ambient / ambient.max()).astype(np.float32)


def _draw_lamp(rng: Rng) -> np.ndarray:
    """A tungsten lamp, a window, a white LED, a CIE lamp of some kind: peak 1."""
    kind = rng.choice(4, p=[0.25, 0.3, 0.1, 0.35])
    if kind == 0:
        return _blackbody_between(2750, 3050, rng)
    if kind == 1:
        return _blackbody_between(5800, 6800, rng)
    if kind == 2:
        blue: Lobe = (rng.uniform(0.5, 0.9), 452, 9, 12)
        phosphor: Lobe = (1.0, rng.uniform(575, 590), 48, 60)
        power = sum_of_lobes(WAVELENGTHS, [blue, phosphor])
        return power / power.max()
    lamps = LAMPS[list(LAMPS)[rng.choice(len(LAMPS), p=[0.15, 0.35, 0.1, 0.4])]]
    return measured_light(lamps[rng.integers(len(lamps))])


def neutral_light(rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """The illuminant divided out: direct light of 1, ambient light with a slight tint."""
    ambient = (WAVELENGTHS / 550) ** rng.normal(0, 0.15)
    return np.ones(31, np.float32), (ambient / ambient.max()).astype(np.float32)


def _blackbody_between(low: float, high: float, rng: Rng) -> np.ndarray:
    """Planck's law at a colour temperature between two, in kelvin, peak 1."""
    import colour  # takes 0.7 s

    power = colour.colorimetry.planck_law(WAVELENGTHS * 1e-9, rng.uniform(low, high))
    return power / power.max()


def fractal(rng: Rng, height: int, width: int, power: float) -> np.ndarray:
    """A random field with amplitude spectrum f^-power, mean 0, deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    amplitude = np.maximum(frequency, 1 / max(height, width)) ** -power
    noise = np.fft.rfft2(rng.standard_normal((height, width)))
    field = np.fft.irfft2(noise * amplitude, (height, width))
    return ((field - field.mean()) / field.std()).astype(np.float32)


def texture_of(
    kind: str, u: np.ndarray, v: np.ndarray, coarse: np.ndarray, mottle: np.ndarray
) -> np.ndarray:
    """What a family looks like from near, about deviation 1. u, v: the object's own axes, in
    periods; coarse, mottle: random fields."""
    if kind == "veins":
        return 0.8 * np.cos(6 * np.arctan2(v, u) + 2 * coarse) + 0.5 * coarse
    if kind == "grain":
        return np.sin(2 * np.pi * u + 2.5 * coarse)
    if kind == "weave":
        return 1.4 * np.sin(3.3 * np.pi * u) * np.sin(3.3 * np.pi * v)
    if kind == "mottle":
        return mottle
    return np.zeros_like(coarse)  # smooth


@dataclass
class Outline:
    """A superellipse: |u / a|^power + |v / b|^power < 1 on its own turned axes u and v."""

    y: float
    x: float
    radius: float
    aspect: float
    angle: float
    power: float

    def box(self, shape: tuple[int, int]) -> tuple[slice, slice]:
        """The part of the frame that it may cover."""
        reach = self.radius * max(self.aspect, 1 / self.aspect) * 1.42 + 1

        def span(centre: float, side: int) -> slice:
            return slice(max(int(centre - reach), 0), max(min(int(centre + reach) + 2, side), 0))

        return span(self.y, shape[0]), span(self.x, shape[1])

    def axes(self, box: tuple[slice, slice]) -> tuple[np.ndarray, ...]:
        """dx, dy of the image, own axes u and v, from the centre; the distance, 1 at the edge."""
        rows, columns = np.ogrid[box]
        dy, dx = rows.astype(np.float32) - self.y, columns.astype(np.float32) - self.x
        cos, sin = float(np.cos(self.angle)), float(np.sin(self.angle))
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        along = np.abs(u / (self.radius * self.aspect)) ** self.power
        across = np.abs(v * self.aspect / self.radius) ** self.power
        return dx, dy, u, v, along + across


class Painter:
    """Paints objects back to front into maps of material, texture, and light by its kind."""

    def __init__(self, rng: Rng, height: int, width: int, families: np.ndarray) -> None:
        self.rng, self.families = rng, families
        self.shape = (height, width)
        # `blend`: how much of material `other` is mixed into `material`.
        names = ("material", "other", "blend", "texture", "direct", "ambient", "mirror")
        self.maps = {name: np.zeros(self.shape, np.float32) for name in names}
        self.coarse = fractal(rng, height, width, 1.8)
        self.mottle = fractal(rng, height, width, 0.8)
        towards = np.array([*rng.normal(0, 0.35, 2), 1.0])  # right, down, towards the camera
        self.light: list[float] = (towards / np.linalg.norm(towards)).tolist()
        # Like lies near like: each ninth of the frame has its own materials.
        self.local = rng.integers(0, MATERIALS, (3, 3, 5))

    def paint(self) -> dict[str, np.ndarray]:
        """The ground, a few large objects, and many by r^-3; writing; then the light's falloff."""
        (height, width), rng, maps = self.shape, self.rng, self.maps
        side, ground = min(height, width), 5.0 * max(height, width)
        count = int(220 * height * width / 256**2)
        radii = 1 / np.sqrt(rng.uniform((0.45 * side) ** -2, 5.0**-2, count))
        large = rng.uniform(0.15 * side, 0.5 * side, 5)
        self.add_object(ground, height / 2, width / 2)
        for radius in (*large.tolist(), *radii.tolist()):
            y, x = (rng.uniform(-0.05, 1.05, 2) * self.shape).tolist()
            self.add_object(radius, y, x)
        if rng.random() < 0.35:
            self.add_writing()
        falloff = np.exp(0.3 * fractal(rng, height, width, 1.3) + 0.35 * self.coarse)
        falloff /= np.quantile(falloff, 0.85)
        maps["direct"] *= falloff
        maps["mirror"] *= maps["direct"]
        maps["ambient"] *= np.sqrt(falloff)
        return maps

    def add_object(self, radius: float, y: float, x: float) -> None:
        """One object and its shadow on what is there."""
        rng, (lx, ly, lz) = self.rng, self.light
        aspect, angle = float(np.exp(rng.normal(0, 0.35))), rng.uniform(0, np.pi)
        power = rng.choice(np.array([1.3, 2, 2, 2.6, 6], np.float32))  # leaf, round .. box
        relief = float(rng.choice([0, 0.35, 0.8], p=[0.45, 0.3, 0.25]))  # flat .. ball
        chosen = self._material_at(y, x)
        kind = FAMILIES[self.families[chosen]]
        height = min(0.75 * radius, 18)  # above what it casts its shadow on
        self._shade(Outline(y - height * ly, x - height * lx, radius, aspect, angle, power))
        outline = Outline(y, x, radius, aspect, angle, power)
        box = outline.box(self.shape)
        dx, dy, u, v, distance = outline.axes(box)
        # The surface's normal.
        nx, ny = relief * dx / (1.05 * radius), relief * dy / (1.05 * radius)
        nz = np.sqrt(np.maximum(1 - nx * nx - ny * ny, 0.05))
        lambert = nx * lx + ny * ly + nz * lz
        halfway = np.maximum((lambert + nz) / float(np.sqrt(2 + 2 * lz)), 0)
        shine = 4.0 if rng.random() < 0.1 else 1.0  # wet or polished: its highlights clip
        glint = shine * kind.gloss * (relief > 0) * halfway**60  # Blinn 1977
        period = rng.uniform(6, 16)  # pixels
        look = texture_of(kind.texture, u / period, v / period, self.coarse[box], self.mottle[box])
        values: dict[str, np.ndarray | int] = {
            "material": chosen,
            "other": self._material_at(y, x),
            "blend": self._gradient(u, radius),
            "texture": kind.strength * look + rng.normal(0, 0.12),
            "direct": np.maximum(lambert, 0),
            "ambient": 0.5 + 0.5 * nz,
            "mirror": glint,
        }
        for name, value in values.items():
            np.copyto(self.maps[name][box], value, where=distance < 1)

    def _gradient(self, u: np.ndarray, radius: float) -> np.ndarray | int:
        """Most objects are of one material; some change into another along their length."""
        if self.rng.random() > 0.12:
            return 0
        return np.clip(0.5 + 0.5 * u / min(radius, max(self.shape)), 0, 1)

    def add_writing(self) -> None:
        """Lines of letters, rules and bars of one material on what is there."""
        rng, (height, width) = self.rng, self.shape
        sheet = Image.new("L", (width, height))
        draw = ImageDraw.Draw(sheet)
        for _ in range(rng.integers(2, 8)):
            x, y = rng.uniform(0, 0.8) * width, rng.uniform(0, 0.95) * height
            if rng.random() < 0.6:
                letters = "".join(chr(code) for code in rng.integers(65, 122, 14))
                font = ImageFont.load_default(size=int(rng.uniform(0.03, 0.15) * height) + 6)
                draw.text((x, y), letters, fill=255, font=font)
            else:
                end = (x + rng.normal(0, 0.4) * width, y + rng.normal(0, 0.4) * height)
                draw.line([(x, y), end], fill=255, width=int(rng.integers(1, 7)))
        inked = np.asarray(sheet) > 127
        for name, value in (("material", rng.integers(MATERIALS)), ("blend", 0), ("mirror", 0)):
            np.copyto(self.maps[name], value, where=inked, casting="unsafe")

    def _material_at(self, y: float, x: float) -> int:
        """Mostly one of those of this part of the frame."""
        rng, (height, width) = self.rng, self.shape
        row, column = min(max(int(3 * y / height), 0), 2), min(max(int(3 * x / width), 0), 2)
        if rng.random() < 0.75:
            return int(rng.choice(self.local[row, column]))
        return int(rng.integers(MATERIALS))

    def _shade(self, outline: Outline) -> None:
        box = outline.box(self.shape)
        *_, distance = outline.axes(box)
        shadow = np.clip((1 - distance) * 3, 0, 1)
        self.maps["direct"][box] *= 1 - 0.8 * shadow
        self.maps["ambient"][box] *= 1 - 0.3 * shadow


def draw_palette(outdoor: bool, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """A scene's materials: families (MATERIALS) and K/S (MATERIALS, 31)."""
    families = rng.choice(list(FAMILIES), MATERIALS, p=OUTDOOR if outdoor else INDOOR)
    rows = []
    for family in families:
        measured = rng.random() < MEASURED.get(family, USUALLY_MEASURED)
        rows.append(measured_material(rng) if measured else draw_material(family, rng))
    return families, np.stack(rows).astype(np.float32)


def defocus(cube: np.ndarray, rng: Rng) -> np.ndarray:
    """Blur what is far from a line across the frame, as a lens of shallow focus does."""
    from scipy.ndimage import uniform_filter1d

    height, width = cube.shape[:2]
    size = int(rng.integers(3, 10))
    blurred = cube
    for axis in (0, 1, 0, 1):
        blurred = uniform_filter1d(blurred, size, axis=axis, mode="nearest")
    place = np.arange(height, dtype=np.float32)[:, None, None] / height
    amount = np.clip(np.abs(place - rng.uniform(0, 1)) * 4 - 1, 0, 1)
    return cube + amount * (blurred - cube)


def draw_level(rng: Rng) -> float:
    """Brightness of a scene: mostly like the others, sometimes dark."""
    darkest = 0.12 if rng.random() < 0.3 else 0.55
    return float(np.exp(rng.uniform(np.log(darkest), 0)))


def synthetic_cube(rng: Rng, height: int, width: int, neutral: bool = False) -> np.ndarray:
    """One scene, (height, width, 31) float32 in [0, 1], seen through a lens that mixes neighbouring
    pixels a little. neutral: reflectance times shading times exposure, with no illuminant."""
    outdoor = rng.random() < 0.65
    families, ks = draw_palette(outdoor, rng)
    direct, ambient = neutral_light(rng) if neutral else draw_illuminants(outdoor, rng)
    level, sky = draw_level(rng), rng.uniform(0.1, 0.3)
    if neutral:
        level *= float(np.exp(rng.uniform(np.log(0.8), np.log(2.0))))
    maps = Painter(rng, height + 2, width + 2, families).paint()
    relief = np.exp(maps["texture"])[..., None]
    body = ks[maps["material"].astype(int)]
    mixed = maps["blend"] > 0
    share = maps["blend"][mixed][:, None]
    body[mixed] += share * (ks[maps["other"][mixed].astype(int)] - body[mixed])
    cube = reflectance(body * relief)
    on, off = maps["direct"][..., None], maps["ambient"][..., None]
    cube = cube * (on * direct + sky * off * ambient) + maps["mirror"][..., None] * direct
    for axis in (0, 1):
        cube = 0.76 * cube + 0.12 * (np.roll(cube, 1, axis) + np.roll(cube, -1, axis))
    if rng.random() < 0.25:
        cube = defocus(cube, rng)
    return np.clip(cube[1:-1, 1:-1] * level, 0, 1, dtype=np.float32)
