"""Evaluation: the layout that hsi_viz_suite reads, metrics of the unclamped output, ranks that
agree."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import standin_model
import torch
from conftest import write_raw_arad
from test_sharp_inference import run, write_checkpoint

import common_utils_v32 as common
import optimized_dataloader as data
import sharp_inference as inference
from frame_prediction import FACTORIES
from spectral_evaluation import (
    STRESS,
    _csv,
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
    seems_turned,
    ssim,
)

ROOT = Path(__file__).resolve().parents[1]


def test_a_table_keeps_scene_names_with_quotes_and_commas():
    names = ['leaf "A", wet', 'leaf "B"']
    rows = [{"scene_id": name, "border": [24, 20], "mrae": 0.25} for name in names]
    read = list(csv.DictReader(_csv(rows).splitlines()))
    assert [row["scene_id"] for row in read] == names
    assert read[0]["border"] == "[24, 20]" and float(read[1]["mrae"]) == 0.25


def evaluate(checkpoint, scenes, target, *more):
    places = ("--data_root", scenes, "--output", target)
    run("--checkpoint", checkpoint, "--evaluate", *places, *more)


@pytest.fixture(autouse=True)
def standin(monkeypatch):
    monkeypatch.setitem(FACTORIES, "hsifusion", ("standin_model", "create"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_raw_arad(tmp_path_factory.mktemp("scenes"), train=("t",), valid=("v", "w", "x"))


def test_results_satisfy_the_hsi_viz_suite_contract_and_hold_the_protocols_numbers(
    tmp_path, scenes
):
    checkpoint = write_checkpoint(tmp_path / "m.ckpt")
    run(
        "--checkpoint",
        checkpoint,
        "--evaluate",
        "--data_root",
        scenes,
        "--split",
        "val",
        "--output",
        tmp_path / "res",
        "--metric-floor",
        "0.001",
    )
    loader = data.val_loader(data.DataConfig(str(scenes), rgb_norm="per_image"))
    model = standin_model.create("tiny").eval()
    for scene in loader:
        with torch.no_grad():
            pred = model(scene.rgb)
        cube, target = (
            np.load(tmp_path / "res/hsi" / f"{scene.name}{end}.npy") for end in ("", "_target")
        )
        assert (
            cube.shape == target.shape == (31, 96, 80) and cube.dtype == target.dtype == np.float32
        )
        assert cube.min() >= 0 and cube.max() <= 1
        np.testing.assert_allclose(cube, pred[0].clamp(0, 1), atol=1e-6)
        np.testing.assert_allclose(target, scene.cube[0], atol=0)
        metrics = json.loads((tmp_path / "res/metrics" / f"{scene.name}_metrics.json").read_text())
        keys = ("mrae", "rmse", "psnr", "sam", "ssim", "ergas", "mrae_full")
        assert all(isinstance(metrics[key], float) for key in keys)
        want = scene_metrics(pred, scene.cube, floor=0.001)
        assert (
            metrics["mrae"] == pytest.approx(want["mrae"], rel=1e-5)
            and metrics["metric_floor"] == 0.001
        )
        assert metrics["rmse"] == pytest.approx(want["rmse"], rel=1e-5) and metrics["border"] == [
            24,
            20,
        ]
    with open(tmp_path / "res/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["scene_id"] for row in rows] == ["v", "w", "x"]
    summary = json.loads((tmp_path / "res/summary.json").read_text())
    assert summary["mean"]["mrae"] == pytest.approx(np.mean([float(row["mrae"]) for row in rows]))
    low, high = summary["interval_95"]["mrae"]
    assert low <= summary["mean"]["mrae"] <= high
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert summary["macs_256"] == 256 * 256 * 9 * (3 * 8 + 8 * 31)
    assert len(summary["per_band"]["mrae"]) == 31
    assert summary["seconds_per_frame"] > 0 and summary["peak_memory_mb"] > 0.5
    assert {p.name for p in (tmp_path / "res/figures").iterdir()} == {
        "best.png",
        "worst.png",
        "curves.png",
    }
    assert "| m (ema weights, rgb per_image)" in (tmp_path / "res/table.md").read_text()


def test_scenes_of_other_wavelengths_are_refused(tmp_path):
    path, data_root = (
        write_checkpoint(tmp_path / "m.ckpt"),
        write_raw_arad(tmp_path / "raw", train=("t",), valid=("v",)),
    )
    state = common.read_checkpoint(path)
    state["data"]["wavelengths"] = [w + 20 for w in state["data"]["wavelengths"]]
    common.save_checkpoint(path, state)
    with pytest.raises(common.UserError, match="was trained on 425..725 nm"):
        evaluate(path, data_root, tmp_path / "res")


def test_several_checkpoints_give_one_comparison_and_calibration_where_there_is_a_scale(
    tmp_path, scenes
):
    write_checkpoint(tmp_path / "a.ckpt")
    write_checkpoint(tmp_path / "b.ckpt", estimate_uncertainty=True)
    run(
        "--checkpoint",
        f"first={tmp_path / 'a.ckpt'}",
        f"second={tmp_path / 'b.ckpt'}",
        "--evaluate",
        "--data_root",
        scenes,
        "--output",
        tmp_path / "res",
        "--format",
        "mat",
    )
    models = json.loads((tmp_path / "res/summary.json").read_text())["models"]
    assert [model["name"] for model in models] == ["first", "second"]
    assert models[0]["mean"]["mrae"] == pytest.approx(models[1]["mean"]["mrae"])
    assert "coverage_50" not in models[0]["mean"]
    assert (tmp_path / "res/second/cubes/v.mat").exists()
    names = ("v", "w", "x")
    loader = data.val_loader(data.DataConfig(str(scenes), rgb_norm="per_image"))
    model = standin_model.create("tiny").eval()
    with torch.no_grad():
        error = {scene.name: (model(scene.rgb) - scene.cube).abs() for scene in loader}
    for percent in (50, 90, 95):  # the stand-in's scale is 0.1 everywhere
        inside = np.mean(
            [(error[name] <= -0.1 * math.log(1 - percent / 100)).float().mean() for name in names]
        )
        assert models[1]["mean"][f"coverage_{percent}"] == pytest.approx(inside, abs=1e-4)


def test_ranks_together_give_the_numbers_of_one(tmp_path, scenes):
    checkpoint = write_checkpoint(tmp_path / "m.ckpt")
    evaluate(checkpoint, scenes, tmp_path / "one")
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import frame_prediction, ranks\n"
        "frame_prediction.FACTORIES['hsifusion'] = ('standin_model', 'create')\n"
        "ranks.main()\n"
    )
    flags = ["--checkpoint", checkpoint, "--evaluate", "--data_root", scenes]
    command = [sys.executable, "-c", code, "sharp_inference", "2", *flags]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([*command, "--output", tmp_path / "two"], check=True, env=env)
    assert (tmp_path / "one/metrics.csv").read_text() == (tmp_path / "two/metrics.csv").read_text()
    one, two = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")
    )
    assert all(one[key] == two[key] for key in ("mean", "interval_95", "per_band", "best", "worst"))


def test_stress_report_covers_every_change_and_the_recipe_moves_the_least(
    tmp_path, scenes, monkeypatch
):
    seen = []
    monkeypatch.setattr(
        inference,
        "predict_scene",
        lambda model, rgb, args: (seen.append(rgb), (torch.zeros(31, 96, 80), None))[1],
    )
    run(
        "--checkpoint",
        write_checkpoint(tmp_path / "m.ckpt", rgb_norm="unit"),
        "--stress",
        "--data_root",
        scenes,
        "--output",
        tmp_path / "res",
    )
    rows = json.loads((tmp_path / "res/stress.json").read_text())["rows"]
    names = ["as given", *STRESS]
    assert [row["change"] for row in rows] == names and len(rows) == len(names)
    renders = dict(zip(names, seen, strict=False))
    means = {name: float(rgb.mean()) for name, rgb in renders.items()}
    assert means["recipe"] == pytest.approx(means["as given"], abs=0.03)
    assert means["exposure 0.5"] == pytest.approx(means["recipe"] / 2, rel=0.1)
    difference = {
        name: float((rgb - renders["recipe"]).abs().mean()) for name, rgb in renders.items()
    }
    assert difference["electrons 50"] > difference["electrons 5000"] > 0
    assert difference["camera analytic2"] > 0.005
    assert (tmp_path / "res/stress.md").exists() and (tmp_path / "res/figures/stress.png").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data_root", "nowhere"], "nowhere"),
        (["--split", "test"], "test"),
        (["--bands"], "28 bands"),
    ],
)
def test_bad_evaluation_input_is_one_line(tmp_path, scenes, flags, words):
    bands = 28 if flags == ["--bands"] else 31
    checkpoint = write_checkpoint(tmp_path / "m.ckpt", out_channels=bands)
    flags = ["--data_root", scenes, *(flags if bands == 31 else [])]
    with pytest.raises(common.UserError, match=words) as error:
        run("--checkpoint", checkpoint, "--evaluate", "--output", tmp_path / "res", *flags)
    assert "\n" not in str(error.value)


def test_mst_plus_plus_weights_need_its_checkout(tmp_path, scenes):
    folder = tmp_path / "MST" / "train_code" / "architecture"
    folder.mkdir(parents=True)
    (folder / "MST_Plus_Plus.py").write_text(
        "from torch import nn\n"
        "class MST_Plus_Plus(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.embedding = nn.Conv2d(3, 31, 1)\n"
        "    def forward(self, x):\n"
        "        return self.embedding(x)\n"
    )
    weights = {
        "module.embedding.weight": torch.rand(31, 3, 1, 1),
        "module.embedding.bias": torch.rand(31),
    }
    torch.save(
        {"epoch": 1, "state_dict": weights, "optimizer": {"state": {}}}, tmp_path / "mst.pth"
    )
    argv = [
        "--checkpoint",
        tmp_path / "mst.pth",
        "--evaluate",
        "--data_root",
        scenes,
        "--output",
        tmp_path / "res",
    ]
    with pytest.raises(common.UserError, match="--mst_root"):
        run(*argv)
    run(*argv, "--mst-root", tmp_path / "MST")
    assert json.loads((tmp_path / "res/summary.json").read_text())["model"] == "mst++"


def test_an_earlier_evaluation_is_kept_unless_told_otherwise(tmp_path, scenes):
    checkpoint = write_checkpoint(tmp_path / "m.ckpt")
    argv = [
        "--checkpoint",
        checkpoint,
        "--evaluate",
        "--data_root",
        scenes,
        "--output",
        tmp_path / "res",
    ]
    run(*argv, "--split", "train")
    before = (tmp_path / "res" / "summary.json").read_bytes()
    with pytest.raises(common.UserError, match="res: holds an evaluation; give --overwrite"):
        run(*argv)
    assert (tmp_path / "res" / "summary.json").read_bytes() == before
    run(*argv, "--overwrite", "--patch-size", 64)
    names = sorted(path.name for path in (tmp_path / "res" / "metrics").iterdir())
    assert names == ["v_metrics.json", "w_metrics.json", "x_metrics.json"]
    summary = common.read_json(tmp_path / "res" / "summary.json")
    assert ", tiles of 64 px)" in (tmp_path / "res" / "table.md").read_text()
    assert summary["tile"] == 64 and len(summary["per_band"]["ssim_full"]) == 31


@pytest.mark.parametrize("names", [("a", "b"), ("hsi", "metrics")])
def test_one_evaluation_leaves_nothing_of_another(tmp_path, scenes, names):
    """Of one model, of two, of one again without a report; models may be named as its folders."""
    checkpoint, output = write_checkpoint(tmp_path / "m.ckpt"), tmp_path / "res"
    argv = ("--evaluate", "--data_root", scenes, "--output", output, "--checkpoint")
    two = [f"{name}={checkpoint}" for name in names]
    run(*argv, checkpoint)
    before = (output / "summary.json").read_bytes()
    with pytest.raises(common.UserError, match="res: holds an evaluation; give --overwrite"):
        run(*argv, *two)
    assert (output / "summary.json").read_bytes() == before
    run(*argv, *two, "--overwrite")
    found = {path.name for path in output.iterdir()}
    assert found == {*names, "report.html", "summary.json", "table.md"}
    with pytest.raises(common.UserError, match="res: holds an evaluation"):
        run(*argv, checkpoint)
    run(*argv, checkpoint, "--overwrite", "--no-report")
    assert not (output / "report.html").exists() and (output / "metrics.csv").exists()


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_an_evaluation_removes_nothing_that_none_wrote(tmp_path, scenes, more):
    checkpoint, own = write_checkpoint(tmp_path / "m.ckpt"), tmp_path / "photos" / "holiday.jpg"
    own.parent.mkdir()
    own.write_text("mine")
    argv = ("--checkpoint", checkpoint, "--evaluate", "--data_root", scenes, "--output", tmp_path)
    with pytest.raises(common.UserError, match="photos is of no evaluation; give another folder"):
        run(*argv, *more)
    assert own.read_text() == "mine"


def test_an_evaluation_leaves_the_summary_of_a_training_run(tmp_path, scenes):
    checkpoint, own = write_checkpoint(tmp_path / "m.ckpt"), tmp_path / "run" / "summary.json"
    own.parent.mkdir()
    own.write_text("{}")
    argv = ("--evaluate", "--data_root", scenes, "--output", tmp_path / "run", "--overwrite")
    with pytest.raises(common.UserError, match="summary.json is of no evaluation"):
        run("--checkpoint", checkpoint, *argv)
    assert own.read_text() == "{}"


def test_a_scene_without_a_number_is_reported_as_the_worst(tmp_path, scenes, monkeypatch):
    real = inference.predict_scene

    def broken(model, rgb, args):
        out, tile = real(model, rgb, args)
        return (out * math.nan if broken.calls.pop(0) else out), tile

    broken.calls = [False, True, False]
    monkeypatch.setattr(inference, "predict_scene", broken)
    evaluate(write_checkpoint(tmp_path / "m.ckpt"), scenes, tmp_path / "res")
    page = (tmp_path / "res" / "report.html").read_text(encoding="utf-8")
    assert '"top": null' not in page and '"top":null' not in page
    assert common.read_json(tmp_path / "res" / "summary.json")["worst"] == "w"


def test_an_evaluation_that_was_cut_off_can_be_replaced(tmp_path, scenes):
    checkpoint, output = write_checkpoint(tmp_path / "m.ckpt"), tmp_path / "res"
    argv = ("--checkpoint", checkpoint, "--evaluate", "--data_root", scenes, "--output", output)
    (output / "metrics").mkdir(parents=True)
    (output / "metrics" / "old_metrics.json").write_text("{}")
    with pytest.raises(common.UserError, match="res: holds an evaluation; give --overwrite"):
        run(*argv)
    run(*argv, "--overwrite")
    assert not (output / "metrics" / "old_metrics.json").exists()


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


@pytest.mark.parametrize("side", [40, 60])
def test_a_cube_that_lies_otherwise_than_its_photo_is_found(side):
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 255, (40, side, 3))
    rendered = photo**0.5 + rng.normal(0, 1, photo.shape)  # another encoding, and noise
    ways = {"": rendered, "upside down": rendered[::-1], "mirrored": rendered[:, ::-1]}
    if side == 40:
        ways["transposed"] = rendered.swapaxes(0, 1)
    for how, turned in ways.items():
        assert seems_turned(photo, turned) == how
    assert seems_turned(photo, np.full_like(rendered, 7)) == ""
