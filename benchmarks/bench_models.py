"""Size and speed of both models beside MST++, in one run: parameters, multiply-adds, time, memory.

    python benchmarks/bench_models.py --mst-root ../MST-plus-plus --json models.json
    python benchmarks/bench_models.py --device cuda --amp bf16 --batch 20 --compile
    python benchmarks/bench_models.py --against ../older-checkout      # two commits, interleaved

float32, eager, 2 threads on a CPU by default. A forward is timed at 128 x 128, 256 x 256, 482 x 512
and 964 x 1024, a training step on --batch 128 x 128 patches (forward, MRAE, backward, Adam), with
--compile both compiled; each is the fastest of several, the models in turn, so that a disturbance
meets them alike. Peak memory is measured in a process of its own, over what the process held with
the model built: of the 482 x 512 forward, of the 964 x 1024 forward, and of the step. Nothing else
may run.

--against times the 482 x 512 forward and the step of two checkouts, each in a process of its own,
in turn for ROUNDS rounds, and prints medians and their ratio beside the multiply-adds of both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
if "--checkout" not in sys.argv:  # a child of --against imports the models of its own checkout
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    from race import AMP_TYPES, RIVAL, build

    import common_utils_v32 as common
    from compute_devices import resolve_device
    from training_runs import environment_record

SIDES = {"128": (128, 128), "256": (256, 256), "482x512": (482, 512), "964x1024": (964, 1024)}
PEAKS = ("482x512", "964x1024", "step")  # of which peak memory is measured
REPEATS = {"128": 7, "256": 5, "482x512": 3, "964x1024": 1, "step": 7}
ROUNDS = 5  # of two checkouts in turn, after one that warms up
STEPS_A_ROUND = 3
MODELS = ("hsifusion", "sharp")


@dataclasses.dataclass
class Bench:
    """A model and what can be timed of it."""

    model: torch.nn.Module
    device: torch.device
    amp: torch.dtype | None
    batch: int = 1  # patches of a training step
    compiled: bool = False

    def __post_init__(self) -> None:
        self.model.to(self.device)
        if self.compiled:
            self.model.compile()
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4, fused=True)

    def run(self, what: str) -> None:
        with torch.autocast(self.device.type, self.amp) if self.amp else nullcontext():
            if what == "step":
                self.step()
            else:
                self.forward(*SIDES[what])
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def forward(self, height: int, width: int) -> None:
        self.model.eval()(torch.rand(1, 3, height, width, device=self.device))

    def step(self) -> None:
        target = torch.rand(self.batch, 31, 128, 128, device=self.device)
        pred = self.model.train()(torch.rand(self.batch, 3, 128, 128, device=self.device))
        loss = ((pred - target).abs() / target.clamp_min(0.01)).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def seconds(self, what: str) -> float:
        start = time.perf_counter()
        self.run(what)
        return time.perf_counter() - start


def macs_256(model: torch.nn.Module) -> int:
    """Multiply-adds of one 256 x 256 frame.

    A CPU's flash kernel would count as 0, so attention is computed by the plain one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        model.eval()(torch.rand(1, 3, 256, 256))
    return counter.get_total_flops() // 2


