"""The trainers: what a run leaves, its steps, schedule, average, and the command line."""

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import write_raw_arad
from training_helpers import (
    DROP,
    TRAINERS,
    after_step,
    arguments,
    assert_same,
    checkpoint,
    make_run,
    parts,
    settings,
    start,
    stop_after,
)

import common_utils_v32 as common
from common_utils_v32 import UserError
from compute_devices import Ranks
from spectral_evaluation import mrae
from spectral_layers import fit_linear_spectral_path
from training_state import learning_rate

pytestmark = pytest.mark.usefixtures("runs_in_this_process")


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


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_saved_settings_make_the_same_run_again(trainer, raw_arad, tmp_path):
    module = importlib.import_module(trainer)
    run = make_run(trainer, raw_arad, tmp_path, "--lr", 1e-3, DROP[trainer], 0.1)
    again = common.parse_dataclass(
        module.Settings, ["--config", str(tmp_path / "run" / "config.json")]
    )
    for name, value in run.settings.items():
        assert getattr(again, name) == value or list(getattr(again, name)) == list(value), name
    run.cfg.device, run.device = "auto", torch.device("cuda", 0)  # rank 0's of several
    run.start_log()
    assert run.settings["device"] == "cuda"


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
    run.sound.MOST = 0
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


def ruin_after(run, steps):
    """After these steps the direct path is a thousand times too large."""
    direct = parts(run)[0].head.direct.weight

    def ruin(count):
        if count in steps:
            direct.data *= 1000

    after_step(run, ruin)
    return direct


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_loss_that_explodes_goes_back_to_sound_weights(trainer, raw_arad, tmp_path, capsys):
    run = make_run(trainer, raw_arad, tmp_path, "--iterations_per_epoch", 9, "--epochs", 1)
    first = parts(run)[0].head.direct.weight.clone()
    direct = ruin_after(run, (3, 6))
    assert run.train() == 0
    said = capsys.readouterr().out
    assert "step 4: MRAE" in said and "step 7: MRAE" in said and "(2 of 3 times)" in said
    torch.testing.assert_close(direct.detach(), first, rtol=0, atol=0.05)
    assert run.step == 9 and run.best < 2


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_loss_that_explodes_again_and_again_ends_the_run(trainer, raw_arad, tmp_path):
    run = make_run(trainer, raw_arad, tmp_path, "--iterations_per_epoch", 40, "--epochs", 1)
    ruin_after(run, range(3, 40))
    with pytest.raises(UserError, match="step 10: MRAE .*going back has not helped 3 times"):
        run.train()
    assert not (tmp_path / "run" / "last.ckpt").exists()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_gradients_that_stay_bad_go_back_too(trainer, raw_arad, tmp_path, capsys):
    """Weights of NaN give nothing but NaN: to skip steps alone would not help."""
    run = make_run(trainer, raw_arad, tmp_path, "--iterations_per_epoch", 30, "--epochs", 1)
    direct = parts(run)[0].head.direct.weight
    after_step(run, lambda count: direct.data.fill_(math.nan) if count == 2 else None)
    assert run.train() == 0 and direct.isfinite().all()
    assert "20 steps in a row had non-finite gradients: back" in capsys.readouterr().out


