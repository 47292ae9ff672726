"""Prepares data: any raw data set becomes a staged folder that the trainers read fast, or a synthetic raw one is made.

    python dataset_setup.py --arad-root RAW --output-root STAGED --patch-size 128 --stride 8 --workers 8
    python dataset_setup.py --cave-root CAVE --output-root STAGED --render-rgb --val-fraction 0.2
    python dataset_setup.py --cubes DIR --output-root STAGED --scale 4095       # .mat, .npy, .npz, ENVI .hdr
    python dataset_setup.py --arad-root RAW --verify-only                      # a table; exit code 1 with any problem
    python dataset_setup.py --synthetic 20 --output-root RAW --size 256x256    # raw scenes in the ARAD-1K layout

A staged folder has `{train,val,test}/<scene>.cube.npy` (H, W, bands) and `.rgb.npy` (H, W, 3), index.json (statistics,
checksums, patch grids) and contact_sheet.png, where a wrong transpose shows. A scene is written whole or not at all; the
same command again carries on where the last one stopped."""

import argparse
import hashlib
import io
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common_utils_v32 as common
import optimized_dataloader as data
from camera_colour import CAMERAS, camera_response, cube_to_srgb, render_rgb
from common_utils_v32 import UserError, atomic_write, read_json, write_json
from cube_files import (
    CUBE_SUFFIXES,
    FIELD_BANDS,
    RGB_SUFFIXES,
    arad_mat,
    check_cube,
    check_wavelengths,
    read_cube,
    read_rgb,
    read_wavelengths,
)
from synthetic_scenes import EXPOSURE, WAVELENGTHS, synthetic_cube


def _write_synthetic_scene(job: tuple[Path, str, int, bool], settings: dict) -> None:
    root, name, number, test = job
    rng = np.random.default_rng([settings["seed"], number])
    cube = synthetic_cube(rng, *settings["size"])
    response = camera_response(settings["camera"], WAVELENGTHS)
    jpeg = render_rgb(cube, response, rng=rng, exposure=settings["exposure"])[1]
    if not test:
        mat = arad_mat(cube, WAVELENGTHS)
        atomic_write(root / "Train_Spec" / f"{name}.mat", lambda file: file.write(mat))
    atomic_write(
        root / ("Test_RGB" if test else "Train_RGB") / f"{name}.jpg", lambda file: file.write(jpeg)
    )


def make_synthetic(args: argparse.Namespace) -> None:
    """Write a raw data set in the ARAD-1K layout: n scenes, a fifth of them for validation, and two test images."""
    root, n, (h, w) = Path(args.output_root), args.synthetic, args.size
    exposure = None if args.exposure == "auto" else args.exposure or EXPOSURE
    settings = {
        "scenes": n,
        "size": [h, w],
        "seed": args.seed,
        "camera": args.camera,
        "exposure": exposure,
    }
    if n < 2 or min(h, w) < max(64, args.patch_size):
        raise UserError(
            f"--synthetic {n} --size {h}x{w}: give 2 or more scenes, of 64 and --patch-size or more pixels a side"
        )
    camera_response(
        args.camera, WAVELENGTHS
    )  # complain about the camera before anything is written
    claim(root, root / "synthetic.json", settings, n * h * w * 31 * 4)
    names, train = [f"synthetic_{i + 1:04d}" for i in range(n + 2)], n - max(1, round(n / 5))
    for part, listed in (("train", names[:train]), ("valid", names[train:n])):
        text = "\n".join([*listed, ""]).encode()
        atomic_write(
            root / "split_txt" / f"{part}_list.txt", lambda file, text=text: file.write(text)
        )
    jobs = [(root, name, i, i >= n) for i, name in enumerate(names)]
    list(
        run_jobs(
            partial(_write_synthetic_scene, settings=settings),
            jobs,
            args.workers,
            "synthetic scenes",
        )
    )
    print(
        f"{root}: {train} training and {n - train} validation scenes of {h} x {w} x 31, 2 test images; stage with --arad-root"
    )


