"""Staging and inference killed at random moments: a restart ends as if nothing had happened, and
leaves nothing behind. (Training: test_resume.py.)"""

import os
import random
import signal
import threading
import time

import fuzz_inputs
import numpy as np
import psutil
import pytest
from conftest import folder_bytes, run_setup, write_raw_arad
from PIL import Image
from tqdm import tqdm

import dataset_setup
import frame_prediction
import sharp_inference


@pytest.fixture
def quiet(monkeypatch, runs_in_this_process):
    # The usual lock is shared with forked processes, and one that is killed may hold it.
    tqdm.set_lock(threading.RLock())
    monkeypatch.setattr(dataset_setup, "contact_sheet", lambda *args: None)
    monkeypatch.setitem(frame_prediction.FACTORIES, "hsifusion", ("standin_model", "create"))


def kill_and_restart(main, folder, kills, longest):
    """Kill a process that runs main() `kills` times at random moments, then let it end."""
    rng = random.Random(kills)
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            silence(folder)
            main()
            os._exit(0)
        time.sleep(rng.uniform(0, longest))
        workers = psutil.Process(child).children(recursive=True)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        _, alive = psutil.wait_procs(workers, timeout=30)
        for worker in alive:
            worker.kill()
        assert not alive, "worker processes outlive the one that was killed"
    main()


def silence(folder):
    nowhere = os.open(folder / "killed.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def stage_with_kills(tmp_path, kills):
    raw = write_raw_arad(tmp_path / "raw", train=tuple("abcdefgh"))
    sizes = ("--patch-size", 64, "--workers", 2)
    run_setup("--arad-root", raw, "--output-root", tmp_path / "whole", *sizes)

    def main():
        run_setup("--arad-root", raw, "--output-root", tmp_path / "killed", *sizes)

    kill_and_restart(main, tmp_path, kills, 0.3)
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "whole")


def predict_with_kills(tmp_path, kills):
    (tmp_path / "photos").mkdir()
    for number in range(6):
        photo = np.roll(fuzz_inputs.picture(128), number, axis=2)
        Image.fromarray(photo).save(tmp_path / "photos" / f"{number}.png")
    fuzz_inputs.write_model(tmp_path / "m.ckpt")

    def run(out):
        files = ["--checkpoint", str(tmp_path / "m.ckpt"), "--input", str(tmp_path / "photos")]
        more = ["--format", "envi", "--overwrite", "--device", "cpu"]
        sharp_inference.main([*files, "--output", str(tmp_path / out), *more])

    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    run("whole")
    kill_and_restart(lambda: run("killed"), tmp_path, kills, 0.4)
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "whole")


def test_staging_survives_kills(tmp_path, quiet):
    stage_with_kills(tmp_path, 3)


def test_inference_survives_kills(tmp_path, quiet):
    predict_with_kills(tmp_path, 3)


@pytest.mark.soak
def test_staging_survives_fifty_kills(tmp_path, quiet):
    stage_with_kills(tmp_path, 50)


@pytest.mark.soak
def test_inference_survives_fifty_kills(tmp_path, quiet):
    predict_with_kills(tmp_path, 50)
