"""Disks that are full, cannot be written, or are slow: each script ends in one line, or right."""

import importlib
import os
import subprocess
import sys
import time

import fuzz_inputs
import fuzzing
import pytest
from conftest import folder_bytes, run_setup
from disks import disk
from PIL import Image
from training_helpers import TRAINERS, arguments, assert_same, checkpoint, make_run

import cube_files
import frame_prediction
import sharp_inference

STAGE = ("--patch-size", 64, "--workers", 2)


@pytest.fixture
def scripts(raw_arad, tmp_path, monkeypatch, runs_in_this_process):
    """By name, main(output folder) of each script, for small inputs."""
    monkeypatch.setitem(frame_prediction.FACTORIES, "hsifusion", ("standin_model", "create"))
    fuzz_inputs.write_model(tmp_path / "m.ckpt")
    Image.fromarray(fuzz_inputs.picture(128)).save(tmp_path / "photo.png")

    def stage(out):
        run_setup("--arad-root", raw_arad, "--output-root", out / "staged", *STAGE)

    def predict(out, *more):
        files = ["--checkpoint", str(tmp_path / "m.ckpt"), "--input", str(tmp_path / "photo.png")]
        sharp_inference.main([*files, "--output", str(out / "cubes"), "--device", "cpu", *more])

    def train(trainer, out):
        sys.argv = [trainer, *arguments(trainer, raw_arad, out)]
        return importlib.import_module(trainer).main()

    mains = {"staging": stage, "inference": predict}
    return mains | {name: lambda out, name=name: train(name, out) for name in TRAINERS}


def test_a_disk_that_cannot_be_written_is_one_line(scripts, tmp_path):
    with disk(tmp_path / "disk", "size=64m") as place:
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        for name, main in scripts.items():
            outcome = fuzzing.attempt(lambda main=main: main(place), tmp_path / "log")
            assert outcome.refused and not outcome.problem, f"{name}: {outcome.text}"
            assert str(place) in outcome.text and "Read-only" in outcome.text
        assert not list(place.iterdir())


@pytest.mark.soak
def test_data_on_a_disk_that_cannot_be_written_are_trained_on(raw_arad, tmp_path, scripts):
    with disk(tmp_path / "disk", "size=64m") as place:
        run_setup("--arad-root", raw_arad, "--output-root", place / "staged", *STAGE)
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        run = make_run(TRAINERS[0], place / "staged", tmp_path, "--memory_mode", "lazy")
        assert run.train() == 0


@pytest.mark.parametrize("kind", ["npy", "envi", "mat", "npz", "tiff"])
@pytest.mark.parametrize("mebibytes", [1, 3])
def test_a_cube_that_does_not_fit_the_disk_is_one_line(
    kind, mebibytes, scripts, tmp_path, monkeypatch
):
    """It takes 1.9 MiB, in all formats but .npy twice at once. Pages of a mapped file that do not
    fit would end the process by a signal."""
    monkeypatch.setattr(cube_files, "MAPPED_BYTES", 0)
    with disk(tmp_path / "disk", f"size={mebibytes}m") as place:
        predict = scripts["inference"]
        outcome = fuzzing.attempt(lambda: predict(place, "--format", kind), tmp_path / "log")
        assert not outcome.problem, f"{outcome.problem}: {outcome.text}"
        fits = kind == "npy" and mebibytes == 3
        assert outcome.refused != fits and ("GiB are free" in outcome.text) != fits
        assert len(list((place / "cubes").iterdir())) == fits


@pytest.mark.parametrize("kind, mebibytes", [("npy", 1), ("envi", 3), ("mat", 3)])
def test_a_disk_that_fills_meanwhile_is_one_line(kind, mebibytes, scripts, tmp_path, monkeypatch):
    """Others write too: the space that was free is gone when it is needed."""
    monkeypatch.setattr(cube_files, "MAPPED_BYTES", 0)
    free = cube_files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cube_files.shutil, "disk_usage", lambda path: free)
    with disk(tmp_path / "disk", f"size={mebibytes}m") as place:
        predict = scripts["inference"]
        outcome = fuzzing.attempt(lambda: predict(place, "--format", kind), tmp_path / "log")
        assert outcome.refused and not outcome.problem, outcome
        assert "disk is full" in outcome.text and not list((place / "cubes").iterdir())


@pytest.mark.soak
def test_a_slow_disk_changes_nothing(scripts, tmp_path, monkeypatch):
    def written(folder):
        (tmp_path / folder).mkdir()
        scripts["staging"](tmp_path / folder)
        scripts["inference"](tmp_path / folder)
        assert make_run(TRAINERS[0], tmp_path / folder / "staged", tmp_path / folder).train() == 0
        state = checkpoint(tmp_path / folder)
        state.update(settings=None, data=None)
        names = ("staged", "cubes")
        return state, [folder_bytes(tmp_path / folder / name) for name in names]

    fast = written("fast")
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def slow(*args, original=original):
            time.sleep(0.05)
            return original(*args)

        monkeypatch.setattr(os, name, slow)
    slow_state, slow_files = written("slow")
    assert slow_files == fast[1]
    assert_same(slow_state, fast[0])
