"""Damaged and hostile data sets: staged files against their checksums, names that leave their
folder."""

import os
import shutil
import threading

import pytest
from conftest import read_index, run_setup, write_index, write_raw_arad
from training_helpers import TRAINERS, make_run

import scene_folders
from common_utils_v32 import UserError, read_json
from compute_devices import Ranks
from scene_folders import FileCheck, StagedScenes, find_scenes


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """A staged folder with checksums."""
    root = tmp_path_factory.mktemp("checked")
    raw = write_raw_arad(root / "raw", train=("a", "b"), bands=31)
    sizes = ("--patch-size", 64, "--stride", 8, "--workers", 1)
    run_setup("--arad-root", raw, "--output-root", root / "staged", *sizes)
    return root / "staged"


@pytest.fixture
def flipped(checked, tmp_path):
    """The folder with one bit of one training cube flipped."""
    shutil.copytree(checked, tmp_path / "staged")
    file = tmp_path / "staged" / "train" / "b.cube.npy"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    return tmp_path / "staged"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_damaged_staged_files_stop_a_run_before_its_first_checkpoint(
    trainer, flipped, tmp_path, runs_in_this_process
):
    run = make_run(trainer, flipped, tmp_path, "--memory_mode", "lazy")
    with pytest.raises(UserError, match="b.cube.npy: not as it was staged.*stage again"):
        run.train()
    assert not list(tmp_path.glob("run/*.ckpt")) + list(tmp_path.glob("run/*.safetensors"))
    run = make_run(trainer, flipped, tmp_path / "b", "--no-verify", "--memory_mode", "lazy")
    assert run.train() == 0


def test_a_run_begins_while_its_files_are_checked_and_saves_when_they_are(
    checked, tmp_path, runs_in_this_process, monkeypatch
):
    go_on, original = threading.Event(), scene_folders.file_sha256

    def slow(path):
        go_on.wait()
        return original(path)

    monkeypatch.setattr(scene_folders, "file_sha256", slow)
    run = make_run(TRAINERS[0], checked, tmp_path)
    assert run.train_epoch() and run.step == 5  # with no file read to its end
    threading.Timer(0.2, go_on.set).start()
    run.save("last.ckpt")
    assert go_on.is_set() and (tmp_path / "run" / "last.ckpt").exists()


def test_a_check_names_missing_files_and_counts_the_others(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    check = FileCheck([(tmp_path / "gone", "0"), (tmp_path / "a", "0")])
    with pytest.raises(UserError, match=r"gone.*\(and 1 more files\)"):
        check.finish(Ranks())
    FileCheck([]).finish(Ranks())


# --- names that leave their folder


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "x/../../y", "..\\y", "C:\\x", ""])
def test_names_in_an_index_stay_in_its_folder(broken, name):
    for kind in ("cube", "rgb"):
        index = read_index(broken)
        index["splits"]["train"][0][kind] = name
        path = broken / "index.json"
        original = path.read_text(encoding="utf-8")
        write_index(broken, index)
        with pytest.raises(UserError, match="index.json: .* leads out of"):
            StagedScenes(broken, "train")
        path.write_text(original, encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["../a", "a/b", "/a", "..", ".a", "a\\b", "a\0b", "C:a", "a" * 300]
)
def test_scene_names_are_names_of_files(broken, raw_copy, tmp_path, name):
    """In an index they name an evaluation's files, in a list those of a staged folder."""
    index = read_index(broken)
    index["splits"]["val"][0]["name"] = name
    write_index(broken, index)
    with pytest.raises(UserError, match="index.json: .*cannot be a scene's name"):
        StagedScenes(broken, "val")
    (raw_copy / "split_txt" / "train_list.txt").write_text(f"a\n{name}\n", encoding="utf-8")
    with pytest.raises(UserError, match="train_list.txt: .*cannot be a scene's name"):
        find_scenes(raw_copy)


def test_the_users_own_links_are_followed_and_others_are_not(broken, tmp_path, monkeypatch):
    os.rename(broken / "train", tmp_path / "elsewhere")
    (broken / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(broken)
    assert StagedScenes(tmp_path / "link", "train").names
    if os.getuid() != 0:
        pytest.skip("only root can give a link away")
    os.chown(broken / "train", 12345, 12345, follow_symlinks=False)
    with pytest.raises(UserError, match="train: a link that somebody else made"):
        StagedScenes(tmp_path / "link", "train")


def test_json_of_endless_depth_is_refused(broken):
    (broken / "index.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(UserError, match="index.json"):
        StagedScenes(broken, "train")
    with pytest.raises(UserError, match="index.json"):
        read_json(broken / "index.json")
