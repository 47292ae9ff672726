"""Mutated inputs of every kind are accepted, or refused in one line, within 10 s and 1.5 GiB."""

import shutil
from collections import Counter

import fuzz_inputs
import fuzzing
import pytest

import dataset_setup
import frame_prediction

QUICK, WHOLE = 200, 2000  # mutated inputs


@pytest.fixture
def kinds(tmp_path, monkeypatch, runs_in_this_process):
    monkeypatch.setattr(dataset_setup, "run_jobs", fuzz_inputs.without_processes)
    monkeypatch.setattr(dataset_setup, "contact_sheet", lambda *args: None)
    standin = ("standin_model", "create")
    monkeypatch.setitem(frame_prediction.FACTORIES, "hsifusion", standin)
    return fuzz_inputs.all_kinds(tmp_path / "good")


def fuzz(kinds, count, folder):
    """`count` mutated inputs -> the outcome of each, by kind; a bad one is a failure that names its
    number, with which it comes again."""
    outcomes, bad = [], []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        outcome, problem = one(kind, number, folder / "case")
        outcomes.append((kind.name, outcome))
        if problem:
            bad.append(f"{number} {kind.name}: {problem}\n{outcome.text[-600:]}")
    assert not bad, f"{len(bad)} of {count}:\n" + "\n".join(bad)
    return outcomes


def one(kind, number, place):
    """One mutated input -> its outcome, and what is wrong with it."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(kind.folder, place)
    file = place / kind.file
    original = file.read_bytes()
    mutated = kind.mutate(original, fuzzing.random_of(kind.name, number))
    file.write_bytes(mutated)
    outcome = fuzzing.attempt(lambda: kind.main(place), place.parent / "log")
    problem = outcome.problem
    if kind.only_same and not outcome.refused and mutated != original:
        same = (place / "sum").exists() and (
            (place / "sum").read_text() == (kind.folder / "sum").read_text()
        )
        if not same:
            problem = problem or "changed, and not refused"
    return outcome, problem


def test_good_inputs_are_accepted(kinds, tmp_path):
    for kind in kinds:
        outcome = fuzzing.attempt(lambda kind=kind: kind.main(kind.folder), tmp_path / "log")
        assert outcome.code == 0, f"{kind.name}: {outcome.text}"


def test_mutated_inputs_are_accepted_or_refused_in_one_line(kinds, tmp_path):
    fuzz(kinds, QUICK, tmp_path)


@pytest.mark.soak
def test_two_thousand_mutated_inputs(kinds, tmp_path, capsys):
    outcomes = fuzz(kinds, WHOLE, tmp_path)
    refused = sum(outcome.refused for _, outcome in outcomes)
    cpu = max(outcome.cpu for _, outcome in outcomes)
    memory = max(outcome.memory for _, outcome in outcomes) / 2**20
    with capsys.disabled():
        print(
            f"\nfuzzed: {WHOLE} inputs of {len(Counter(name for name, _ in outcomes))} kinds, "
            f"{refused} refused in one line, {WHOLE - refused} accepted, no traceback; "
            f"at most {cpu:.1f} s of CPU and {memory:.0f} MiB more memory"
        )
