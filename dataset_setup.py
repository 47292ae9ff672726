"""Prepares data: any raw data set becomes a staged folder that the trainers read fast, or a synthetic raw one is made.

    python dataset_setup.py --arad-root RAW --output-root STAGED --patch-size 128 --stride 8 --workers 8
    python dataset_setup.py --cave-root CAVE --output-root STAGED --render-rgb --val-fraction 0.2
    python dataset_setup.py --cubes DIR --output-root STAGED --scale 4095       # .mat, .npy, .npz, ENVI .hdr
    python dataset_setup.py --arad-root RAW --verify-only                      # a table; exit code 1 with any problem
    python dataset_setup.py --synthetic 20 --output-root RAW --size 256x256    # raw scenes in the ARAD-1K layout

A staged folder has train/, val/ and test/ with `<scene>.cube.npy` (H, W, bands) and `<scene>.rgb.npy` (H, W, 3), an
index.json (shapes, wavelengths, statistics, checksums, patch grids) and contact_sheet.png to see a wrong transpose at
once. Each scene is written whole or not at all; the same command again carries on where the last one stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from tqdm import tqdm

import common_utils_v32 as common
import optimized_dataloader as data
from common_utils_v32 import UserError, atomic_write, write_json
from optimized_dataloader import Scene

# --- synthetic scenes -----------------------------------------------------------------------------------------------
# Dead leaves (Lee, Mumford and Huang, "Occlusion models for natural images", IJCV 2001): opaque objects, radii by r^-3,
# so edges come at all scales as in photos. Reflectances follow Kubelka and Munk (1931): K/S is a sum of pigment
# absorptions, which gives smooth spectra in (0, 1) on a curved manifold. Each family of materials has its own texture,
# so a leaf and a green plastic of the same RGB are told apart by what is around them. Shadows keep an ambient light of
# another colour. The cube is radiance relative to a white in the brightest light, the same for all scenes, and so is the
# camera's exposure: brightness means something, and `unit` normalisation keeps it.

WAVELENGTHS = np.arange(400.0, 701.0, 10.0)
PIGMENTS = {  # absorption as lobes (height, peak nm, width below, width above) near the bands known for each pigment
    "chlorophyll": [(1, 435, 40, 18), (0.75, 470, 20, 16), (0.3, 600, 50, 25), (0.45, 648, 16, 14), (1, 677, 13, 11)],
    "carotenoid": [(0.7, 425, 40, 15), (1, 450, 16, 15), (0.85, 480, 15, 14)],
    "anthocyanin": [(1, 535, 40, 30), (0.35, 420, 40, 40)], "delphinidin": [(1, 590, 45, 32), (0.25, 410, 30, 30)],
    "haemoglobin": [(3, 415, 20, 18), (1, 542, 16, 13), (1, 577, 9, 10), (0.15, 500, 60, 60)],
    "melanin": [(1, 350, 60, 130)], "tannin": [(1, 360, 60, 90)],
    "haematite": [(1, 480, 120, 50), (0.25, 640, 40, 60)], "goethite": [(1, 430, 60, 45), (0.15, 650, 40, 60)],
    "azo": [(1, 430, 50, 32)], "cadmium orange": [(1, 470, 120, 45)], "cadmium red": [(1, 510, 140, 40)],
    "quinacridone": [(0.8, 525, 35, 14), (1, 560, 14, 14)], "phthalo blue": [(1, 615, 35, 25), (0.9, 680, 22, 40)],
    "phthalo green": [(1, 645, 45, 45), (0.5, 430, 40, 25)], "indigo": [(1, 650, 60, 40)], "smalt": [(1, 600, 45, 45)],
}
# family: main pigments, second pigments, texture, its strength in log K/S, gloss, range of grey K/S and of pigment K/S
FAMILIES = {
    "foliage": (["chlorophyll"], ["carotenoid"], "mottle", 0.25, 0.03, (0.05, 1), (2, 25)),
    "blossom": (["carotenoid", "anthocyanin", "delphinidin"], ["anthocyanin"], "veins", 0.2, 0.02, (0.005, 0.15), (1, 25)),
    "wood": (["tannin", "melanin"], ["goethite"], "grain", 0.35, 0.02, (0.02, 2), (1, 16)),
    "earth": (["haematite", "goethite"], ["melanin"], "speckle", 0.3, 0.0, (0.05, 2), (1, 16)),
    "skin": (["haemoglobin"], ["melanin"], "mottle", 0.12, 0.04, (0.02, 0.08), (0.1, 0.5)),
    "plastic": (["cadmium orange", "cadmium red", "phthalo blue", "phthalo green", "quinacridone", "azo"],
                ["azo", "phthalo green", "smalt"], "smooth", 0.0, 0.25, (0.005, 2), (0.6, 40)),
    "textile": (["indigo", "smalt", "quinacridone", "azo", "anthocyanin", "tannin"], ["azo", "indigo", "quinacridone"], "weave",
                0.35, 0.0, (0.01, 3), (0.6, 30)),
    "neutral": ([], ["melanin", "haematite"], "speckle", 0.15, 0.05, (0.004, 14), (0.02, 0.5)),
}
# the share of each family among the materials of a scene, in the order above
OUTDOOR, INDOOR = (0.28, 0.12, 0.12, 0.18, 0.03, 0.09, 0.08, 0.10), (0.06, 0.06, 0.12, 0.06, 0.05, 0.27, 0.25, 0.13)
MATERIALS, FRESNEL = 24, 0.012  # materials in a scene; reflection at the surface, so that nothing is quite black


def draw_material(family: str, rng: np.random.Generator) -> np.ndarray:
    """The K/S spectrum of one material: a grey part, a main pigment and often a second one, each a little varied."""
    main, second, _, _, _, grey, amount = FAMILIES[family]
    ks = np.exp(rng.uniform(*np.log(grey))) * (WAVELENGTHS / 550) ** rng.uniform(-0.6, 0.2)
    for pigments, share, chance in ((main, 1.0, 1.0), (second, 0.6, 0.7)):
        if pigments and rng.random() < chance:
            lobes = [(a, peak + rng.normal(0, 5), low * rng.uniform(0.85, 1.2), high * rng.uniform(0.85, 1.2))
                     for a, peak, low, high in PIGMENTS[pigments[rng.integers(len(pigments))]]]
            ks = ks + share * np.exp(rng.uniform(*np.log(amount))) * common.sum_of_lobes(WAVELENGTHS, lobes)
    return ks


def reflectance(ks: np.ndarray) -> np.ndarray:
    """Kubelka and Munk: reflectance of a thick layer with absorption over scattering K/S, and the surface's own."""
    return FRESNEL + (1 - FRESNEL) * (1 + ks - np.sqrt(ks * (ks + 2)))


