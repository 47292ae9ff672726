"""What a machine with one NVIDIA GPU has to show, in minutes: the tests that need a card, training
throughput and latency beside MST++, the attention table, and a short race.

    python benchmarks/gpu.py --mst-root ../MST-plus-plus --minutes 7 --out results

Needs this checkout and a Python with torch; a part that lacks a package is left out, which is said.
Each row is written as it ends, to <out>/<card>.json and <out>/<card>.md. With more --minutes the
races, a minute each, are longer. Without a GPU: exit code 2; --device cpu --quick runs every part
in a small form, to see that this script works.

Throughput: forward, MRAE, backward and Adam on 20 patches of 128 pixels. Latency: one 482 x 512
frame, eager, and as one CUDA graph. Launch share: the part of an eager step in which the card has
nothing to do, 1 - (time in kernels) / (time of the step).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench_models import SIDES, Bench  # noqa: E402
from race import AMP_TYPES, RIVAL, build  # noqa: E402

import common_utils_v32 as common  # noqa: E402
from compute_devices import prepare_cuda, resolve_device  # noqa: E402
from training_runs import environment_record  # noqa: E402

SIZES = ("tiny", "small", "base", "large")
BATCH, FRAME = 20, "482x512"
REPEATS = 10
TEST_SHARE = 0.4  # of the time at most
USUAL_MINUTES, RACE_SECONDS = 7.0, 60.0
SCENES = 24  # synthetic ones for the race
NEEDED = {"tests": ("pytest", "pytest_timeout"), "race": ("colour",), "models": ("psutil",)}


class Report:
    """Rows by part, written as they come."""

    def __init__(self, folder: Path, card: str, settings: dict, device: torch.device) -> None:
        name = re.sub(r"[^A-Za-z0-9]+", "-", card).strip("-")
        self.json, self.markdown = folder / f"{name}.json", folder / f"{name}.md"
        self.facts: dict = {"card": card, "settings": settings, "parts": {}}
        self.facts["environment"] = environment_record(device)

    def add(self, part: str, row: dict) -> None:
        self.facts["parts"].setdefault(part, []).append(row)
        shown = ", ".join(f"{key} {_shown(value)}" for key, value in row.items())
        print(f"{part}: {shown}", flush=True)
        common.write_json(self.json, self.facts)
        common.write_text(self.markdown, self.table())

    def table(self) -> str:
        lines = [f"# {self.facts['card']}, torch {torch.__version__}"]
        for part, rows in self.facts["parts"].items():
            keys = list(dict.fromkeys(key for row in rows for key in row))
            lines += ["", f"## {part}", "", f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
            for row in rows:
                cells = (_shown(row.get(key, "")) for key in keys)
                lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- parts, each yields its rows


def run_tests(args: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Outcome of the tests marked gpu; what ran before the time was over counts."""
    command = [sys.executable, "-m", "pytest", "-v", "-o", "addopts=", "-m", "gpu"]
    command += ["tests/test_gpu.py"]
    limit = TEST_SHARE * 60 * args.minutes
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    try:
        output, _ = process.communicate(timeout=limit)
        rest = "all ran"
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        rest = f"cut after {limit:.0f} s"
    (args.out / "gpu_tests.txt").write_text(output, encoding="utf-8")
    outcomes = re.findall(r"(?:::\S+ )(PASSED|FAILED|SKIPPED|ERROR)", output)
    counts = {kind.lower(): outcomes.count(kind) for kind in ("PASSED", "FAILED", "SKIPPED")}
    failed = re.findall(r"(test_\w+(?:\[[^\]]*\])?) (?:FAILED|ERROR)", output)
    yield counts | {"rest": rest, "which failed": " ".join(failed) or "none"}


