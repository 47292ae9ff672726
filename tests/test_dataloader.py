"""Order, augmentation, memory modes and errors of the loaders, on staged folders written here by NumPy alone."""

import json
import pickle
import shutil

import h5py
import numpy as np
import psutil
import pytest
import torch
from conftest import write_raw_arad
from PIL import Image

import optimized_dataloader as loader_module
from common_utils_v32 import UserError, cgroup_free
from cube_files import FIELD_BANDS
from optimized_dataloader import (
    DataConfig,
    RawBatch,
    create_optimized_dataloaders,
    dihedral,
    prepare_batch,
    train_loader,
    val_loader,
)

SIZES = {"a": (40, 56), "b": (48, 32)}
BANDS = 31


def stage(root, dtype="float16", sizes=SIZES, val_dtype="float32"):
    """A staged folder; cube and RGB hold the same picture, so that a test sees whether they are turned alike."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, kind in (("train", dtype), ("val", val_dtype)):
        (root / split).mkdir(parents=True)
        splits[split] = []
        for name, (height, width) in sizes.items():
            rgb = rng.integers(3, 250, (height, width, 3), dtype=np.uint8)
            cube = np.repeat(rgb[..., :1] / np.float32(255), BANDS, axis=2).astype(kind)
            entry = {
                "name": name,
                "shape": cube.shape,
                "dtype": kind,
                "cube": f"{split}/{name}.cube.npy",
                "rgb": f"{split}/{name}.rgb.npy",
                "rgb_range": [int(rgb.min()), int(rgb.max())],
            }
            np.save(root / entry["cube"], cube)
            np.save(root / entry["rgb"], rgb)
            splits[split].append(entry)
    index = {
        "format": "hsi-staged",
        "version": 1,
        "bands": BANDS,
        "wavelengths": FIELD_BANDS,
        "splits": splits,
    }
    (root / "index.json").write_text(json.dumps(index))
    return root


@pytest.fixture(scope="session")
def staged(tmp_path_factory):
    return stage(tmp_path_factory.mktemp("staged") / "s")


def config(root, **changes):
    return DataConfig(
        **{
            "data_root": str(root),
            "memory_mode": "lazy",
            "patch_size": 16,
            "stride": 8,
            "batch_size": 4,
            "iterations_per_epoch": 3,
            "num_workers": 0,
            **changes,
        }
    )


def epoch_of(loader, epoch=0, iteration=0):
    loader.set_position(epoch, iteration)
    return [RawBatch(*(tensor.clone() for tensor in batch)) for batch in loader]


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(x, y)
        for a, b in zip(one, other, strict=True)
        for x, y in zip(a, b, strict=True)
    )


def test_patch_counts_follow_the_grid_of_each_scene(staged):
    loader = train_loader(config(staged, iterations_per_epoch=0, batch_size=7))
    assert len(loader.dataset) == 4 * 6 + 5 * 3 and len(loader) == 6
    assert loader.dataset.place(0) == (0, 0, 0) and loader.dataset.place(7) == (0, 8, 8)
    assert loader.dataset.place(24) == (1, 0, 0) and loader.dataset.place(38) == (1, 32, 16)
    assert loader.describe().startswith("2 training scenes, 39 patches of 16 px, 31 bands, lazy")


def test_batch_holds_what_the_files_hold(staged):
    loader = train_loader(config(staged, augment=False))
    batch = epoch_of(loader)[0]
    for i, patch in enumerate(batch.index.tolist()):
        scene, top, left = loader.dataset.place(patch)
        cube, rgb = (
            np.load(staged / "train" / f"{'ab'[scene]}.{kind}.npy") for kind in ("cube", "rgb")
        )
        window = slice(top, top + 16), slice(left, left + 16)
        assert np.array_equal(batch.cube[i], cube[window]) and np.array_equal(
            batch.rgb[i], rgb[window]
        )
        assert batch.rgb_range[i].tolist() == [rgb.min(), rgb.max()]


def test_prepared_batch_is_float32_channels_last_normalised_by_the_frame(staged):
    loader = train_loader(config(staged, augment=False))
    batch = epoch_of(loader)[0]
    rgb, cube = prepare_batch(batch)
    assert rgb.shape == (4, 3, 16, 16) and cube.shape == (4, BANDS, 16, 16)
    for tensor, channels in ((rgb, 3), (cube, BANDS)):
        assert tensor.dtype == torch.float32
        assert tensor.stride() == (16 * 16 * channels, 1, 16 * channels, channels)
    assert torch.equal(cube, batch.cube.float().permute(0, 3, 1, 2))
    low, high = (batch.rgb_range[:, i, None, None, None] for i in (0, 1))
    assert torch.equal(rgb, ((batch.rgb.float() - low) / (high - low)).permute(0, 3, 1, 2))
    unit = epoch_of(train_loader(config(staged, augment=False, rgb_norm="unit")))[0]
    assert torch.equal(prepare_batch(unit)[0], (batch.rgb.float() / 255).permute(0, 3, 1, 2))


def test_dihedral_group_is_complete():
    square = torch.arange(9).view(3, 3, 1)
    turned = [dihedral(square, code)[..., 0] for code in range(8)]
    expected = [
        np.rot90(flipped, k)
        for flipped in (square[..., 0].numpy(), square[..., 0].numpy().T)
        for k in range(4)
    ]
    assert {x.numpy().tobytes() for x in turned} == {
        np.ascontiguousarray(x).tobytes() for x in expected
    }
    assert torch.equal(turned[0], square[..., 0])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rgb_and_cube_are_turned_alike_by_all_8_elements(dtype):
    rgb = torch.randint(0, 256, (8, 5, 5, 3), dtype=torch.uint8)
    cube = (
        (rgb[..., :1].float() / 255)
        .to(getattr(torch, dtype))
        .expand(-1, -1, -1, BANDS)
        .contiguous()
    )
    ranges = torch.tensor([[0.0, 255.0]]).expand(8, 2)
    out_rgb, out_cube = prepare_batch(
        RawBatch(rgb, cube, torch.arange(8, dtype=torch.uint8), ranges, torch.arange(8))
    )
    assert (out_rgb[:, :1] - out_cube).abs().max() < 5e-4
    for code in range(8):
        assert torch.equal(out_cube[code], dihedral(cube[code], code).float().permute(2, 0, 1))


def test_augmentation_reaches_all_8_elements_and_can_be_off(staged):
    codes = torch.cat(
        [batch.augment for batch in epoch_of(train_loader(config(staged, iterations_per_epoch=30)))]
    )
    assert set(codes.tolist()) == set(range(8))
    off = epoch_of(train_loader(config(staged, augment=False)))
    assert not any(batch.augment.any() for batch in off)


@pytest.mark.parametrize("mode", ["lazy", "float16"])
def test_batches_do_not_depend_on_workers(staged, mode):
    expected = epoch_of(train_loader(config(staged, memory_mode=mode)), 3)
    for workers in (1, 2):
        loader = train_loader(config(staged, memory_mode=mode, num_workers=workers))
        assert same(epoch_of(loader, 3), expected)
        assert same(
            epoch_of(loader, 3, 2), expected[2:]
        )  # the same workers again, from another position


def test_ranks_share_the_global_batch_of_one_rank(staged):
    one = epoch_of(train_loader(config(staged, batch_size=8)), 2)
    halves = [
        epoch_of(train_loader(config(staged, batch_size=4, rank=rank, world_size=2)), 2)
        for rank in (0, 1)
    ]
    for whole, *parts in zip(one, *halves, strict=True):
        assert all(
            torch.equal(torch.cat(pieces), tensor)
            for tensor, *pieces in zip(whole, *parts, strict=True)
        )
    both = [torch.cat([batch.index for batch in half]).tolist() for half in halves]
    assert not set(both[0]) & set(both[1])


def test_position_resumes_inside_an_epoch_and_moves_on(staged):
    loader = train_loader(config(staged))
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    assert same(epoch_of(train_loader(config(staged)), 0, 1), first[1:])
    assert not same(first, second) and not same(
        first, epoch_of(train_loader(config(staged, seed=-1)), 0)
    )
    loader.set_position(0, 2)
    assert len(list(loader)) == 1 and same([RawBatch(*batch) for batch in loader], second)
    assert list(loader.loader.sampler) and len(loader) == 3
    with pytest.raises(ValueError):
        loader.set_position(0, 4)


def test_whole_pass_takes_every_patch_and_longer_epochs_wrap_into_new_orders(staged):
    loader = train_loader(config(staged, iterations_per_epoch=0, batch_size=13))
    assert sorted(torch.cat([batch.index for batch in epoch_of(loader)]).tolist()) == list(
        range(39)
    )
    longer = torch.cat(
        [b.index for b in epoch_of(train_loader(config(staged, iterations_per_epoch=20)))]
    ).tolist()
    assert (
        sorted(longer[:39]) == sorted(longer[39:78]) == list(range(39))
        and longer[:39] != longer[39:78]
    )


def test_all_memory_modes_give_the_same_batches_within_half_precision(tmp_path):
    root = stage(tmp_path / "s", dtype="float32")
    modes = {
        mode: epoch_of(train_loader(config(root, memory_mode=mode)))
        for mode in ("lazy", "standard", "float16")
    }
    assert same(modes["lazy"], modes["standard"]) and modes["lazy"][0].cube.dtype == torch.float32
    for half, exact in zip(modes["float16"], modes["standard"], strict=True):
        assert half.cube.dtype == torch.float16 and torch.equal(half.rgb, exact.rgb)
        error = (half.cube.float() - exact.cube).abs()
        assert (
            error.max() > 0 and (error <= exact.cube * 2**-11).all()
        )  # the bound that describe() states


def test_buffers_are_not_used_again_while_a_tensor_holds_them(staged):
    loader = train_loader(config(staged, iterations_per_epoch=6))
    kept = [prepare_batch(batch)[1][:, :1] for batch in loader]
    again = [prepare_batch(batch)[1][:, :1].clone() for batch in epoch_of(loader)]
    assert all(torch.equal(x, y) for x, y in zip(kept, again, strict=True))
    assert len({x.data_ptr() for x in kept}) == 6
    del kept
    free = {
        memory.ctypes.data for memory in loader_module._free_buffers[(4, 16, 16, BANDS), "float32"]
    }
    assert prepare_batch(next(iter(loader)))[1].data_ptr() in free


def test_data_set_pickles_small_and_works_after_it(staged, raw_arad):
    for root in (staged, raw_arad):
        dataset = train_loader(config(root)).dataset
        data = pickle.dumps(dataset)
        assert len(data) < 20_000
        assert same([pickle.loads(data)[0, 1]], [dataset[0, 1]])


class CountedMap(np.ndarray):
    """A map that notes how many bytes are taken from it."""

    taken = 0

    def __getitem__(self, item):
        part = np.asarray(self)[item]
        CountedMap.taken += part.nbytes
        return part


def test_staged_lazy_read_takes_only_the_patch_and_leaves_no_map_open(staged, monkeypatch):
    loader = train_loader(config(staged))
    mapped = loader_module._mapped
    monkeypatch.setattr(loader_module, "_mapped", lambda *args: mapped(*args).view(CountedMap))
    epoch_of(loader)
    assert CountedMap.taken == 3 * 4 * 16 * 16 * (BANDS * 2 + 3)
    open_files = [
        entry.path for entry in psutil.Process().memory_maps() if entry.path.startswith(str(staged))
    ]
    assert not open_files


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
    monkeypatch.setattr(loader_module, "IMAGE_BYTES", 2 * frame)
    loader = train_loader(config(raw_arad, iterations_per_epoch=5))
    epoch_of(loader)
    assert sum(image.nbytes for image, _ in loader.dataset.scenes.images.values()) <= 2 * frame


def test_validation_gives_whole_float32_frames_sharded_by_rank(staged, raw_arad):
    scenes = {scene.name: scene for scene in val_loader(config(staged))}
    assert list(scenes) == ["a", "b"]
    stored, rgb = (np.load(staged / "val" / f"b.{kind}.npy") for kind in ("cube", "rgb"))
    assert scenes["b"].cube.shape == (1, BANDS, 48, 32) and scenes["b"].cube.dtype == torch.float32
    assert np.array_equal(scenes["b"].cube[0].permute(1, 2, 0), stored)
    expected = (rgb.astype(np.float32) - rgb.min()) / (rgb.max() - rgb.min())
    assert np.array_equal(scenes["b"].rgb[0].permute(1, 2, 0), expected)
    shards = [
        [scene.name for scene in val_loader(config(staged, rank=r, world_size=2))] for r in (0, 1)
    ]
    assert shards == [["a"], ["b"]]
    raw = list(val_loader(config(raw_arad)))
    with h5py.File(raw_arad / "Train_Spec" / "v.mat") as file:
        assert np.array_equal(raw[0].cube[0], file["cube"][()].transpose(0, 2, 1))
    assert raw[0].cube.is_contiguous(memory_format=torch.channels_last)


def test_half_precision_validation_targets_are_refused(tmp_path):
    root = stage(tmp_path / "s", val_dtype="float16")
    with pytest.raises(UserError, match="s/val: float16"):
        create_optimized_dataloaders(config(root))
    assert len(val_loader(config(root, val_split="train"))) == 2


@pytest.mark.parametrize("free", ["ram", "cgroup"])
def test_memory_guard_names_lazy_mode_before_reading(staged, monkeypatch, free):
    needed = sum(h * w for h, w in SIZES.values()) * (BANDS * 4 + 3)
    if free == "ram":
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda: type("Memory", (), {"available": needed - 1})
        )
    else:
        monkeypatch.setattr(loader_module, "cgroup_free", lambda: needed - 1)
    monkeypatch.setattr(
        loader_module, "tqdm", lambda *args, **kwargs: pytest.fail("read before the guard")
    )
    with pytest.raises(UserError, match="2 scenes take .* GB.*--memory_mode lazy"):
        train_loader(config(staged, memory_mode="standard"))
    monkeypatch.undo()
    monkeypatch.setattr(loader_module, "cgroup_free", lambda: needed)
    train_loader(config(staged, memory_mode="standard"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="lazy"):
        train_loader(config(staged, memory_mode="standard", world_size=2))


def write_cgroup(folder, names, limit, usage, stat):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, usage, stat), strict=True):
        (folder / name).write_text(f"{value}\n")


def test_cgroup_limits_of_both_versions_and_of_parents(tmp_path):
    member = tmp_path / "cgroup"
    names = ("memory.max", "memory.current", "memory.stat")
    write_cgroup(tmp_path / "v2" / "job", names, 1000, 700, "anon 1\ninactive_file 200")
    write_cgroup(tmp_path / "v2" / "job" / "step", names, "max", 500, "inactive_file 0")
    member.write_text("0::/job/step\n")
    assert cgroup_free(tmp_path / "v2", member) == 500
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    write_cgroup(tmp_path / "v1" / "memory" / "job", names, 900, 100, "total_inactive_file 50")
    member.write_text("5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n")
    assert cgroup_free(tmp_path / "v1", member) == 850
    assert cgroup_free(tmp_path / "none", tmp_path / "absent") == float("inf")


def test_defects_of_a_staged_folder_are_named(staged, tmp_path):
    def broken(change):
        root = tmp_path / "broken"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(staged, root)
        change(root)
        return config(root)

    def edit(root, **changes):
        index = json.loads((root / "index.json").read_text())
        index["splits"]["train"][1].update(changes)
        (root / "index.json").write_text(json.dumps(index))

    cube = "train/b.cube.npy"
    for change, words in (
        (lambda root: (root / cube).unlink(), f"{cube}: no such file"),
        (
            lambda root: (root / cube).write_bytes((root / cube).read_bytes()[:-1]),
            f"{cube}: its size",
        ),
        (lambda root: (root / cube).write_bytes(b""), cube),
        (lambda root: edit(root, shape=[48, 32, 28]), f"{cube}: 28 bands"),
        (lambda root: (root / "index.json").write_text("{"), "index.json"),
        (
            lambda root: (root / "index.json").write_text('{"format": "other"}'),
            "index.json: not the index",
        ),
    ):
        with pytest.raises(UserError, match=words):
            train_loader(broken(change))
    with pytest.raises(UserError, match="--data_root .*nowhere.*dataset_setup.py"):
        train_loader(config(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no scenes in split test"):
        val_loader(config(staged, val_split="test"))


def test_defects_of_a_raw_folder_are_named(raw_arad, tmp_path):
    root = tmp_path / "raw"
    shutil.copytree(raw_arad, root)
    with h5py.File(root / "Train_Spec" / "b.mat", "a") as file:
        file["cube"][3, 4, 5] = np.nan
    with pytest.raises(UserError, match="b.mat: 1 values"):
        train_loader(config(root, memory_mode="float16"))
    with h5py.File(root / "Train_Spec" / "b.mat", "a") as file:
        file["cube"][...] = 7.0
    for workers in (0, 1):  # lazily it shows with the patch, in one line from a worker too
        with pytest.raises(UserError, match="b.mat: values from 7 to 7") as caught:
            epoch_of(train_loader(config(root, num_workers=workers, iterations_per_epoch=9)))
        assert "\n" not in str(caught.value)
    Image.new("RGB", (80, 95)).save(root / "Train_RGB" / "b.jpg")
    with pytest.raises(UserError, match=r"b.mat: shape \(31, 80, 96\).*95 x 80"):
        train_loader(config(root))
    (root / "Train_RGB" / "b.jpg").unlink()
    with pytest.raises(UserError, match="Train_RGB/b.jpg: no such image"):
        train_loader(config(root))
    (root / "Train_Spec" / "a.mat").unlink()
    with pytest.raises(UserError, match="Train_Spec/a.mat"):
        train_loader(config(root))


def test_raw_lazy_refuses_files_that_decode_only_as_a_whole(raw_arad, tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    root = tmp_path / "raw"
    shutil.copytree(raw_arad, root)
    with h5py.File(raw_arad / "Train_Spec" / "a.mat") as file:
        scipy_io.savemat(
            root / "Train_Spec" / "a.mat", {"cube": file["cube"][()].transpose(2, 1, 0)}
        )
    with pytest.raises(UserError, match="a.mat: not MATLAB v7.3.*--memory_mode float16"):
        train_loader(config(root))
    whole = epoch_of(train_loader(config(root, memory_mode="standard")))
    assert same(whole, epoch_of(train_loader(config(raw_arad, memory_mode="standard"))))


def test_settings_out_of_range_are_errors(staged):
    for changes, words in (
        ({"memory_mode": "ram"}, "--memory_mode ram: choose from standard, float16, lazy"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"patch_size": 64}, "--patch_size 64.*40 x 56"),
        ({"rgb_norm": "max"}, "choose from per_image, unit"),
    ):
        with pytest.raises(UserError, match=words):
            train_loader(config(staged, **changes))


def test_any_band_count_works_when_its_wavelengths_are_known(staged, tmp_path):
    raw = write_raw_arad(tmp_path / "raw", bands=28)
    _, cube = prepare_batch(next(iter(train_loader(config(raw)))), torch.device("cpu"))
    assert cube.shape[1] == 28
    assert next(iter(val_loader(config(raw)))).cube.shape[1] == 28
    root = tmp_path / "s"
    shutil.copytree(staged, root)
    index = json.loads((root / "index.json").read_text())
    index["wavelengths"] = FIELD_BANDS[:5]
    (root / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="index.json: 5 wavelengths of 31 bands"):
        train_loader(config(root))
