"""Training runs are never lost: resume, signals, kills, folders, several ranks."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT, read_index, write_index, write_raw_arad, write_staged
from training_helpers import (
    DROP,
    ONE_THREAD,
    TRAINERS,
    arguments,
    assert_same,
    checkpoint,
    make_run,
    parts,
    start,
    stop_after,
)

import common_utils_v32 as common
import training_runs
from common_utils_v32 import UserError
from training_runs import STOPPED

UNSURE = "--estimate_uncertainty"

pytestmark = pytest.mark.usefixtures("runs_in_this_process")


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("stopped_at", [2, 3, 5])
def test_resume_is_exact_also_in_the_middle_of_an_epoch(trainer, stopped_at, raw_arad, tmp_path):
    """5 batches in groups of 2: 3 steps an epoch, the last of one batch."""
    more = ("--accumulate_steps", 2, DROP[trainer], 0.3, "--ema_update_every", 2)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert make_run(trainer, raw_arad, whole, *more).train() == 0
    first = make_run(trainer, raw_arad, halves, *more)
    stop_after(first, stopped_at)
    assert first.train() == STOPPED
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


@pytest.mark.parametrize("trainer", TRAINERS)
def test_groups_of_another_size_start_where_a_run_goes_on(trainer, raw_arad, tmp_path):
    """7 batches: 3 in a step, then 2 and 2."""
    more = ("--iterations_per_epoch", 7, "--epochs", 1)
    first = make_run(trainer, raw_arad, tmp_path, *more, "--accumulate_steps", 3)
    stop_after(first, 1)
    assert first.train() == STOPPED
    more += ("--accumulate_steps", 2, "--resume_from", "auto")
    assert make_run(trainer, raw_arad, tmp_path, *more).train() == 0
    assert checkpoint(tmp_path)["step"] == 3


@pytest.mark.parametrize(
    "trainer, number", [(TRAINERS[0], "SIGTERM"), (TRAINERS[1], "SIGUSR1"), (TRAINERS[1], "SIGHUP")]
)
def test_a_signal_ends_the_step_saves_and_gives_exit_code_75(trainer, number, raw_arad, tmp_path):
    args = arguments(trainer, raw_arad, tmp_path, "--iterations_per_epoch", 100000)
    job = start(trainer, *args)
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and log.read_text(encoding="utf-8")):
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(getattr(signal, number))
    job.communicate()
    assert job.returncode == STOPPED and checkpoint(tmp_path)["step"] > 0


@pytest.mark.parametrize("trainer", TRAINERS)
def test_resume_goes_by_the_settings_of_this_command(trainer, raw_arad, tmp_path, capsys):
    first = make_run(trainer, raw_arad, tmp_path)
    stop_after(first, 3)
    assert first.train() == STOPPED
    state = checkpoint(tmp_path)
    for name in ("last.ckpt", "best.ckpt"):
        common.save_checkpoint(tmp_path / "run" / name, state | {"best": 0.0})
    resume = ("--resume_from", "auto")
    again = make_run(
        trainer, raw_arad, tmp_path, *resume, "--lr", 8e-5, "--eta_min", 1e-7, "--weight_decay", 0.3
    )
    said = "; --lr 8e-05, it was 0.0008; --eta_min 1e-07, it was 1e-06; --weight_decay 0.3, it was "
    assert f"step 3{said}0.0001\n" in capsys.readouterr().out
    make_run(trainer, raw_arad, tmp_path, *resume, "--num_workers", 0, DROP[trainer], 0.3)
    assert f"step 3; {DROP[trainer]} 0.3, it was not given\n" in capsys.readouterr().out
    rates = {group["weight_decay"]: group["lr"] for group in parts(again)[2].param_groups}
    assert rates.keys() == {0.3, 0.0} and again.best == 0.0
    expected = first.schedule.get_last_lr()[0] / 10
    assert all(rate == pytest.approx(expected, rel=1e-6) for rate in rates.values())
    assert again.schedule.base_lrs == [8e-5, 8e-5]
    assert make_run(trainer, raw_arad, tmp_path, *resume, "--metric_floor", 0.01).best == math.inf
    with pytest.raises(UserError, match="iteration 3 of an epoch that now has 2"):
        make_run(trainer, raw_arad, tmp_path, *resume, "--iterations_per_epoch", 2)


KILLED_RUNS = """
import os, random, signal, sys, time
tests, trainer, count, kills, longest, whole, cut = sys.argv[1:8]
sys.path.insert(0, tests)
import ranks
ranks.importlib.import_module(trainer)
flags = sys.argv[8:]
random.seed(1)

