"""The trainers: schedule, EMA, accumulation, skipped steps, resume, signals, ranks, what a run leaves behind."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, write_raw_arad

import common_utils_v32 as common
from common_utils_v32 import Ranks, RunFolder, UserError
from spectral_evaluation import mrae
from spectral_layers import fit_linear_spectral_path

SMALL = {
    "hsifusion_training": [
        "--base_channels",
        "16",
        "--depths",
        "1",
        "1",
        "1",
        "--num_heads",
        "2",
        "2",
        "2",
    ],
    "sharp_training_script_fixed": [
        "--base_dim",
        "16",
        "--depths",
        "1",
        "1",
        "1",
        "--heads",
        "1",
        "1",
        "1",
    ],
}
DROP = {"hsifusion_training": "--drop_path", "sharp_training_script_fixed": "--drop_path_rate"}
TRAINERS = list(SMALL)
BASE = [
    "--model_size",
    "tiny",
    "--patch_size",
    "64",
    "--batch_size",
    "2",
    "--iterations_per_epoch",
    "5",
    "--epochs",
    "2",
    "--warmup_epochs",
    "0.5",
    "--num_workers",
    "0",
    "--log_interval",
    "1",
    "--device",
    "cpu",
]


@pytest.fixture(autouse=True)
def plain_process(monkeypatch):
    """No settings from outside, and pytest keeps its own signal handlers."""
    for name in ("HSI_LOG_DIR", "HSI_CKPT_DIR", "HSI_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(signal, "signal", lambda *args: None)


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
    """What a trainer trains: model, averaged weights, optimizer. SHARP's trainer keeps them in its step engine."""
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