def matmul_rate(device: torch.device) -> float:
    """Floating-point operations per second of a 2048^3 product, the fastest of five."""
    a = torch.rand(2048, 2048, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


# --- peak memory, in a process of its own


def peak_memory(name: str, size: str, what: str, args: argparse.Namespace) -> float:
    """Bytes that `what` takes at most beyond the built model, measured in a new process."""
    command = [sys.executable, __file__, "--peak", name, size, what]
    command += ["--threads", str(args.threads), "--device", args.device]
    command += ["--batch", str(args.batch), *["--compile"] * args.compile]
    if args.amp:
        command += ["--amp", args.amp]
    if args.mst_root:
        command += ["--mst-root", str(args.mst_root)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(json.loads(answer)["peak"])


def measure_peak(bench: Bench, what: str) -> float:
    if bench.device.type == "cuda":
        bench.run(what)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        bench.run(what)
        return torch.cuda.max_memory_allocated() - before
    before = psutil.Process().memory_info().rss
    # Resets the peak, which a process else inherits from its parent.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    bench.run(what)
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before


# --- two checkouts


def serve_checkout(checkout: str, size: str, threads: int) -> None:
    """The child of --against: answers a model and a measure on each line with seconds or counts."""
    sys.path.insert(0, checkout)
    from hsifusion_v252_complete import create_hsifusion_lightning_pro
    from sharp_v322_hardened import create_sharp_v32

    torch.set_num_threads(threads)
    benches = {}
    for name, create in zip(
        MODELS, (create_hsifusion_lightning_pro, create_sharp_v32), strict=True
    ):
        torch.manual_seed(0)
        benches[name] = Bench(create(size), torch.device("cpu"), None)
    for line in sys.stdin:
        name, what = line.split()
        bench = benches[name]
        if what == "macs":
            answer: float = macs_256(bench.model)
        elif what == "step":
            answer = statistics.median(bench.seconds(what) for _ in range(STEPS_A_ROUND))
        else:
            answer = bench.seconds(what)
        print(json.dumps(answer), flush=True)


class Checkout:
    """A process that imports one checkout's models, and measures when it is asked."""

    def __init__(self, path: Path, size: str, threads: int) -> None:
        command = [sys.executable, __file__, "--checkout", str(path), size, str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, name: str, what: str) -> float:
        assert self.process.stdin and self.process.stdout
        print(name, what, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def compare(other: Path, size: str, threads: int) -> list[dict]:
    """One row for each model and measure: this checkout, the other, and their ratio."""
    mine, theirs = Checkout(ROOT, size, threads), Checkout(other, size, threads)
    rows = []
    for name in MODELS:
        counts = [checkout.ask(name, "macs") for checkout in (theirs, mine)]
        rows.append({"model": name, "measure": "multiply-adds 256", "against": counts[0]})
        rows[-1]["this"] = counts[1]
        for what in ("482x512", "step"):
            times: dict[Checkout, list[float]] = {theirs: [], mine: []}
            for _ in range(ROUNDS + 1):
                for checkout, taken in times.items():
                    taken.append(checkout.ask(name, what))
            row = {"model": name, "measure": f"{what} s"}
            row["against"] = statistics.median(times[theirs][1:])  # the first warms up
            row["this"] = statistics.median(times[mine][1:])
            rows.append(row)
    for checkout in (mine, theirs):
        checkout.process.communicate()
    for row in rows:
        row["ratio"] = row["this"] / row["against"]
    return rows


def comparison_table(rows: list[dict]) -> str:
    lines = ["| model | measure | against | this | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        cells = f"{row['against']:.6g} | {row['this']:.6g} | {row['ratio']:.3f}"
        lines.append(f"| {row['model']} | {row['measure']} | {cells} |")
    return "\n".join(lines)


# --- beside MST++


def measure_all(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """A row for each model and size: seconds, parameters, multiply-adds, peaks."""
    amp = AMP_TYPES[args.amp]
    chosen = [(RIVAL, "")] if args.mst_root else []
    for size in args.sizes:
        chosen += [(name, size) for name in args.models]
    rows = [{"model": name, "size": size} for name, size in chosen]
    benches = []
    for name, size in chosen:
        model = build(name, size, args.mst_root)
        benches.append(Bench(model, device, amp, args.batch, args.compile))
    for what in args.measure:
        times: list[list[float]] = [[] for _ in rows]
        for _ in range(REPEATS[what] + 1):
            for taken, bench in zip(times, benches, strict=True):
                taken.append(bench.seconds(what))
        for row, taken in zip(rows, times, strict=True):
            row[what] = min(taken[1:])  # the first is a warm-up
    torch.compiler.set_stance("force_eager")  # operations are counted as they are written
    for row, bench in zip(rows, benches, strict=True):
        row["parameters"] = sum(p.numel() for p in bench.model.parameters())
        row["macs_256"] = macs_256(bench.model.cpu())
        if "482x512" in row:
            operations = 2 * row["macs_256"] * 482 * 512 / 256**2
            row["gflops"] = operations / row["482x512"] / 1e9
        for what in args.measure:
            if what in PEAKS:
                row[f"peak {what}"] = peak_memory(row["model"], row["size"], what, args)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown; in brackets the ratio to MST++ of the same run."""
    rival = next((row for row in rows if row["model"] == RIVAL), None)
    units = {
        "parameters": ("M param", 1e6),
        "macs_256": ("GMAC 256", 1e9),
        "gflops": ("GFLOP/s at 482x512", 1),
    }
    units |= {what: (f"{what} s", 1) for what in REPEATS}
    units |= {f"peak {what}": (f"peak {what} GB", 1e9) for what in PEAKS}
    shown = [key for key in rows[0] if key in units]
    titles = " | ".join(units[key][0] for key in shown)
    lines = [f"| model | {titles} |", "|" + "---|" * (len(shown) + 1)]
    for row in rows:
        cells = []
        for key in shown:
            cell = f"{row[key] / units[key][1]:.3g}"
            if rival:
                cell += f" ({row[key] / rival[key]:.2f}x)"
            cells.append(cell)
        lines.append(f"| {row['model']} {row['size']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = common.CliParser(description=__doc__)
    add = parser.add_argument
    add("--mst-root", type=Path, help="a checkout of MST++; without it MST++ is not measured")
    add("--models", nargs="+", default=list(MODELS), choices=MODELS)
    add("--sizes", nargs="+", default=["tiny"], choices=["tiny", "small", "base", "large"])
    measures = list(REPEATS)
    add("--measure", nargs="+", default=measures, choices=measures, help="large ones take minutes")
    add("--threads", type=common.positive, default=2, help="of the CPU")
    add("--device", default="cpu")
    add("--amp", choices=["bf16", "fp16"])
    add("--batch", type=common.positive, default=1, help="patches of a training step")
    add("--compile", action="store_true", help="torch.compile")
    add("--against", type=Path, metavar="CHECKOUT", help="time another commit's models instead")
    add("--json", type=Path, help="where to write the figures")
    add("--peak", nargs=3, metavar=("MODEL", "SIZE", "WHAT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    if args.peak:
        name, size, what = args.peak
        model = build(name, size, args.mst_root)
        bench = Bench(model, device, AMP_TYPES[args.amp], args.batch, args.compile)
        print(json.dumps({"peak": measure_peak(bench, what)}))
        return 0
    facts: dict = {"environment": environment_record()}
    if args.against:
        if not (args.against / "hsifusion_v252_complete.py").exists():
            raise common.UserError(f"--against {args.against}: not a checkout of this project")
        facts["rows"] = compare(args.against.resolve(), args.sizes[0], args.threads)
        print(comparison_table(facts["rows"]))
    else:
        facts["rows"] = measure_all(args, device)
        facts["matmul_gflops"] = matmul_rate(device) / 1e9
        print(table(facts["rows"]))
        print(f"\nmatmul rate here: {facts['matmul_gflops']:.0f} GFLOP/s; ", end="")
        print(f"{device}, {args.amp or 'float32'}, {args.threads} threads")
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        common.write_json(args.json, facts | {"settings": settings})
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--checkout"]:
        serve_checkout(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        common.run_cli(main)
