"""The least that a data set may hold: one scene to validate on, cubes of one band."""

import json

import numpy as np
import pytest
from conftest import write_raw_arad
from PIL import Image
from training_helpers import TRAINERS, checkpoint, make_run

import sharp_inference
from cube_files import WRITTEN, read_cube, read_wavelengths, write_cube


@pytest.mark.parametrize("trainer", TRAINERS)
def test_one_band_and_one_scene_go_all_the_way(trainer, tmp_path, runs_in_this_process):
    data = write_raw_arad(tmp_path / "raw", train=("a", "b"), valid=("v",), bands=1)
    run = make_run(trainer, data, tmp_path, "--epochs", 1, "--iterations_per_epoch", 3)
    assert run.train() == 0
    state = checkpoint(tmp_path, "best.ckpt")
    assert state["data"]["wavelengths"] == [400.0] and 0 < state["metrics"]["mrae"] < 1
    assert state["metrics"]["sam"] == pytest.approx(0, abs=0.1)  # two numbers have no angle

    def use(*more):
        flags = ["--checkpoint", tmp_path / "run" / "best.ckpt", "--device", "cpu", *more]
        sharp_inference.main(list(map(str, flags)))

    photo = data / "Train_RGB" / "v.jpg"
    use("--input", photo, "--output", tmp_path, "--preview")
    with Image.open(photo) as image:
        assert np.load(tmp_path / "v.npy").shape == (1, image.height, image.width)
    use("--evaluate", "--data_root", data, "--output", tmp_path / "scores")
    (summary,) = (tmp_path / "scores").rglob("summary.json")
    assert json.loads(summary.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind, suffix", WRITTEN.items())
def test_a_cube_of_one_band_comes_back_from_every_format(kind, suffix, tmp_path):
    cube = np.random.default_rng(1).uniform(0.1, 0.9, (1, 12, 10)).astype(np.float32)
    path = tmp_path / f"a{suffix}"
    write_cube(path, cube, [550.0], kind)
    assert np.array_equal(read_cube(path, bands=1), cube.transpose(1, 2, 0))
    assert read_wavelengths(path) == (None if kind == "npy" else [550.0])


def test_a_count_of_bands_is_no_wavelength(tmp_path):
    nm, cube = np.linspace(400, 900, 224), np.ones((4, 4, 224), np.float32)
    np.savez(tmp_path / "a.npz", cube=cube, bands=224, wavelengths=nm)
    assert read_wavelengths(tmp_path / "a.npz") == nm.tolist()
    np.savez(tmp_path / "b.npz", cube=cube[..., :31], bands=31)
    assert read_wavelengths(tmp_path / "b.npz") is None