# --- a run


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_leaves_what_the_readme_promises(trainer, raw_arad, tmp_path):
    run = make_run(trainer, raw_arad, tmp_path)
    assert run.train() == 0
    folder = tmp_path / "run"
    for name in (
        "config.json",
        "last.ckpt",
        "best.ckpt",
        "best.safetensors",
        "metrics.jsonl",
        "summary.json",
    ):
        assert (folder / name).stat().st_size > 0
    assert list(folder.glob("events.out.tfevents.*"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == (["train"] * 5 + ["val"]) * 2
    assert {"mrae", "rmse", "psnr", "sam", "mrae_full", "metric_floor", "border"} <= lines[
        -1
    ].keys()
    assert lines[0]["lr"] > 0
    summary = common.read_json(folder / "summary.json")
    assert (
        summary["steps"] == 10
        and summary["data"]["rgb_norm"] == "per_image"
        and summary["environment"]["torch"]
    )
    state, weights = (
        checkpoint(tmp_path, "best.ckpt"),
        common.read_checkpoint(folder / "best.safetensors"),
    )
    assert_same(dict(sorted(state["ema"].items())), dict(sorted(weights["state_dict"].items())))
    assert weights["data"]["wavelengths"] == list(np.linspace(400, 700, 31))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_training_starts_at_the_linear_map_and_gets_better(trainer, raw_arad, tmp_path):
    run = make_run(
        trainer, raw_arad, tmp_path, "--iterations_per_epoch", 15, "--lr", 2e-3, "--ema_decay", 0.5
    )
    with torch.no_grad():
        scene = next(iter(run.val_loader))
        before = mrae(parts(run)[0].eval()(scene.rgb), scene.cube)
        weight, bias = fit_linear_spectral_path(*run.train_loader.spread(2**18))
        linear = torch.einsum("oc,bchw->bohw", weight, scene.rgb) + bias[:, None, None]
    assert before <= 1.1 * mrae(linear, scene.cube)
    run.train()
    assert run.best < before


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_same_seed_writes_the_same_lines_and_another_seed_others(trainer, raw_arad, tmp_path):
    lines = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_run(
            trainer, raw_arad, tmp_path / name, "--seed", seed, "--epochs", 1, DROP[trainer], 0.2
        ).train()
        text = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        measured = ("patches_per_second", "memory_gb")
        lines.append(
            [{k: v for k, v in json.loads(line).items() if k not in measured} for line in text]
        )
    assert lines[0] == lines[1] != lines[2]


# --- never lost


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("stopped_at", [2, 3, 5])
def test_resume_is_exact_also_in_the_middle_of_an_epoch(trainer, stopped_at, raw_arad, tmp_path):
    """5 batches in groups of 2: 3 steps an epoch, the last of one batch."""
    more = ("--accumulate_steps", 2, DROP[trainer], 0.3, "--ema_update_every", 2)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert make_run(trainer, raw_arad, whole, *more).train() == 0
    first = make_run(trainer, raw_arad, halves, *more)
    stop_after(first, stopped_at)
    assert first.train() == common.STOPPED
    assert checkpoint(halves)["step"] == stopped_at
    torch.manual_seed(999)
    assert make_run(trainer, raw_arad, halves, *more, "--resume_from", "auto").train() == 0
    expected, found = checkpoint(whole), checkpoint(halves)
    for state in (expected, found):
        state.pop("settings")
    assert_same(expected, found)
    steps = [
        json.loads(line)["step"]
        for line in (halves / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps)


@pytest.mark.parametrize(
    "trainer, number", zip(TRAINERS, (signal.SIGTERM, signal.SIGUSR1), strict=True)
)
def test_a_signal_ends_the_step_saves_and_gives_exit_code_75(trainer, number, raw_arad, tmp_path):
    args = arguments(trainer, raw_arad, tmp_path, "--iterations_per_epoch", 100000)
    job = subprocess.Popen(
        [sys.executable, ROOT / f"{trainer}.py", *args],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and log.read_text()):
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(number)
    assert job.wait(60) == common.STOPPED and checkpoint(tmp_path)["step"] > 0


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_saved_settings_make_the_same_run_again(trainer, raw_arad, tmp_path):
    module = importlib.import_module(trainer)
    run = make_run(trainer, raw_arad, tmp_path, "--lr", 1e-3, DROP[trainer], 0.1)
    again = common.parse_dataclass(
        module.Settings, ["--config", str(tmp_path / "run" / "config.json")]
    )
    for name, value in run.settings.items():
        assert getattr(again, name) == value or list(getattr(again, name)) == list(value), name


@pytest.mark.parametrize("trainer", TRAINERS)
def test_many_skipped_steps_apart_leave_the_scale_as_it_is(trainer, raw_arad, tmp_path):
    scaler = getattr(run := make_run(trainer, raw_arad, tmp_path), "engine", run).scaler
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], fused=True)
    for _ in range(200):
        weight.grad = scaler.scale(torch.tensor([math.nan]))
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 1.0 and weight.item() == 1.0
    scaler.set_growth_interval(1)  # 300,000 good steps have 150 of the usual ones
    for _ in range(150):
        weight.grad = scaler.scale(torch.tensor([1.0]))
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 1.0
    half = common.make_scaler(torch.device("cpu"), torch.float16)
    common.restore(
        optimizer, half, {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    )
    assert (
        half.get_scale() == 2**16 and half.get_growth_factor() == 2
    )  # another precision starts with its own


@pytest.mark.parametrize("trainer", TRAINERS)
def test_resume_goes_by_the_settings_of_this_command(trainer, raw_arad, tmp_path):
    first = make_run(trainer, raw_arad, tmp_path)
    stop_after(first, 3)
    assert first.train() == common.STOPPED
    state = checkpoint(tmp_path)
    common.save_checkpoint(tmp_path / "run" / "last.ckpt", state | {"best": 0.0})
    resume = ("--resume_from", "auto")
    again = make_run(
        trainer, raw_arad, tmp_path, *resume, "--lr", 4e-5, "--eta_min", 1e-7, "--weight_decay", 0.3
    )
    rates = {group["weight_decay"]: group["lr"] for group in parts(again)[2].param_groups}
    assert rates.keys() == {0.3, 0.0} and again.best == 0.0
    expected = first.schedule.get_last_lr()[0] / 10
    assert all(rate == pytest.approx(expected, rel=1e-6) for rate in rates.values())
    assert again.schedule.base_lrs == [4e-5, 4e-5]
    assert make_run(trainer, raw_arad, tmp_path, *resume, "--metric_floor", 0.01).best == math.inf
    with pytest.raises(UserError, match="iteration 3 of an epoch that now has 2"):
        make_run(trainer, raw_arad, tmp_path, *resume, "--iterations_per_epoch", 2)


def test_the_uncertainty_head_is_trained(raw_arad, tmp_path):
    run = make_run(
        "hsifusion_training",
        raw_arad,
        tmp_path,
        "--estimate_uncertainty",
        "--iterations_per_epoch",
        2,
        "--epochs",
        1,
    )
    before = run.model.head.scale.weight.clone()
    assert run.train() == 0
    assert not torch.allclose(run.model.head.scale.weight, before, atol=1e-6)


KILLED_RUNS = """
import os, random, signal, sys, time
import torch.utils.tensorboard
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import test_training as t
trainer, data, out = sys.argv[3], *map(Path, sys.argv[4:6])
random.seed(1)
last, step = out / "run" / "last.ckpt", 0
for _ in range(20):
    child = os.fork()
    if not child:
        t.make_run(trainer, data, out, "--iterations_per_epoch", 5000, "--save_minutes", 1e-9, "--resume_from", "auto").train()
        os._exit(1)
    deadline = time.monotonic() + 60
    while not (last.exists() and t.checkpoint(out)["step"] > step):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert t.checkpoint(out)["step"] >= step
    step = t.checkpoint(out)["step"]
print(step)
"""


@pytest.mark.parametrize("trainer", TRAINERS)
def test_twenty_kills_at_random_moments_leave_a_readable_checkpoint(trainer, raw_arad, tmp_path):
    """A save after every step, so that many a kill comes while one is written; each run goes on from the one before."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED_RUNS, ROOT, ROOT / "tests", trainer, raw_arad, tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 20


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_stop_during_validation_saves_and_validates_after_the_resume(trainer, raw_arad, tmp_path):
    run = make_run(trainer, raw_arad, tmp_path, "--epochs", 1)
    loader = run.val_loader

    def interrupted():
        for scene in loader:
            run.stop.requested = True
            yield scene

    run.val_loader = interrupted()
    assert run.train() == common.STOPPED and not (tmp_path / "run" / "best.ckpt").exists()
    assert (
        make_run(trainer, raw_arad, tmp_path, "--epochs", 1, "--resume_from", "auto").train() == 0
    )
    assert checkpoint(tmp_path, "best.ckpt")["step"] == 5


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_old_run_is_not_overwritten(trainer, raw_arad, tmp_path):
    make_run(trainer, raw_arad, tmp_path, "--epochs", 1).train()
    with pytest.raises(UserError, match="--resume_from auto"):
        make_run(trainer, raw_arad, tmp_path)
    with pytest.raises(UserError, match="nowhere.ckpt"):
        make_run(trainer, raw_arad, tmp_path, "--resume_from", tmp_path / "nowhere.ckpt")
    with pytest.raises(UserError, match="best.safetensors"):
        make_run(
            trainer, raw_arad, tmp_path, "--resume_from", tmp_path / "run" / "best.safetensors"
        )


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    common.save_checkpoint(tmp_path / "last.ckpt", {"state_dict": {"a": torch.ones(2)}})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="last.ckpt: the disk is full"):
        common.save_checkpoint(tmp_path / "last.ckpt", {"state_dict": {"a": torch.zeros(2)}})
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert common.read_checkpoint(tmp_path / "last.ckpt")["state_dict"]["a"].sum() == 2


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"state_dict": Evil()}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="x.ckpt"):
        common.read_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "owned").exists()


# --- steps


@pytest.mark.parametrize("trainer", TRAINERS)
def test_accumulated_batches_equal_one_big_batch(trainer, raw_arad, tmp_path):
    """Three batches of 2 in groups of 2 and 1, against a batch of 4 and one of 2."""
    weights = []
    for name, more in (
        ("a", ("--batch_size", 2, "--accumulate_steps", 2, "--iterations_per_epoch", 3)),
        ("b", ("--batch_size", 4, "--iterations_per_epoch", 1)),
    ):
        run = make_run(
            trainer, raw_arad, tmp_path / name, "--epochs", 1, "--optimizer", "adam", *more
        )
        for group in parts(run)[2].param_groups:
            group["lr"] = group["initial_lr"] = 1e-3
        run.schedule.step = lambda: None
        stop_after(run, 1)
        run.train_epoch()
        weights.append(parts(run)[0].state_dict())
    for key in weights[0]:
        torch.testing.assert_close(weights[0][key], weights[1][key], rtol=0, atol=2e-4)
        assert torch.equal(weights[0][key], weights[1][key]) or weights[0][key].is_floating_point()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_step_with_bad_gradients_is_skipped_and_a_run_of_them_stops(trainer, raw_arad, tmp_path):
    run = make_run(trainer, raw_arad, tmp_path, "--iterations_per_epoch", 30, "--epochs", 1)
    model, read, batches, seen = parts(run)[0], run.train_loader, [], []

    def poisoned():
        for batch in read:
            bad = len(batches) in (2, 8, *range(9, 99))
            batches.append(bad)
            yield batch._replace(cube=batch.cube * math.nan) if bad else batch

    class Loader:
        set_position, __iter__ = staticmethod(read.set_position), staticmethod(poisoned)

    run.train_loader, before = Loader(), {k: v.clone() for k, v in model.state_dict().items()}

    def compare(_):
        seen.append(all(torch.equal(v, before[k]) for k, v in model.state_dict().items()))
        before.update({k: v.clone() for k, v in model.state_dict().items()})

    after_step(run, compare)
    with pytest.raises(UserError, match="not finite|in a row"):
        run.train_epoch()
    assert seen[:8] == [False, False, True] + [False] * 5
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_learning_rate_of_zero_leaves_weights_and_average_bit_identical(
    trainer, raw_arad, tmp_path
):
    run = make_run(trainer, raw_arad, tmp_path, "--epochs", 1)
    model, average, optimizer = parts(run)
    run.schedule.lr_lambdas = [lambda step: 0.0] * 2
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run.train_epoch()
    assert_same(before, dict(model.state_dict()))
    assert_same(before, dict(average.module.state_dict()))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_average_warms_up_and_does_not_alias_the_weights(trainer, raw_arad, tmp_path):
    model, average, _ = parts(
        make_run(trainer, raw_arad, tmp_path, "--ema_decay", 0.9, "--ema_update_every", 2)
    )
    watched, averaged = next(model.parameters()), next(average.module.parameters())
    assert watched.data_ptr() != averaged.data_ptr()
    expected = averaged.detach().flatten()[0].item()
    for n in range(30):
        with torch.no_grad():
            watched.fill_(float(n % 7))
        average.update_parameters(model)
        decay = min(0.9**2, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * float(n % 7)
        assert averaged.flatten()[0].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_learning_rate_starts_above_zero_peaks_and_stays_at_the_end(trainer, raw_arad, tmp_path):
    module, cfg = settings(
        trainer,
        raw_arad,
        tmp_path,
        "--epochs",
        10,
        "--warmup_epochs",
        2,
        "--lr",
        1e-3,
        "--eta_min",
        1e-5,
    )
    rates = [module.learning_rate(step, cfg, 100) for step in range(1500)]
    assert (
        0 < rates[0] < 1e-4
        and max(rates) == pytest.approx(1e-3, rel=1e-2)
        and rates.index(max(rates)) == 200
    )
    assert np.all(np.diff(rates[:200]) > 0) and np.all(np.diff(rates[200:]) <= 0)
    assert rates[1000:] == [pytest.approx(1e-5)] * 500


@pytest.mark.parametrize("trainer", TRAINERS)
def test_norms_biases_and_scales_are_not_decayed(trainer, raw_arad, tmp_path):
    model, _, optimizer = parts(make_run(trainer, raw_arad, tmp_path, "--weight_decay", 0.1))
    decayed, free = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(
        names[id(p)].endswith("weight") and "norm" not in names[id(p)] for p in decayed["params"]
    )
    assert any("temperature" in names[id(p)] for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


# --- the command line


def command(trainer, *args, **kwargs):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, ROOT / f"{trainer}.py", *map(str, args)],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
        **kwargs,
    )


@pytest.mark.parametrize("trainer", TRAINERS)
def test_bad_input_is_one_line_and_exit_code_2(trainer, tmp_path):
    (tmp_path / "c.json").write_text('{"epochs": 3, "no_such": 1}')
    cases = {
        "--data_root": ["--data_root", tmp_path / "missing"],
        "no_such": ["--config", tmp_path / "c.json"],
        "tiny, small, base, large": ["--model_size", "huge"],
        "--epochs": ["--epochs", "0"],
        "--no_flag": ["--no_flag", "1"],
    }
    for named, args in cases.items():
        done = command(trainer, *args, "--output_dir", tmp_path / "runs")
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        message = done.stderr.strip().splitlines()[-1].replace("'", "")
        assert message.startswith("error: ") and named in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_config_file_gives_defaults_and_the_command_line_wins(trainer, tmp_path, monkeypatch):
    module = importlib.import_module(trainer)
    (tmp_path / "c.json").write_text(
        '{"epochs": 7, "lr": 0.001, "depths": [1, 2, 1], "use_amp": false}'
    )
    cfg = common.parse_dataclass(
        module.Settings,
        ["--config", str(tmp_path / "c.json"), "--epochs", "9", "--ema-decay", "0.5"],
    )
    assert (cfg.epochs, cfg.lr, cfg.ema_decay, cfg.use_amp, list(cfg.depths)) == (
        9,
        0.001,
        0.5,
        False,
        [1, 2, 1],
    )
    assert cfg.data_root == "./data/ARAD_1K" and cfg.use_checkpoint is None
    monkeypatch.setenv("HSI_DATA_DIR", "/elsewhere")
    assert common.parse_dataclass(module.Settings, []).data_root == "/elsewhere"
    assert common.parse_dataclass(module.Settings, ["--no-use-amp"]).use_amp is False


def test_folders_follow_the_environment(monkeypatch):
    monkeypatch.setenv("HSI_LOG_DIR", "l")
    monkeypatch.setenv("HSI_CKPT_DIR", "c")
    folder = RunFolder.of("o", "run")
    assert (folder.logs, folder.checkpoints) == (Path("l/run"), Path("c/run"))


# --- several processes


@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_ranks_with_half_the_batch_equal_one_and_resume_exactly(trainer, tmp_path):
    """With accumulation and averaged weights; the second job of two ranks is killed after its first save, and goes on."""
    raw_arad = write_raw_arad(tmp_path / "raw", valid=("v", "w", "x"))
    more = (
        "--iterations_per_epoch",
        41,
        "--epochs",
        1,
        "--accumulate_steps",
        2,
        "--ema_update_every",
        2,
    )

    def start(out, *more):
        args = arguments(trainer, raw_arad, out, *more)
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc_per_node=2",
                "--standalone",
                ROOT / f"{trainer}.py",
                *args,
            ],
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )

    def finish(job):
        _, errors = job.communicate(timeout=200)
        return job.returncode, errors

    assert finish(start(tmp_path / "two", *more, "--batch_size", 1))[0] == 0
    assert make_run(trainer, raw_arad, tmp_path / "one", *more).train() == 0
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")

    job, saved = (
        start(tmp_path / "cut", *more, "--batch_size", 1, "--save_minutes", 1e-6),
        tmp_path / "cut/run/last.ckpt",
    )
    while not saved.exists():
        assert job.poll() is None
        time.sleep(0.02)
    for process in (*psutil.Process(job.pid).children(recursive=True), job):
        process.kill()
    finish(job)
    assert 0 < checkpoint(tmp_path / "cut")["step"] < two["step"] == 21
    assert (
        finish(start(tmp_path / "cut", *more, "--batch_size", 1, "--resume_from", "auto"))[0] == 0
    )
    cut = checkpoint(tmp_path / "cut")
    assert_same({**cut, "settings": None}, {**two, "settings": None})

    for key, value in one["state_dict"].items():
        torch.testing.assert_close(value, two["state_dict"][key], rtol=0, atol=1e-5)
    assert one["metrics"]["mrae"] == pytest.approx(two["metrics"]["mrae"], abs=1e-5)
    code, errors = finish(start(tmp_path / "bad", "--data_root", tmp_path / "missing"))
    assert code != 0 and "missing" in errors
