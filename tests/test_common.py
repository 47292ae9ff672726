"""What the scripts share: metrics against plain NumPy (and MST++'s own code where it is at hand), command line, files."""

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import common_utils_v32 as common
from common_utils_v32 import UserError, opt
from optimized_dataloader import normalise_rgb
from spectral_evaluation import (
    bootstrap_interval,
    centre_crop,
    crop_border,
    ergas,
    mrae,
    per_band_metrics,
    psnr,
    rmse,
    sam,
    scene_metrics,
    ssim,
)

SCRIPTS = [path.stem for path in ROOT.glob("*.py")]


@pytest.mark.parametrize("module", SCRIPTS)
def test_importing_prints_nothing_and_changes_no_global_state(module):
    code = (
        "import os, random, signal, torch, numpy, json\n"
        "def state(): return [torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), "
        "torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, "
        "torch.get_float32_matmul_precision(), signal.getsignal(signal.SIGTERM), random.getstate()[1][:3], "
        "torch.initial_seed(), dict(os.environ)]\n"
        f"before = state()\nimport {module}\nassert before == state()\nassert not torch.cuda.is_initialized()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


BLOCKS = (ROOT / "README.md").read_text().split("```bash\n")[1:]
COMMANDS = [
    line.split("    #")[0].removeprefix("python ").split()
    for block in BLOCKS
    for line in block.split("```")[0].splitlines()
    if line.startswith("python ")
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_of_the_readme_parses(command):
    if command[:2] == ["-m", "torch.distributed.run"]:
        command = command[3:]
    module, argv = importlib.import_module(command[0].removesuffix(".py")), command[1:]
    if hasattr(module, "Settings"):
        assert common.parse_dataclass(module.Settings, argv)
    else:  # its flags are right, and the data are missing here
        with pytest.raises(UserError, match="no such folder"):
            module.main(argv)


# --- metrics


def scene(seed=0, height=40, width=50, bands=31):
    rng = np.random.default_rng(seed)
    target = rng.uniform(0, 1, (bands, height, width)) ** 2
    target[:, 3, 4] = 0
    return np.clip(target + rng.normal(0, 0.05, target.shape), -0.05, 1.2), target


def numpy_metrics(pred, target, floor):
    p, t = pred.astype(np.float64), target.astype(np.float64)
    lit = t.mean(0) > 0.01
    cosine = (p * t).sum(0)[lit] / np.maximum(
        np.linalg.norm(p, axis=0) * np.linalg.norm(t, axis=0), 1e-30
    )[lit]
    mse = ((np.clip(p, 0, 1) - np.clip(t, 0, 1)) ** 2).mean()
    return {
        "mrae": (np.abs(p - t) / np.maximum(t, floor)).mean(),
        "rmse": np.sqrt(((p - t) ** 2).mean()),
        "psnr": 10 * np.log10(1 / mse),
        "sam": np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean(),
        "ergas": 100 * np.sqrt((((p - t) ** 2).mean((1, 2)) / t.mean((1, 2)) ** 2).mean()),
    }


def layouts(array):
    """The same values in every memory layout that a metric may meet."""
    x = torch.from_numpy(array).float()
    wide = torch.zeros(x.shape[0], x.shape[1], 2 * x.shape[2])
    wide[:, :, ::2] = x
    yield from (
        x,
        x[None],
        x[None].to(memory_format=torch.channels_last),
        wide[:, :, ::2],
        x.double(),
        x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    )


@pytest.mark.parametrize("floor", [1e-6, 0.01])
def test_metrics_equal_plain_numpy_in_every_memory_layout(floor):
    pred, target = scene()
    expected = numpy_metrics(pred.astype(np.float32), target.astype(np.float32), floor)
    for p, t in zip(layouts(pred), layouts(target), strict=True):
        found = scene_metrics(p, t, floor=floor)
        for key, value in expected.items():
            assert found[f"{key}_full"] == pytest.approx(value, rel=1e-5), key


def test_the_crop_is_the_protocols_and_is_what_the_metrics_score():
    x = torch.arange(482 * 512.0).view(1, 482, 512)
    assert centre_crop(x).shape == (1, 226, 256) and centre_crop(x)[0, 0, 0] == x[0, 128, 128]
    assert crop_border(256, 400) == (64, 128)
    pred, target = scene(height=40, width=500)
    found = scene_metrics(torch.from_numpy(pred), torch.from_numpy(target))
    expected = numpy_metrics(pred[:, 10:-10, 128:-128], target[:, 10:-10, 128:-128], 1e-6)
    assert found["mrae"] == pytest.approx(expected["mrae"]) and found["border"] == [10, 128]
    assert found["mrae"] != pytest.approx(found["mrae_full"])


def test_a_perfect_prediction_and_a_black_scene():
    target = torch.from_numpy(scene()[1])
    assert mrae(target, target) == rmse(target, target) == ergas(target, target) == 0
    assert sam(target, target) == 0 and psnr(target, target) == math.inf
    black = torch.zeros(31, 8, 8)
    assert math.isnan(sam(black, black)) and mrae(black, black) == 0
    assert mrae(black + 1, black) == pytest.approx(1e6)


def test_psnr_clamps_and_has_a_peak_of_one():
    target = torch.full((31, 8, 8), 1.0)
    assert psnr(target + 0.5, target) == math.inf
    assert psnr(target - 0.1, target) == pytest.approx(20.0, abs=1e-4)


def test_spectral_angle_is_exact_near_zero_and_in_degrees():
    a, b = torch.zeros(31, 1, 1), torch.zeros(31, 1, 1)
    a[0], b[0], b[1] = 1.0, 1.0, 1.0
    assert sam(a, b) == pytest.approx(45.0)
    b[1] = 1e-6
    assert sam(b, a) == pytest.approx(np.degrees(1e-6), rel=1e-3)


def test_ssim_is_one_for_equal_and_falls_with_noise():
    pytest.importorskip("torchmetrics")
    pred, target = (torch.from_numpy(x).clamp(0, 1) for x in scene())
    assert ssim(target, target) == pytest.approx(1.0)
    assert ssim(pred, target) < 0.999


def test_a_border_below_zero_is_an_error():
    with pytest.raises(common.UserError, match="crop border of -1 px"):
        centre_crop(torch.zeros(1, 64, 64), -1)


def test_per_band_metrics_average_to_the_whole():
    pytest.importorskip("torchmetrics")
    pred, target = (torch.from_numpy(x) for x in scene())
    bands = per_band_metrics(pred, target)
    assert len(bands["mrae"]) == 31 and np.mean(bands["mrae"]) == pytest.approx(mrae(pred, target))
    assert np.square(bands["rmse"]).mean() ** 0.5 == pytest.approx(rmse(pred, target))
    assert np.square(bands["ergas"]).mean() ** 0.5 == pytest.approx(ergas(pred, target))
    inside = [x.clamp(0, 1) for x in (pred, target)]
    assert np.mean(bands["ssim"]) == pytest.approx(ssim(*inside), abs=1e-5)


def test_a_record_of_the_environment_needs_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert common.environment_record()["git_commit"] is None


def test_a_scene_without_an_angle_is_left_out_of_the_interval():
    assert bootstrap_interval([2.0, math.nan, 2.0]) == (2.0, 2.0)


def test_both_floors_of_mrae_are_recorded():
    pred, target = (torch.from_numpy(x) for x in scene())
    found = scene_metrics(pred, target, floor=0.05)
    for floor in (0.01, 1e-6):
        assert found[f"mrae_floor_{floor:g}_full"] == pytest.approx(
            numpy_metrics(pred.numpy(), target.numpy(), floor)["mrae"]
        )


def test_bootstrap_interval_covers_the_mean_and_shrinks():
    values = np.random.default_rng(0).normal(0.2, 0.05, 50).tolist()
    low, high = bootstrap_interval(values)
    assert low < np.mean(values) < high and 0.02 < high - low < 0.04
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([0.3]) == (0.3, 0.3)


@pytest.mark.skipif("MST_ROOT" not in os.environ, reason="MST_ROOT names no checkout of MST++")
def test_metrics_equal_mst_plus_plus():
    sys.path.insert(0, os.path.join(os.environ["MST_ROOT"], "train_code"))
    import utils

    pred, target = (torch.from_numpy(x)[None] for x in scene())
    target = target.clamp_min(1e-6)
    assert mrae(pred, target) == pytest.approx(utils.Loss_MRAE()(pred, target).item())
    assert rmse(pred, target) == pytest.approx(utils.Loss_RMSE()(pred, target).item())


# --- command line and files


@dataclasses.dataclass
class Example:
    data_root: str = opt("x", "folder")
    use_amp: bool = opt(True, "mixed precision")
    compile_model: bool | None = opt(None, "compile")
    depths: tuple[int, ...] = opt((1, 2), "blocks")
    mode: str = opt("a", "mode", choices=("a", "b"))
    rate: float = opt(0.5, "rate, 100 %")
    rank: int = 0


def parse(*argv):
    return common.parse_dataclass(Example, list(argv))


def test_dashes_and_underscores_are_both_accepted():
    assert parse("--data-root", "y") == parse("--data_root=y") == Example(data_root="y")
    assert parse("--no-use-amp") == parse("--no-use_amp") == Example(use_amp=False)
    assert parse("--compile_model").compile_model is True and parse().compile_model is None
    assert list(parse("--depths", "3", "4", "5").depths) == [3, 4, 5]


@pytest.mark.parametrize(
    "argv", [["--mode", "c"], ["--rank", "1"], ["--data", "x"], ["--rate", "fast"]]
)
def test_unknown_flags_and_values_are_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("settings", [{"rank": 1, "no": 2}, []])
def test_unknown_settings_in_a_config_file_name_the_file_and_the_key(settings, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="c.json: unknown settings: (no, rank|a list)"):
        parse("--config", str(path))


@pytest.mark.parametrize("settings", [{"mode": "c"}, {"rate": "fast"}, {"depths": "no"}])
def test_bad_values_in_a_config_file_are_refused_like_flags(settings, tmp_path, capsys):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(SystemExit):
        parse("--config", str(path))
    assert next(iter(settings)) in capsys.readouterr().err


def test_config_files_set_values_of_every_kind(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(
        json.dumps({"use_amp": False, "depths": [3], "rate": 2, "compile_model": None, "mode": "b"})
    )
    found = parse("--config", str(path), "--mode", "a")
    assert (found.use_amp, list(found.depths), found.rate, found.compile_model, found.mode) == (
        False,
        [3],
        2.0,
        None,
        "a",
    )


def test_help_shows_percent_signs_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "100 % (default: 0.5)" in " ".join(capsys.readouterr().out.split())


def test_json_writes_numbers_of_any_kind_and_no_nan(tmp_path):
    common.write_json(
        tmp_path / "x.json",
        {"a": np.float32(0.5), "b": torch.ones(2), "c": math.nan, 3: [np.int64(4)]},
    )
    assert common.read_json(tmp_path / "x.json") == {"a": 0.5, "b": [1.0, 1.0], "c": None, "3": [4]}


def test_rgb_normalisation():
    rgb = torch.tensor([[10, 60], [110, 210]], dtype=torch.uint8)
    assert normalise_rgb(rgb, "unit")[1, 1] == pytest.approx(210 / 255)
    scaled = normalise_rgb(rgb, "per_image", 10, 210)
    assert scaled.min() == 0 and scaled.max() == 1 and scaled[0, 1] == 0.25
    assert normalise_rgb(rgb * 0, "per_image", 0, 0).isfinite().all()
    with pytest.raises(UserError, match="per_image or unit"):
        normalise_rgb(rgb, "other")


def test_unusable_devices_are_named():
    with pytest.raises(UserError, match="tpu"):
        common.resolve_device("tpu!")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cpu"):
            common.resolve_device("cuda")
