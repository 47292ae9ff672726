"""Prepares data: any raw data set becomes a staged folder that the trainers read fast, or a
synthetic raw one is made.

    python dataset_setup.py --arad-root RAW --output-root STAGED --patch-size 128 --stride 8
    python dataset_setup.py --cave-root CAVE --output-root STAGED --render-rgb --val-fraction 0.2
    python dataset_setup.py --cubes DIR --output-root STAGED --scale 4095   # docs/formats.md
    python dataset_setup.py --arad-root RAW --verify-only         # a table; exit code 1 on problems
    python dataset_setup.py --synthetic 20 --output-root RAW --size 256x256    # ARAD-1K's layout

A staged folder has {train,val,test}/<scene>.cube.npy (H, W, bands) and .rgb.npy (H, W, 3),
index.json (statistics, checksums, patch grids) and contact_sheet.png, where a wrong transpose
shows. A scene is written whole or not at all; the same command again carries on where the last one
stopped."""

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import common_utils_v32 as common
import cube_files
import scene_folders
import terminal
from camera_colour import CAMERAS, SRGB, Wavelengths, camera_response, ordinary_photo, render_rgb
from common_utils_v32 import CliParser, UserError
from cube_files import CUBE_SUFFIXES, Facts, check_cube, read_rgb
from cube_preparation import find_wavelengths, plan_bands, prepare_cube, remark_lines
from measured_spectra import WAVELENGTHS
from optimized_dataloader import patch_grid
from scene_folders import SPLITS, Scene, encoding_of, find_folder_scenes, find_scenes, save_array
from spectral_evaluation import contact_sheet
from synthetic_scenes import EXPOSURE, synthetic_cube

# Flags that the staged files depend on, and what a folder begun before a flag existed has.
GRID = ("patch_size", "stride", "patch_grid")
SETTINGS: tuple[str, ...] = (*GRID, "dtype", "scale", "cube_key", "axes", "render_rgb")
SETTINGS += ("rgb_encoding", "camera", "seed", "val_fraction", "split_seed")
SETTINGS += ("chosen_bands", "no_data", "white", "dark", "fill", "clip")
# Flags that --synthetic has no use for; patches and cubes of any kind may be planned with it.
OF_SOURCE = {*SETTINGS, "wavelengths"}.difference(GRID, ("dtype", "camera", "seed"))
OLD_SETTINGS = {"rgb_encoding": "linear", "clip": False}
SPARE_BYTES = 10_000_000  # for index and pictures

Job = tuple[str, Scene]  # a scene and its split


def make_synthetic(args: argparse.Namespace) -> None:
    """Write a raw data set in the ARAD-1K layout: a fifth for validation, two test images more."""
    root, count = Path(args.output_root), args.synthetic
    height, width = args.size
    exposure = None if args.exposure == "auto" else args.exposure or EXPOSURE
    if count < 2:
        raise UserError(f"--synthetic {count}: give 2 or more scenes")
    least = max(64, args.patch_size)
    if min(height, width) < least:
        what = f"--size {height}x{width}: sides must hold a patch, --patch-size {args.patch_size}"
        raise UserError(f"{what}; give {least} or more, or smaller patches (64 at least)")
    camera_response(args.camera, WAVELENGTHS)  # complains of the camera before anything is written
    settings = {"scenes": count, "size": [height, width], "seed": args.seed}
    settings |= {"camera": args.camera, "exposure": exposure}
    claim(root, root / "synthetic.json", settings, count * height * width * 31 * 4)
    names = [f"synthetic_{i + 1:04d}" for i in range(count + 2)]
    train = count - max(1, round(count / 5))
    for part, listed in (("train", names[:train]), ("valid", names[train:count])):
        common.write_text(root / "split_txt" / f"{part}_list.txt", "\n".join([*listed, ""]))
    jobs = [(name, number, number >= count) for number, name in enumerate(names)]
    work = partial(_write_synthetic_scene, root=root, settings=settings)
    list(run_jobs(work, jobs, args.workers, "synthetic scenes"))
    terminal.say(
        f"{root}: {train} training and {count - train} validation scenes of {height} x {width} "
        "x 31, 2 test images; stage with --arad-root"
    )


