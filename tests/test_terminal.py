"""What scripts say: --quiet and --verbose mean the same in all; bars know terminals from files."""

import importlib
import io

import pytest
from conftest import run_setup
from test_sharp_inference import photo, write_checkpoint

import sharp_inference
import terminal
from frame_prediction import FACTORIES

SCRIPTS = ("sharp_inference", "dataset_setup", "hsifusion_training", "sharp_training_script_fixed")


@pytest.fixture(autouse=True)
def loudness():
    yield
    terminal.set_loudness(quiet=False, verbose=False)


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_both_flags_and_not_both_at_once(script, capsys, monkeypatch):
    main = importlib.import_module(script).main
    for argv, words in ((["--help"], "--verbose"), (["--quiet", "--verbose"], "not allowed")):
        monkeypatch.setattr("sys.argv", [script, *argv])
        with pytest.raises(SystemExit):
            main()
        said = capsys.readouterr()
        assert words in said.out + said.err


@pytest.mark.parametrize(
    "flag, said, settings", [([], True, False), (["--quiet"], False, False), (["--verbose"], 1, 1)]
)
def test_a_photo_is_said_settings_on_request(tmp_path, monkeypatch, capsys, flag, said, settings):
    monkeypatch.setitem(FACTORIES, "hsifusion", ("standin_model", "create"))
    checkpoint = write_checkpoint(tmp_path / "m.ckpt")
    photo(tmp_path / "a.png")
    files = ["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "a.npy")]
    sharp_inference.main(["--checkpoint", str(checkpoint), *files, *flag])
    out, _ = capsys.readouterr()
    assert ("whole frame" in out) == bool(said) and ("settings: {" in out) == bool(settings)
    assert (tmp_path / "a.npy").exists()


def test_quiet_staging_says_nothing_and_a_table_asked_for_stays(raw_arad, tmp_path, capfd):
    root = ["--arad-root", raw_arad, "--workers", 1]
    grid = ["--patch-size", 32]
    run_setup(*root, *grid, "--output-root", tmp_path / "staged", "--quiet")
    assert capfd.readouterr() == ("", "")
    run_setup(*root, "--verify-only", "--quiet")
    out, err = capfd.readouterr()
    assert "4 scenes, 0 with problems" in out and err == ""


def test_a_bar_is_drawn_on_a_terminal_and_is_silent_elsewhere(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "BAR_DELAY", 0)
    for quiet, rank, drawn in ((False, "0", True), (True, "0", False), (False, "1", False)):
        monkeypatch.setenv("RANK", rank)
        terminal.set_loudness(quiet=quiet, verbose=False)
        screen = Screen()
        monkeypatch.setattr("sys.stderr", screen)
        assert list(terminal.bar(range(3), desc="three")) == [0, 1, 2]
        assert ("three" in screen.getvalue()) == drawn
    terminal.set_loudness(quiet=False, verbose=False)
    monkeypatch.setenv("RANK", "0")
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    for number in terminal.bar(range(3)):
        terminal.say(f"line {number}")
    assert log.getvalue() == ""
    assert capsys.readouterr().out == "line 0\nline 1\nline 2\n"


def test_a_log_file_gets_a_line_a_minute_however_slow_the_steps_become(monkeypatch):
    clock, log = [0.0], io.StringIO()
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr("sys.stderr", log)
    bar = terminal.bar(total=10000, desc="steps")
    for seconds in [0.01] * 7000 + [20] * 9:
        clock[0] += seconds
        bar.update()
    assert len(log.getvalue().splitlines()) == 4


def test_a_misspelt_flag_is_answered_with_the_one_that_is_meant(capsys):
    parser = terminal.CliParser(prog="tool")
    parser.add_argument("--data_root", help="a folder")
    parser.add_argument("--seed", default=0, help="a number")
    for argv, words in (
        (["--data-rot=x", "--quite"], "did you mean --data_root and --quiet? see tool --help"),
        (["--zzz"], "--zzz (see tool --help)"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args(argv)
        assert stopped.value.code == 2 and words in capsys.readouterr().err
    assert "None" not in parser.format_help() and "a number (default: 0)" in parser.format_help()


def test_what_takes_no_time_needs_no_bar(monkeypatch):
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    list(terminal.bar(range(3)))
    assert screen.getvalue() == ""


def test_what_holds_for_many_files_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "_said", set())
    for name in ("a", "b"):
        terminal.say_first("bands left out", f"{name}: bands left out")
    assert capsys.readouterr().out == "a: bands left out\n"