def draw_illuminants(outdoor: bool, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Direct and ambient light, peak 1: sun and sky; or a lamp (tungsten, white LED) or a window, with some daylight."""
    def planck(low: float, high: float) -> np.ndarray:
        metres = WAVELENGTHS * 1e-9
        power = 1 / (metres**5 * np.expm1(1.4388e-2 / (metres * rng.uniform(low, high))))
        return power / power.max()

    if outdoor:
        direct, tint = planck(4800, 6500), -rng.uniform(0.8, 2.5)
    else:
        lamp, tint, daylight = rng.choice(3, p=[0.3, 0.25, 0.45]), rng.uniform(0.1, 0.8), rng.uniform(0.08, 0.35)
        diode = [(rng.uniform(0.35, 1.1), rng.uniform(446, 458), 9, 12),  # blue diode and yellow phosphor
                 (1.0, rng.uniform(565, 600), rng.uniform(42, 55), rng.uniform(52, 66))]
        direct = (planck(2700, 3400), common.sum_of_lobes(WAVELENGTHS, diode), planck(5000, 7500))[lamp]
        direct = (1 - daylight) * direct / direct.max() + daylight * planck(5500, 8000)
    ambient = direct * (WAVELENGTHS / 550) ** tint
    return (direct / direct.max()).astype(np.float32), (ambient / ambient.max()).astype(np.float32)


def fractal(rng: np.random.Generator, h: int, w: int, power: float) -> np.ndarray:
    """A random field with amplitude spectrum f^-power, mean 0, deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None])
    amplitude = np.maximum(frequency, 1 / max(h, w)) ** -power
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((h, w))) * amplitude, (h, w))
    return ((field - field.mean()) / field.std()).astype(np.float32)


def _texture(kind: str, u: np.ndarray, v: np.ndarray, coarse: np.ndarray, fine: np.ndarray, period: float) -> np.ndarray:
    """What a family looks like from near, about deviation 1; u and v are the object's own axes in pixels."""
    if kind == "veins":
        return 0.8 * np.cos(6 * np.arctan2(v, u) + 2 * coarse) + 0.5 * coarse
    if kind == "grain":
        return np.sin(2 * np.pi * u / period + 2.5 * coarse)
    if kind == "weave":
        return 1.4 * np.sin(2 * np.pi * u / (0.6 * period)) * np.sin(2 * np.pi * v / (0.6 * period))
    return np.zeros_like(coarse) if kind == "smooth" else fine


