"""A run's folder, log, signals and data facts."""

import json
import math
from pathlib import Path

import pytest
import torch

from common_utils_v32 import UserError
from compute_devices import Ranks
from training_runs import (
    RunFolder,
    RunLog,
    _refit_where_better,
    check_resumed_data,
    rng_state,
    set_rng_state,
)


class Guess(torch.nn.Linear):
    """A model whose loss is its bias, which a fit of the spectral path makes the next of `fits`."""

    def fit_spectral_path(self, rgb, cube):
        self.bias.data.fill_(self.fits)


@pytest.mark.parametrize(
    "fits, said, bias", [(0.5, "kept", 0.5), (2.0, "not kept", 1.0), (math.nan, "not kept", 1.0)]
)
def test_a_new_fit_of_the_linear_path_is_kept_where_it_helps(fits, said, bias):
    model, patches = Guess(3, 1), torch.zeros(2, 3)
    model.bias.data.fill_(1.0)
    model.fits = fits
    text = _refit_where_better(model, patches, patches, lambda pred, _: pred.mean())
    assert text.endswith(f", {said}") and model.bias.item() == bias


FACTS = {"rgb_norm": "unit", "rgb_dtype": "uint8", "rgb_encoding": "linear", "wavelengths": [400.0]}


def test_folders_follow_the_environment(monkeypatch):
    monkeypatch.setenv("HSI_LOG_DIR", "l")
    monkeypatch.setenv("HSI_CKPT_DIR", "c")
    folder = RunFolder.of("o", "run")
    assert (folder.logs, folder.checkpoints) == (Path("l/run"), Path("c/run"))


@pytest.mark.parametrize(
    "old, named",
    [
        ({"rgb_norm": "per_image"}, "rgb_norm per_image, not unit"),
        ({"rgb_encoding": "srgb"}, "rgb_encoding srgb, not linear"),
        ({"rgb_dtype": "uint16"}, "rgb_dtype uint16, not uint8"),
        ({"wavelengths": [410.0]}, "wavelengths"),
    ],
)
def test_a_resume_on_data_of_another_kind_is_refused(old, named):
    with pytest.raises(UserError, match=f"--resume_from x.ckpt: trained with {named}"):
        check_resumed_data(FACTS | old, FACTS, Path("x.ckpt"))
    check_resumed_data(FACTS, FACTS, Path("x.ckpt"))


def test_an_older_checkpoint_was_trained_on_8_bits_of_linear_light():
    old = {"rgb_norm": "unit", "wavelengths": [400.0]}
    check_resumed_data(old, FACTS, Path("x.ckpt"))
    with pytest.raises(UserError, match="rgb_encoding linear, not srgb"):
        check_resumed_data(old, FACTS | {"rgb_encoding": "srgb"}, Path("x.ckpt"))


def test_a_log_goes_on_from_the_checkpoint_and_drops_what_a_killed_run_wrote_after_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": step}) + "\n" for step in (1, 2, 3)]
    path.write_text("".join(lines) + '{"kind": "tr', encoding="utf-8")
    log = RunLog(tmp_path, Ranks(), 2, None, {})
    log.write("train", 3, {"loss": 0.5, "note": "text is not a curve"})
    log.close()
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in found] == [1, 2, 3] and found[-1]["loss"] == 0.5


def test_a_log_keeps_pictures_and_is_silent_on_other_ranks(tmp_path):
    from matplotlib.figure import Figure

    log = RunLog(tmp_path / "main", Ranks(), 0, None, {})
    log.figure("val/scene", 1, Figure(figsize=(1, 1)))
    log.close()
    (events,) = (tmp_path / "main").glob("events.out.tfevents.*")
    assert b"val/scene" in events.read_bytes()
    other = RunLog(tmp_path / "other", Ranks(1, 2, 1), 0, None, {})
    other.write("train", 1, {"loss": 1.0})
    other.close()
    assert not (tmp_path / "other").exists()


def test_random_states_come_back():
    state = rng_state()
    first = torch.rand(3)
    set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