def run(folder, longest):
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        sys.argv[1:] = [trainer, count, *flags, "--output_dir", folder]
        ranks.main()
    os.setpgid(child, child)  # here too: the child may not have come to it
    if longest:
        time.sleep(random.uniform(0, longest))
        os.killpg(child, signal.SIGKILL)
    end = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert end == (-signal.SIGKILL if longest else 0), end

run(whole, 0)
for _ in range(int(kills)):
    run(cut, float(longest))
run(cut, 0)
"""


def survive_kills(trainer, ranks, data, folder, kills, steps):
    """A run that saves after each step, killed at random moments and started again, ends as one
    that nothing happened to, and leaves no temporary files."""
    flags = ("--iterations_per_epoch", steps, "--epochs", 1, "--save_minutes", 1e-9)
    flags += ("--batch_size", 1, "--resume_from", "auto")
    longest = 0.6 * ranks  # seconds to the kill: from before the first step to many steps later
    command = [sys.executable, "-c", KILLED_RUNS, ROOT / "tests", trainer, ranks, kills, longest]
    command += [folder / "whole", folder / "cut", *arguments(trainer, data, folder, *flags)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    cut, whole = checkpoint(folder / "cut"), checkpoint(folder / "whole")
    assert_same({**cut, "settings": None}, {**whole, "settings": None})
    assert files_of(folder / "cut/run") == files_of(folder / "whole/run")
    lines = (folder / "cut/run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps)


def files_of(run):
    return sorted(path.name for path in run.iterdir() if "tfevents" not in path.name)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(
    trainer, raw_arad, tmp_path
):
    survive_kills(trainer, 1, raw_arad, tmp_path, 3, steps=20)


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_fifty_kills_of_training(trainer, ranks, three_to_validate, tmp_path):
    survive_kills(trainer, ranks, three_to_validate, tmp_path, 50, steps=1500)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_stop_during_validation_saves_and_validates_after_the_resume(trainer, raw_arad, tmp_path):
    run = make_run(trainer, raw_arad, tmp_path, "--epochs", 1)
    loader = run.val_loader

    def interrupted():
        for scene in loader:
            run.stop.requested = True
            yield scene

    run.val_loader = interrupted()
    assert run.train() == STOPPED and not (tmp_path / "run" / "best.ckpt").exists()
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


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_does_not_go_on_in_the_folder_of_another(trainer, raw_arad, tmp_path):
    for name in ("a", "b"):
        assert make_run(trainer, raw_arad, tmp_path / name, "--epochs", 1).train() == 0
    before = checkpoint(tmp_path / "b", "best.ckpt")
    other = tmp_path / "a" / "run" / "last.ckpt"
    with pytest.raises(UserError, match="holds a run: give .* another --experiment_name"):
        make_run(trainer, raw_arad, tmp_path / "b", "--resume_from", other)
    assert_same(checkpoint(tmp_path / "b", "best.ckpt"), before)
    # Killed before its first save it starts from there again.
    make_run(trainer, raw_arad, tmp_path / "c", "--resume_from", other)
    assert make_run(trainer, raw_arad, tmp_path / "c", "--resume_from", other).step == 5
    # Its settings make a run of its own, which does not go on with it.
    config = json.loads((tmp_path / "c" / "run" / "config.json").read_text())
    assert config["resume_from"] is None


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_whose_last_checkpoint_is_gone_goes_on_from_its_best(
    trainer, raw_arad, tmp_path, monkeypatch
):
    assert make_run(trainer, raw_arad, tmp_path).train() == 0
    best = checkpoint(tmp_path, "best.ckpt")
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / "run" / name).unlink()
    again = make_run(trainer, raw_arad, tmp_path, "--resume_from", "auto")
    assert again.step == best["step"] > 0 and again.best == best["best"]
    monkeypatch.setenv("HSI_CKPT_DIR", str(tmp_path / "elsewhere"))
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="holds a run that ended, .*elsewhere.*HSI_CKPT_DIR"):
        make_run(trainer, raw_arad, tmp_path, "--resume_from", "auto")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == logged


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_stop_at_the_last_step_of_an_epoch_is_not_forgotten(trainer, raw_arad, tmp_path):
    more = ("--iterations_per_epoch", 1, "--epochs", 20, "--val_interval", 20)
    run = make_run(trainer, raw_arad, tmp_path, *more)
    stop_after(run, 3)
    assert run.train() == STOPPED and checkpoint(tmp_path)["step"] == 3
    assert checkpoint(tmp_path, "previous.ckpt")["step"] == 2  # it was saved once


@pytest.mark.parametrize("good", ["previous.ckpt", "best.ckpt"])
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_not_damaged(raw_arad, tmp_path, good):
    assert make_run(TRAINERS[0], raw_arad, tmp_path).train() == 0
    names = ["last.ckpt", "previous.ckpt", "best.ckpt"]
    step = checkpoint(tmp_path, good)["step"]
    for name in names[: names.index(good)]:
        (tmp_path / "run" / name).write_bytes(b"damaged")
    assert make_run(TRAINERS[0], raw_arad, tmp_path, "--resume_from", "auto").step == step
    assert not (tmp_path / "run" / "last.ckpt").exists()
    for name in names:
        (tmp_path / "run" / name).write_bytes(b"damaged")
    with pytest.raises(UserError, match="last.ckpt: refused as a checkpoint"):
        make_run(TRAINERS[0], raw_arad, tmp_path, "--resume_from", "auto")
    assert (tmp_path / "run" / "last.ckpt").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no terminals that close")
def test_a_closed_terminal_stops_a_run_unless_it_was_told_to_ignore_that(raw_arad, tmp_path):
    args = arguments(TRAINERS[0], raw_arad, tmp_path, "--iterations_per_epoch", 100000)
    command = [sys.executable, ROOT / f"{TRAINERS[0]}.py", *args]
    master, terminal = pytest.importorskip("pty").openpty()
    job = subprocess.Popen(command, env=ONE_THREAD, stdout=terminal, stderr=terminal)
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and log.read_text(encoding="utf-8")):
        assert job.poll() is None
        time.sleep(0.05)
    os.close(terminal)
    os.close(master)  # what is written from now on is an error
    job.send_signal(signal.SIGHUP)
    assert job.wait() == STOPPED and checkpoint(tmp_path)["step"] > 0


def test_signals_that_are_ignored_stay_so_if_they_are_of_a_terminal(monkeypatch):
    """nohup ignores SIGHUP; a shell script ignores SIGINT of what it starts in the background."""
    ignored = {getattr(signal, "SIGHUP", None), signal.SIGINT}
    monkeypatch.setattr(signal, "getsignal", lambda number: number in ignored and signal.SIG_IGN)
    found = training_runs.stop_signals()
    assert signal.SIGINT in found and getattr(signal, "SIGHUP", None) not in found


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(
    "seconds, looks",
    [
        ([0.1] * 20, [1, 10, 20]),
        ([1.0] * 20, list(range(1, 21))),
        ([1.0] * 3 + [0.1] * 17, [1, 2, 3, 4, 10, 20]),
        ([0.1] * 9 + [1.0] * 11, [1, 10, 20]),
    ],
)
def test_ranks_look_for_a_stop_at_every_slow_step(
    trainer, seconds, looks, raw_arad, tmp_path, monkeypatch
):
    """A launcher kills trainers that take too long to stop."""
    run, clock, asked = make_run(trainer, raw_arad, tmp_path), [0.0], []
    run.ranks = SimpleNamespace(world_size=2, any=lambda *flags: asked.append(run.step) or flags)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    run.looked_at = run.saved_at = 0.0
    for run.step in range(1, 21):
        clock[0] += seconds[run.step - 1]
        run.asked()
    assert asked == looks


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_folder_that_cannot_be_written_is_found_before_training(
    trainer, raw_arad, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HSI_CKPT_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="^HSI_CKPT_DIR .*file/run: cannot be written .Not a direc"):
        make_run(trainer, raw_arad, tmp_path)
    monkeypatch.delenv("HSI_CKPT_DIR")
    with pytest.raises(UserError, match="^--output_dir .*file/run: cannot be written"):
        make_run(trainer, raw_arad, tmp_path / "file")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_another_number_of_ranks_is_said_by_the_batch_that_they_make(
    trainer, raw_arad, tmp_path, capsys
):
    run = make_run(trainer, raw_arad, tmp_path)
    stop_after(run, 2)
    assert run.train() == STOPPED
    state = checkpoint(tmp_path)
    common.save_checkpoint(tmp_path / "run" / "last.ckpt", state | {"rng": 2 * state["rng"]})
    capsys.readouterr()
    resume = ("--resume_from", "auto", "--iterations_per_epoch", 5)
    make_run(trainer, raw_arad, tmp_path, *resume, "--batch_size", 4)
    assert "step 2\n" in capsys.readouterr().out  # and nothing of a best that was not yet
    make_run(trainer, raw_arad, tmp_path, *resume)
    said = "step 2; ranks x patches of a batch are 1 x --batch_size 2, they were 2 x 2\n"
    assert said in capsys.readouterr().out


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


# --- several processes


RANKS = shlex.split("--iterations_per_epoch 9 --epochs 1 --accumulate_steps 2 --ema_update_every 2")


@pytest.fixture(scope="module")
def three_to_validate(tmp_path_factory):
    return write_raw_arad(tmp_path_factory.mktemp("raw"), valid=("v", "w", "x"))


@pytest.fixture(scope="module")
def two_ranks(three_to_validate, tmp_path_factory):
    """The checkpoint of a whole run of two ranks, by trainer."""
    whole = {}
    for trainer in TRAINERS:
        out = tmp_path_factory.mktemp("two")
        finish(start_two(trainer, three_to_validate, out))
        whole[trainer] = checkpoint(out)
    return whole


def finish(job):
    _, errors = job.communicate()
    assert job.returncode == 0, errors


def start_two(trainer, data, out, *more):
    return start(trainer, *arguments(trainer, data, out, *RANKS, "--batch_size", 1, *more), ranks=2)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_ranks_with_half_the_batch_equal_one(trainer, three_to_validate, two_ranks, tmp_path):
    assert make_run(trainer, three_to_validate, tmp_path, *RANKS).train() == 0
    one, two = checkpoint(tmp_path), two_ranks[trainer]
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(value, two["state_dict"][key], rtol=0, atol=1e-5)
    assert one["metrics"]["mrae"] == pytest.approx(two["metrics"]["mrae"], abs=1e-5)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_ranks_resume_exactly_after_a_kill(trainer, three_to_validate, two_ranks, tmp_path):
    job = start_two(trainer, three_to_validate, tmp_path, "--save_minutes", 1e-6)
    while not (tmp_path / "run/last.ckpt").exists():
        assert job.poll() is None
        time.sleep(0.02)
    for process in (*psutil.Process(job.pid).children(recursive=True), job):
        process.kill()
    job.communicate()
    finish(start_two(trainer, three_to_validate, tmp_path, "--resume_from", "auto"))
    cut, whole = checkpoint(tmp_path), two_ranks[trainer]
    assert_same({**cut, "settings": None}, {**whole, "settings": None})


@pytest.mark.soak
@pytest.mark.parametrize("trainer", TRAINERS)
def test_torchrun_trains_on_two_ranks_and_shows_their_error(trainer, raw_arad, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    for data, good in ((raw_arad, True), (tmp_path / "missing", False)):
        args = arguments(trainer, data, tmp_path / str(good), "--epochs", 1)
        command = [*launch, ROOT / f"{trainer}.py", *args]
        done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD)
        assert (done.returncode == 0) == good
        assert good or "missing" in done.stderr


@pytest.mark.parametrize("trainer", TRAINERS)
def test_another_memory_layout_goes_on_with_the_same_steps(trainer, raw_arad, tmp_path):
    run = make_run(trainer, raw_arad, tmp_path)
    stop_after(run, 3)
    assert run.train() == 75
    shutil.copytree(tmp_path / "run", tmp_path / "same" / "run")
    weights = []
    for flag, folder in (("", tmp_path / "same"), ("--no-use_channels_last", tmp_path)):
        more = ["--resume_from", "auto", *flag.split()]
        run = make_run(trainer, raw_arad, folder, *more)
        for parameter, moments in parts(run)[2].state.items():
            assert moments["exp_avg"].stride() == parameter.stride()
        assert run.train() == 0
        weights.append(parts(run)[0].state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=0, atol=1e-5)


# --- a start from weights


def start_from(trainer, data, out, path, *more):
    return make_run(trainer, data, out, "--init_from", path, *more)


@pytest.fixture
def trained(trainer, raw_arad, tmp_path):
    """A folder with a run's files, best.safetensors among them."""
    run = make_run(trainer, raw_arad, tmp_path / "first", "--epochs", 1)
    assert run.train() == 0
    return tmp_path / "first" / "run"


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("file", ["last.ckpt", "best.safetensors"])
def test_a_run_starts_from_weights_with_a_fresh_optimizer(
    trainer, file, trained, raw_arad, tmp_path, capsys
):
    run = start_from(trainer, raw_arad, tmp_path, trained / file, "--epochs", 1)
    said = capsys.readouterr().out
    assert f"starts from {trained / file}; its loss on training patches" in said
    state = common.read_checkpoint(trained / file)
    weights = state["ema"] or state["state_dict"]
    mine = parts(run)[0].state_dict()
    others = [key for key in mine if not key.startswith(("head.direct", "head.consistency"))]
    assert_same({key: mine[key] for key in others}, {key: weights[key] for key in others})
    kept = torch.equal(mine["head.direct.weight"], weights["head.direct.weight"])
    assert kept == (", not kept" in said)
    assert not parts(run)[2].state and run.step == 0 and run.best == float("inf")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_start_on_other_bands_makes_their_parts_anew(trainer, trained, tmp_path, capsys):
    data = write_raw_arad(tmp_path / "raw", bands=28)
    run = start_from(trainer, data, tmp_path, trained / "last.ckpt", "--epochs", 1)
    said = capsys.readouterr().out
    assert "another number of bands: direct path, basis and camera are new" in said
    assert said.rstrip().endswith("run") and ", kept" in said  # a random path is no start
    assert parts(run)[0].config.out_channels == 28 and run.train() == 0


