"""A rank that dies takes the job down at once, and its own error is shown."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_helpers import ONE_THREAD, TRAINERS, arguments

LONGEST = 60  # seconds from the death of a rank to the end of the job
DYING = Path(__file__).with_name("dying_rank.py")


@pytest.mark.soak
@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("how, said", [("error", "scene.cube.npy"), ("kill", "SIGKILL")])
def test_a_rank_that_dies_takes_the_job_down(trainer, how, said, raw_arad, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    args = arguments(trainer, raw_arad, tmp_path, "--iterations_per_epoch", 100_000)
    log = tmp_path / "run" / "metrics.jsonl"
    with open(tmp_path / "said", "w+b") as words:
        job = subprocess.Popen(
            [*launch, DYING, how, trainer, *args], stdout=words, stderr=words, env=ONE_THREAD
        )
        while not (log.exists() and log.stat().st_size) and job.poll() is None:
            time.sleep(0.1)  # its first step
        code = job.wait(LONGEST)
    text = (tmp_path / "said").read_text(encoding="utf-8")
    assert code == 1 and said in text, text
    if how == "error":
        assert "error: [Errno 5] Input/output error: 'scene.cube.npy'\n" in text
