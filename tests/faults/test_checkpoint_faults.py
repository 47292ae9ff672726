"""Checkpoints on bad disks and from strangers: cut, flipped, packed, full disks, killed writers."""

import os
import signal
import socket
import subprocess
import sys
import time
import zipfile

import psutil
import pytest
import torch
from conftest import ROOT
from disks import disk
from training_helpers import TRAINERS, checkpoint, make_run, stop_after

import common_utils_v32 as common
import compute_devices as devices
from checkpoint_files import load_weights, read_checkpoint, save_checkpoint, save_weights
from common_utils_v32 import UserError
from training_runs import STOPPED, RunFolder

STATE = {"state_dict": {"a": torch.arange(5000.0), "b": torch.ones(())}, "step": 1}


def write_both(folder):
    """A checkpoint and a file of weights."""
    save_checkpoint(folder / "x.ckpt", STATE)
    facts = {"model": "sharp", "model_config": {"width": 8}, "data": {"rgb_norm": "unit"}}
    save_weights(folder / "x.safetensors", STATE["state_dict"], averaged=False, **facts)
    return folder / "x.ckpt", folder / "x.safetensors"


def test_a_checkpoint_cut_at_every_sixteenth_is_refused_in_one_line(tmp_path):
    for path in write_both(tmp_path):
        whole = path.read_bytes()
        for part in range(16):
            path.write_bytes(whole[: len(whole) * part // 16])
            with pytest.raises(UserError, match=path.name) as error:
                read_checkpoint(path)
            assert "\n" not in str(error.value)
        path.write_bytes(whole)
        torch.testing.assert_close(read_checkpoint(path)["state_dict"], STATE["state_dict"])


def test_a_flipped_bit_in_weights_or_in_what_is_said_of_them_is_refused(tmp_path):
    for path in write_both(tmp_path):
        whole = path.read_bytes()
        weights = whole.index(torch.tensor(4000.0).numpy().tobytes())
        said = whole.index(b'width\\": 8' if path.suffix == ".safetensors" else b"step")
        for place in (weights, said):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=f"{path.name}.*(damaged|checksum)"):
                read_checkpoint(path)


def test_weights_without_a_checksum_are_read(tmp_path):
    from safetensors.torch import save_file

    save_file(STATE["state_dict"], tmp_path / "theirs.safetensors")
    assert read_checkpoint(tmp_path / "theirs.safetensors")["state_dict"].keys() == {"a", "b"}


def test_an_archive_that_grows_when_read_is_refused_unread(tmp_path):
    save_checkpoint(tmp_path / "x.ckpt", {"state_dict": {"a": torch.zeros(30_000_000)}})
    with (
        zipfile.ZipFile(tmp_path / "x.ckpt") as source,
        zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for part in source.infolist():
            bomb.writestr(part.filename, source.read(part))
    assert (tmp_path / "bomb.ckpt").stat().st_size < 200_000
    before = devices.memory_gb(torch.device("cpu"))
    with pytest.raises(UserError, match="bomb.ckpt: refused"):
        read_checkpoint(tmp_path / "bomb.ckpt")
    assert devices.memory_gb(torch.device("cpu")) - before < 0.05


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod." * 3])
def test_weights_load_under_any_stack_of_wrappers_names(prefix):
    model = torch.nn.Linear(2, 2)
    wrapped = {prefix + name: value + 1 for name, value in model.state_dict().items()}
    expected = {name: value + 1 for name, value in model.state_dict().items()}
    load_weights(model, wrapped, "x.ckpt")
    torch.testing.assert_close(dict(model.state_dict()), expected)


# --- the one before


def test_last_keeps_one_predecessor_and_best_none(tmp_path):
    folder = RunFolder(tmp_path, tmp_path)
    for step in (1, 2, 3):
        folder.save("last.ckpt", STATE | {"step": step})
        folder.save("best.ckpt", STATE | {"step": step})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert read_checkpoint(tmp_path / "last.ckpt")["step"] == 3
    assert read_checkpoint(tmp_path / "previous.ckpt")["step"] == 2


def test_without_links_the_predecessor_is_kept_too(tmp_path, monkeypatch):
    def no_links(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    folder = RunFolder(tmp_path, tmp_path)
    for step in (1, 2):
        folder.save("last.ckpt", STATE | {"step": step})
    assert read_checkpoint(tmp_path / "previous.ckpt")["step"] == 1


def test_auto_takes_the_one_before_a_damaged_or_missing_last(tmp_path, capsys):
    folder = RunFolder(tmp_path, tmp_path)
    for step in (1, 2):
        folder.save("last.ckpt", STATE | {"step": step})
    whole = (tmp_path / "last.ckpt").read_bytes()
    for part in range(16):
        (tmp_path / "last.ckpt").write_bytes(whole[: len(whole) * part // 16])
        path, state = folder.resume("auto")
        assert (path.name, state["step"]) == ("previous.ckpt", 1)
        said = capsys.readouterr().err
        assert "last.ckpt" in said and "previous.ckpt" in said and said.count("\n") == 1
        assert not (tmp_path / "last.ckpt").exists()  # it must not become the one before
        assert folder.resume("auto")[1]["step"] == 1
    with pytest.raises(UserError, match="holds a run"):
        folder.resume(None)
    (tmp_path / "last.ckpt").write_bytes(b"")
    (tmp_path / "previous.ckpt").unlink()
    with pytest.raises(UserError, match="last.ckpt: refused"):
        folder.resume("auto")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_goes_on_from_the_one_before(trainer, raw_arad, tmp_path, runs_in_this_process):
    first = make_run(trainer, raw_arad, tmp_path)
    stop_after(first, 7)  # the first epoch has 5 steps
    assert first.train() == STOPPED
    last = tmp_path / "run" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    second = make_run(trainer, raw_arad, tmp_path, "--resume_from", "auto")
    assert (second.step, second.epoch) == (5, 1)
    assert second.train() == 0 and checkpoint(tmp_path)["step"] == 10


# --- disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    with disk(tmp_path / "disk", "size=1m") as place:
        yield place


def test_a_full_disk_is_said_and_keeps_the_checkpoints(small_disk):
    folder = RunFolder(small_disk, small_disk)
    for step in (1, 2):
        folder.save("last.ckpt", STATE | {"step": step})
    with pytest.raises(UserError, match="last.ckpt: the disk is full; make room"):
        folder.save("last.ckpt", STATE | {"more": torch.zeros(500_000)})
    assert sorted(path.name for path in small_disk.iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert folder.resume("auto")[1]["step"] == 2
    weights = {"a": torch.zeros(500_000)}
    with pytest.raises(UserError, match="the disk is full"):
        save_weights(small_disk / "w.safetensors", weights, "sharp", {}, {}, False)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "-c", WRITES_INTO_A_FILE, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and "file" in done.stderr


WRITES_INTO_A_FILE = """
import sys
from common_utils_v32 import run_cli, write_json
run_cli(lambda: write_json(sys.argv[1] + "/run/config.json", {}))
"""


# --- what killed processes leave


def test_a_restart_removes_what_killed_processes_left_and_nothing_else(tmp_path):
    host, dead = socket.gethostname(), 2**22 + 1  # above the largest process id of Linux
    old = time.time() - 2 * common.LEFTOVER_AGE
    left = f".last.ckpt.{host}-{dead}-abcd_123"
    parent = f".last.ckpt.{host}-{os.getppid()}-abcd1234"  # alive
    elsewhere = f".last.ckpt.another-host-{dead}-abcd1234"
    elsewhere_old = f".best.ckpt.another-host-{dead}-abcd1234"
    for name in (left, parent, elsewhere, elsewhere_old, "last.ckpt", ".hidden-file-12345678"):
        (tmp_path / name).touch()
    (tmp_path / f".cube.{host}-{dead}-abcd1234").mkdir()
    (tmp_path / f".cube.{host}-{dead}-abcd1234" / "part").touch()
    os.utime(tmp_path / elsewhere_old, (old, old))
    common.remove_leftovers(tmp_path)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {parent, elsewhere, "last.ckpt", ".hidden-file-12345678"}


def test_what_a_killed_process_left_goes_also_while_nobody_has_looked_after_it(tmp_path):
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(100):
        if psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    prefix = common.temporary_prefix("a.ckpt").replace(f"-{os.getpid()}-", f"-{child}-")
    (tmp_path / f"{prefix}abcd1234").touch()
    common.remove_leftovers(tmp_path)
    os.waitpid(child, 0)
    assert not list(tmp_path.iterdir())