def render_photo(
    cube: np.ndarray, nm: Wavelengths, rng: np.random.Generator, settings: dict[str, Any]
) -> tuple[np.ndarray, bytes]:
    """The photo of a cube by the settings' camera and exposure: pixels and JPEG file."""
    response = camera_response(settings["camera"], nm)
    if settings["camera"] == SRGB:
        return ordinary_photo(cube, response, rng=rng)
    return render_rgb(cube, response, rng=rng, exposure=settings["exposure"])


def _write_synthetic_scene(job: tuple[str, int, bool], root: Path, settings: dict) -> None:
    """Cube and photo of a scene, the photo alone of a test image."""
    name, number, test = job
    rng = np.random.default_rng([settings["seed"], number])
    height, width = settings["size"]
    cube = synthetic_cube(rng, height, width, neutral=settings["camera"] == SRGB)
    _, jpeg = render_photo(cube, WAVELENGTHS, rng, settings)
    if not test:
        mat = cube_files.arad_mat(cube, WAVELENGTHS)
        common.atomic_write(root / "Train_Spec" / f"{name}.mat", lambda file: file.write(mat))
    folder = root / ("Test_RGB" if test else "Train_RGB")
    common.atomic_write(folder / f"{name}.jpg", lambda file: file.write(jpeg))


def _draw_validation(scenes: list[Scene], share: float, seed: int) -> dict[str, list[Scene]]:
    """The scenes in two splits, at least one in each where there are two and share is above 0."""
    most = max(len(scenes) - 1, 0)
    least = 1 if share > 0 else 0
    count = int(np.clip(round(share * len(scenes)), least, most))
    drawn = set(np.random.default_rng(seed).permutation(len(scenes))[:count].tolist())
    return {
        "train": [scene for number, scene in enumerate(scenes) if number not in drawn],
        "val": [scene for number, scene in enumerate(scenes) if number in drawn],
    }


def collect_scenes(args: argparse.Namespace) -> list[Job]:
    """The scenes of the source: by its list files, else --val-fraction drawn with --split-seed."""
    root = Path(args.arad_root or args.cave_root or args.cubes)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder of the data set")
    references = [Path(file) for file in (args.white, args.dark) if file]
    if args.arad_root:
        splits = find_scenes(root)
    else:
        splits = {"train": find_folder_scenes(root, leave_out=references)}
    if args.render_rgb == "all" and splits.pop("test", None):
        terminal.say("--render-rgb all: test photos have no cube to render from, and are left out")
    listed = bool(args.arad_root) and (root / "split_txt" / "valid_list.txt").exists()
    if listed and args.val_fraction is not None:
        raise UserError(
            f"--val-fraction: {root / 'split_txt'} lists the splits, and the lists are used; "
            "leave it out"
        )
    if not listed:
        share = 0.1 if args.val_fraction is None else args.val_fraction
        splits |= _draw_validation(splits["train"], share, args.split_seed)
    jobs = []
    for split in SPLITS:
        jobs += [(split, scene) for scene in splits.get(split, ())]
    if not jobs or jobs[0][0] == "test":
        raise UserError(f"{root}: no scenes in it; dataset_setup.py --help shows known layouts")
    return jobs