@pytest.mark.parametrize("first, then", [((), (UNSURE,)), ((UNSURE,), ())])
def test_a_start_with_or_without_uncertainty_takes_the_other(
    first, then, raw_arad, tmp_path, capsys
):
    hsi = TRAINERS[0]
    assert make_run(hsi, raw_arad, tmp_path / "a", "--epochs", 1, *first).train() == 0
    capsys.readouterr()
    last = tmp_path / "a" / "run" / "last.ckpt"
    run = start_from(hsi, raw_arad, tmp_path / "b", last, "--epochs", 1, *then)
    assert (", whose uncertainty is new" in capsys.readouterr().out) == bool(then)
    weights, mine = common.read_checkpoint(last)["ema"], run.model.state_dict()
    assert torch.equal(mine["stem.weight"], weights["stem.weight"])
    assert run.train() == 0


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_best_value_is_not_of_scenes_that_were_staged_again(trainer, tmp_path, capsys):
    data = write_staged(tmp_path / "data", dtype="float32")
    more = ("--patch_size", 16, "--min_input_size", 16)
    run = make_run(trainer, data, tmp_path, *more)
    stop_after(run, 7)
    assert run.train() == STOPPED and run.best < math.inf
    assert make_run(trainer, data, tmp_path, *more, "--resume_from", "auto").best == run.best
    index = read_index(data)
    index["splits"]["val"][0]["cube_sha256"] = "0" * 64
    write_index(data, index)
    capsys.readouterr()
    resumed = (*more, "--resume_from", "auto", "--no-verify")
    assert make_run(trainer, data, tmp_path, *resumed).best == math.inf
    assert "; its best was of other scenes" in capsys.readouterr().out