def _superellipse(shape: tuple[int, int], y: float, x: float, radius: float, form: tuple) -> tuple | None:
    """The part of the frame an object may cover: slices, image axes x and y, own axes u and v, distance (edge at 1)."""
    aspect, angle, power = form
    reach = radius * max(aspect, 1 / aspect) * 1.42 + 1
    rows, cols = (slice(max(int(c - reach), 0), min(int(c + reach) + 2, side)) for c, side in zip((y, x), shape, strict=True))
    if rows.start >= rows.stop or cols.start >= cols.stop:
        return None
    dy, dx = (axis.astype(np.float32) - np.float32(c) for axis, c in zip(np.ogrid[rows, cols], (y, x), strict=True))
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    return (rows, cols), dx, dy, u, v, np.abs(u / (radius * aspect)) ** power + np.abs(v * aspect / radius) ** power


def _paint(rng: np.random.Generator, h: int, w: int, families: np.ndarray) -> dict[str, np.ndarray]:
    """Back to front: which material each pixel shows, its texture, and how much direct, ambient and mirrored light."""
    maps = {name: np.zeros((h, w), np.float32) for name in ("material", "texture", "direct", "ambient", "mirror")}
    coarse, mottle, grains = fractal(rng, h, w, 1.8), fractal(rng, h, w, 0.9), fractal(rng, h, w, 0.3)
    light = np.array([*rng.normal(0, 0.35, 2), 1.0])
    lx, ly, lz = (light / np.linalg.norm(light)).tolist()  # right, down, towards the camera
    local = rng.integers(0, MATERIALS, (3, 3, 5))  # like lies near like: each part of the frame has its own materials
    side, ground = min(h, w), 1.5 * max(h, w)
    radii = 1 / np.sqrt(rng.uniform((0.45 * side) ** -2, 4.0**-2, int(350 * h * w / 256**2)))  # density r^-3
    for radius in (ground, *rng.uniform(0.15 * side, 0.5 * side, 5).tolist(), *radii.tolist()):
        y, x = (h / 2, w / 2) if radius == ground else rng.uniform(-0.05, 1.05, 2) * (h, w)
        form = float(np.exp(rng.normal(0, 0.35))), rng.uniform(0, np.pi), float(rng.choice([1.3, 2, 2, 2.6, 6]))  # leaf .. box
        relief = 0.0 if radius == ground else float(rng.choice([0, 0.35, 0.8], p=[0.45, 0.3, 0.25]))  # flat .. ball
        nearby = local[min(max(int(3 * y / h), 0), 2), min(max(int(3 * x / w), 0), 2)]
        chosen = int(rng.choice(nearby) if rng.random() < 0.75 else rng.integers(MATERIALS))
        _, _, kind, strength, gloss, _, _ = FAMILIES[families[chosen]]
        height = 0.0 if radius == ground else min(0.75 * radius, 18)
        shadow = _superellipse((h, w), y - height * ly, x - height * lx, radius, form)
        if shadow:
            soft = np.clip((1 - shadow[-1]) * 3, 0, 1)
            maps["direct"][shadow[0]] *= 1 - 0.8 * soft
            maps["ambient"][shadow[0]] *= 1 - 0.3 * soft
        area = _superellipse((h, w), y, x, radius, form)
        if not area:
            continue
        box, dx, dy, u, v, distance = area
        nx, ny = relief * dx / (1.05 * radius), relief * dy / (1.05 * radius)
        nz = np.sqrt(np.maximum(1 - nx * nx - ny * ny, 0.05))
        lambert = nx * lx + ny * ly + nz * lz
        glint = gloss * (relief > 0) * np.maximum((lambert + nz) / float(np.sqrt(2 + 2 * lz)), 0) ** 60  # Blinn
        fine = grains[box] if kind == "speckle" else mottle[box]
        texture = strength * _texture(kind, u, v, coarse[box], fine, rng.uniform(6, 16)) + rng.normal(0, 0.12)
        for name, value in zip(maps, (chosen, texture, np.maximum(lambert, 0), 0.5 + 0.5 * nz, glint), strict=True):
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
    level, sky = float(np.exp(rng.uniform(np.log(0.55), 0))), rng.uniform(0.08, 0.25)
    maps = _paint(rng, h + 2, w + 2, families)
    cube = reflectance(ks[maps.pop("material").astype(int)] * np.exp(maps.pop("texture"))[..., None])
    on, off, mirror = (maps[name][..., None] for name in ("direct", "ambient", "mirror"))
    cube = cube * (on * direct + sky * off * ambient) + mirror * direct
    for axis in (0, 1):
        cube = 0.76 * cube + 0.12 * (np.roll(cube, 1, axis) + np.roll(cube, -1, axis))
    return np.clip(cube[1:-1, 1:-1] * level, 0, 1, dtype=np.float32)