@pytest.mark.parametrize("trainer", TRAINERS)
def test_threads_are_as_asked_for(trainer, tmp_path, monkeypatch):
    module, before = importlib.import_module(trainer), torch.get_num_threads()
    flags = ["--data_root", str(tmp_path / "none"), "--threads"]
    for count in ("3", "0"):
        monkeypatch.setattr(sys, "argv", [trainer, *flags, count])
        with pytest.raises(UserError, match="--threads 0" if count == "0" else "none"):
            module.main()
    asked = torch.get_num_threads()
    torch.set_num_threads(before)
    assert asked == 3


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
        average.update()
        decay = min(0.9**2, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * float(n % 7)
        assert averaged.flatten()[0].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_learning_rate_starts_above_zero_peaks_and_stays_at_the_end(trainer, raw_arad, tmp_path):
    _, cfg = settings(
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
    rates = [learning_rate(step, cfg, 100) for step in range(1500)]
    assert (
        0 < rates[0] < 1e-4
        and max(rates) == pytest.approx(1e-3, rel=1e-2)
        and rates.index(max(rates)) == 200
    )
    assert np.all(np.diff(rates[:200]) > 0) and np.all(np.diff(rates[200:]) <= 0)
    assert rates[1000:] == [pytest.approx(1e-5)] * 500


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(
    "epochs, given, warmup", [(20, None, 1), (100, None, 5), (300, None, 5), (20, 0, 0), (20, 5, 5)]
)
def test_a_short_run_warms_up_for_a_twentieth_of_it(trainer, epochs, given, warmup):
    module = importlib.import_module(trainer)
    cfg = module.TrainConfig(epochs=epochs, warmup_epochs=given)
    rates = [learning_rate(step, cfg, 100) for step in range(100 * epochs)]
    assert rates.index(max(rates)) == 100 * warmup
    assert cfg.warmup_epochs == given  # a later run from its config.json may be longer


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("size, lr", [("tiny", 8e-4), ("small", 4e-4), ("base", 4e-4)])
def test_larger_models_peak_at_a_lower_learning_rate(trainer, size, lr):
    module = importlib.import_module(trainer)
    assert module.TrainConfig(model_size=size).lr == lr
    assert module.TrainConfig(model_size=size, lr=1e-3).lr == 1e-3
    with pytest.raises(ValueError, match="--lr 0.*must be above 0"):
        module.TrainConfig(lr=0.0)


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


@pytest.mark.parametrize(
    "args, named",
    [
        (["--data_root", "missing"], "--data_root"),
        (["--config", "c.json"], "no_such"),
        (["--model_size", "huge"], "tiny, small, base, large"),
        (["--epochs", "0"], "--epochs"),
        (["--no_flag", "1"], "--no_flag"),
        (["--gradient_clip", "-1"], "--gradient_clip -1.0: must be 0 or above"),
        (["--weight_decay", "-0.1"], "--weight_decay"),
        (["--val_crop_border", "-8"], "--val_crop_border"),
        (["--seed", str(2**64)], "--seed"),
        (["--num_workers", "-2"], "--num_workers -2: give -1 or more"),
        (["--save_minutes", "-1"], "--save_minutes -1.0: give 0 or more"),
        (["--experiment_name", "../x"], "--experiment_name ../x: leaves --output_dir"),
        (["--experiment_name", "."], "--experiment_name .: leaves --output_dir"),
    ],
)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_bad_input_is_one_line_and_exit_code_2(trainer, args, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("c.json").write_text('{"epochs": 3, "no_such": 1}', encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [trainer, *args, "--output_dir", "runs", "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        common.run_cli(importlib.import_module(trainer).main)
    message = capsys.readouterr().err.strip().splitlines()[-1].replace("'", "")
    assert stop.value.code == 2 and message.startswith("error: ") and named in message
    assert not Path("runs").exists()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_border_that_leaves_nothing_of_a_scene_is_found_before_training(trainer, tmp_path):
    data = write_raw_arad(tmp_path / "raw", size=(328, 336))
    with pytest.raises(UserError, match="--val_crop_border 164: scene .* 328 x 336: .* 0 to 163"):
        make_run(trainer, data, tmp_path, "--val_crop_border", 164)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_process_with_bad_input_shows_no_traceback(trainer, tmp_path):
    job = start(trainer, "--data_root", tmp_path / "missing")
    _, errors = job.communicate()
    assert job.returncode == 2 and "Traceback" not in errors and "missing" in errors


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


@pytest.mark.parametrize("trainer", TRAINERS)
def test_workers_run_before_ranks_meet(trainer, raw_arad, tmp_path, monkeypatch):
    """A fork after NCCL has started may hang."""
    seen, before = [], set(psutil.Process().children())

    def count_children(ranks, device):
        seen.append(len(set(psutil.Process().children()) - before))

    monkeypatch.setattr(Ranks, "join", count_children)
    run = make_run(trainer, raw_arad, tmp_path, "--num_workers", 2, "--memory_mode", "lazy")
    assert seen == [2]
    run.train_loader.set_position(0, 3)
    assert len(list(run.train_loader)) == 2


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_training_step_out_of_memory_is_one_line(trainer, raw_arad, tmp_path, monkeypatch):
    module, flags = importlib.import_module(trainer), arguments(trainer, raw_arad, tmp_path)

    def too_much(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sys, "argv", [trainer, *flags])
    monkeypatch.setattr(module, "prepare_batch", too_much)
    with pytest.raises(common.UserError, match="out of memory on cpu: lower --batch_size"):
        module.main()


def test_a_mixture_of_experts_is_not_compiled(raw_arad, tmp_path):
    with pytest.raises(common.UserError, match="--compile_model: each of --use_moe"):
        flags = ("--use_moe", "--compile_model")
        make_run("hsifusion_training", raw_arad, tmp_path, *flags)
