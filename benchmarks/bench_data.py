"""Speed and memory of the training loader, on scenes that it makes itself in a temporary folder.

    python benchmarks/bench_data.py                       # all memory modes, staged and raw
    python benchmarks/bench_data.py --mst-root ../MST-plus-plus --json data.json   # and MST++'s

MST++'s loader needs cv2.

Every figure comes from a process of its own. A patch counts when it is float32, normalised and
augmented (MST++: when its DataLoader hands it over). The first batch is timed from a fresh loader
to its first prepared batch, imports apart. Memory is the peak of the process over what its imports
took (Linux only). Files are in the page cache, as in a run's second epoch. The copy rate is what
one large tensor copy reaches with the same threads, in bytes copied: a loader bound by memory
alone, which wrote each float32 once, would hand over about that many bytes a second."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common_utils_v32 as common  # noqa: E402
from cube_files import FIELD_BANDS
from optimized_dataloader import DataConfig, prepare_batch, train_loader  # noqa: E402
from terminal import CliParser  # noqa: E402

DISTINCT = 8  # scenes really written; the others are hard links to them
BANDS = len(FIELD_BANDS)


def make_scene(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A cube of blurred blocks with a little noise (so that it compresses like an image), and an
    RGB."""
    coarse = rng.uniform(0.02, 0.9, (height // 16 + 1, width // 16 + 1, BANDS)).astype(np.float32)
    cube = np.kron(coarse, np.ones((16, 16, 1), np.float32))[:height, :width]
    cube += rng.normal(0, 0.004, cube.shape).astype(np.float32)
    cube = cube.clip(0, 1)
    return cube, (cube[..., [25, 15, 5]] * 255).astype(np.uint8)


def link_to(original: Path, copy: Path) -> None:
    if not copy.exists():
        os.link(original, copy)


def make_staged(root: Path, scenes: list, count: int) -> Path:
    """A staged folder of `count` scenes."""
    (root / "train").mkdir(parents=True)
    entries = []
    for i in range(count):
        cube, rgb = scenes[i % DISTINCT]
        names = {"cube": f"train/{i}.cube.npy", "rgb": f"train/{i}.rgb.npy"}
        for kind, array in (("cube", cube.astype(np.float16)), ("rgb", rgb)):
            if i < DISTINCT:
                np.save(root / names[kind], array)
            else:
                link_to(root / f"train/{i % DISTINCT}.{kind}.npy", root / names[kind])
        entries.append(
            {
                "name": str(i),
                "shape": list(cube.shape),
                "dtype": "float16",
                **names,
                "rgb_range": [int(rgb.min()), int(rgb.max())],
            }
        )
    common.write_json(
        root / "index.json",
        {
            "format": "hsi-staged",
            "version": 1,
            "bands": BANDS,
            "wavelengths": FIELD_BANDS,
            "splits": {"train": entries},
        },
    )
    return root


def make_raw(root: Path, scenes: list, count: int) -> Path:
    """A raw ARAD-1K folder of `count` scenes: gzip-compressed v7.3 files and JPEGs."""
    for folder in ("Train_Spec", "Train_RGB", "split_txt"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        spec, image = (root / "Train_Spec" / f"{i}.mat", root / "Train_RGB" / f"{i}.jpg")
        if i >= DISTINCT:
            link_to(root / "Train_Spec" / f"{i % DISTINCT}.mat", spec)
            link_to(root / "Train_RGB" / f"{i % DISTINCT}.jpg", image)
            continue
        cube, rgb = scenes[i]
        with h5py.File(spec, "w") as file:
            file.create_dataset(
                "cube", data=cube.transpose(2, 1, 0), compression="gzip", chunks=(BANDS, 64, 64)
            )
            file["bands"] = np.array(FIELD_BANDS)[:, None]
        Image.fromarray(rgb).save(image, quality=90)
    (root / "split_txt" / "train_list.txt").write_text("".join(f"{i}\n" for i in range(count)))
    return root


def peak_mb() -> float:
    """Peak resident memory of this process (getrusage would count the parent's before exec)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def mst_batches(mst_root: str, data_root: str, batch_size: int, workers: int):
    """Batches of the MST++ toolbox, with its own training script's loader settings."""
    sys.path.insert(0, str(Path(mst_root) / "train_code"))
    from hsi_dataset import TrainDataset

    dataset = TrainDataset(data_root=data_root, crop_size=128, bgr2rgb=True, arg=True, stride=8)
    return torch.utils.data.DataLoader(
        dataset, batch_size, shuffle=True, num_workers=workers, drop_last=True
    )


def measure(case: dict) -> dict:
    """One case, in this process: seconds to the first batch, patches per second after it, peak
    memory."""
    torch.set_num_threads(case["threads"])
    before, start = peak_mb(), time.perf_counter()
    if case["mode"] == "mst":
        batches = iter(
            mst_batches(case["mst_root"], case["root"], case["batch_size"], case["workers"])
        )
        ready = next
    else:
        config = DataConfig(
            data_root=case["root"],
            memory_mode=case["mode"],
            batch_size=case["batch_size"],
            num_workers=case["workers"],
            iterations_per_epoch=10**5,
        )
        batches = iter(train_loader(config))

        def ready(batches):
            return prepare_batch(next(batches))

    batch = ready(batches)
    first = time.perf_counter() - start
    for _ in range(3):
        batch = ready(batches)
    times = []
    for _ in range(case["batches"]):
        start = time.perf_counter()
        batch = ready(batches)
        times.append(time.perf_counter() - start)
    delivered = sum(x.numel() * x.element_size() for x in batch)
    rate = len(times) / sum(times)
    return {
        "first_batch_s": first,
        "patches_per_s": rate * case["batch_size"],
        "peak_mb": peak_mb() - before,
        "delivered_gb_per_s": rate * delivered / 1e9,
    }


def in_new_process(case: dict) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(case)], capture_output=True, text=True
    )
    if done.returncode:
        raise common.UserError(f"{case['label']}: {done.stderr.strip().splitlines()[-1]}")
    return {"label": case["label"], **json.loads(done.stdout.splitlines()[-1])}


def copy_rate(threads: int) -> float:
    """GB/s of a copy far larger than the caches (bytes copied, each read once and written once)."""
    torch.set_num_threads(threads)
    source = torch.ones(1 << 26)
    target = torch.empty_like(source).copy_(source)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return source.nbytes / min(times) / 1e9


def cases(args: argparse.Namespace, folder: Path) -> list[dict]:
    rng = np.random.default_rng(0)
    scenes = [make_scene(rng, *args.size) for _ in range(DISTINCT)]
    few, raw = (
        make_staged(folder / "staged", scenes, DISTINCT),
        make_raw(folder / "raw", scenes, DISTINCT),
    )
    many, most = (
        make_staged(folder / "many", scenes, args.many),
        make_staged(folder / "most", scenes, args.most),
    )
    raw_many = make_raw(folder / "raw_many", scenes, args.many)
    todo = [("mst", raw, DISTINCT, workers) for workers in (0, 2) if args.mst_root]
    todo += [
        (mode, root, DISTINCT, 0) for root in (few, raw) for mode in ("lazy", "float16", "standard")
    ]
    todo += [("lazy", few, DISTINCT, 2), ("lazy", many, args.many, 0), ("lazy", most, args.most, 0)]
    todo += [("lazy", raw_many, args.many, 0)]
    listed = []
    for mode, root, count, workers in todo:
        kind = "raw" if "raw" in root.name else "staged"
        listed.append(
            {
                "mode": mode,
                "root": str(root),
                "workers": workers,
                "batch_size": args.batch_size,
                "threads": args.threads,
                "mst_root": args.mst_root,
                "label": f"{mode} {kind}, {count} scenes, {workers} workers",
                "batches": max(2, args.batches // 10)
                if (mode, kind) == ("lazy", "raw")
                else args.batches,
            }
        )  # it decodes
    return listed


def main() -> None:
    parser = CliParser(description=__doc__)
    parser.add_argument("--mst-root", help="checkout of the MST++ toolbox")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--batches", type=common.positive, default=60, help="timed batches a case")
    parser.add_argument("--batch-size", type=common.positive, default=20, help="patches of a batch")
    parser.add_argument("--threads", type=common.positive, default=2, help="of the CPU")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(482, 512), help="height and width of the scenes"
    )
    parser.add_argument(
        "--many", type=int, default=200, help="scenes of the test that memory does not grow"
    )
    parser.add_argument(
        "--most", type=int, default=900, help="scenes of the test of the time to the first batch"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(json.loads(args.child))))
        return
    if args.mst_root and not Path(args.mst_root, "train_code").is_dir():
        raise common.UserError(f"--mst-root {args.mst_root}: no train_code in it; give a checkout")
    copying = copy_rate(args.threads)
    rows = []
    print(
        f"{'loader':42s} {'patches/s':>10s} {'first batch':>12s} {'peak':>9s} {'of copy rate':>13s}"
    )
    with tempfile.TemporaryDirectory(prefix="bench_data_") as folder:
        for case in cases(args, Path(folder)):
            row = in_new_process(case)
            row["share_of_copy_rate"] = row["delivered_gb_per_s"] / copying
            rows.append(row)
            print(
                f"{row['label']:42s} {row['patches_per_s']:10.0f} {row['first_batch_s']:10.2f} s "
                f"{row['peak_mb']:6.0f} MB {row['share_of_copy_rate']:12.0%}",
                flush=True,
            )
    facts = {
        "copy_gb_per_s": copying,
        "threads": args.threads,
        "batch_size": args.batch_size,
        "rows": rows,
    }
    print(f"copying memory: {copying:.1f} GB/s")
    lazy = [row for row in rows if row["label"].startswith("lazy staged")]
    reference = [row["patches_per_s"] for row in rows if row["label"].startswith("mst")]
    if reference:
        facts["staged_lazy_over_mst"] = lazy[0]["patches_per_s"] / max(reference)
        print(
            f"staged lazy over MST++ (the faster of its two): {facts['staged_lazy_over_mst']:.1f} x"
        )
    facts["growth_mb"] = lazy[2]["peak_mb"] - lazy[0]["peak_mb"]
    print(
        f"peak memory of staged lazy, {args.many} scenes over {DISTINCT}: "
        f"{facts['growth_mb']:+.0f} MB"
    )
    if args.json:
        common.write_json(args.json, facts)


if __name__ == "__main__":
    common.run_cli(main)
