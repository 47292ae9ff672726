"""What the tests of the trainers share: small settings, runs in this process, exact comparison."""

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from conftest import ROOT

import common_utils_v32 as common
from compute_devices import Ranks
from training_runs import RunFolder

SMALL = {
    "hsifusion_training": shlex.split("--base_channels 16 --depths 1 1 1 --num_heads 2 2 2"),
    "sharp_training_script_fixed": shlex.split(
        "--base_dim 16 --depths 1 1 --heads 1 1 --mlp_ratios 1 1"
    ),
}
DROP = {"hsifusion_training": "--drop_path", "sharp_training_script_fixed": "--drop_path_rate"}
TRAINERS = list(SMALL)
BASE = shlex.split(
    "--model_size tiny --patch_size 64 --batch_size 2 --iterations_per_epoch 5 --epochs 2 "
    "--warmup_epochs 0.5 --num_workers 0 --log_interval 1 --device cpu"
)
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def arguments(trainer, data, out, *more):
    places = ["--data_root", str(data), "--output_dir", str(out), "--experiment_name", "run"]
    return [*BASE, *SMALL[trainer], *places, *map(str, more)]


def settings(trainer, data, out, *more):
    module = importlib.import_module(trainer)
    return module, common.parse_dataclass(module.Settings, arguments(trainer, data, out, *more))


def make_run(trainer, data, out, *more):
    module, cfg = settings(trainer, data, out, *more)
    return module.Run(
        cfg, Ranks(), torch.device("cpu"), RunFolder.of(cfg.output_dir, cfg.experiment_name)
    )


def parts(run):
    """What a trainer trains: model, averaged weights, optimizer. SHARP's trainer keeps them in its
    step engine."""
    owner = getattr(run, "engine", run)
    return owner.model, owner.average, owner.optimizer


def after_step(run, do):
    """Call do(number of steps done) after every optimizer step."""
    owner, name = (run.engine, "train_step") if hasattr(run, "engine") else (run, "optimizer_step")
    original, count = getattr(owner, name), [run.step]

    def step(*args):
        result = original(*args)
        count[0] += 1
        do(count[0])
        return result

    setattr(owner, name, step)


def stop_after(run, steps):
    """Ask the run to stop, as a signal would, when it has done `steps` steps."""

    def ask(count):
        run.stop.requested |= count == steps

    after_step(run, ask)


def checkpoint(out, name="last.ckpt"):
    return common.read_checkpoint(Path(out) / "run" / name)


def assert_same(a, b):
    """Equal to the last bit, tensors and all else, at any depth."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def start(trainer, *args, ranks=None):
    """A trainer's process, or one whose children are its ranks."""
    command = [sys.executable, ROOT / f"{trainer}.py"]
    if ranks is not None:
        command = [sys.executable, ROOT / "tests" / "ranks.py", trainer, str(ranks)]
    command += [str(arg) for arg in args]
    return subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