def _write_synthetic_scene(job: tuple[Path, str, int, bool], settings: dict) -> None:
    root, name, number, test = job
    spec, photo = root / "Train_Spec" / f"{name}.mat", root / ("Test_RGB" if test else "Train_RGB") / f"{name}.jpg"
    if photo.exists() and (test or spec.exists()):
        return
    rng = np.random.default_rng([settings["seed"], number])
    cube = synthetic_cube(rng, *settings["size"])
    response = common.camera_response(settings["camera"], WAVELENGTHS)
    jpeg = common.render_rgb(cube, response, rng=rng, exposure=settings["exposure"])[1]
    if not test:
        memory = io.BytesIO()
        with h5py.File(memory, "w") as file:  # MATLAB is column-major: h5py sees bands, W, H
            file.create_dataset("cube", data=cube.transpose(2, 1, 0), chunks=(31, 64, 64), compression="gzip",
                                compression_opts=1)
            file["bands"], file["norm_factor"] = WAVELENGTHS[:, None], np.ones((1, 1))
        atomic_write(spec, lambda file: file.write(memory.getbuffer()))
    atomic_write(photo, lambda file: file.write(jpeg))


def make_synthetic(args: argparse.Namespace) -> None:
    """Write a raw data set in the ARAD-1K layout: n scenes, a fifth of them for validation, and two test images."""
    root, n, (h, w) = Path(args.output_root), args.synthetic, args.size
    settings = {"format": "hsi-synthetic", "scenes": n, "size": [h, w], "seed": args.seed, "camera": args.camera,
                "exposure": None if args.exposure == "auto" else args.exposure or 1.0}
    if n < 2 or min(h, w) < max(64, args.patch_size):
        raise UserError(f"--synthetic {n} --size {h}x{w}: needs 2 scenes or more, of at least 64 pixels and --patch-size "
                        f"({args.patch_size}) a side")
    common.camera_response(args.camera, WAVELENGTHS)  # complain about the camera before anything is written
    check_same_settings(root, root / "synthetic.json", settings)
    check_disk(root, n * h * w * 31 * 4)
    write_json(root / "synthetic.json", settings)
    names, held_out = [f"synthetic_{i + 1:04d}" for i in range(n + 2)], max(1, round(n / 5))
    for file_name, part in (("train_list.txt", names[: n - held_out]), ("valid_list.txt", names[n - held_out : n])):
        atomic_write(root / "split_txt" / file_name, lambda file, part=part: file.write("\n".join([*part, ""]).encode()))
    jobs = [(root, name, i, i >= n) for i, name in enumerate(names)]
    for _ in run_jobs(partial(_write_synthetic_scene, settings=settings), jobs, args.workers, "synthetic scenes"):
        pass
    print(f"{root}: {n - held_out} training and {held_out} validation scenes of {h} x {w} x 31 and 2 test images, raw "
          f"ARAD-1K layout; stage with --arad-root {root}")


# --- sources --------------------------------------------------------------------------------------------------------


def collect_scenes(args: argparse.Namespace) -> list[tuple[str, Scene]]:
    """(split, scene) of the source, by its list files where it has them, else --val-fraction drawn with --split-seed."""
    root, listed = Path(args.arad_root or args.cave_root or args.cubes), False
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder of the data set")
    if args.arad_root:
        splits = data.find_scenes(root)
        listed = (root / "split_txt" / "valid_list.txt").exists()
    else:
        if args.cave_root:  # <scene>_ms/<scene>_ms_01.png, often in a second folder of that name, and a .bmp beside them
            cubes = {p.name.removesuffix("_ms"): p for p in root.iterdir() if p.is_dir() and any(p.rglob("*_01.png"))}
            images = [*root.rglob("*.bmp"), *root.glob("*.jpg")]
        else:
            cubes = {p.stem: p for p in root.iterdir() if p.suffix.lower() in data.CUBE_SUFFIXES}
            images = [p for p in root.iterdir() if p.suffix.lower() in data.RGB_SUFFIXES]
        by_stem = {p.stem.lower().removesuffix("_rgb"): p for p in images}
        splits = {"train": [Scene(name, cubes[name], by_stem.get(name.lower())) for name in sorted(cubes)]}
    if listed and args.val_fraction is not None:
        raise UserError(f"--val-fraction: {root / 'split_txt'} lists the splits, and the lists are used; leave it out")
    if not listed:
        scenes, share = splits["train"], 0.1 if args.val_fraction is None else args.val_fraction
        count = max(min(max(round(share * len(scenes)), int(share > 0)), len(scenes) - 1), 0)
        drawn = set(np.random.default_rng(args.split_seed).permutation(len(scenes))[:count].tolist())
        splits["val"] = [scene for i, scene in enumerate(scenes) if i in drawn]
        splits["train"] = [scene for i, scene in enumerate(scenes) if i not in drawn]
    jobs = [(split, scene) for split in ("train", "val", "test") for scene in splits.get(split, ())]
    if not jobs or jobs[0][1].cube_path is None:
        raise UserError(f"{root}: no scenes in it; see dataset_setup.py --help for the layouts that are known")
    return jobs


