"""Memory, file handles and processes stay as they are under load (load.py)."""

import os

import load
import pytest
from training_helpers import TRAINERS

MINUTES = float(os.environ.get("HSI_SOAK_MINUTES", "60"))  # of all tests here together
MOST_SLOPE = 2.0  # MB per 1000 steps or photos, over an hour; noise of shorter ones is larger
NOISE = 100.0  # MB that may differ between two samples: the allocator keeps what was freed


def check(own, workers, handles, processes, done):
    assert own < MOST_SLOPE + 1000 * NOISE / done
    assert workers < MOST_SLOPE + 1000 * NOISE / done
    assert handles <= 0 and processes <= 0


def test_a_slope_is_per_thousand_after_the_warm_up():
    counts = list(range(0, 1000, 10))
    values = [900.0] * 20 + [100 + 0.003 * count for count in counts[20:]]
    assert load.slope(counts, values) == pytest.approx(3.0)


@pytest.mark.soak
@pytest.mark.parametrize("trainer", TRAINERS)
def test_training_holds_no_more_as_it_goes_on(trainer, tmp_path, capsys, runs_in_this_process):
    with capsys.disabled():
        figures = load.train(trainer, tmp_path, MINUTES / 4)
    check(*figures)


@pytest.mark.soak
def test_inference_holds_no_more_as_it_goes_on(tmp_path, capsys):
    with capsys.disabled():
        figures = load.predict(tmp_path, MINUTES / 2)
    check(*figures)
