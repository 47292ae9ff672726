"""The benchmarks' own arithmetic."""

import argparse
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation  # noqa: E402
import bench_all  # noqa: E402
import demo  # noqa: E402
import race  # noqa: E402

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


@pytest.mark.parametrize("steps, code", [(2400, 1), (600, 0)])
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


def gpu_script(*arguments):
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_every_part_of_the_gpu_script_works_in_its_small_form(tmp_path):
    done = gpu_script("--device", "cpu", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))["parts"]
    assert {row["model"] for row in parts["models"]} == {"hsifusion tiny", "sharp tiny"}
    assert {row["model"] for row in parts["race"]} == {"hsifusion", "sharp"}
    assert all(0 < row["mrae"] < 1 for row in parts["race"])
    assert len(parts["attention"]) == 7
    assert parts["tests"][0]["failed"] == 0 and parts["tests"][0]["rest"] == "all ran"
    counted = parts["tests"][0]["skipped"] + parts["tests"][0]["passed"]
    assert counted > 30
    assert "| hsifusion tiny | bf16 | eager |" in (tmp_path / "cpu.md").read_text(encoding="utf-8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a usable card")
def test_without_a_gpu_the_gpu_script_says_so(tmp_path):
    done = gpu_script("--out", tmp_path / "results")
    assert done.returncode == 2 and "no CUDA device is usable" in done.stderr
    assert not (tmp_path / "results").exists()