def resolve_settings(args: argparse.Namespace, jobs: list[tuple[str, Scene]]) -> dict:
    """All that the staged files depend on, with bands and wavelengths as the first readable scene has them."""
    names = ("patch_size", "stride", "patch_grid", "dtype", "scale", "cube_key", "axes", "render_rgb", "camera", "seed",
             "val_fraction", "split_seed")
    settings = {name: getattr(args, name) for name in names}
    settings["exposure"] = None if args.exposure in (None, "auto") else args.exposure
    first = jobs[0][1]
    shape = data.read_rgb(first.rgb_path).shape if first.rgb_path else None
    bands = data.read_cube(first.cube_path, key=args.cube_key, axes=args.axes, rgb_shape=shape).shape[2]
    nm = data.read_wavelengths(first.cube_path)
    if args.wavelengths or (nm is None and bands == 31):
        nm = np.linspace(*(args.wavelengths or (400.0, 700.0)), bands).tolist()
    if nm is None or len(nm) != bands:
        raise UserError(f"{first.cube_path}: {bands} bands, but no wavelengths of them in the file; "
                        "give --wavelengths FIRST:LAST in nm")
    if args.render_rgb:
        common.camera_response(args.camera, nm)
    return settings | {"bands": bands, "wavelengths": nm}


def load_scene(scene: Scene, settings: dict) -> tuple[np.ndarray | None, np.ndarray]:
    """Cube (H, W, bands) float32, scaled but not judged, and RGB, rendered where the settings ask for it."""
    render = scene.cube_path and settings["render_rgb"]
    rgb = data.read_rgb(scene.rgb_path) if scene.rgb_path and render != "all" else None
    if scene.cube_path is None:
        return None, rgb
    cube = data.read_cube(scene.cube_path, key=settings["cube_key"], axes=settings["axes"], bands=settings["bands"],
                          rgb_shape=None if rgb is None else rgb.shape)
    cube = cube if settings["scale"] == 1 else cube / np.float32(settings["scale"])
    if rgb is None and not render:
        raise UserError(f"{scene.cube_path}: no image of scene {scene.name}; add it as a JPEG, PNG or BMP of that name, "
                        "or render it with --render-rgb")
    if rgb is None:
        rng = np.random.default_rng([settings["seed"], *scene.name.encode()])
        response = common.camera_response(settings["camera"], settings["wavelengths"])
        rgb = common.render_rgb(np.nan_to_num(cube), response, rng=rng, exposure=settings["exposure"])[0]
    return cube, rgb


# --- staging --------------------------------------------------------------------------------------------------------