def resolve_settings(args: argparse.Namespace, jobs: list[Job]) -> dict[str, Any]:
    """What the staged files depend on; bands and wavelengths as in the first scene."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    if args.rgb_encoding is None:
        rendered = args.render_rgb == "all" or not any(scene.rgb_path for _, scene in jobs)
        camera = args.camera if args.render_rgb and rendered else _source_camera(args)
        settings["rgb_encoding"] = encoding_of(camera)
    path, stored, facts = _first_cube(args, [scene for _, scene in jobs if scene.cube_path])
    every = find_wavelengths(path, stored, args.wavelengths)
    nm = [every[band] for band in plan_bands(every, args.chosen_bands, facts.bad)]
    if args.render_rgb:
        camera_response(args.camera, nm)  # complains of the camera now
    exposure = None if args.exposure == "auto" else args.exposure
    settings |= {"exposure": exposure, "bands": len(nm), "wavelengths": nm}
    given = bool(args.wavelengths) or None  # folders of before it was kept have None
    return settings | {"stored_wavelengths": every, "given_wavelengths": given}


def _first_cube(args: argparse.Namespace, scenes: list[Scene]) -> tuple[Path, int, Facts]:
    """Path, stored bands and facts of the first cube (with --verify-only, a readable one)."""
    for scene in scenes:
        assert scene.cube_path is not None
        try:
            shape = read_rgb(scene.rgb_path).shape if scene.rgb_path else None
            how = {"key": args.cube_key, "axes": args.axes, "rgb_shape": shape}
            cube, facts = cube_files.read_stored(scene.cube_path, **how)
            return scene.cube_path, cube.shape[2], facts
        except UserError:
            if not args.verify_only or scene == scenes[-1]:
                raise
    raise UserError("no cubes among the scenes; give a folder that has some")


def claim(root: Path, path: Path, settings: dict[str, Any], needed: int) -> None:
    """Take the output folder if it is new or begun with these settings, and `needed` bytes fit."""
    for folder in (root, *root.glob("*")):
        common.remove_leftovers(folder)
    files = [file for file in root.rglob("*") if file.is_file()]
    if path.exists() and files != [path]:  # else nothing was written with the settings in it
        old = OLD_SETTINGS | common.read_json(path)
        old.setdefault("stored_wavelengths", old.get("wavelengths"))
        for name, value in settings.items():
            if old.get(name) != value:
                raise UserError(
                    f"{root}: has {name} {old.get(name)}, not {value}; remove it or give another "
                    "--output-root"
                )
    elif root.exists() and (not root.is_dir() or files not in ([], [path])):
        raise UserError(
            f"{root}: exists and holds other things; give a new or empty folder as --output-root"
        )
    there = next(p for p in (root.absolute(), *root.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    terminal.say(f"{root}: {needed / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free")
    if needed + SPARE_BYTES > free:
        raise UserError(
            f"{root}: {needed / 1e9:.2f} GB do not fit in {free / 1e9:.2f} GB; make room or change "
            "--output-root"
        )
    common.write_json(path, settings)


def check_files(scene: Scene, render: str | None) -> None:
    """The files of a scene are there, before anything is written."""
    if scene.cube_path and not scene.cube_path.exists():
        raise UserError(
            f"{scene.cube_path}: no such file, though {scene.name} is listed; add it or mend the "
            "list"
        )
    if scene.rgb_path is None and not render:
        raise UserError(
            f"{scene.cube_path}: scene {scene.name} has no RGB image; add it, or render it with "
            "--render-rgb"
        )


def is_rendered(scene: Scene, settings: dict[str, Any]) -> bool:
    """Whether the photo of a scene is made here."""
    return bool(scene.cube_path) and (settings["render_rgb"] == "all" or scene.rgb_path is None)


def load_scene(
    scene: Scene, settings: dict[str, Any]
) -> tuple[np.ndarray | None, np.ndarray, dict[str, Any], Facts | None]:
    """Cube (H, W, bands) float32 as asked for, not judged, RGB (H, W, 3), record, file facts."""
    check_files(scene, settings["render_rgb"])
    rgb = None
    if not is_rendered(scene, settings) and scene.rgb_path:
        rgb = read_rgb(scene.rgb_path)
    if scene.cube_path is None:
        assert rgb is not None  # a scene has one or the other
        return None, rgb, {}, None
    shape = None if rgb is None else rgb.shape
    cube, record, facts = prepare_cube(scene.cube_path, settings, shape)
    if rgb is None:
        rgb = _render(cube, scene.name, settings)
    return cube, rgb, record, facts


def _render(cube: np.ndarray, name: str, settings: dict[str, Any]) -> np.ndarray:
    rendered = encoding_of(settings["camera"])
    if settings["rgb_encoding"] != rendered:
        raise UserError(
            f"--rgb-encoding {settings['rgb_encoding']}: scene {name} is rendered, and photos of "
            f"camera {settings['camera']} are {rendered}; give --rgb-encoding {rendered} if all "
            "photos are, or another --camera, such as srgb"
        )
    rng = np.random.default_rng([settings["seed"], *name.encode()])
    rgb, _ = render_photo(np.nan_to_num(cube), settings["wavelengths"], rng, settings)
    return rgb


def _grid(shape: tuple[int, ...], settings: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Offsets of the patches of a frame (H, W, ...)."""
    patch, stride, mode = (settings[name] for name in GRID)
    return patch_grid(shape[0], shape[1], patch, stride, mode)


