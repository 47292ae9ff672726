"""Time and memory of sparse attention against dense scaled_dot_product_attention, forward and
backward, float32.

    python benchmarks/bench_attention.py --json attention.json     # with its bars, a few minutes
    python benchmarks/bench_attention.py --quick --json quick.json # small, to see that it runs

4 heads, width 32, ratio 0.9, two CPU threads (or CUDA with --device cuda). Times are the best of
--repeats, in one process, dense and sparse in turn. Memory is the rise of the peak resident size
over that of the inputs, each case in a process of its own (on CUDA: the allocator's peak). `extra`
is what attention itself adds. Exit code 1 when a bar is missed.
"""

import argparse
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common_utils_v32 as common  # noqa: E402
from compute_devices import resolve_device  # noqa: E402
from sparse_attention import sparse_attention_topk_streaming  # noqa: E402
from terminal import CliParser  # noqa: E402

HEADS, WIDTH, RATIO = 4, 32, 0.9
# name, shape of the frame, mode; a bar is (figure, limit)
CASES = {
    "dense 4096": ((64, 64), "dense"),
    "topk 4096": ((64, 64), "topk"),
    "block 4096": ((64, 64), "block"),
    "dense 16384": ((128, 128), "dense"),
    "block 16384": ((128, 128), "block"),
    "local 65536": ((256, 256), "local"),
    "local 246784": ((482, 512), "local"),
}
QUICK = {
    "dense 4096": ((16, 16), "dense"),
    "topk 4096": ((16, 16), "topk"),
    "block 4096": ((16, 16), "block"),
    "dense 16384": ((32, 32), "dense"),
    "block 16384": ((32, 32), "block"),
    "local 65536": ((32, 32), "local"),
    "local 246784": ((60, 64), "local"),
}
BARS = {
    "time topk / dense, 4096": 4.0,
    "extra memory topk 4096, MiB": 64.0,
    "time block / dense, 4096": 0.4,
    "time block / dense, 16384": 0.25,
    "time local 246784 / 65536": 4.2,
    "memory local 246784 / 65536": 4.2,
}


def make_case(shape, mode, device):
    """A function that runs forward and backward once."""
    n = shape[0] * shape[1]
    q, k, v = (torch.randn(HEADS, n, WIDTH, device=device, requires_grad=True) for _ in range(3))
    grad = torch.randn(HEADS, n, WIDTH, device=device)

    def run():
        if mode == "dense":
            out = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        elif mode == "local":  # the fallback of top-k above max_tokens
            out = sparse_attention_topk_streaming(
                q, k, v, RATIO, max_tokens=64, spatial_shape=shape
            )
        else:  # no cap: the ratio alone says how many keys
            out = sparse_attention_topk_streaming(q, k, v, RATIO, sparse_mode=mode, k_cap=n)
        torch.autograd.grad(out, (q, k, v), grad)

    return run


def seconds(run, device) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_memory(shape, mode, device) -> float:
    """Extra peak in MiB of the first run: a thread samples the resident size every millisecond."""
    small = make_case((16, 16), mode, device)  # loads libraries and kernels
    small()
    run = make_case(shape, mode, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = peak = resident_mib()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident_mib())

    thread = threading.Thread(target=watch)
    thread.start()
    run()
    peak = max(peak, resident_mib())
    done.set()
    thread.join()
    return peak - before


def memory_apart(name: str, args: argparse.Namespace) -> float:
    """Extra MiB of a case in a process of its own, which the others have not filled."""
    if args.quick:
        return measure_memory(*QUICK[name], args.device)
    command = [sys.executable, __file__, "--memory", name, "--device", args.device]
    command += ["--threads", str(args.threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def main() -> int:
    parser = CliParser(description=__doc__)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--threads", type=common.positive, default=2, help="of the CPU")
    parser.add_argument(
        "--repeats", type=common.positive, default=3, help="of each case; the fastest counts"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes; the bars say nothing then"
    )
    parser.add_argument("--memory", metavar="CASE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    resolve_device(args.device)  # complains of a card that is not there
    torch.manual_seed(0)
    cases = QUICK if args.quick else CASES
    if args.memory:
        print(measure_memory(*cases[args.memory], args.device))
        return 0

    times: dict[str, list[float]] = {}
    memory = {name: memory_apart(name, args) for name in cases}
    runs = {name: make_case(*case, args.device) for name, case in cases.items()}
    for _ in range(
        args.repeats + 1
    ):  # in turn, so that a change of clock meets all; the first warms up
        for name, run in runs.items():
            times.setdefault(name, []).append(seconds(run, args.device))
    best = {name: min(values[1:]) for name, values in times.items()}
    figures = {
        "time topk / dense, 4096": best["topk 4096"] / best["dense 4096"],
        "extra memory topk 4096, MiB": memory["topk 4096"],
        "time block / dense, 4096": best["block 4096"] / best["dense 4096"],
        "time block / dense, 16384": best["block 16384"] / best["dense 16384"],
        "time local 246784 / 65536": best["local 246784"] / best["local 65536"],
        "memory local 246784 / 65536": memory["local 246784"] / max(1e-9, memory["local 65536"]),
    }
    for name in cases:
        print(f"{name:14s} {best[name] * 1e3:9.1f} ms  {memory[name]:8.1f} MiB extra")
    for name, value in figures.items():
        met = "ok" if value <= BARS[name] else "MISSED"
        met = "" if args.quick else met
        print(f"{name:30s} {value:8.3f}  (bar {BARS[name]:g}) {met}")
    if args.json:
        common.write_json(
            args.json,
            {
                "heads": HEADS,
                "width": WIDTH,
                "ratio": RATIO,
                "threads": args.threads,
                "device": args.device,
                "torch": torch.__version__,
                "processor": platform.processor() or platform.machine(),
                "quick": args.quick,
                "seconds": best,
                "all_seconds": times,
                "extra_mib": memory,
                "figures": figures,
                "bars": BARS,
            },
        )
    return int(not args.quick and any(value > BARS[name] for name, value in figures.items()))


if __name__ == "__main__":
    common.run_cli(main)