def run_jobs(work: Callable, jobs: list, workers: int, what: str) -> Iterator:
    """Results of work(job) as they come, from parallel processes, with a progress bar; the first error ends it."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ignore_interrupt = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    with ProcessPoolExecutor(min(workers, max(len(jobs), 1)), mp_context=context, **ignore_interrupt) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), total=len(jobs), desc=what, unit="scene"):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(f"{what}: a worker process died, out of memory perhaps; try fewer --workers") from None
        finally:
            pool.shutdown(cancel_futures=True)


def check_disk(root: Path, needed: int) -> None:
    """Print what will be written, and refuse when it does not fit."""
    place = next(p for p in (root.absolute(), *root.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    print(f"{root}: {needed / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free", flush=True)
    if needed + 1e7 > free:  # 10 MB for index and pictures
        raise UserError(f"{root}: {needed / 1e9:.2f} GB to write do not fit into the {free / 1e9:.2f} GB free; make room "
                        "or choose another --output-root")


def check_same_settings(root: Path, path: Path, settings: dict) -> None:
    """A folder may be new, empty, or begun with the same settings."""
    if path.exists():
        old = json.loads(path.read_text())
        for name, value in settings.items():
            if old.get(name) != value:
                raise UserError(f"{root}: was made with {name} {old.get(name)}, not {value}; remove the folder or give "
                                "another --output-root")
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root}: exists and is none of these folders; give a new or empty folder as --output-root")


def _save(path: Path, array: np.ndarray) -> str:
    memory = io.BytesIO()
    np.save(memory, array)
    atomic_write(path, lambda file: file.write(memory.getbuffer()))
    return hashlib.sha256(memory.getbuffer()).hexdigest()


def _source(scene: Scene) -> list:
    """Names, sizes and times of the raw files, to notice a changed one."""
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in (scene.cube_path, scene.rgb_path) if p]


def stage_scene(job: tuple[str, Scene], root: Path, settings: dict) -> dict:
    """Write one scene's .npy files and, last, its record, which becomes its entry in index.json."""
    split, scene = job
    cube, rgb = load_scene(scene, settings)
    entry = {"name": scene.name, "shape": list(rgb.shape[:2]), "rgb": f"{split}/{scene.name}.rgb.npy",
             "rgb_range": [rgb.min(), rgb.max()], "rgb_mean": rgb.mean((0, 1)), "rgb_std": rgb.std((0, 1)),
             "source": _source(scene)}
    if cube is not None:
        data.check_cube(cube, scene.cube_path)
        rows, cols = data.patch_grid(*cube.shape[:2], *(settings[k] for k in ("patch_size", "stride", "patch_grid")))
        dtype = settings["dtype"] if split == "train" else "float32"  # what is measured against is never rounded
        entry |= {"shape": list(cube.shape), "dtype": dtype, "cube": f"{split}/{scene.name}.cube.npy",
                  "range": [cube.min(), cube.max()], "zeros": np.mean(cube == 0), "mean": cube.mean((0, 1), np.float64),
                  "std": cube.std((0, 1), np.float64), "min": cube.min((0, 1)), "max": cube.max((0, 1)),
                  "grid": [len(rows), len(cols)], "patches": len(rows) * len(cols)}
        entry["cube_sha256"] = _save(root / entry["cube"], np.ascontiguousarray(cube, dtype))
    entry["rgb_sha256"] = _save(root / entry["rgb"], rgb)
    record = root / ".staging" / f"{split}.{scene.name}.json"
    write_json(record, entry)
    return json.loads(record.read_text())


def write_index(root: Path, splits: dict[str, list[dict]], settings: dict) -> dict:
    """index.json: what the loaders need, and the statistics of the training scenes pooled over pixels."""
    train = splits["train"] or splits["val"]
    pixels = np.array([entry["shape"][0] * entry["shape"][1] for entry in train], float)
    low, high = (f([entry[name] for entry in train], 0) for f, name in ((np.min, "min"), (np.max, "max")))
    statistics = {"min": low, "max": high}
    for kind in ("", "rgb_"):
        means, stds = (np.array([entry[kind + name] for entry in train]) for name in ("mean", "std"))
        mean, square = (np.average(x, axis=0, weights=pixels) for x in (means, stds**2 + means**2))
        statistics |= {f"{kind}mean": mean, f"{kind}std": np.sqrt(np.maximum(square - mean**2, 0))}
    index = {"format": "hsi-staged", "version": 1, "bands": settings["bands"], "wavelengths": settings["wavelengths"],
             "settings": settings, "splits": splits, "statistics": statistics,
             "normalisation": {"rgb": "uint8; per-scene rgb_range holds the whole-frame min and max for per_image",
                               "cube": f"as in the raw file, divided by {settings['scale']:g}"}}
    write_json(root / "index.json", index)
    return index


