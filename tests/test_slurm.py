"""The job templates under a real Slurm of two nodes (tests/slurm/setup.sh): to the end, preempted,
cancelled."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, write_raw_arad

import common_utils_v32 as common

TEMPLATES = ("train_job_HSI.sh", "train_job_SHARP.sh")
SCRIPTS = (*TEMPLATES, "tests/slurm/setup.sh", ".ci/run")
SETUP = ROOT / "tests" / "slurm" / "setup.sh"
STEPS = 100
TINY = {
    "train_job_HSI.sh": [
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
    "train_job_SHARP.sh": [
        "--base_dim",
        "16",
        "--depths",
        "1",
        "1",
        "--heads",
        "1",
        "1",
        "--mlp_ratios",
        "1",
        "1",
    ],
}
RUN = [
    "--model_size",
    "tiny",
    "--patch_size",
    "64",
    "--batch_size",
    "1",
    "--device",
    "cpu",
    "--epochs",
    "2",
    "--iterations_per_epoch",
    str(STEPS // 2),
    "--val_interval",
    "2",
    "--num_workers",
    "0",
    "--log_interval",
    "5",
]
# In the place of python: notes what it was started with; stops at a signal as the launcher does.
STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$NOTES/arguments"; env >"$NOTES/environment"
[[ -z ${STAND_IN_CODE:-} ]] || exit "$STAND_IN_CODE"
((${SLURM_RESTART_COUNT:-0} == 0)) || exit 0
trap 'echo got USR1 >"$NOTES/signal"; exit 1' USR1
trap 'echo got TERM >"$NOTES/signal"; exit 1' TERM
touch "$NOTES/started"
sleep 100 &
wait
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_pass_shellcheck(script):
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", ROOT / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_templates_are_twins_without_personal_data_or_serialised_kernels():
    texts = [(ROOT / name).read_text() for name in TEMPLATES]
    for text in texts:
        assert not re.search(
            r"CUDA_LAUNCH_BLOCKING|@\w+\.\w+|/(home|scratch|users)/|--(account|mail)", text
        )
    pairs = list(zip(*(text.splitlines() for text in texts), strict=True))
    different = [pair for pair in pairs if pair[0] != pair[1]]
    assert len(different) == 4 and (
        "hsifusion_training.py" in different[-1][0]
        and "sharp_training_script_fixed.py" in different[-1][1]
    )


# --- under Slurm


class Slurm:
    """Submits jobs and looks at them."""

    def __init__(self, folder, environment):
        self.folder, self.environment = folder, environment

    def call(self, *args, **environment):
        done = subprocess.run(
            [str(a) for a in args],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=ROOT,
            env=self.environment | environment,
        )
        assert done.returncode == 0, (args, done.stderr)
        return done.stdout

    def submit(self, name, script, options=(), arguments=(), **environment):
        notes = self.folder / name
        notes.mkdir()
        log = self.folder / f"{name}.log"
        number = self.call(
            "sbatch",
            "--parsable",
            "--gpus-per-node=0",
            "--cpus-per-task=1",
            f"--output={log}",
            *options,
            script,
            *arguments,
            NOTES=str(notes),
            **environment,
        ).strip()
        return SimpleNamespace(number=number, log=log, notes=notes, run=self.folder / "runs" / name)

    def show(self, job):
        return dict(
            re.findall(
                r"(\w+)=(\S*)", self.call("scontrol", "--oneliner", "show", "job", job.number)
            )
        )

    def wait(self, job):
        """Until the job has ended for good -> what scontrol says of it."""
        await_(
            lambda: self.show(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"),
            job,
            "has not ended",
        )
        return self.show(job)

    def make_room(self, node):
        """A short job of the higher partition, which needs more of the node's 8 CPUs than a job
        with 4 leaves."""
        self.call(
            "sbatch",
            "--partition=high",
            f"--nodelist={node}",
            "--cpus-per-task=6",
            "--output=/dev/null",
            "--wrap=true",
        )


def text(job):
    """The job's log; writes of several processes meet in it, also inside a character of a progress
    bar."""
    return job.log.read_text(errors="replace") if job.log.exists() else "it wrote no log"


def await_(ready, job, complaint, seconds=600):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"{complaint}:\n{text(job)[-3000:]}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons are started as root only")
    path = os.environ["PATH"] + os.pathsep + "/usr/sbin"
    for command in ("sbatch", "slurmctld", "slurmd", "munged"):
        if not shutil.which(command, path=path):
            pytest.skip(f"{command} is not installed (Debian: apt-get install slurm-wlm munge)")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([SETUP, "start", folder / "slurm"], check=True, timeout=300)
    stand_in = folder / "stand_in"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "HSI_"))}
    yield Slurm(
        folder,
        clean | {"SLURM_CONF": str(folder / "slurm" / "slurm.conf"), "PYTHON": str(stand_in)},
    )
    subprocess.run([SETUP, "stop", folder / "slurm"], check=True, timeout=300)


@pytest.fixture(scope="module")
def train(slurm):
    """Submits a tiny run of a template's trainer."""
    data, runs = write_raw_arad(slurm.folder / "data", size=(64, 64)), str(slurm.folder / "runs")

    def submit(name, script, options, *more, ranks=1):
        return slurm.submit(
            name,
            script,
            options,
            [*RUN, *TINY[script], "--experiment_name", name, *more],
            PYTHON=sys.executable,
            RANKS_PER_NODE=str(ranks),
            OMP_NUM_THREADS="1",
            HSI_DATA_DIR=str(data),
            HSI_LOG_DIR=runs,
            HSI_CKPT_DIR=runs,
        )

    return submit