def _source(scene: Scene, settings: dict[str, Any]) -> list[list]:
    """Names, sizes and times of the raw files, to notice a changed one."""
    files = cube_files.cube_sources(scene.cube_path) if scene.cube_path else []
    files += [scene.rgb_path] if scene.rgb_path else []
    for reference in (settings["white"], settings["dark"]):
        files += cube_files.cube_sources(Path(reference)) if reference else []
    if Path(settings["camera"]).is_file():  # a table of its response
        files.append(Path(settings["camera"]))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def stage_scene(job: Job, root: Path, settings: dict[str, Any]) -> None:
    """Write one scene's .npy files and, last, its record <scene>.json, its entry in index.json."""
    split, scene = job
    cube, rgb, record, facts = load_scene(scene, settings)
    entry: dict[str, Any] = {
        "name": scene.name,
        "shape": rgb.shape[:2],
        "source": _source(scene, settings),
        "rgb": f"{split}/{scene.name}.rgb.npy",
        "rgb_dtype": str(rgb.dtype),
        "rendered": is_rendered(scene, settings),
        "rgb_range": [rgb.min(), rgb.max()],
        "rgb_mean": rgb.mean((0, 1)),
        "rgb_std": rgb.std((0, 1)),
        **record,
    }
    if cube is not None:
        assert scene.cube_path is not None
        check_cube(cube, scene.cube_path, facts=facts)
        # What is measured against is never rounded.
        dtype = settings["dtype"] if split == "train" else "float32"
        rows, columns = _grid(cube.shape, settings)
        entry |= scene_folders.cube_facts(cube, (len(rows), len(columns)))
        entry |= {"dtype": dtype, "cube": f"{split}/{scene.name}.cube.npy"}
        entry["cube_sha256"] = save_array(root / entry["cube"], np.ascontiguousarray(cube, dtype))
    entry["rgb_sha256"] = save_array(root / entry["rgb"], rgb)
    common.write_json(root / split / f"{scene.name}.json", entry)