def median_seconds(run: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Of one run; the first two warm up."""
    taken = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def peak_gb(run: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 1e9


def launch_share(bench: Bench, seconds: float) -> float:
    """Part of a step in which no kernel runs."""
    from torch.profiler import ProfilerActivity, profile

    if bench.device.type != "cuda":
        return 0.0
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        bench.run("step")
    busy = sum(event.self_device_time_total for event in found.key_averages()) / 1e6
    return max(0.0, 1 - busy / seconds)


def graph_seconds(bench: Bench, repeats: int) -> float | None:
    """Latency of a frame as one CUDA graph; None where it cannot be captured."""
    if bench.device.type != "cuda":
        return None
    rgb = torch.rand(1, 3, *SIDES[FRAME], device=bench.device)
    amp = bench.amp
    model = bench.model.eval()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.autocast("cuda", amp, enabled=amp is not None, cache_enabled=False):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                model(rgb)
        torch.cuda.current_stream().wait_stream(side)
        try:
            with torch.cuda.graph(graph):
                model(rgb)
        except RuntimeError as error:
            print(f"no CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
            return None
    return median_seconds(graph.replay, bench.device, repeats)


def variants(args: argparse.Namespace) -> list[tuple[str, str, str | None, bool]]:
    """(model, size, precision, compiled), the most telling first."""
    first = [("hsifusion", "tiny", "bf16", False), ("sharp", "tiny", "bf16", False)]
    compiled = [("hsifusion", "tiny", "bf16", True), ("sharp", "tiny", "bf16", True)]
    if args.mst_root:
        first = [(RIVAL, "", None, False), (RIVAL, "", "bf16", False), *first]
        compiled = [(RIVAL, "", "bf16", True), *compiled]
    single = [("hsifusion", "tiny", None, False), ("sharp", "tiny", None, False)]
    others = []
    for size in SIZES[1:]:
        others += [("hsifusion", size, "bf16", False), ("sharp", size, "bf16", False)]
    return first[-2:] if args.quick else [*first, *compiled, *single, *others]


def time_models(args: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Throughput, latency, memory and launch share of each variant."""
    batch, repeats = (1, 1) if args.quick else (BATCH, REPEATS)
    for name, size, precision, compiled in variants(args):
        torch.manual_seed(0)
        model = build(name, size, args.mst_root)
        bench = Bench(model, device, AMP_TYPES[precision], batch, compiled)
        row = {"model": f"{name} {size}".strip(), "precision": precision or "float32"}
        row |= {"mode": "compiled" if compiled else "eager"}
        start = time.perf_counter()
        try:
            bench.run("step")
            row["first step s"] = time.perf_counter() - start
            step = median_seconds(lambda bench=bench: bench.run("step"), device, repeats)
            row |= {"step ms": 1e3 * step, "patches/s": batch / step}
            row["step peak GB"] = peak_gb(lambda bench=bench: bench.run("step"), device)
            if not compiled:
                row["launch share"] = launch_share(bench, step)
                frame = "128" if args.quick else FRAME
                run = lambda bench=bench, frame=frame: bench.run(frame)  # noqa: E731
                row["frame ms"] = 1e3 * median_seconds(run, device, repeats)
                row["frame peak GB"] = peak_gb(run, device)
                graph = graph_seconds(bench, repeats)
                row["frame as graph ms"] = 1e3 * graph if graph else "none"
        except RuntimeError as error:  # a rival that does not compile, a card too small
            row["failed"] = str(error).splitlines()[0][:80]
        del bench, model
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield row


def time_attention(args: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """The table of bench_attention.py."""
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_attention.py")]
    command += ["--device", device.type, *["--quick"] * args.quick]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    for line in done.stdout.splitlines():
        found = re.match(r"(\w+ \d+)\s+([\d.]+) ms\s+([\d.]+) MiB", line)
        if found:
            name, milliseconds, memory = found.groups()
            yield {"case": name, "ms": float(milliseconds), "extra MiB": float(memory)}
    if done.returncode not in (0, 1):
        yield {"case": "failed", "why": done.stderr.strip().splitlines()[-1][:200]}


def run_race(args: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Errors after the same time, on synthetic scenes made here by all cores."""
    scenes = args.out / "synthetic_scenes"
    size, count = ("96x96", 4) if args.quick else ("482x512", SCENES)
    make = [sys.executable, str(ROOT / "dataset_setup.py"), "--synthetic", str(count)]
    make += ["--output-root", str(scenes), "--size", size, "--workers", str(os.cpu_count())]
    if args.quick:
        make += ["--patch-size", "64"]
    if not scenes.exists():
        subprocess.run(make, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    more = (60 * args.minutes - 60 * USUAL_MINUTES) / 3
    seconds = 1.0 if args.quick else RACE_SECONDS + max(0.0, more)
    command = [sys.executable, str(ROOT / "benchmarks" / "race.py"), "--device", device.type]
    command += ["--data_root", str(scenes), "--minutes", str(seconds / 60)]
    if not args.quick:
        command += ["--batch", str(BATCH), "--patch", "128"]
    if args.mst_root:
        command += ["--mst-root", str(args.mst_root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        for line in process.stdout:
            found = re.match(r"val seed 0 (\S+): (\d+) steps, (.*)", line)
            if found:
                scores = {k: float(v) for k, v in re.findall(r"'(\w+)': ([\d.]+)", found[3])}
                yield {"model": found[1], "seconds": seconds, "steps": int(found[2])} | scores


PARTS: dict[str, Callable[[argparse.Namespace, torch.device], Iterator[dict]]] = {
    "tests": run_tests,
    "models": time_models,
    "race": run_race,
    "attention": time_attention,
}


def parse_arguments() -> argparse.Namespace:
    parser = common.CliParser(description=__doc__)
    add = parser.add_argument
    add("--mst-root", type=Path, help="a checkout of MST++; without it MST++ is left out")
    add("--minutes", type=float, default=USUAL_MINUTES, help="for all parts together")
    add("--out", type=Path, default=Path("results"), help="folder of the results")
    add("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    add("--device", default="cuda", help="cpu only with --quick")
    add("--quick", action="store_true", help="small forms, to see that this script works")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    prepare_cuda()
    device = resolve_device(args.device)
    if device.type == "cpu" and not args.quick:
        raise common.UserError("--device cpu: this measures a GPU; give --quick to try the script")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(args).items()}
    report = Report(args.out, card, settings, device)
    deadline = time.monotonic() + 60 * args.minutes
    # What the races will take is kept for them.
    reserved = 0.0 if args.quick else 3.5 * RACE_SECONDS * ("race" in args.parts)
    for part in args.parts:
        missing = [name for name in NEEDED.get(part, ()) if not importlib.util.find_spec(name)]
        if missing:
            report.add(part, {"left out": f"{', '.join(missing)} is not installed"})
            continue
        if part == "race":
            reserved = 0.0
        for row in PARTS[part](args, device):
            report.add(part, row)
            if time.monotonic() > deadline - reserved:
                report.add(part, {"left out": "the rest, for lack of time"})
                break
    print(f"{report.markdown}\n{report.json}")
    failed = [row.get("failed") for row in report.facts["parts"].get("tests", [])]
    return int(any(failed))


if __name__ == "__main__":
    common.run_cli(main)
