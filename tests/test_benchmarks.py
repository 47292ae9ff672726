"""The benchmarks' own arithmetic."""

import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import demo  # noqa: E402

ERRORS = {"mrae": 1.0, "rmse": 1.0, "sam": 1.0}


@pytest.mark.parametrize("seconds_a_step", [0.02, 0.1, 0.35, 2.0])
def test_the_demo_trains_as_long_as_the_budget_allows(seconds_a_step):
    steps = demo.steps_that_fit(300, seconds_a_step)
    assert demo.EPOCHS <= steps <= demo.MOST_STEPS and steps % demo.EPOCHS == 0
    spent = steps * demo.SLOWER_LOOP * seconds_a_step + demo.AFTER_SECONDS
    assert spent <= 300
    more = (steps + demo.EPOCHS) * demo.SLOWER_LOOP * seconds_a_step
    assert steps == demo.MOST_STEPS or more > 300 - demo.AFTER_SECONDS - 60 * seconds_a_step


def test_the_demo_trains_a_little_where_there_is_no_time():
    assert demo.steps_that_fit(-5, 1.0) == demo.EPOCHS


@pytest.mark.parametrize("steps, code", [(2000, 1), (600, 0)])
def test_a_machine_too_slow_to_learn_enough_is_no_failure(steps, code, capsys):
    table = {"linear": ERRORS, "linear_relative": ERRORS, "network": ERRORS}
    assert demo.verdict(table, steps) == code
    assert ("600 training steps" in capsys.readouterr().out) == (steps == 600)


def test_the_demo_says_when_the_network_is_ahead(capsys):
    ahead = {metric: 0.5 for metric in ERRORS}
    assert demo.verdict({"linear": ERRORS, "linear_relative": ERRORS, "network": ahead}, 600) == 0
    assert "ahead of both maps" in capsys.readouterr().out


STANDALONE = """
import os, runpy, sys, traceback
import torch

for path in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            runpy.run_path(path, run_name="started as a script, up to its main")
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(path)
"""


def test_every_benchmark_starts_without_help_from_its_surroundings(tmp_path):
    scripts = sorted((ROOT / "benchmarks").glob("*.py"))
    command = [sys.executable, "-c", STANDALONE, *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "", done.stderr