def run_jobs(work: Callable, jobs: list, workers: int, what: str) -> Iterator[Any]:
    """Results of work(job) as they come, from processes, with a bar; an error ends it."""
    methods = multiprocessing.get_all_start_methods()
    fork = sys.platform == "linux" and "fork" in methods  # where it is safe: it starts faster
    context = multiprocessing.get_context("fork" if fork else "spawn")
    processes = min(workers, len(jobs) or 1)
    with ProcessPoolExecutor(processes, context, common.begin_worker) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        done = terminal.bar(as_completed(futures), total=len(jobs), desc=what, unit="scene")
        try:
            for future in done:
                yield future.result()
        except BrokenExecutor:
            raise UserError(
                f"{what}: a worker process died, out of memory perhaps; try fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _bytes_needed(job: Job, settings: dict[str, Any]) -> int:
    """Bytes on disk of one staged scene; an error when no patch fits into it."""
    split, scene = job
    rgb = read_rgb(scene.rgb_path) if scene.rgb_path else load_scene(scene, settings)[1]
    height, width = rgb.shape[:2]
    value = 0
    if split != "test":
        _grid(rgb.shape, settings)
        value = np.dtype(settings["dtype"] if split == "train" else "float32").itemsize
    return rgb.nbytes + height * width * settings["bands"] * value


def _is_done(root: Path, job: Job, settings: dict[str, Any]) -> bool:
    """An earlier run wrote this scene from the same raw files, and its files are intact."""
    split, scene = job
    path = root / split / f"{scene.name}.json"
    if not path.exists():
        return False
    entry = common.read_json(path)
    if entry["source"] != _source(scene, settings):
        return False
    return scene_folders.is_intact(root, entry)


def stage(args: argparse.Namespace) -> None:
    """Raw data set -> staged folder. Scenes that are done are kept: a stopped run carries on."""
    root, jobs = Path(args.output_root), collect_scenes(args)
    for _, scene in jobs:
        check_files(scene, args.render_rgb)
    settings = resolve_settings(args, jobs)
    left = [job for job in jobs if not _is_done(root, job, settings)]
    sizes = run_jobs(partial(_bytes_needed, settings=settings), left, args.workers, "sizes")
    claim(root, root / "settings.json", settings, sum(sizes))
    records: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for split, scene in jobs:
        records[split].append(root / split / f"{scene.name}.json")
    strange = set(root.glob("*/*.json")).difference(*records.values())
    if strange:
        raise UserError(
            f"{min(strange)}: a scene that the source lacks, or has in another split; remove "
            f"{root} or give another --output-root"
        )
    if left:
        (root / "index.json").unlink(missing_ok=True)  # it speaks of files that will change
    work = partial(stage_scene, root=root, settings=settings)
    list(run_jobs(work, left, args.workers, "staging"))
    splits = {split: [common.read_json(path) for path in paths] for split, paths in records.items()}
    index = scene_folders.write_index(root, splits, settings, _source_camera(args))
    contact_sheet(root, index)
    counts = ", ".join(f"{len(entries)} {split}" for split, entries in splits.items())
    patches = sum(entry["patches"] for entry in splits["train"])
    for line in remark_lines([*splits["train"], *splits["val"]]):
        terminal.say(line)
    terminal.say(
        f"{root}: {counts} scenes ({len(jobs) - len(left)} were there), {patches} training "
        f"patches; look at {root / 'contact_sheet.png'}"
    )


def _source_camera(args: argparse.Namespace) -> str | None:
    """The camera of photos that came with a synthetic raw folder."""
    return scene_folders.synthetic_camera(Path(args.arad_root)) if args.arad_root else None


def inspect_scene(job: Job, settings: dict[str, Any]) -> str:
    split, scene = job
    row = f"{split:5s} {scene.name:24s}"
    try:
        cube, rgb, record, facts = load_scene(scene, settings)
        shape = rgb.shape if cube is None else cube.shape
        row += f" {' x '.join(map(str, shape))}"
        if cube is not None:
            row += f"  {np.fmin.reduce(cube, None):.4g} to {np.fmax.reduce(cube, None):.4g}"
            row += f"  zeros {np.mean(cube == 0):.3%}  NaN {np.isnan(cube).sum()}"
            row += "".join(f"  {line}" for line in remark_lines([{"name": "note", **record}]))
            check_cube(cube, scene.cube_path or scene.name, facts=facts)
    except UserError as error:
        row += f"  PROBLEM {error}"
    return row


def verify(args: argparse.Namespace) -> int:
    """Open every scene, print a table, write nothing. -> exit code."""
    jobs = collect_scenes(args)
    work = partial(inspect_scene, settings=resolve_settings(args, jobs))
    rows = sorted(run_jobs(work, jobs, args.workers, "verifying"))
    problems = sum("  PROBLEM " in row for row in rows)
    print(*rows, f"{len(rows)} scenes, {problems} with problems", sep="\n")
    return 1 if problems else 0


def _frame_size(text: str) -> tuple[int, int]:
    """256 or 256x320 -> (height, width)."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def _exposure(text: str) -> str | float:
    return text if text == "auto" else float(text)


def _add_source_flags(parser: CliParser) -> None:
    source = parser.add_argument_group("source").add_mutually_exclusive_group(required=True)
    add = partial(source.add_argument, metavar="DIR")
    add("--arad-root", help="ARAD-1K layout: Train_Spec, Train_RGB, Test_RGB, split_txt")
    add("--cave-root", help="CAVE layout: a folder of band images for each scene")
    add("--cubes", help=f"cubes ({' '.join(CUBE_SUFFIXES)}), each with its RGB of the same name")
    synthetic = "make N raw scenes, to be staged with --arad-root"
    source.add_argument("--synthetic", type=int, metavar="N", help=synthetic)


def _add_staging_flags(parser: CliParser) -> None:
    add = parser.add_argument
    on_off = argparse.BooleanOptionalAction
    add("--output-root", metavar="DIR", help="the folder to write")
    verify_help = "open everything, print a table; exit code 1 with any problem"
    add("--verify-only", action=on_off, default=False, help=verify_help)
    add("--patch-size", type=int, default=128, help="side of a training patch")
    add("--stride", type=int, default=8, help="distance of patches")
    grid_help = "MST++'s grid, or one to the border too"
    add("--patch-grid", choices=("floor", "cover"), default="floor", help=grid_help)
    dtype_help = "of training cubes; the others are float32"
    add("--dtype", choices=("float16", "float32"), default="float16", help=dtype_help)
    workers = min(8, os.cpu_count() or 1)
    add("--workers", type=int, default=workers, help="parallel processes")
    fraction_help = "share for validation where there are no lists; 0.1 unless given"
    add("--val-fraction", type=common.finite, help=fraction_help)
    add("--split-seed", type=int, default=0, help="seed of that draw")
    add("--cube-key", help="name of the cube in the files, where it is not a usual one")
    add("--axes", help="stored order of h, w and c, such as cwh, where it cannot be told")
    nm_help = "nm, where the files do not say: first and last, one a band, or a text file"
    add("--wavelengths", nargs="+", metavar="NM", help=nm_help)


def _add_value_flags(parser: CliParser) -> None:
    add = parser.add_argument_group("from stored values to reflectance").add_argument
    bands_help = "bands to keep: numbers from 1 or nm, such as 1-12,20 or 450-650nm"
    add("--bands", dest="chosen_bands", nargs="+", metavar="LIST", help=bands_help)
    white_help = "white reference of counts (any format), averaged over lines, by column and band"
    add("--white", metavar="FILE", help=white_help)
    add("--dark", metavar="FILE", help="its dark reference")
    add("--scale", type=common.finite, default=1.0, help="the stored value that means 1")
    add("--no-data", type=float, help="stored value of no data, where the files do not say")
    add(
        "--fill",
        type=common.finite,
        metavar="VALUE",
        help="take in no data, as this value from 0 to 1",
    )
    clip_help = "cut values a little outside [0, 1], and record how many and how far"
    add("--clip", action=argparse.BooleanOptionalAction, default=False, help=clip_help)


def _add_photo_flags(parser: CliParser) -> None:
    add = parser.add_argument
    which = ("missing", "all")
    render_help = "render the missing images, or all"
    add("--render-rgb", nargs="?", const="missing", choices=which, help=render_help)
    encoding_help = "how the photos' light is encoded: NTIRE's are linear (the default), most srgb"
    add("--rgb-encoding", choices=scene_folders.RGB_ENCODINGS, help=encoding_help)
    camera_help = (
        f"{', '.join(CAMERAS)} (ordinary photos of reflectance), or a CSV file with rows nm,r,g,b"
    )
    add("--camera", default="analytic", help=camera_help)
    exposure_help = (
        f"gain of the linear camera signal ({EXPOSURE} for --synthetic), or auto: mean 0.18 (for "
        "--render-rgb)"
    )
    add("--exposure", type=_exposure, help=exposure_help)
    add("--seed", type=int, default=0, help="seed of scenes and camera noise")
    add("--size", type=_frame_size, default="256x256", help="synthetic H x W")


def _check_range(args: argparse.Namespace, name: str, low: float, high: float = 1e9) -> None:
    value = getattr(args, name)
    if isinstance(value, (int, float)) and not low <= value <= high:
        flag = "--" + name.replace("_", "-")
        raise UserError(f"{flag} {value}: give a number from {low:g} to {high:g}")


def _check_flags(args: argparse.Namespace, parser: CliParser) -> None:
    for name in ("patch_size", "stride", "workers"):
        _check_range(args, name, 1)
    for name in ("scale", "exposure"):
        _check_range(args, name, 1e-9)
    for name in ("seed", "split_seed"):
        _check_range(args, name, 0)
    for name in ("val_fraction", "fill"):
        _check_range(args, name, 0, 1)
    if args.dark and not args.white:
        raise UserError(f"--dark {args.dark}: give --white too")
    if args.white and args.scale != 1:
        raise UserError(f"--scale {args.scale:g}: --white makes counts reflectance; leave one out")
    if args.exposure is not None and args.camera == SRGB:
        what = f"--exposure {args.exposure}: photos of --camera {SRGB} are exposed by themselves"
        raise UserError(f"{what}; leave it out")
    if args.synthetic is None:
        return
    for name in sorted(OF_SOURCE):
        if getattr(args, name) != parser.get_default(name):
            flag = "--" + name.removeprefix("chosen_").replace("_", "-")
            raise UserError(f"{flag}: is for staging; give it with --arad-root, not --synthetic")


def main(argv: list[str] | None = None) -> int | None:
    parser = CliParser(description=__doc__)
    _add_source_flags(parser)
    _add_staging_flags(parser)
    _add_value_flags(parser)
    _add_photo_flags(parser)
    args = parser.parse_args(argv)
    _check_flags(args, parser)
    synthetic = args.synthetic is not None
    if args.verify_only and not synthetic:
        return verify(args)
    if not args.output_root or args.verify_only:
        raise UserError("--output-root: give the folder to write; --verify-only needs a source")
    if synthetic:
        make_synthetic(args)
    else:
        stage(args)
    return None


if __name__ == "__main__":
    # Through the finally that ends the workers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    common.run_cli(main)