def test_a_race_goes_on_where_it_was_stopped_and_is_paired_over_scenes(synthetic, tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "race.py", "--data_root", synthetic]
    command += ["--steps", "2", "--folds", "2", "--most-folds", "1", "--threads", "1"]
    command += ["--json", tmp_path / "race.json", "--entrants"]
    first = subprocess.run([*command, "hsifusion"], capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    names = ["hsifusion", "hsifusion,use_rope=false,lr=0.001", "sharp,sparse_mode=block"]
    second = subprocess.run([*command, *names], capture_output=True, text=True)
    assert second.returncode == 0 and "hsifusion: 2 steps" not in second.stdout
    results = json.loads((tmp_path / "race.json").read_text(encoding="utf-8"))["results"]
    assert [row["entrant"] for row in results] == names
    wrong = subprocess.run([*command, "hsifusion,no_such=1"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "no_such" in wrong.stderr


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--steps", "-2"], "--steps -2: give 0 or more"),
        (["--folds", "1"], "--folds 1: of 5 training scenes, give from 2"),
        (["--folds", "20"], "--folds 20: of 5 training scenes"),
        (["--patch", "512"], "--patch 512: larger than scene synthetic_"),
        (["--entrants", "mst++"], "--mst-root: MST.. is needed"),
        (["--entrants", "mst++", "--mst-root", "nowhere"], "--mst-root nowhere: no train_code"),
        (["--steps", "0", "--budget", "2", "--entrants", "sharp"], "--mst-root: MST.. is needed"),
        (["--entrants", "hsifusion,window_size=abc"], "--entrants hsifusion:tiny: "),
        (["--entrants", "hsifusion,lr=abc"], "hsifusion,lr=abc: lr cannot be 'abc'"),
        (["--entrants", "hsifusion,mix=nope"], "hsifusion,mix=nope: nope: no such file or fold"),
        (["--entrants", "hsifusion,init=nope"], "hsifusion,init=nope: nope: no such file or fol"),
        (["--entrants", "mst++:large"], "--entrants mst..:large: of MST.. lr alone can be chosen"),
        (["--entrants", "mst++,without=spectral"], "of MST.. lr alone can be chosen"),
        (["--entrants", "hsifusion,without=nope"], "without=nope: not a part of this model"),
        (["--entrants", "hsifusion,without=fusion"], "without=fusion: not a part of this model"),
        (["--entrants", "sharp,without=windows"], "without=windows: not a part of this model"),
        (["--json", "other.json"], "--json other.json: not a race's"),
    ],
)
def test_a_race_that_cannot_be_run_is_one_line(synthetic, tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    command = ["race.py", "--data_root", str(synthetic), "--threads", "1", "--steps", "1"]
    flags = ["--entrants", "hsifusion", *flags[1:]] if flags[0] == "--entrants" else flags
    monkeypatch.setattr(sys, "argv", [*command, *flags])
    monkeypatch.setattr(race.Training, "step", lambda *_: pytest.fail("a race began"))
    with pytest.raises(race.UserError, match=f"^.*{named}"):
        race.main()


def test_counts_of_a_benchmark_are_1_or_more(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["race.py", "--data_root", "x", "--batch", "0"])
    with pytest.raises(SystemExit) as stopped:
        race.main()
    assert stopped.value.code == 2 and "argument --batch: 0: give 1 or" in capsys.readouterr().err


def test_ratios_have_intervals_over_the_same_scenes():
    rng = np.random.default_rng(0)
    rival = rng.uniform(0.1, 0.4, 20)
    low, high = race.interval(0.8 * rival, rival)
    assert low == pytest.approx(0.8) and high == pytest.approx(0.8)
    low, high = race.interval(0.8 * rival * rng.uniform(0.8, 1.2, 20), rival)
    assert 0.7 < low < 0.8 < high < 0.9


def built(text):
    entrant = race.parse_entrant(text)
    model = race.build(entrant.model, entrant.size, None, entrant.options)
    if entrant.training["without"]:
        ablation.take_out(model, entrant.training["without"])
    return model


@pytest.mark.parametrize("text", [*ablation.HSIFUSION, *ablation.SHARP])
def test_every_variant_of_the_ablation_trains(text):
    model, rgb = built(text), torch.rand(1, 3, 64, 64)
    model.fit_spectral_path(rgb, torch.rand(1, 31, 64, 64))
    cube = model(rgb)
    (cube.mean() + model.auxiliary_loss()).backward()
    assert cube.shape == (1, 31, 64, 64) and cube.isfinite().all()


@pytest.mark.parametrize("part, rows", [("gain", slice(0, 12)), ("term", slice(12, 24))])
def test_what_is_taken_out_of_the_head_stays_out(part, rows):
    model = built(f"sharp,without={part}")
    weight = model.head.coefficients.weight
    model(torch.rand(1, 3, 64, 64)).square().mean().backward()
    assert not weight[rows].any() and not weight.grad[rows].any() and weight.grad.any()


def test_attention_that_is_taken_out_reads_nothing_around_a_pixel():
    """Without windows and spectral attention only convolutions are left."""
    model = built("hsifusion,without=windows").eval()
    ablation.take_out(model, "spectral")
    rgb = torch.rand(1, 3, 128, 128)
    other = rgb.clone()
    other[..., -8:, -8:] = 0
    with torch.no_grad():
        change = (model(rgb) - model(other)).abs().amax(1)[0]
    assert change[-1, -1] > 0 and not change[:8, :8].any()


def test_a_list_in_an_entrant_keeps_its_commas():
    entrant = race.parse_entrant("hsifusion:small,depths=[1,2,2],lr=0.001")
    assert entrant.size == "small" and entrant.options == {"depths": [1, 2, 2]}
    assert entrant.training["lr"] == 0.001


def test_all_benchmarks_are_part_of_make_bench():
    args = argparse.Namespace(mst_root="mst", data_root="scenes")
    parts = bench_all.parts(args)
    assert {"race 300", "race 1000", "race 3000", "ablation"} <= set(parts)
    scripts = {command[0] for command in parts.values()}
    found = {path.name for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert scripts == found - {"bench_all.py"} | {"race.py"}
    for script, *flags in parts.values():
        text = (ROOT / "benchmarks" / script).read_text(encoding="utf-8")
        for flag in ["--json", *(flag for flag in flags if flag.startswith("--"))]:
            assert f'"{flag}"' in text, f"{script} {flag}"


GOOD_PART = """
import pathlib, sys
pathlib.Path(sys.argv[-1]).write_text('{"figure": 1}')
with open(__file__ + ".runs", "a") as file:
    file.write("x")
print("a table")
"""


def test_all_benchmarks_stop_at_a_part_without_figures_and_go_on_from_it(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    for name, text in (("good.py", GOOD_PART), ("bad.py", "raise SystemExit(1)")):
        (tmp_path / "benchmarks" / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(bench_all, "ROOT", tmp_path)
    monkeypatch.setattr(bench_all, "parts", lambda args: {"a": ["good.py"], "b": ["bad.py"]})
    monkeypatch.setattr(sys, "argv", ["bench_all.py", "--mst-root", "x", "--data_root", "y"])
    for _ in range(2):
        with pytest.raises(race.UserError, match="^bad.py: ended with exit code 1"):
            bench_all.main()
    (tmp_path / "benchmarks" / "bad.py").write_text(GOOD_PART, encoding="utf-8")
    bench_all.main()
    assert (tmp_path / "benchmarks" / "good.py.runs").read_text() == "x"
    (record,) = (tmp_path / "benchmarks" / "results").glob("*.json")
    assert json.loads(record.read_text()) == {"a": {"figure": 1}, "b": {"figure": 1}}
    assert record.with_suffix(".md").read_text().count("a table") == 2


@pytest.mark.parametrize(
    "text, rate",
    [
        ("mst++", 4e-4),
        ("mst++,lr=0.0008", 8e-4),
        ("hsifusion", 8e-4),
        ("sharp:small", 4e-4),
        ("sharp,lr=1e-3", 1e-3),
    ],
)
def test_the_rival_trains_at_its_own_learning_rate(text, rate):
    assert race.parse_entrant(text).training["lr"] == rate


def test_the_rival_at_another_rate_has_its_steps_too(monkeypatch):
    def seconds_a_step(entrants, scenes, args):
        return {
            entrant.text: (2.0 if entrant.model == "mst++" else 0.5, 0.0) for entrant in entrants
        }

    monkeypatch.setattr(race, "seconds_a_step", seconds_a_step)
    args = argparse.Namespace(steps=0, budget=300, minutes=0)
    entrants = [race.parse_entrant(text) for text in ("mst++,lr=0.0008", "hsifusion")]
    assert race.steps_of(entrants, [], args) == {"mst++,lr=0.0008": 300, "hsifusion": 1200}


def test_a_race_does_not_go_on_with_other_settings(tmp_path):
    settings = dict.fromkeys(race.SAME, "1") | {"lr": "0.0008", "amp": "None"}
    file = tmp_path / "race.json"
    facts = {"steps": {}, "results": [], "environment": {}}
    for other, named in (({"lr": "0.0004"}, "lr 0.0004"), ({"amp": "bf16"}, "amp bf16")):
        file.write_text(json.dumps(facts | {"settings": settings | other}), encoding="utf-8")
        with pytest.raises(race.UserError, match=f"was made with {named}; give another file"):
            race.Record(file, settings)
