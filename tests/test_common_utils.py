"""What the scripts share: metrics against plain NumPy (and MST++'s own code where it is at hand),
command line, files."""

import dataclasses
import importlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import common_utils_v32 as common
from common_utils_v32 import UserError, opt
from training_runs import environment_record

SCRIPTS = [path.stem for path in ROOT.glob("*.py")]


IMPORTS = """
import contextlib, io, json, os, random, signal, sys
import numpy, torch

def state():
    backends = torch.backends.cudnn
    return [
        torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        backends.benchmark, backends.deterministic, signal.getsignal(signal.SIGTERM),
        random.getstate(), torch.initial_seed(), dict(os.environ),
    ]

for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        before, said = state(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            __import__(module)
        clean = before == state() and not said.getvalue() and not torch.cuda.is_initialized()
        os._exit(0 if clean else 1)
    if os.waitpid(child, 0)[1]:
        print(module)
"""


def test_importing_prints_nothing_and_changes_no_global_state():
    command = [sys.executable, "-W", "error::UserWarning", "-c", IMPORTS, *SCRIPTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


BLOCKS = (ROOT / "README.md").read_text().split("```bash\n")[1:]
COMMANDS = [
    line.split("    #")[0].removeprefix("python ").split()
    for block in BLOCKS
    for line in block.split("```")[0].splitlines()
    if line.startswith("python ")
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_of_the_readme_parses(command):
    if command[:2] == ["-m", "torch.distributed.run"]:
        command = command[3:]
    module, argv = importlib.import_module(command[0].removesuffix(".py")), command[1:]
    if hasattr(module, "Settings"):
        assert common.parse_dataclass(module.Settings, argv)
    else:  # its flags are right, and the data are missing here
        with pytest.raises(UserError, match="no such folder"):
            module.main(argv)


def test_a_record_of_the_environment_needs_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment_record()["git_commit"] is None


# --- command line and files


@dataclasses.dataclass
class Example:
    data_root: str = opt("x", "folder")
    use_amp: bool = opt(True, "mixed precision")
    compile_model: bool | None = opt(None, "compile")
    depths: tuple[int, ...] = opt((1, 2), "blocks")
    mode: str = opt("a", "mode", choices=("a", "b"))
    rate: float = opt(0.5, "rate, 100 %")
    rank: int = 0


def parse(*argv):
    return common.parse_dataclass(Example, list(argv))


def test_dashes_and_underscores_are_both_accepted():
    assert parse("--data-root", "y") == parse("--data_root=y") == Example(data_root="y")
    assert parse("--no-use-amp") == parse("--no-use_amp") == Example(use_amp=False)
    assert parse("--compile_model").compile_model is True and parse().compile_model is None
    assert list(parse("--depths", "3", "4", "5").depths) == [3, 4, 5]


@pytest.mark.parametrize(
    "argv", [["--mode", "c"], ["--rank", "1"], ["--data", "x"], ["--rate", "fast"]]
)
def test_unknown_flags_and_values_are_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("settings", [{"rank": 1, "no": 2}, []])
def test_unknown_settings_in_a_config_file_name_the_file_and_the_key(settings, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="c.json: unknown settings: (no, rank|a list)"):
        parse("--config", str(path))


@pytest.mark.parametrize("settings", [{"mode": "c"}, {"rate": "fast"}, {"depths": "no"}])
def test_bad_values_in_a_config_file_are_refused_like_flags(settings, tmp_path, capsys):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(SystemExit):
        parse("--config", str(path))
    assert next(iter(settings)) in capsys.readouterr().err


def test_config_files_set_values_of_every_kind(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(
        json.dumps({"use_amp": False, "depths": [3], "rate": 2, "compile_model": None, "mode": "b"})
    )
    found = parse("--config", str(path), "--mode", "a")
    assert (found.use_amp, list(found.depths), found.rate, found.compile_model, found.mode) == (
        False,
        [3],
        2.0,
        None,
        "a",
    )


def test_help_shows_percent_signs_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "100 % (default: 0.5)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("value", ["nan", "-inf", "1e999"])
def test_a_number_that_is_not_finite_is_refused(value, capsys):
    @dataclasses.dataclass
    class Rates:
        lr: float | None = common.opt(1.0, "a rate")

    with pytest.raises(SystemExit) as error:
        common.parse_dataclass(Rates, ["--lr", value] if value != "-inf" else ["--lr=-inf"])
    assert error.value.code == 2
    assert f"argument --lr: {value}: give a finite number" in capsys.readouterr().err


def test_json_writes_numbers_of_any_kind_and_no_nan(tmp_path):
    common.write_json(
        tmp_path / "x.json",
        {"a": np.float32(0.5), "b": torch.ones(2), "c": math.nan, 3: [np.int64(4)]},
    )
    assert common.read_json(tmp_path / "x.json") == {"a": 0.5, "b": [1.0, 1.0], "c": None, "3": [4]}


def test_the_average_waits_for_no_device_and_counts_in_python():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average = common.make_average(model, 0.5, 2)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    before = average.module[0].weight.clone()
    average.update()
    expected = before.lerp(model[0].weight, 1 - min(0.25, 1 / 10))
    torch.testing.assert_close(average.module[0].weight, expected)
    assert average.updates == 1 and not any(p.requires_grad for p in average.module.parameters())
    assert common.make_average(model, 0.0, 1) is None
