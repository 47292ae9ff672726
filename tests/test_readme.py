"""Every command of README.md and docs/ is run, in order, on small data; what needs a GPU, Slurm,
`make` or hours is parsed."""

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, write_raw_arad
from PIL import Image
from training_helpers import ONE_THREAD

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL_RUN = "--patch_size 64 --batch_size 2 --iterations_per_epoch 2 --num_workers 0 --device cpu"
# What makes a command small; the last value of a flag counts.
SMALL = {
    "hsifusion_training.py": f"{SMALL_RUN} --epochs 1 --val_crop_border 0",
    "sharp_training_script_fixed.py": f"{SMALL_RUN} --epochs 1 --val_crop_border 0",
    "dataset_setup.py": "--patch-size 64 --workers 1",
    "sharp_inference.py": "--device cpu",
}
# Runs each command in a fork of one process that has imported everything.
RUNNER = """
import json, os, runpy, sys, time
sys.path.insert(0, os.getcwd())
import hsifusion_training, sharp_training_script_fixed, sharp_inference, dataset_setup
import torch._dynamo, torch.utils.tensorboard

for arguments in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, arguments]), flush=True)
    if code:
        break
"""


def blocks(language):
    """Code blocks of all pages."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.strip()]


def test_the_commands_of_the_readme_work_one_after_the_other(tmp_path):
    write_raw_arad(tmp_path / "data" / "ARAD_1K")
    pixels = np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    for folder in ("weights", "report_page"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("work"))
    runs = []
    for command in commands():
        if command[0] == "python" and command[1] in SMALL:
            runs.append([*command[1:], *shlex.split(SMALL[command[1]])])
    assert len(runs) >= 8
    program = [sys.executable, "-c", RUNNER, json.dumps(runs)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, env=ONE_THREAD)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [code for code, _ in results] == [0] * len(runs), done.stderr[-2000:]
    for path in ("photo.npy", "data/staged/index.json", "results/report.html"):
        assert (tmp_path / path).exists()
    for block in blocks("python"):
        check = f"{block}\nassert cube.shape == (31, 80, 90) and len(wavelengths) == 31\n"
        ran = subprocess.run(
            [sys.executable, "-c", check], capture_output=True, text=True, cwd=tmp_path
        )
        assert ran.returncode == 0, ran.stderr


def test_what_is_not_run_is_there_and_takes_its_flags():
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands():
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", targets, re.M), command
        elif command[0] == "sbatch":
            assert (ROOT / command[1]).exists()
        elif command[:3] == ["python", "-m", "torch.distributed.run"]:
            assert (ROOT / command[4]).exists()
        else:
            assert command[0] == "python" and (ROOT / command[1]).exists(), command


@functools.cache
def help_of(script):
    command = [sys.executable, ROOT / script, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("script", SMALL)
def test_help_begins_with_commands(script):
    top = help_of(script).split("options:")[0].splitlines()[:16]
    assert sum(script in line for line in top) >= 3, top


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_every_flag_that_is_named_exists():
    """In README.md: flags of any script."""
    known = set()
    for script in (*SMALL, "benchmarks/gpu.py", "benchmarks/race.py"):
        known |= set(re.findall(r"--[a-z][a-z0-9_-]+", help_of(script)))
    known = {flag.replace("-", "_") for flag in known}
    named = re.findall(r"--[a-z][a-z0-9_-]+", PAGES[0].read_text(encoding="utf-8"))
    unknown = {flag for flag in named if flag.replace("-", "_") not in known}
    assert unknown <= {"--nproc_per_node"}, unknown