def _by_name(found: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    names: dict[str, Path] = {}
    for name, path in found:
        if names.setdefault(name, path) != path:
            raise UserError(f"{path} and {names[name]} are both scene {name}; rename or remove one")
    return names


def collect_scenes(args: argparse.Namespace) -> list[tuple[str, data.Scene]]:
    """(split, scene) of the source, by its list files where it has them, else --val-fraction drawn with --split-seed."""
    root, listed = Path(args.arad_root or args.cave_root or args.cubes), False
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder of the data set")
    if args.arad_root:
        splits = data.find_scenes(root)
        listed = (root / "split_txt" / "valid_list.txt").exists()
    else:  # CAVE: <scene>_ms/<scene>_ms_01.png, often in a second folder of that name, and <scene>_RGB.bmp
        cubes = _by_name(
            (p.stem.removesuffix("_ms"), p)
            for p in root.iterdir()
            if p.suffix.lower() in CUBE_SUFFIXES or (p.is_dir() and any(p.rglob("*_01.png")))
        )
        images = _by_name(
            (p.stem.lower().removesuffix("_rgb"), p)
            for p in root.rglob("*")
            if p.suffix.lower() in RGB_SUFFIXES
        )
        splits = {
            "train": [
                data.Scene(name, cubes[name], images.get(name.lower())) for name in sorted(cubes)
            ]
        }
    if listed and args.val_fraction is not None:
        raise UserError(
            f"--val-fraction: {root / 'split_txt'} lists the splits, and the lists are used; leave it out"
        )
    if not listed:
        scenes, share = splits["train"], 0.1 if args.val_fraction is None else args.val_fraction
        count = int(
            np.clip(round(share * len(scenes)), share > 0, max(len(scenes) - 1, 0))
        )  # at least one of each
        drawn = set(
            np.random.default_rng(args.split_seed).permutation(len(scenes))[:count].tolist()
        )
        splits |= {
            split: [s for i, s in enumerate(scenes) if (i in drawn) == (split == "val")]
            for split in ("train", "val")
        }
    jobs = [(split, scene) for split in ("train", "val", "test") for scene in splits.get(split, ())]
    if not jobs or jobs[0][0] == "test":
        raise UserError(
            f"{root}: no scenes in it; see dataset_setup.py --help for the layouts that are known"
        )
    return jobs


def resolve_settings(args: argparse.Namespace, jobs: list[tuple[str, data.Scene]]) -> dict:
    """What the staged files depend on; bands and wavelengths as in the first scene (--verify-only: the first readable)."""
    names = (
        "patch_size",
        "stride",
        "patch_grid",
        "dtype",
        "scale",
        "cube_key",
        "axes",
        "render_rgb",
        "camera",
        "seed",
        "val_fraction",
        "split_seed",
    )
    settings = {name: getattr(args, name) for name in names}
    cubes = [scene for _, scene in jobs if scene.cube_path]
    for scene in cubes:
        try:
            shape = read_rgb(scene.rgb_path).shape if scene.rgb_path else None
            bands = read_cube(
                scene.cube_path, key=args.cube_key, axes=args.axes, rgb_shape=shape
            ).shape[2]
            break
        except UserError:
            if not args.verify_only or scene == cubes[-1]:
                raise
    nm = (
        np.linspace(*args.wavelengths, bands).tolist()
        if args.wavelengths
        else read_wavelengths(scene.cube_path)
    )
    if nm is None and bands == len(FIELD_BANDS):
        nm = FIELD_BANDS
        print(
            f"{scene.cube_path}: does not say its wavelengths; taken as 400..700 nm, or give --wavelengths",
            flush=True,
        )
    if nm is None or len(nm) != bands:
        raise UserError(
            f"{scene.cube_path}: {bands} bands of unknown wavelengths; give --wavelengths FIRST LAST in nm"
        )
    if args.render_rgb:
        camera_response(args.camera, nm)  # complain about the camera now
    return settings | {
        "exposure": None if args.exposure == "auto" else args.exposure,
        "bands": bands,
        "wavelengths": nm,
    }


def check_files(scene: data.Scene, render: str | None) -> None:
    """The files of a scene are there, before anything is written."""
    if scene.cube_path and not scene.cube_path.exists():
        raise UserError(
            f"{scene.cube_path}: no such file, though {scene.name} is listed; add it or mend the list"
        )
    if scene.rgb_path is None and not render:
        raise UserError(
            f"{scene.cube_path}: scene {scene.name} has no RGB image; add it, or render it with --render-rgb"
        )


def load_scene(scene: data.Scene, settings: dict) -> tuple[np.ndarray | None, np.ndarray]:
    """Cube (H, W, bands) float32, scaled but not judged, and RGB, rendered where the settings ask for it."""
    check_files(scene, settings["render_rgb"])
    rendered = scene.cube_path and (settings["render_rgb"] == "all" or scene.rgb_path is None)
    rgb = None if rendered else read_rgb(scene.rgb_path)
    if scene.cube_path is None:
        return None, rgb
    how = {"key": settings["cube_key"], "axes": settings["axes"], "bands": settings["bands"]}
    cube = read_cube(
        scene.cube_path, rgb_shape=None if rgb is None else rgb.shape, **how
    ) / np.float32(settings["scale"])
    check_wavelengths(
        read_wavelengths(scene.cube_path) or settings["wavelengths"],
        settings["wavelengths"],
        scene.cube_path,
    )
    if rgb is None:
        rng = np.random.default_rng([settings["seed"], *scene.name.encode()])
        response = camera_response(settings["camera"], settings["wavelengths"])
        rgb = render_rgb(np.nan_to_num(cube), response, rng=rng, exposure=settings["exposure"])[0]
    return cube, rgb


def run_jobs(work: Callable, jobs: list, workers: int, what: str) -> Iterator:
    """Results of work(job) as they come, from processes that leave Ctrl-C to this one, with a progress bar; an error ends it."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(
        min(workers, len(jobs) or 1), context, signal.signal, (signal.SIGINT, signal.SIG_IGN)
    ) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            for future in tqdm(
                as_completed(futures), total=len(jobs), desc=what, unit="scene", disable=not jobs
            ):
                yield future.result()
        except BrokenExecutor:
            raise UserError(
                f"{what}: a worker process died, out of memory perhaps; try fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def claim(root: Path, path: Path, settings: dict, needed: int) -> None:
    """Take the output folder if it is new, empty, or was begun with these settings (kept in `path`), and `needed` bytes fit."""
    old = read_json(path) if path.exists() else settings
    for name in (name for name, value in settings.items() if old.get(name) != value):
        raise UserError(
            f"{root}: has {name} {old.get(name)}, not {settings[name]}; remove it or give another --output-root"
        )
    if not path.exists() and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(
            f"{root}: exists and holds other things; give a new or empty folder as --output-root"
        )
    free = shutil.disk_usage(
        next(p for p in (root.absolute(), *root.absolute().parents) if p.exists())
    ).free
    print(f"{root}: {needed / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free", flush=True)
    if needed + 1e7 > free:  # 10 MB for index and pictures
        raise UserError(
            f"{root}: {needed / 1e9:.2f} GB do not fit in {free / 1e9:.2f} GB; make room or change --output-root"
        )
    write_json(path, settings)


def _save(path: Path, array: np.ndarray) -> str:
    memory = io.BytesIO()
    np.save(memory, array)
    atomic_write(path, lambda file: file.write(memory.getbuffer()))
    return hashlib.sha256(memory.getbuffer()).hexdigest()


def _source(scene: data.Scene) -> list:
    """Names, sizes and times of the raw files, to notice a changed one."""
    files = [p for p in (scene.cube_path, scene.rgb_path) if p]
    if scene.cube_path and scene.cube_path.suffix == ".hdr":  # ENVI's data lie beside its header
        files += sorted(scene.cube_path.parent.glob(f"{scene.cube_path.stem}.*"))
    elif scene.cube_path and scene.cube_path.is_dir():
        files += sorted(scene.cube_path.rglob("*.png"))
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def stage_scene(job: tuple[str, data.Scene], root: Path, settings: dict) -> None:
    """Write one scene's .npy files and, last, its record `<scene>.json`, which becomes its entry in index.json."""
    split, scene = job
    cube, rgb = load_scene(scene, settings)
    entry = {
        "name": scene.name,
        "shape": rgb.shape[:2],
        "rgb": f"{split}/{scene.name}.rgb.npy",
        "source": _source(scene),
        "rgb_range": [rgb.min(), rgb.max()],
        "rgb_mean": rgb.mean((0, 1)),
        "rgb_std": rgb.std((0, 1)),
    }
    if cube is not None:
        check_cube(cube, scene.cube_path)
        rows, cols = data.patch_grid(
            *cube.shape[:2], *(settings[k] for k in ("patch_size", "stride", "patch_grid"))
        )
        dtype = (
            settings["dtype"] if split == "train" else "float32"
        )  # what is measured against is never rounded
        entry |= {
            "shape": list(cube.shape),
            "dtype": dtype,
            "cube": f"{split}/{scene.name}.cube.npy",
            "range": [cube.min(), cube.max()],
            "min": cube.min((0, 1)),
            "max": cube.max((0, 1)),
            "mean": cube.mean((0, 1), np.float64),
            "std": cube.std((0, 1), np.float64),
            "zeros": np.mean(cube == 0),
            "grid": [len(rows), len(cols)],
            "patches": len(rows) * len(cols),
        }
        entry["cube_sha256"] = _save(root / entry["cube"], np.ascontiguousarray(cube, dtype))
    entry["rgb_sha256"] = _save(root / entry["rgb"], rgb)
    write_json(root / split / f"{scene.name}.json", entry)


def write_index(root: Path, splits: dict[str, list[dict]], settings: dict) -> dict:
    """index.json: what the loaders need, and the statistics of the training scenes pooled over pixels."""
    train = splits["train"] or splits["val"]
    pixels = [entry["shape"][0] * entry["shape"][1] for entry in train]
    statistics = {
        name: f([e[name] for e in train], axis=0) for name, f in (("min", np.min), ("max", np.max))
    }
    for kind in ("", "rgb_"):
        means, stds = (
            np.array([entry[kind + name] for entry in train]) for name in ("mean", "std")
        )
        mean, square = (np.average(x, axis=0, weights=pixels) for x in (means, stds**2 + means**2))
        statistics |= {f"{kind}mean": mean, f"{kind}std": np.sqrt(np.maximum(square - mean**2, 0))}
    facts = {
        "rgb": "uint8; rgb_range: of the whole frame, for per_image",
        "cube": f"raw values / {settings['scale']:g}",
    }
    index = {
        "format": "hsi-staged",
        "version": 1,
        "bands": settings["bands"],
        "wavelengths": settings["wavelengths"],
        "settings": settings,
        "splits": splits,
        "statistics": statistics,
        "normalisation": facts,
    }
    write_json(root / "index.json", index)
    return index


def contact_sheet(root: Path, index: dict, most: int = 12) -> None:
    """contact_sheet.png: RGB, cube rendered, three bands and mean spectra of some scenes. A wrong transpose shows."""
    from matplotlib.figure import Figure  # takes a second to import

    scenes, nm = index["splits"]["train"] + index["splits"]["val"], index["wavelengths"]
    scenes = [
        scenes[i] for i in np.linspace(0, len(scenes) - 1, min(most, len(scenes))).astype(int)
    ]
    bands = [len(nm) // 6, len(nm) // 2, len(nm) * 5 // 6]
    figure = Figure(figsize=(13, 2.1 * len(scenes)), layout="constrained", dpi=70)
    for row, entry in zip(figure.subplots(len(scenes), 6, squeeze=False), scenes, strict=True):
        step = max(max(entry["shape"]) // 256, 1)
        rgb = np.load(root / entry["rgb"], mmap_mode="r")[::step, ::step]
        cube = np.load(root / entry["cube"], mmap_mode="r")[::step, ::step].astype(np.float32)
        pictures = {
            entry["name"]: rgb,
            "cube": cube_to_srgb(cube, nm),
            **{f"{nm[i]:.0f} nm": cube[..., i] for i in bands},
        }
        for axis, (title, picture) in zip(row, pictures.items(), strict=False):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=float(cube.max()))
            axis.set(title=title, xticks=[], yticks=[])
        row[5].plot(
            nm, cube[: len(cube) // 2].mean((0, 1)), nm, cube[len(cube) // 2 :].mean((0, 1))
        )
        row[5].legend(["top half", "bottom half"], fontsize=6)
    atomic_write(root / "contact_sheet.png", lambda file: figure.savefig(file, format="png"))


def _bytes_needed(job: tuple[str, data.Scene], settings: dict) -> int:
    """Bytes on disk of one staged scene; an error when no patch fits into it."""
    split, scene = job
    h, w = (read_rgb(scene.rgb_path) if scene.rgb_path else load_scene(scene, settings)[1]).shape[
        :2
    ]
    if split != "test":
        data.patch_grid(h, w, settings["patch_size"], settings["stride"])
    return (
        h
        * w
        * (
            3
            + settings["bands"]
            * {"train": np.dtype(settings["dtype"]).itemsize, "val": 4, "test": 0}[split]
        )
    )


def _is_done(root: Path, split: str, scene: data.Scene) -> bool:
    """An earlier run wrote this scene, from the same raw files, and its own files are as it left them."""
    path = root / split / f"{scene.name}.json"
    entry = read_json(path) if path.exists() else {"source": None}
    files = [
        (root / entry[kind], entry[f"{kind}_sha256"]) for kind in ("cube", "rgb") if kind in entry
    ]
    return entry["source"] == _source(scene) and all(
        file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == checksum
        for file, checksum in files
    )


def stage(args: argparse.Namespace) -> None:
    """Raw data set -> staged folder. Scenes that are done are kept, so that a stopped run carries on."""
    root, jobs = Path(args.output_root), collect_scenes(args)
    for _, scene in jobs:
        check_files(scene, args.render_rgb)
    settings = resolve_settings(args, jobs)
    left = [job for job in jobs if not _is_done(root, *job)]
    sizes = list(run_jobs(partial(_bytes_needed, settings=settings), left, args.workers, "sizes"))
    claim(root, root / "settings.json", settings, sum(sizes))
    records = {
        split: [root / split / f"{s.name}.json" for k, s in jobs if k == split]
        for split in ("train", "val", "test")
    }
    if strange := {*root.glob("*/*.json")} - {path for paths in records.values() for path in paths}:
        raise UserError(
            f"{min(strange)}: a scene that the source lacks; remove {root} or give another --output-root"
        )
    if left:
        (root / "index.json").unlink(missing_ok=True)  # it speaks of files that will change
    list(
        run_jobs(partial(stage_scene, root=root, settings=settings), left, args.workers, "staging")
    )
    splits = {split: [read_json(path) for path in paths] for split, paths in records.items()}
    contact_sheet(root, write_index(root, splits, settings))
    print(
        f"{root}: {', '.join(f'{len(v)} {k}' for k, v in splits.items())} scenes ({len(jobs) - len(left)} were there), "
        f"{sum(e['patches'] for e in splits['train'])} training patches; look at {root / 'contact_sheet.png'}"
    )


def inspect_scene(job: tuple[str, data.Scene], settings: dict) -> str:
    """One row of the table."""
    row = f"{job[0]:5s} {job[1].name:24s}"
    try:
        cube, rgb = load_scene(job[1], settings)
        row += f" {' x '.join(map(str, (rgb if cube is None else cube).shape))}"
        if cube is not None:
            row += f"  {np.nanmin(cube):.4g} to {np.nanmax(cube):.4g}  zeros {np.mean(cube == 0):.3%}  NaN {np.isnan(cube).sum()}"
            check_cube(cube, job[1].cube_path)
    except UserError as error:
        row += f"  PROBLEM {error}"
    return row


def verify(args: argparse.Namespace) -> int:
    """Open every scene, print a table, write nothing. -> exit code."""
    jobs = collect_scenes(args)
    rows = sorted(
        run_jobs(
            partial(inspect_scene, settings=resolve_settings(args, jobs)),
            jobs,
            args.workers,
            "verifying",
        )
    )
    problems = sum("  PROBLEM " in row for row in rows)
    print(*rows, f"{len(rows)} scenes, {problems} with problems", sep="\n")
    return int(problems > 0)


def main(argv: list[str] | None = None) -> int | None:
    parser = common.CliParser(description=__doc__)
    source = parser.add_argument_group("source").add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--arad-root",
        metavar="DIR",
        help="ARAD-1K layout: Train_Spec, Train_RGB, Test_RGB, split_txt",
    )
    source.add_argument(
        "--cave-root", metavar="DIR", help="CAVE layout: a folder of band images for each scene"
    )
    source.add_argument(
        "--cubes",
        metavar="DIR",
        help="cubes (.mat .npy .npz .hdr), each with its RGB of the same name",
    )
    source.add_argument(
        "--synthetic",
        type=int,
        metavar="N",
        help="make N raw scenes, to be staged with --arad-root",
    )
    add = parser.add_argument
    add("--output-root", metavar="DIR", help="the folder to write")
    add(
        "--verify-only",
        action="store_true",
        help="open everything, print a table; exit code 1 with any problem",
    )
    add("--patch-size", type=int, default=128, help="side of a training patch")
    add("--stride", type=int, default=8, help="distance of patches")
    add(
        "--patch-grid",
        choices=("floor", "cover"),
        default="floor",
        help="MST++'s grid, or one to the border too",
    )
    add(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="of training cubes; the others are float32",
    )
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="parallel processes")
    add(
        "--val-fraction",
        type=float,
        help="share for validation where there are no lists; 0.1 unless given",
    )
    add("--split-seed", type=int, default=0, help="seed of that draw")
    add("--scale", type=float, default=1.0, help="the stored value that means 1")
    add("--cube-key", help="name of the cube in the files, where it is not a usual one")
    add("--axes", help="stored order of h, w and c, such as cwh, where it cannot be told")
    add(
        "--wavelengths",
        type=float,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="nm, where the files do not say",
    )
    add(
        "--render-rgb",
        nargs="?",
        const="missing",
        choices=("missing", "all"),
        help="render the missing images, or all",
    )
    add(
        "--camera",
        default="analytic",
        help=f"{', '.join(CAMERAS)}, or a CSV file with rows nm,r,g,b",
    )
    add(
        "--exposure",
        type=lambda text: text if text == "auto" else float(text),
        help=f"gain of the linear camera signal ({EXPOSURE} for --synthetic), or auto: mean 0.18 (for --render-rgb)",
    )
    add("--seed", type=int, default=0, help="seed of scenes and camera noise")
    add(
        "--size",
        type=lambda text: tuple(map(int, f"{text}x{text}".split("x")[:2])),
        default="256x256",
        help="synthetic H x W",
    )
    args = parser.parse_args(argv)
    lows = {
        "patch_size": 1,
        "stride": 1,
        "workers": 1,
        "scale": 1e-9,
        "exposure": 1e-9,
        "seed": 0,
        "split_seed": 0,
    }
    for name, low in (lows | {"val_fraction": 0}).items():
        value, high = getattr(args, name), 1 if name == "val_fraction" else 1e9
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise UserError(
                f"--{name.replace('_', '-')} {value}: give a number from {low:g} to {high:g}"
            )
    if args.verify_only and args.synthetic is None:
        return verify(args)
    if not args.output_root or args.verify_only:
        raise UserError(
            "--output-root: give the folder to write (and --verify-only another source than --synthetic)"
        )
    return make_synthetic(args) if args.synthetic is not None else stage(args)


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # through the finally that ends the workers
    common.run_cli(main)
