"""Synthetic scenes: cubes of 31 bands made of physical spectra, light, shapes and textures.

cube = synthetic_cube(np.random.default_rng(0), 256, 256)      # (H, W, 31) float32 in [0, 1]
"""

import numpy as np

from camera_colour import sum_of_lobes

# Synthetic scenes are dead leaves (Lee, Mumford and Huang, IJCV 2001): opaque objects with radii by r^-3, so edges come at all
# scales. Kubelka and Munk's reflectances (1931): K/S is a sum of pigment absorptions, so spectra are smooth, in (0, 1), on a
# curved manifold. A family of materials has its own texture: a leaf and a green plastic of the same RGB are told apart by their
# surroundings. The cube is radiance relative to a white in the brightest light, the same for all scenes, and so is the camera's
# exposure (mean about 0.18): brightness means something, and `unit` RGB keeps it.
WAVELENGTHS = np.arange(400.0, 701.0, 10.0)
PIGMENTS = {  # absorption as lobes (height, peak nm, width below, width above) near the bands known for each pigment
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
# family: main pigments, second pigments, texture, its strength in log K/S, gloss, range of grey K/S and of pigment K/S
FAMILIES = {
    "foliage": (["chlorophyll"], ["carotenoid"], "mottle", 0.25, 0.03, (0.05, 1), (2, 25)),
    "blossom": (
        ["carotenoid", "anthocyanin", "delphinidin"],
        ["anthocyanin"],
        "veins",
        0.2,
        0.02,
        (0.01, 0.2),
        (1, 25),
    ),
    "wood": (["tannin", "melanin"], ["goethite"], "grain", 0.35, 0.02, (0.02, 2), (1, 16)),
    "earth": (["haematite", "goethite"], ["melanin"], "mottle", 0.3, 0.0, (0.05, 2), (1, 16)),
    "plastic": (
        ["cadmium orange", "cadmium red", "phthalo blue", "phthalo green", "quinacridone", "azo"],
        ["azo", "phthalo green", "smalt"],
        "smooth",
        0.0,
        0.25,
        (0.005, 2),
        (0.6, 40),
    ),
    "textile": (
        ["indigo", "smalt", "quinacridone", "azo", "anthocyanin", "tannin"],
        ["azo", "indigo", "quinacridone"],
        "weave",
        0.35,
        0.0,
        (0.01, 3),
        (0.6, 30),
    ),
    "neutral": ([], ["melanin", "haematite"], "mottle", 0.15, 0.05, (0.004, 14), (0.02, 0.5)),
}
TEXTURES = {  # what a family looks like from near, about deviation 1; u, v: the object's own axes, in periods
    "veins": lambda u, v, coarse, mottle: (
        0.8 * np.cos(6 * np.arctan2(v, u) + 2 * coarse) + 0.5 * coarse
    ),
    "grain": lambda u, v, coarse, mottle: np.sin(2 * np.pi * u + 2.5 * coarse),
    "weave": lambda u, v, coarse, mottle: 1.4 * np.sin(3.3 * np.pi * u) * np.sin(3.3 * np.pi * v),
    "mottle": lambda u, v, coarse, mottle: mottle,
    "smooth": lambda u, v, coarse, mottle: np.zeros_like(coarse),
}
OUTDOOR, INDOOR = (
    (0.28, 0.12, 0.13, 0.2, 0.09, 0.08, 0.1),
    (0.06, 0.07, 0.14, 0.07, 0.27, 0.25, 0.14),
)  # shares of the families
MATERIALS, FRESNEL = (
    48,
    0.012,
)  # materials in a scene; reflection at the surface, so that nothing is quite black
EXPOSURE = (
    1.4  # gain of the camera signal at which the mean over scenes is about 0.18 of full scale
)


def draw_material(family: str, rng: np.random.Generator) -> np.ndarray:
    """The K/S spectrum of one material: a grey part, a main pigment and often a second one, each a little varied."""
    main, second, _, _, _, grey, amount = FAMILIES[family]
    ks = np.exp(rng.uniform(*np.log(grey))) * (WAVELENGTHS / 550) ** rng.uniform(-0.6, 0.2)
    for pigments, share, chance in ((main, 1.0, 1.0), (second, 0.6, 0.7)):
        if pigments and rng.random() < chance:
            chosen = PIGMENTS[pigments[rng.integers(len(pigments))]]
            lobes = [
                (a, peak + rng.normal(0, 2), *(rng.uniform(0.92, 1.08, 2) * widths))
                for a, peak, *widths in chosen
            ]
            ks = ks + share * np.exp(rng.uniform(*np.log(amount))) * sum_of_lobes(
                WAVELENGTHS, lobes
            )
    return ks


def reflectance(ks: np.ndarray) -> np.ndarray:
    """Kubelka and Munk: reflectance of a thick layer with absorption over scattering K/S, and the surface's own."""
    return FRESNEL + (1 - FRESNEL) * (1 + ks - np.sqrt(ks * (ks + 2)))


def draw_illuminants(outdoor: bool, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Direct and ambient light, peak 1: sun and sky; or a lamp (tungsten, white LED) or a window, with some daylight."""

    def planck(low: float, high: float) -> np.ndarray:  # between these colour temperatures, kelvin
        power = WAVELENGTHS**-5 / np.expm1(1.4388e7 / (WAVELENGTHS * rng.uniform(low, high)))
        return power / power.max()

    if outdoor:
        direct, tint = planck(5000, 6000), -rng.uniform(0.8, 2)
    else:
        lamp, tint, daylight = (
            rng.choice(3, p=[0.3, 0.25, 0.45]),
            rng.uniform(0.1, 0.8),
            rng.uniform(0.08, 0.35),
        )
        diode = [
            (rng.uniform(0.5, 0.9), 452, 9, 12),
            (1.0, rng.uniform(575, 590), 48, 60),
        ]  # blue, and yellow phosphor
        direct = (planck(2750, 3050), sum_of_lobes(WAVELENGTHS, diode), planck(5800, 6800))[lamp]
        direct = (1 - daylight) * direct / direct.max() + daylight * planck(6000, 7000)
    ambient = direct * (WAVELENGTHS / 550) ** tint
    return (direct / direct.max()).astype(np.float32), (ambient / ambient.max()).astype(np.float32)


def fractal(rng: np.random.Generator, h: int, w: int, power: float) -> np.ndarray:
    """A random field with amplitude spectrum f^-power, mean 0, deviation 1."""
    amplitude = (
        np.maximum(np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)), 1 / max(h, w))
        ** -power
    )
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((h, w))) * amplitude, (h, w))
    return ((field - field.mean()) / field.std()).astype(np.float32)


def _superellipse(shape: tuple[int, int], y: float, x: float, radius: float, form: tuple) -> tuple:
    """The part of the frame an object may cover: slices, image axes x and y, own axes u and v, distance (edge at 1)."""
    aspect, angle, power = form
    reach = radius * max(aspect, 1 / aspect) * 1.42 + 1
    rows, cols = (
        slice(max(int(c - reach), 0), max(min(int(c + reach) + 2, n), 0))
        for c, n in ((y, shape[0]), (x, shape[1]))
    )
    dy, dx = (
        axis.astype(np.float32) - c for axis, c in zip(np.ogrid[rows, cols], (y, x), strict=True)
    )
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    return (
        (rows, cols),
        dx,
        dy,
        u,
        v,
        np.abs(u / (radius * aspect)) ** power + np.abs(v * aspect / radius) ** power,
    )


def _paint(rng: np.random.Generator, h: int, w: int, families: np.ndarray) -> dict[str, np.ndarray]:
    """Back to front: which material each pixel shows, its texture, and how much direct, ambient and mirrored light."""
    maps = {
        name: np.zeros((h, w), np.float32)
        for name in ("material", "texture", "direct", "ambient", "mirror")
    }
    coarse, mottle = fractal(rng, h, w, 1.8), fractal(rng, h, w, 0.8)
    light = np.array([*rng.normal(0, 0.35, 2), 1.0])
    lx, ly, lz = (light / np.linalg.norm(light)).tolist()  # right, down, towards the camera
    local = rng.integers(
        0, MATERIALS, (3, 3, 5)
    )  # like lies near like: each part of the frame has its own materials
    side, ground, forms = (
        min(h, w),
        5.0 * max(h, w),
        np.float32([1.3, 2, 2, 2.6, 6]),
    )  # powers: leaf, round .. box
    radii = 1 / np.sqrt(
        rng.uniform((0.45 * side) ** -2, 5.0**-2, int(220 * h * w / 256**2))
    )  # density r^-3
    for radius in (ground, *rng.uniform(0.15 * side, 0.5 * side, 5).tolist(), *radii.tolist()):
        y, x = (
            (h / 2, w / 2) if radius == ground else (rng.uniform(-0.05, 1.05, 2) * (h, w)).tolist()
        )
        form = float(np.exp(rng.normal(0, 0.35))), rng.uniform(0, np.pi), rng.choice(forms)
        relief, height = (
            float(rng.choice([0, 0.35, 0.8], p=[0.45, 0.3, 0.25])),
            min(0.75 * radius, 18),
        )  # flat .. ball
        nearby = local[min(max(int(3 * y / h), 0), 2), min(max(int(3 * x / w), 0), 2)]
        chosen = int(rng.choice(nearby) if rng.random() < 0.75 else rng.integers(MATERIALS))
        _, _, kind, strength, gloss, _, _ = FAMILIES[families[chosen]]
        box, *_, distance = _superellipse((h, w), y - height * ly, x - height * lx, radius, form)
        for name, darkness in (("direct", 0.8), ("ambient", 0.3)):  # its shadow on what is there
            maps[name][box] *= 1 - darkness * np.clip((1 - distance) * 3, 0, 1)
        box, dx, dy, u, v, distance = _superellipse((h, w), y, x, radius, form)
        nx, ny = (
            relief * dx / (1.05 * radius),
            relief * dy / (1.05 * radius),
        )  # the surface's normal
        nz = np.sqrt(np.maximum(1 - nx * nx - ny * ny, 0.05))
        lambert = nx * lx + ny * ly + nz * lz
        glint = (
            gloss * (relief > 0) * np.maximum((lambert + nz) / float(np.sqrt(2 + 2 * lz)), 0) ** 60
        )  # Blinn
        period = rng.uniform(6, 16)
        texture = strength * TEXTURES[kind](
            u / period, v / period, coarse[box], mottle[box]
        ) + rng.normal(0, 0.12)
        for name, value in zip(
            maps, (chosen, texture, np.maximum(lambert, 0), 0.5 + 0.5 * nz, glint), strict=True
        ):
            np.copyto(maps[name][box], value, where=distance < 1)
    falloff = np.exp(0.3 * fractal(rng, h, w, 1.3) + 0.35 * coarse)
    falloff /= np.quantile(falloff, 0.85)
    maps["direct"] *= falloff
    maps["mirror"] *= maps["direct"]
    maps["ambient"] *= np.sqrt(falloff)
    return maps


def synthetic_cube(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """One scene, (h, w, 31) float32 in [0, 1], seen through a lens that mixes neighbouring pixels a little."""
    outdoor = rng.random() < 0.65
    families = rng.choice(list(FAMILIES), MATERIALS, p=OUTDOOR if outdoor else INDOOR)
    ks = np.stack([draw_material(family, rng) for family in families]).astype(np.float32)
    direct, ambient = draw_illuminants(outdoor, rng)
    level, sky = float(np.exp(rng.uniform(np.log(0.55), 0))), rng.uniform(0.1, 0.3)
    maps = _paint(rng, h + 2, w + 2, families)
    cube = reflectance(
        ks[maps.pop("material").astype(int)] * np.exp(maps.pop("texture"))[..., None]
    )
    on, off, mirror = (maps[name][..., None] for name in ("direct", "ambient", "mirror"))
    cube = cube * (on * direct + sky * off * ambient) + mirror * direct
    for axis in (0, 1):
        cube = 0.76 * cube + 0.12 * (np.roll(cube, 1, axis) + np.roll(cube, -1, axis))
    return np.clip(cube[1:-1, 1:-1] * level, 0, 1, dtype=np.float32)