@pytest.fixture(scope="module")
def stand_ins(slurm):
    """Jobs that do not train; submitted early, because Slurm looks at time limits every 30 s."""
    unsigned = slurm.folder / "job.sh"
    unsigned.write_text(
        (ROOT / TEMPLATES[0]).read_text().replace("#SBATCH --signal=B:USR1@120\n", "")
    )
    jobs = SimpleNamespace(
        limited=slurm.submit(
            "limited", TEMPLATES[0], ["--partition=low", "--nodelist=127.0.0.2", "--time=2"]
        ),
        unsigned=slurm.submit(
            "unsigned", unsigned, ["--partition=low", "--nodelist=127.0.0.1", "--cpus-per-task=4"]
        ),
        failing=slurm.submit("failing", TEMPLATES[1], STAND_IN_CODE="2"),
        noted=slurm.submit(
            "noted",
            TEMPLATES[1],
            ["--nodes=2"],
            ["--epochs", "3"],
            STAND_IN_CODE="0",
            RANKS_PER_NODE="4",
        ),
    )
    await_((jobs.unsigned.notes / "started").exists, jobs.unsigned, "did not start")
    slurm.make_room("127.0.0.1")
    return jobs


def test_a_preempted_job_saves_queues_again_and_ends_as_an_undisturbed_one(slurm, stand_ins, train):
    """Two ranks on one node, stopped and requeued, against one rank on each of two nodes."""
    preempted = train(
        "preempted",
        TEMPLATES[0],
        ["--partition=low", "--nodelist=127.0.0.2", "--cpus-per-task=4"],
        ranks=2,
    )
    await_((preempted.run / "config.json").exists, preempted, "did not start to train")
    slurm.make_room("127.0.0.2")
    whole = train("whole", TEMPLATES[0], ["--partition=high", "--nodes=2"])
    assert slurm.wait(preempted)["Restarts"] == "1"
    log = text(preempted)
    assert "start 1 on 127.0.0.2" in log and "start 2 on" in log and "done: best crop MRAE" in log
    assert 0 < int(re.search(r"resumed: .* step (\d+)", log)[1]) < STEPS

    assert slurm.wait(whole)["ExitCode"] == "0:0"
    assert "start 1 on 127.0.0.1 127.0.0.2" in text(whole)
    one, other = (common.read_checkpoint(job.run / "last.ckpt") for job in (whole, preempted))
    assert one["step"] == other["step"] == STEPS and len(one["rng"]) == len(other["rng"]) == 2
    for key in ("state_dict", "ema"):
        assert one[key].keys() == other[key].keys()
        assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])
    steps = [
        [json.loads(line)["step"] for line in (job.run / "metrics.jsonl").read_text().splitlines()]
        for job in (whole, preempted)
    ]
    assert steps[0] == steps[1]


def test_a_cancelled_job_saves_and_is_not_queued_again(slurm, train):
    """With a loader process, which the launcher signals too."""
    job = train(
        "cancelled", TEMPLATES[1], [], "--num_workers", "1", "--iterations_per_epoch", "9999"
    )
    lines = job.run / "metrics.jsonl"
    await_(lambda: lines.exists() and lines.stat().st_size, job, "did not train")
    assert not (job.run / "last.ckpt").exists()
    slurm.call("scancel", job.number)
    await_((job.run / "last.ckpt").exists, job, "nothing was saved", seconds=30)
    assert common.read_checkpoint(job.run / "last.ckpt")["step"] > 0
    found = slurm.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")


def test_a_job_near_its_time_limit_stops_and_is_queued_again(slurm, stand_ins):
    found = slurm.wait(stand_ins.limited)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1")
    assert (stand_ins.limited.notes / "signal").read_text() == "got USR1\n"


def test_a_preemption_that_signals_the_trainers_alone_queues_again(slurm, stand_ins):
    """As where a job asks for no signal, or Slurm is not set to send it at preemption."""
    found = slurm.wait(stand_ins.unsigned)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1")
    assert (stand_ins.unsigned.notes / "signal").read_text() == "got TERM\n"


def test_a_failed_run_keeps_its_exit_code_and_is_not_queued_again(slurm, stand_ins):
    found = slurm.wait(stand_ins.failing)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "2:0", "0")


def test_trainers_get_the_environment_and_the_arguments(slurm, stand_ins):
    assert slurm.wait(stand_ins.noted)["JobState"] == "COMPLETED"
    environment = (stand_ins.noted.notes / "environment").read_text().splitlines()
    for expected in (
        "HSI_DATA_DIR=./data/ARAD_1K",
        "HSI_LOG_DIR=./artifacts/logs",
        "HSI_CKPT_DIR=./artifacts/checkpoints",
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
    ):
        assert expected in environment
    arguments = (stand_ins.noted.notes / "arguments").read_text().splitlines()
    assert {"--nnodes=2", "--nproc_per_node=4", "--rdzv_backend=c10d"} < set(arguments)
    assert arguments[-5:] == [
        "sharp_training_script_fixed.py",
        "--resume_from",
        "auto",
        "--epochs",
        "3",
    ]