def contact_sheet(root: Path, index: dict, most: int = 12) -> None:
    """contact_sheet.png: RGB, cube rendered, three bands and mean spectra of some scenes. A wrong transpose shows."""
    from matplotlib.figure import Figure

    scenes = index["splits"]["train"] + index["splits"]["val"]
    scenes = [scenes[i] for i in sorted({*np.linspace(0, len(scenes) - 1, min(most, len(scenes))).astype(int)})]
    nm = index["wavelengths"]
    figure = Figure(figsize=(13, 2.1 * len(scenes)), layout="constrained", dpi=70)
    for row, entry in zip(figure.subplots(len(scenes), 6, squeeze=False), scenes, strict=True):
        step = max(max(entry["shape"]) // 256, 1)
        rgb, cube = (np.load(root / entry[kind], mmap_mode="r")[::step, ::step] for kind in ("rgb", "cube"))
        cube = cube.astype(np.float32)
        chosen = [len(nm) // 6, len(nm) // 2, len(nm) * 5 // 6]
        visible = min(nm) < 500 and max(nm) > 600
        colour = common.cube_to_srgb(cube, nm) if visible else cube[..., chosen[::-1]]
        pictures = [(f"{entry['name']} RGB", rgb), ("cube in colour", colour)]
        pictures += [(f"{nm[i]:.0f} nm", cube[..., i]) for i in chosen]
        for axis, (title, picture) in zip(row, pictures, strict=False):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=float(cube.max()))
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()
        for name, part in (("top half", cube[: len(cube) // 2]), ("bottom half", cube[len(cube) // 2 :])):
            row[5].plot(nm, part.mean((0, 1)), label=name)
        row[5].tick_params(labelsize=6)
        row[5].legend(fontsize=6)
    atomic_write(root / "contact_sheet.png", lambda file: figure.savefig(file, format="png"))


def _frame_size(scene: Scene, settings: dict) -> tuple[int, int]:
    if scene.rgb_path is None:
        return data.read_cube(scene.cube_path, key=settings["cube_key"], axes=settings["axes"], bands=settings["bands"]).shape[:2]
    with data._reading(scene.rgb_path, "an RGB image"), Image.open(scene.rgb_path) as image:
        return image.height, image.width


def _bytes_needed(split: str, scene: Scene, settings: dict) -> int:
    """Bytes on disk of one staged scene; an error when no patch fits into it."""
    h, w = _frame_size(scene, settings)
    value = 2 if split == "train" and settings["dtype"] == "float16" else 4
    if scene.cube_path:
        data.patch_grid(h, w, settings["patch_size"], settings["stride"])
    return h * w * (3 + (settings["bands"] * value if scene.cube_path else 0)) + 4096


def _is_done(root: Path, entry: dict | None, scene: Scene) -> bool:
    files = [entry[kind] for kind in ("cube", "rgb") if kind in entry] if entry else []
    return bool(files) and entry["source"] == _source(scene) and all((root / file).exists() for file in files)


def stage(args: argparse.Namespace) -> None:
    """Raw data set -> staged folder. Scenes that are done are kept, so that a stopped run carries on."""
    root, jobs, done = Path(args.output_root), collect_scenes(args), {}
    for _, scene in jobs:
        for path in filter(None, (scene.cube_path, scene.rgb_path)):
            if not path.exists():
                raise UserError(f"{path}: no such file, though scene {scene.name} is listed; add it or mend the list")
        if scene.rgb_path is None and not args.render_rgb:
            raise UserError(f"{scene.cube_path}: no image of scene {scene.name}; add it as a JPEG, PNG or BMP of that "
                            "name, or render it with --render-rgb")
    settings = json.loads(common.to_json(resolve_settings(args, jobs)))
    check_same_settings(root, root / "settings.json", settings)
    if (root / "index.json").exists():
        splits = json.loads((root / "index.json").read_text())["splits"]
        done = {(split, entry["name"]): entry for split, entries in splits.items() for entry in entries}
    for path in (root / ".staging").glob("*.json"):
        entry = json.loads(path.read_text())
        done[path.name.split(".")[0], entry["name"]] = entry
    strange = set(done) - {(split, scene.name) for split, scene in jobs}
    if strange:
        raise UserError(f"{root}: holds {'/'.join(min(strange))}, which the source lacks; give another --output-root")
    left = [job for job in jobs if not _is_done(root, done.get((job[0], job[1].name)), job[1])]
    check_disk(root, sum(_bytes_needed(*job, settings) for job in left))
    write_json(root / "settings.json", settings)
    for _, scene in left: pass
    for split_entry in run_jobs(partial(stage_scene, root=root, settings=settings), left, args.workers, "staging"):
        done[split_entry["rgb"].split("/")[0], split_entry["name"]] = split_entry
    splits = {split: [done[split, s.name] for other, s in jobs if other == split] for split in ("train", "val", "test")}
    contact_sheet(root, write_index(root, splits, settings))
    shutil.rmtree(root / ".staging", ignore_errors=True)
    print(f"{root}: {', '.join(f'{len(v)} {k}' for k, v in splits.items())} scenes ({len(jobs) - len(left)} were there), "
          f"{sum(e['patches'] for e in splits['train'])} training patches, {settings['bands']} bands; "
          f"look at {root / 'contact_sheet.png'}")


# --- checking, command line -----------------------------------------------------------------------------------------


def inspect_scene(job: tuple[str, Scene], settings: dict) -> tuple[str, str, str, str]:
    """One row of the table: split, name, facts, problem."""
    split, scene = job
    facts = ""
    try:
        cube, rgb = load_scene(scene, settings)
        if cube is None:
            return split, scene.name, f"{rgb.shape[0]} x {rgb.shape[1]} RGB", ""
        facts = (f"{' x '.join(map(str, cube.shape))}  {np.nanmin(cube):.4g} to {np.nanmax(cube):.4g}  "
                 f"zeros {100 * np.mean(cube == 0):.3f} %  NaN {np.isnan(cube).sum()}")
        data.check_cube(cube, scene.cube_path)
    except UserError as error:
        return split, scene.name, facts, str(error)
    return split, scene.name, facts, ""


def verify(args: argparse.Namespace) -> int:
    """Open every scene, print a table, write nothing. -> exit code."""
    jobs = collect_scenes(args)
    work = partial(inspect_scene, settings=resolve_settings(args, jobs))
    rows = sorted(run_jobs(work, jobs, args.workers, "verifying"))
    for split, name, facts, problem in rows:
        print(f"{split:5s} {name:24s} {facts}{'  PROBLEM ' + problem if problem else ''}")
    problems = sum(bool(row[3]) for row in rows)
    print(f"{len(rows)} scenes, {problems} with problems")
    return int(problems > 0)


def _number(kind: type, low: float, high: float = np.inf) -> Callable[[str], float]:
    def number(text: str) -> float:
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)
    return number


def _size(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)


def build_parser() -> common.CliParser:
    parser = common.CliParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_argument_group("source").add_mutually_exclusive_group(required=True)
    source.add_argument("--arad-root", metavar="DIR", help="ARAD-1K layout: Train_Spec, Train_RGB, Test_RGB, split_txt")
    source.add_argument("--cave-root", metavar="DIR", help="CAVE layout: a folder of band images for each scene")
    source.add_argument("--cubes", metavar="DIR", help="cubes (.mat .npy .npz .hdr), each with its RGB of the same name")
    source.add_argument("--synthetic", type=int, metavar="N", help="make N raw scenes, to be staged with --arad-root")
    add = parser.add_argument_group("output").add_argument
    add("--output-root", metavar="DIR", help="the folder to write")
    add("--verify-only", action="store_true", help="open everything, print a table; exit code 1 with any problem")
    add("--patch-size", type=_number(int, 1), default=128, help="side of a training patch (128)")
    add("--stride", type=_number(int, 1), default=8, help="distance of patches (8)")
    add("--patch-grid", choices=("floor", "cover"), default="floor", help="MST++'s grid, or one to the border too")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of training cubes; the others are float32")
    add("--workers", type=_number(int, 1), default=min(8, os.cpu_count() or 1), help="parallel processes")
    add = parser.add_argument_group("reading").add_argument
    add("--val-fraction", type=_number(float, 0, 1), help="share for validation where there are no lists (0.1)")
    add("--split-seed", type=_number(int, 0), default=0, help="seed of that draw")
    add("--scale", type=_number(float, 1e-12), default=1.0, help="the stored value that means 1")
    add("--cube-key", help="name of the cube in the files, where it is not a usual one")
    add("--axes", help="stored order of h, w and c, such as cwh, where it cannot be told")
    add("--wavelengths", type=lambda text: tuple(map(float, text.split(":"))), metavar="FIRST:LAST", help="nm")
    add = parser.add_argument_group("camera and synthetic scenes").add_argument
    add("--render-rgb", nargs="?", const="missing", choices=("missing", "all"), help="render the missing images, or all")
    add("--camera", default="analytic", help="analytic, analytic2, cie1964, or a CSV file with rows nm,r,g,b")
    add("--exposure", type=lambda text: text if text == "auto" else _number(float, 1e-9)(text),
        help="a gain, 1: white is full scale (default of --synthetic), or auto: mean 0.18 (default of --render-rgb)")
    add("--seed", type=_number(int, 0), default=0, help="seed of scenes and camera noise")
    add("--size", type=_size, default=(256, 256), metavar="HxW", help="of synthetic scenes (256x256)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.verify_only and args.synthetic is None:
        return verify(args)
    if not args.output_root:
        raise UserError("--output-root: give the folder to write")
    make_synthetic(args) if args.synthetic is not None else stage(args)
    return 0


if __name__ == "__main__":
    common.run_cli(main)
