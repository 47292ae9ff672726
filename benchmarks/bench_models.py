"""Size and speed of both models beside MST++, in one run: parameters, multiply-adds, seconds, peak memory.

    python benchmarks/bench_models.py --mst-root ../MST-plus-plus --json models.json
    python benchmarks/bench_models.py --device cuda --amp bf16 --sizes tiny base

float32, eager, 2 threads on a CPU by default. A forward is timed at 128 x 128, 256 x 256, 482 x 512 and 964 x 1024, a
training step on one 128 x 128 patch (forward, MRAE, backward, Adam); each is the fastest of several, the models in
turn, so that a disturbance meets them alike. Peak memory is measured in a process of its own, over what the process
held with the model built: of the 482 x 512 forward, of the 964 x 1024 forward, and of the step. Nothing else may run.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from race import RIVAL, build  # noqa: E402

import common_utils_v32 as common  # noqa: E402

SIDES = {"128": (128, 128), "256": (256, 256), "482x512": (482, 512), "964x1024": (964, 1024)}
PEAKS = ("482x512", "964x1024", "step")  # of which peak memory is measured
REPEATS = {"128": 7, "256": 5, "482x512": 3, "964x1024": 1, "step": 7}


@dataclasses.dataclass
class Bench:
    """A model and what can be timed of it."""

    model: torch.nn.Module
    device: torch.device
    amp: torch.dtype | None

    def __post_init__(self) -> None:
        self.model.to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4, fused=True)

    def run(self, what: str) -> None:
        with torch.autocast(self.device.type, self.amp) if self.amp else nullcontext():
            self.step() if what == "step" else self.forward(*SIDES[what])
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def forward(self, height: int, width: int) -> None:
        self.model.eval()(torch.rand(1, 3, height, width, device=self.device))

    def step(self) -> None:
        target = torch.rand(1, 31, 128, 128, device=self.device)
        pred = self.model.train()(torch.rand(1, 3, 128, 128, device=self.device))
        loss = ((pred - target).abs() / target.clamp_min(0.01)).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def seconds(self, what: str) -> float:
        start = time.perf_counter()
        self.run(what)
        return time.perf_counter() - start


def macs_256(model: torch.nn.Module) -> int:
    """Multiply-adds of one 256 x 256 frame; the CPU's flash kernel would count as 0, so attention is counted as math."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
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


def peak_memory(name: str, size: str, what: str, args: argparse.Namespace) -> float:
    """Bytes that `what` takes at most beyond the built model, measured in a new process."""
    command = [
        sys.executable,
        __file__,
        "--peak",
        name,
        size,
        what,
        "--threads",
        str(args.threads),
        "--device",
        args.device,
    ]
    command += ["--amp", args.amp] if args.amp else []
    command += ["--mst-root", str(args.mst_root)] if args.mst_root else []
    return float(
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)[
            "peak"
        ]
    )


def measure_peak(bench: Bench, what: str) -> float:
    if bench.device.type == "cuda":
        bench.run(what)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        bench.run(what)
        return torch.cuda.max_memory_allocated() - before
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # resets the peak, which a process else inherits from its parent
    bench.run(what)
    peak = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(peak.split()[1]) * 1024 - before


def table(rows: list[dict]) -> str:
    """Markdown; in brackets the ratio to MST++ of the same run."""
    rival = next((r for r in rows if r["model"] == RIVAL), None)
    units = (
        {
            "parameters": ("M param", 1e6),
            "macs_256": ("GMAC 256", 1e9),
            "gflops": ("GFLOP/s at 482x512", 1),
        }
        | {what: (f"{what} s", 1) for what in REPEATS}
        | {f"peak {what}": (f"peak {what} GB", 1e9) for what in PEAKS}
    )
    shown = [key for key in rows[0] if key in units]
    lines = [
        "| model | " + " | ".join(units[key][0] for key in shown) + " |",
        "|" + "---|" * (len(shown) + 1),
    ]
    for row in rows:
        cells = [
            f"{row[k] / units[k][1]:.3g}" + (f" ({row[k] / rival[k]:.2f}x)" if rival else "")
            for k in shown
        ]
        lines.append(f"| {row['model']} {row['size']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = common.CliParser(description=__doc__)
    parser.add_argument(
        "--mst-root", type=Path, help="a checkout of MST++; without it MST++ is not measured"
    )
    parser.add_argument(
        "--models", nargs="+", default=["hsifusion", "sharp"], choices=["hsifusion", "sharp"]
    )
    parser.add_argument(
        "--sizes", nargs="+", default=["tiny"], choices=["tiny", "small", "base", "large"]
    )
    parser.add_argument(
        "--measure",
        nargs="+",
        default=list(REPEATS),
        choices=list(REPEATS),
        help="large models take minutes",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", choices=["bf16", "fp16"])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument(
        "--peak", nargs=3, metavar=("MODEL", "SIZE", "WHAT"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = common.resolve_device(args.device)
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}[args.amp]
    if args.peak:
        name, size, what = args.peak
        print(
            json.dumps(
                {"peak": measure_peak(Bench(build(name, size, args.mst_root), device, amp), what)}
            )
        )
        return 0

    chosen = [(name, size) for size in args.sizes for name in args.models]
    chosen = [(RIVAL, "")] * bool(args.mst_root) + chosen
    rows = [{"model": name, "size": size} for name, size in chosen]
    benches = [Bench(build(name, size, args.mst_root), device, amp) for name, size in chosen]
    for what in args.measure:
        times = [[] for _ in rows]
        for _ in range(REPEATS[what] + 1):
            for taken, bench in zip(times, benches, strict=True):
                taken.append(bench.seconds(what))
        for row, taken in zip(rows, times, strict=True):
            row[what] = min(taken[1:])  # the first is a warm-up
    for row, bench in zip(rows, benches, strict=True):
        row["parameters"] = sum(p.numel() for p in bench.model.parameters())
        row["macs_256"] = macs_256(bench.model.cpu())
        if "482x512" in row:
            row["gflops"] = 2 * row["macs_256"] * 482 * 512 / 256**2 / row["482x512"] / 1e9
        for what in filter(PEAKS.__contains__, args.measure):
            row[f"peak {what}"] = peak_memory(row["model"], row["size"], what, args)
    rate = matmul_rate(device)
    print(table(rows))
    print(
        f"\nmatmul rate here: {rate / 1e9:.0f} GFLOP/s; {device}, {args.amp or 'float32'}, {args.threads} threads"
    )
    if args.json:
        common.write_json(
            args.json,
            {
                "rows": rows,
                "matmul_gflops": rate / 1e9,
                "environment": common.environment_record(),
                "settings": {k: str(v) for k, v in vars(args).items()},
            },
        )
    return 0


if __name__ == "__main__":
    common.run_cli(main)