def test_a_start_from_another_model_is_one_line(raw_arad, tmp_path):
    hsi, sharp = TRAINERS
    assert make_run(hsi, raw_arad, tmp_path / "a", "--epochs", 1).train() == 0
    last = tmp_path / "a" / "run" / "last.ckpt"
    with pytest.raises(UserError, match=f"--init_from {last}: holds hsifusion, this trains sharp"):
        start_from(sharp, raw_arad, tmp_path / "b", last)
    with pytest.raises(UserError, match=f"--init_from {last}: weights do not fit"):
        start_from(hsi, raw_arad, tmp_path / "b", last, "--base_channels", 32)
    with pytest.raises(UserError, match=f"--resume_from {last}: holds hsifusion, this trains shar"):
        make_run(sharp, raw_arad, tmp_path / "b", "--resume_from", last)
    with pytest.raises(UserError, match=r"last.ckpt: its model has base_channels \d+ and not 32"):
        make_run(hsi, raw_arad, tmp_path / "a", "--resume_from", "auto", "--base_channels", 32)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_best_value_belongs_to_one_data_set_and_one_folder(trainer, raw_arad, tmp_path):
    run = make_run(trainer, raw_arad, tmp_path)
    stop_after(run, 7)  # after the first validation
    assert run.train() == 75 and run.best < float("inf")
    last = tmp_path / "run" / "last.ckpt"
    same = make_run(trainer, raw_arad, tmp_path, "--resume_from", last)
    assert same.best == run.best
    elsewhere = make_run(trainer, raw_arad, tmp_path / "other", "--resume_from", last)
    assert elsewhere.best == float("inf") and not elsewhere.best_metrics
    moved = shutil.copytree(raw_arad, tmp_path / "other data")
    assert make_run(trainer, moved, tmp_path, "--resume_from", last).best == float("inf")
    spelled = tmp_path / ".." / tmp_path.name / "data"
    spelled.symlink_to(moved)
    ours = make_run(trainer, moved, tmp_path / "moved")
    stop_after(ours, 7)
    assert ours.train() == STOPPED
    resume = ("--resume_from", "auto")
    assert make_run(trainer, spelled, tmp_path / "moved", *resume).best == ours.best
    for path in (moved / "Train_Spec").iterdir():
        os.utime(path, (1e9, 1e9))  # other files of the same names
    assert make_run(trainer, moved, tmp_path / "moved", *resume).best == float("inf")
    assert elsewhere.train() == 0 and (tmp_path / "other" / "run" / "best.ckpt").exists()
