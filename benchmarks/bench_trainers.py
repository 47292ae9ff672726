"""What a trainer's loop costs over the bare forward, backward and optimizer step: data, EMA,
clipping's check, logging.

    python benchmarks/bench_trainers.py --data_root data/staged --json trainers.json

Both loops train the same model on patches of the same size, in turns on one machine, and the
medians are compared. The bare loop has its batches in memory, prepared, and does nothing but the
five lines of `bare`.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common_utils_v32 as common  # noqa: E402
from compute_devices import Ranks  # noqa: E402
from optimized_dataloader import MSTPlusPlusLoss, prepare_batch  # noqa: E402
from training_runs import RunFolder, environment_record  # noqa: E402

TRAINERS = ("hsifusion_training", "sharp_training_script_fixed")


def bare(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list,
    loss_fn: torch.nn.Module,
) -> None:
    for rgb, cube in batches:
        optimizer.zero_grad(set_to_none=True)
        (loss_fn(model(rgb), cube) + model.auxiliary_loss()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def measure(trainer: str, args, folder: str) -> dict[str, float]:
    """Median seconds per step of either loop."""
    module, steps = importlib.import_module(trainer), args.steps
    cfg = common.parse_dataclass(
        module.Settings,
        [
            "--data_root",
            args.data_root,
            "--model_size",
            "tiny",
            "--batch_size",
            str(args.batch_size),
            "--patch_size",
            str(args.patch_size),
            "--device",
            "cpu",
            "--iterations_per_epoch",
            str(steps),
            "--output_dir",
            folder,
            "--experiment_name",
            trainer,
        ],
    )
    run = module.Run(cfg, Ranks(), torch.device("cpu"), RunFolder.of(folder, trainer))
    model = getattr(run, "engine", run).model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batches = [prepare_batch(batch, run.device) for batch in islice(run.train_loader, steps)]
    times: dict[str, list] = {"trainer": [], "bare": []}
    for _ in range(args.rounds + 1):
        for name, loop in (
            ("trainer", run.train_epoch),
            ("bare", lambda: bare(model, optimizer, batches, MSTPlusPlusLoss())),
        ):
            start = time.perf_counter()
            loop()
            times[name].append((time.perf_counter() - start) / steps)
        run.epoch, run.iteration = run.epoch + 1, 0
    run.bar.close()
    return {
        name: float(np.median(values[1:])) for name, values in times.items()
    }  # the first round warms up


def main() -> int:
    parser = common.CliParser(description=__doc__)
    parser.add_argument("--data_root", required=True, help="staged or raw ARAD-1K folder")
    parser.add_argument("--batch_size", type=common.positive, default=4, help="patches of a batch")
    parser.add_argument("--patch_size", type=common.positive, default=128, help="its side, pixels")
    parser.add_argument("--steps", type=common.positive, default=20, help="of a round")
    parser.add_argument("--rounds", type=common.positive, default=5, help="of each loop, in turns")
    parser.add_argument("--threads", type=common.positive, default=2, help="of the CPU")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for trainer in TRAINERS:
        with tempfile.TemporaryDirectory() as folder:
            results[trainer] = seconds = measure(trainer, args, folder)
        print(
            f"{trainer}: {seconds['trainer']:.3f} s a step, bare {seconds['bare']:.3f} s, "
            f"overhead {100 * (seconds['trainer'] / seconds['bare'] - 1):.1f} %",
            flush=True,
        )
    if args.json:
        common.write_json(
            args.json,
            {
                "seconds_per_step": results,
                "environment": environment_record(),
                "settings": {k: str(v) for k, v in vars(args).items()},
            },
        )
    return 0


if __name__ == "__main__":
    common.run_cli(main)
