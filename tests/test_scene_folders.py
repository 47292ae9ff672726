"""Folders of scenes: what they hold, patches read by themselves, and what is wrong with them."""

import h5py
import numpy as np
import psutil
import pytest
from conftest import BANDS, LINEAR16, config, epoch_of, read_index, same, write_index
from PIL import Image

import scene_folders
from common_utils_v32 import UserError
from cube_files import read_cube
from optimized_dataloader import train_loader, val_loader
from scene_folders import find_scenes

CUBE = "train/b.cube.npy"


@pytest.mark.parametrize("text", ["b\na\n", "b\na", "b\r\na\r\n", "\ufeffb.mat\n\na.mat  \n"])
def test_list_files_in_any_line_ending_give_the_same_scenes(raw_arad, tmp_path, text):
    for folder in ("Train_Spec", "Train_RGB"):
        (tmp_path / folder).symlink_to(raw_arad / folder)
    (tmp_path / "split_txt").mkdir()
    listing = tmp_path / "split_txt" / "train_list.txt"
    listing.write_bytes(text.encode())
    scenes = find_scenes(tmp_path)
    assert [scene.name for scene in scenes["train"]] == ["a", "b"] and scenes["val"] == []
    assert scenes["train"][0].rgb_path.name == "a.jpg"
    assert listing.read_bytes() == text.encode()
    (tmp_path / "split_txt" / "valid_list.txt").write_bytes(b"a")
    with pytest.raises(UserError, match="valid_list.txt: a is a training scene"):
        find_scenes(tmp_path)
    listing.write_bytes(b"b\nb\n")
    with pytest.raises(UserError, match="b is listed twice"):
        find_scenes(tmp_path)


def test_test_images_and_missing_scenes(raw_arad, tmp_path):
    for folder in ("Train_Spec", "Train_RGB"):
        (tmp_path / folder).symlink_to(raw_arad / folder)
    (tmp_path / "Test_RGB").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "Test_RGB" / "t.png")
    assert [scene.name for scene in find_scenes(tmp_path)["train"]] == ["a", "b", "c", "v"]
    assert find_scenes(tmp_path)["test"][0]._replace(rgb_path=None) == ("t", None, None)
    (tmp_path / "split_txt").mkdir()
    (tmp_path / "split_txt" / "train_list.txt").write_bytes(b"a\ngone\n")
    gone = find_scenes(tmp_path)["train"][1]
    assert gone.rgb_path is None
    with pytest.raises(UserError, match="Train_Spec/gone.mat: no such file"):
        read_cube(gone.cube_path)
    with pytest.raises(UserError, match="no Train_Spec"):
        find_scenes(tmp_path / "Train_RGB")


def test_of_two_files_for_one_scene_the_usual_suffix_wins(tmp_path):
    for name in ("Train_Spec/s.npy", "Train_Spec/s.mat", "Train_RGB/s.png", "Train_RGB/s.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (scene,) = find_scenes(tmp_path)["train"]
    assert (scene.cube_path.name, scene.rgb_path.name) == ("s.mat", "s.jpg")


class CountedMap(np.ndarray):
    """A map that notes how many bytes are taken from it."""

    taken = 0

    def __getitem__(self, item):
        part = np.asarray(self)[item]
        CountedMap.taken += part.nbytes
        return part


@pytest.mark.parametrize(
    "version, rgb, words",
    [
        (2, LINEAR16 | {"dtype": "int16"}, "RGB is int16 linear, not uint8 or uint16"),
        (2, LINEAR16 | {"encoding": "gamma"}, "RGB is uint16 gamma, not .* linear or srgb"),
        (2, {"dtype": "uint8"}, "encoding"),
        (3, LINEAR16, "version 1 or 2"),
    ],
)
def test_unknown_kinds_of_rgb_name_the_index(broken, version, rgb, words):
    write_index(broken, read_index(broken) | {"version": version, "rgb": rgb})
    with pytest.raises(UserError, match=f"index.json: .*{words}") as caught:
        train_loader(config(broken))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder, rgb_bytes", [("staged", 3), ("staged16", 6)])
def test_staged_lazy_read_takes_only_the_patch_and_leaves_no_map_open(
    request, monkeypatch, folder, rgb_bytes
):
    root = request.getfixturevalue(folder)
    loader = train_loader(config(root))
    mapped = scene_folders._mapped
    monkeypatch.setattr(scene_folders, "_mapped", lambda *args: mapped(*args).view(CountedMap))
    monkeypatch.setattr(CountedMap, "taken", 0)
    epoch_of(loader)
    assert CountedMap.taken == 3 * 4 * 16 * 16 * (BANDS * 2 + rgb_bytes)
    paths = [entry.path for entry in psutil.Process().memory_maps()]
    assert not [path for path in paths if path.startswith(str(root))]


def test_raw_lazy_read_takes_only_the_hyperslab(raw_arad, monkeypatch):
    loader = train_loader(config(raw_arad))
    expected = epoch_of(train_loader(config(raw_arad, memory_mode="standard")))
    sizes, plain = [], h5py.Dataset.astype

    class Noted:
        def __init__(self, view):
            self.view = view

        def __getitem__(self, cut):
            part = self.view[cut]
            sizes.append(part.size)
            return part

    monkeypatch.setattr(h5py.Dataset, "astype", lambda self, dtype: Noted(plain(self, dtype)))
    assert same(epoch_of(loader), expected)
    assert set(sizes) == {16 * 16 * BANDS}


def test_raw_image_cache_is_bounded(raw_arad, monkeypatch):
    frame = 96 * 80 * 3
    monkeypatch.setattr(scene_folders, "IMAGE_BYTES", 2 * frame)
    loader = train_loader(config(raw_arad, iterations_per_epoch=5))
    epoch_of(loader)
    kept = loader.dataset.scenes.images.values()
    assert 0 < sum(image.nbytes for image, _ in kept) <= 2 * frame


def test_a_missing_staged_file_is_named(broken):
    (broken / CUBE).unlink()
    with pytest.raises(UserError, match=f"{CUBE}: no such file"):
        train_loader(config(broken))


@pytest.mark.parametrize("length, words", [(-1, f"{CUBE}: its size"), (0, CUBE)])
def test_a_cut_staged_file_is_named(broken, length, words):
    (broken / CUBE).write_bytes((broken / CUBE).read_bytes()[:length])
    with pytest.raises(UserError, match=words):
        train_loader(config(broken))


def test_a_staged_scene_of_other_bands_is_named(broken):
    index = read_index(broken)
    index["splits"]["train"][1]["shape"] = [48, 32, 28]
    write_index(broken, index)
    with pytest.raises(UserError, match=f"{CUBE}: 28 bands"):
        train_loader(config(broken))


@pytest.mark.parametrize(
    "text, words",
    [("{", "index.json: cannot be read"), ('{"format": "other"}', "index.json: not the index")],
)
def test_a_damaged_index_is_named(broken, text, words):
    (broken / "index.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        train_loader(config(broken))


def test_folders_and_splits_without_scenes_are_named(staged, tmp_path):
    with pytest.raises(UserError, match="--data_root .*nowhere.*dataset_setup.py"):
        train_loader(config(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no scenes in split test"):
        val_loader(config(staged, val_split="test"))


def test_bad_values_of_a_raw_cube_are_named_once_they_are_read(raw_copy):
    with h5py.File(raw_copy / "Train_Spec" / "b.mat", "a") as file:
        file["cube"][3, 4, 5] = np.nan
    with pytest.raises(UserError, match="b.mat: 1 values"):
        train_loader(config(raw_copy, memory_mode="float16"))
    with h5py.File(raw_copy / "Train_Spec" / "b.mat", "a") as file:
        file["cube"][...] = 7.0
    for workers in (0, 1):  # lazily it shows with the patch, in one line from a worker too
        loader = train_loader(config(raw_copy, num_workers=workers, iterations_per_epoch=9))
        with pytest.raises(UserError, match="b.mat: values from 7 to 7") as caught:
            epoch_of(loader)
        assert "\n" not in str(caught.value)


def test_missing_and_mismatched_files_of_a_raw_folder_are_named(raw_copy):
    Image.new("RGB", (80, 95)).save(raw_copy / "Train_RGB" / "b.jpg")
    with pytest.raises(UserError, match=r"b.mat: shape \(31, 80, 96\).*95 x 80"):
        train_loader(config(raw_copy))
    (raw_copy / "Train_RGB" / "b.jpg").unlink()
    with pytest.raises(UserError, match="Train_RGB/b.jpg: no such image"):
        train_loader(config(raw_copy))
    (raw_copy / "Train_Spec" / "a.mat").unlink()
    with pytest.raises(UserError, match="Train_Spec/a.mat"):
        train_loader(config(raw_copy))


def test_raw_lazy_refuses_files_that_decode_only_as_a_whole(raw_arad, raw_copy):
    scipy_io = pytest.importorskip("scipy.io")
    path = raw_copy / "Train_Spec" / "a.mat"
    with h5py.File(path) as file:
        cube = file["cube"][()].transpose(2, 1, 0)
    scipy_io.savemat(path, {"cube": cube})
    with pytest.raises(UserError, match="a.mat: not MATLAB v7.3.*--memory_mode float16"):
        train_loader(config(raw_copy))
    whole = epoch_of(train_loader(config(raw_copy, memory_mode="standard")))
    assert same(whole, epoch_of(train_loader(config(raw_arad, memory_mode="standard"))))
