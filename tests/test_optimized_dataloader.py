"""Order, augmentation, memory modes and errors of the loaders, on folders that NumPy and h5py alone
wrote; and the training loss."""

import contextlib
import os
import pickle
import shutil
from unittest.mock import MagicMock

import h5py
import numpy as np
import psutil
import pytest
import torch
from conftest import (
    BANDS,
    LINEAR16,
    STAGED_SIZES,
    config,
    epoch_of,
    read_index,
    same,
    write_index,
    write_raw_arad,
    write_staged,
)

import optimized_dataloader as data
import scene_folders
from common_utils_v32 import UserError
from compute_devices import errors_in_one_line
from cube_files import FIELD_BANDS
from optimized_dataloader import (
    MSTPlusPlusLoss,
    RawBatch,
    create_optimized_dataloaders,
    dihedral,
    normalise_rgb,
    patch_grid,
    prepare_batch,
    train_loader,
    val_loader,
)
from scene_folders import RgbFacts


def patches_of(batches):
    return torch.cat([batch.patches for batch in batches]).tolist()


def test_patch_grid_is_that_of_mst_plus_plus_or_covers_the_frame():
    rows, cols = patch_grid(482, 512, 128, 8)
    assert (len(rows), len(cols), len(rows) * len(cols)) == (45, 49, 2205)
    assert (rows[-1] + 128, cols[-1] + 128) == (480, 512)
    covering = patch_grid(482, 512, 128, 8, "cover")
    assert covering[0] == [*rows, 354] and covering[1] == cols
    assert patch_grid(128, 128, 128, 8, "cover") == ([0], [0])
    with pytest.raises(UserError, match="--patch_size 128.*100 x 512"):
        patch_grid(100, 512, 128, 8)


def test_patch_counts_follow_the_grid_of_each_scene(staged):
    loader = train_loader(config(staged, iterations_per_epoch=0, batch_size=7))
    assert len(loader.dataset) == 4 * 6 + 5 * 3 and len(loader) == 6
    assert loader.dataset.place(0) == (0, 0, 0) and loader.dataset.place(7) == (0, 8, 8)
    assert loader.dataset.place(24) == (1, 0, 0) and loader.dataset.place(38) == (1, 32, 16)
    assert loader.describe().startswith(
        "2 training scenes, 39 patches of 16 px, 31 bands, --memory_mode lazy"
    )


def test_batch_holds_what_the_files_hold(staged):
    loader = train_loader(config(staged, augment=False))
    batch = epoch_of(loader)[0]
    for i, patch in enumerate(batch.patches.tolist()):
        scene, top, left = loader.dataset.place(patch)
        cube = np.load(staged / "train" / f"{'ab'[scene]}.cube.npy")
        rgb = np.load(staged / "train" / f"{'ab'[scene]}.rgb.npy")
        window = slice(top, top + 16), slice(left, left + 16)
        assert np.array_equal(batch.cube[i], cube[window])
        assert np.array_equal(batch.rgb[i], rgb[window])
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


def test_rgb_normalisation():
    rgb = torch.tensor([[10, 60], [110, 210]], dtype=torch.uint8)
    assert normalise_rgb(rgb, "unit", 10, 210)[1, 1] == pytest.approx(210 / 255)
    scaled = normalise_rgb(rgb, "per_image", 10, 210)
    assert scaled.min() == 0 and scaled.max() == 1 and scaled[0, 1] == 0.25
    assert normalise_rgb(rgb * 0, "per_image", 0, 0).isfinite().all()
    with pytest.raises(UserError, match="per_image or unit"):
        normalise_rgb(rgb, "other", 0, 255)


def test_rgb_of_16_bits_is_normalised_by_its_own_full_scale():
    rgb = torch.tensor([0, 32768, 65535], dtype=torch.uint16)
    assert normalise_rgb(rgb, "unit", 0, 0).tolist() == pytest.approx([0, 32768 / 65535, 1])
    assert normalise_rgb(rgb, "per_image", 32768, 65535).tolist()[1:] == [0, 1]


@pytest.mark.parametrize("memory_mode", ["lazy", "standard", "float16"])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("rgb_norm", ["unit", "per_image"])
def test_16_bit_rgb_gives_the_batches_of_8_bit_rgb(
    staged, staged16, memory_mode, workers, rgb_norm
):
    settings = {"memory_mode": memory_mode, "num_workers": workers, "rgb_norm": rgb_norm}
    eight = epoch_of(train_loader(config(staged, **settings)))
    sixteen = epoch_of(train_loader(config(staged16, **settings)))
    assert {int(code) for batch in eight for code in batch.augment} >= {1, 4, 7}  # turned too
    for batch, twin in zip(eight, sixteen, strict=True):
        assert twin.rgb.dtype == torch.uint16 and twin.rgb.int().max() > 32767
        assert torch.equal(twin.rgb.int(), 257 * batch.rgb.int())
        assert torch.equal(twin.patches, batch.patches)
        for tensor, expected in zip(prepare_batch(twin), prepare_batch(batch), strict=True):
            torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rgb_norm", ["unit", "per_image"])
def test_16_bit_rgb_gives_the_validation_frames_of_8_bit_rgb(staged, staged16, rgb_norm):
    eight = val_loader(config(staged, rgb_norm=rgb_norm))
    sixteen = val_loader(config(staged16, rgb_norm=rgb_norm))
    for scene, twin in zip(eight, sixteen, strict=True):
        torch.testing.assert_close(twin.rgb, scene.rgb, atol=1e-6, rtol=0)
        assert torch.equal(twin.cube, scene.cube)


def test_loaders_say_what_their_rgb_is(staged, staged16, raw_arad, tmp_path):
    for root in (staged, raw_arad):
        train, val = create_optimized_dataloaders(config(root))
        assert train.rgb == val.rgb == RgbFacts("uint8", "linear", None)
    train, val = create_optimized_dataloaders(config(staged16))
    assert train.rgb == val.rgb == RgbFacts("uint16", "linear", "some camera")
    photos = {"dtype": "uint8", "encoding": "srgb", "camera": None}
    assert train_loader(config(write_staged(tmp_path / "s", rgb=photos))).rgb.encoding == "srgb"


@pytest.mark.parametrize("other", [{"dtype": "uint8"}, {"encoding": "srgb"}])
def test_training_and_validation_rgb_of_two_kinds_are_refused(
    staged16, tmp_path, monkeypatch, other
):
    val = val_loader(config(write_staged(tmp_path / "s", rgb=LINEAR16 | other)))
    monkeypatch.setattr(data, "val_loader", lambda _: val)
    with pytest.raises(UserError, match="differ in their RGB type or encoding"):
        create_optimized_dataloaders(config(staged16))


def test_dihedral_group_is_complete():
    square = torch.arange(9).view(3, 3, 1)
    turned = {dihedral(square, code)[..., 0].numpy().tobytes() for code in range(8)}
    expected = set()
    for flipped in (square[..., 0].numpy(), square[..., 0].numpy().T):
        expected |= {np.rot90(flipped, turns).tobytes() for turns in range(4)}
    assert turned == expected and len(turned) == 8
    assert torch.equal(dihedral(square, 0), square)


@pytest.mark.parametrize("cube_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rgb_dtype", [torch.uint8, torch.uint16])
def test_rgb_and_cube_are_turned_alike_by_all_8_elements(cube_dtype, rgb_dtype):
    full_scale = torch.iinfo(rgb_dtype).max
    values = torch.randint(0, full_scale + 1, (8, 5, 5, 3))
    share = (values[..., :1] / full_scale).to(cube_dtype)
    cube = share.expand(-1, -1, -1, BANDS).contiguous()
    codes = torch.arange(8, dtype=torch.uint8)
    ranges = torch.tensor([[0.0, full_scale]]).expand(8, 2)
    batch = RawBatch(values.to(rgb_dtype), cube, codes, ranges, torch.arange(8))
    out_rgb, out_cube = prepare_batch(batch)
    assert (out_rgb[:, :1] - out_cube).abs().max() < 5e-4
    for code in range(8):
        assert torch.equal(out_cube[code], dihedral(cube[code], code).float().permute(2, 0, 1))


def test_augmentation_reaches_all_8_elements_and_can_be_off(staged):
    batches = epoch_of(train_loader(config(staged, iterations_per_epoch=30)))
    assert set(torch.cat([batch.augment for batch in batches]).tolist()) == set(range(8))
    off = epoch_of(train_loader(config(staged, augment=False)))
    assert not any(batch.augment.any() for batch in off)


@pytest.mark.parametrize("mode", ["lazy", "float16"])
def test_batches_do_not_depend_on_workers(staged, mode):
    expected = epoch_of(train_loader(config(staged, memory_mode=mode)), 3)
    for workers in (1, 2):
        loader = train_loader(config(staged, memory_mode=mode, num_workers=workers))
        assert same(epoch_of(loader, 3), expected)
        assert same(epoch_of(loader, 3, 2), expected[2:])  # the same workers, from elsewhere


def test_shared_memory_too_small_for_workers_is_one_line(staged, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(data, "SHARED_MEMORY", tmp_path)
    first = next(iter(train_loader(config(staged))))
    batch = first.rgb.nbytes + first.cube.nbytes  # two workers hold two each, and one is in use
    for free, fits in ((5 * batch, True), (5 * batch - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, f=free: usage._replace(free=f))
        if fits:
            train_loader(config(staged, num_workers=2))
        else:
            with pytest.raises(UserError, match="need .* MB of shared memory.*--num_workers 0"):
                train_loader(config(staged, num_workers=2))
            train_loader(config(staged, num_workers=0))


def test_a_worker_that_is_killed_is_one_line(staged):
    loader = train_loader(config(staged, num_workers=1, iterations_per_epoch=50))
    others = psutil.Process().children()
    with said_in_one_line():
        for _ in loader:
            for worker in set(psutil.Process().children()) - set(others):
                worker.kill()
                os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # the signal has come
    loader = train_loader(config(staged))
    for ended in (EOFError(), ConnectionResetError(104, "Connection reset by peer")):
        loader.loader = MagicMock(**{"__iter__.side_effect": ended})
        with said_in_one_line():
            next(iter(loader))


@contextlib.contextmanager
def said_in_one_line():
    with (
        pytest.raises(UserError, match="worker.*--num_workers 0"),
        errors_in_one_line(torch.device("cpu")),
    ):
        yield


def test_scenes_in_ram_stay_in_this_process_where_workers_cannot_be_forked(staged, monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    in_ram = train_loader(config(staged, memory_mode="float16", num_workers=2))
    assert in_ram.loader.num_workers == 0
    assert train_loader(config(staged, num_workers=2)).loader.num_workers == 2


def test_ranks_share_the_global_batch_of_one_rank(staged):
    one = epoch_of(train_loader(config(staged, batch_size=8)), 2)
    first = epoch_of(train_loader(config(staged, rank=0, world_size=2)), 2)
    second = epoch_of(train_loader(config(staged, rank=1, world_size=2)), 2)
    for whole, *halves in zip(one, first, second, strict=True):
        for tensor, *parts in zip(whole, *halves, strict=True):
            assert torch.equal(torch.cat(parts), tensor)
    assert not set(patches_of(first)) & set(patches_of(second))


def test_position_resumes_inside_an_epoch_and_moves_on(staged):
    loader = train_loader(config(staged))
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    assert same(epoch_of(train_loader(config(staged)), 0, 1), first[1:])
    assert not same(first, second)
    assert not same(first, epoch_of(train_loader(config(staged, seed=-1)), 0))
    loader.set_position(0, 2)
    assert len(list(loader)) == 1 and same([RawBatch(*batch) for batch in loader], second)
    assert list(loader.loader.sampler) and len(loader) == 3
    with pytest.raises(ValueError):
        loader.set_position(0, 4)


def test_whole_pass_takes_every_patch_and_longer_epochs_wrap_into_new_orders(staged):
    loader = train_loader(config(staged, iterations_per_epoch=0, batch_size=13))
    assert sorted(patches_of(epoch_of(loader))) == list(range(39))
    longer = patches_of(epoch_of(train_loader(config(staged, iterations_per_epoch=20))))
    assert sorted(longer[:39]) == sorted(longer[39:78]) == list(range(39))
    assert longer[:39] != longer[39:78]
    wide = patches_of(epoch_of(train_loader(config(staged, batch_size=80, iterations_per_epoch=1))))
    assert wide == longer  # a batch may hold several passes


def test_all_memory_modes_give_the_same_batches_within_half_precision(tmp_path):
    root = write_staged(tmp_path / "s", dtype="float32")
    lazy, standard, float16 = (
        epoch_of(train_loader(config(root, memory_mode=mode)))
        for mode in ("lazy", "standard", "float16")
    )
    assert same(lazy, standard) and lazy[0].cube.dtype == torch.float32
    for half, exact in zip(float16, standard, strict=True):
        assert half.cube.dtype == torch.float16 and torch.equal(half.rgb, exact.rgb)
        error = (half.cube.float() - exact.cube).abs()
        assert error.max() > 0
        assert (error <= exact.cube * 2**-11).all()  # the bound that describe() states


def test_buffers_are_not_used_again_while_a_tensor_holds_them(staged):
    loader = train_loader(config(staged, iterations_per_epoch=6))
    kept = [prepare_batch(batch)[1][:, :1] for batch in loader]
    again = [prepare_batch(batch)[1][:, :1].clone() for batch in epoch_of(loader)]
    assert all(torch.equal(x, y) for x, y in zip(kept, again, strict=True))
    assert len({x.data_ptr() for x in kept}) == 6
    del kept
    free = data._free_buffers[(4, 16, 16, BANDS), "float32"]
    addresses = {memory.ctypes.data for memory in free}
    assert prepare_batch(next(iter(loader)))[1].data_ptr() in addresses


def test_data_set_pickles_small_and_works_after_it(staged, raw_arad):
    for root in (staged, raw_arad):
        dataset = train_loader(config(root)).dataset
        pickled = pickle.dumps(dataset)
        assert len(pickled) < 20_000
        assert same([pickle.loads(pickled)[0, 1]], [dataset[0, 1]])


def test_validation_gives_whole_float32_frames(staged, raw_arad):
    scenes = {scene.name: scene for scene in val_loader(config(staged))}
    assert list(scenes) == ["a", "b"]
    stored, rgb = (np.load(staged / "val" / f"b.{kind}.npy") for kind in ("cube", "rgb"))
    assert scenes["b"].cube.shape == (1, BANDS, 48, 32) and scenes["b"].cube.dtype == torch.float32
    assert np.array_equal(scenes["b"].cube[0].permute(1, 2, 0), stored)
    expected = (rgb.astype(np.float32) - rgb.min()) / (rgb.max() - rgb.min())
    assert np.array_equal(scenes["b"].rgb[0].permute(1, 2, 0), expected)
    raw = list(val_loader(config(raw_arad)))
    with h5py.File(raw_arad / "Train_Spec" / "v.mat") as file:
        assert np.array_equal(raw[0].cube[0], file["cube"][()].transpose(0, 2, 1))
    assert raw[0].cube.is_contiguous(memory_format=torch.channels_last)


def test_validation_frames_are_sharded_by_rank(staged):
    for rank, names in ((0, ["a"]), (1, ["b"])):
        loader = val_loader(config(staged, rank=rank, world_size=2))
        assert [scene.name for scene in loader] == names and len(loader) == 1


def test_half_precision_validation_targets_are_refused(tmp_path):
    root = write_staged(tmp_path / "s", val_dtype="float16")
    with pytest.raises(UserError, match="s/val: float16"):
        create_optimized_dataloaders(config(root))
    assert len(val_loader(config(root, val_split="train"))) == 2


@pytest.mark.parametrize("folder, rgb_bytes", [("staged", 3), ("staged16", 6)])
def test_memory_guard_names_lazy_mode_before_reading(request, monkeypatch, folder, rgb_bytes):
    settings = config(request.getfixturevalue(folder), memory_mode="standard")
    needed = sum(h * w for h, w in STAGED_SIZES.values()) * (BANDS * 4 + rgb_bytes)
    with monkeypatch.context() as patch:
        patch.setattr(scene_folders, "free_memory", lambda: needed - 1)
        patch.setattr(
            scene_folders.terminal,
            "bar",
            lambda *args, **kwargs: pytest.fail("read before the guard"),
        )
        with pytest.raises(UserError, match="2 scenes take .* GB.*--memory_mode lazy"):
            train_loader(settings)
    monkeypatch.setattr(scene_folders, "free_memory", lambda: needed)
    train_loader(settings)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    settings.world_size = 2
    with pytest.raises(UserError, match="lazy"):
        train_loader(settings)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"memory_mode": "ram"}, "--memory_mode ram: choose from standard, float16, lazy"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"iterations_per_epoch": -1}, "--iterations_per_epoch -1"),
        ({"patch_size": 64}, "--patch_size 64.*40 x 56"),
        ({"rgb_norm": "max"}, "choose from per_image, unit"),
    ],
)
def test_settings_out_of_range_are_errors(staged, changes, words):
    with pytest.raises(UserError, match=words):
        train_loader(config(staged, **changes))


def test_any_band_count_works_when_its_wavelengths_are_known(broken, tmp_path):
    raw = write_raw_arad(tmp_path / "raw", bands=28)
    assert prepare_batch(next(iter(train_loader(config(raw)))))[1].shape[1] == 28
    assert next(iter(val_loader(config(raw)))).cube.shape[1] == 28
    write_index(broken, read_index(broken) | {"wavelengths": FIELD_BANDS[:5]})
    with pytest.raises(UserError, match="index.json: 5 wavelengths of 31 bands"):
        train_loader(config(broken))


def loss_pair(shape=(2, 31, 8, 9)):
    """A prediction and a target with zeros in it."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(shape, generator=generator)
    target[:, :, 0, 0] = 0
    return torch.rand(shape, generator=generator), target


@pytest.mark.parametrize("floor", [1e-2, 1e-6])
def test_loss_equals_float64_numpy_in_any_memory_layout(floor):
    pred, target = loss_pair()
    p, t = pred.double().numpy(), target.double().numpy()
    expected = np.mean(np.abs(p - t) / np.maximum(t, floor))
    for layout in (torch.contiguous_format, torch.channels_last):
        loss = MSTPlusPlusLoss(floor)(pred.contiguous(memory_format=layout), target)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("floor", [1e-2, 1e-6])
def test_loss_is_zero_for_a_perfect_prediction(floor):
    _, target = loss_pair()
    assert MSTPlusPlusLoss(floor)(target, target).item() == 0


def test_gradient_of_the_loss_is_finite_where_the_target_is_zero():
    pred, target = loss_pair()
    pred.requires_grad_()
    MSTPlusPlusLoss()(pred, target).backward()
    assert torch.isfinite(pred.grad).all() and pred.grad[:, :, 0, 0].abs().min() > 0
    perfect = target.clone().requires_grad_()
    MSTPlusPlusLoss()(perfect, target).backward()
    assert torch.equal(perfect.grad, torch.zeros_like(perfect))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32_under_autocast_and_for_half_predictions(dtype):
    pred, target = loss_pair()
    # Below the least normal float16; with floor 1e-6 its reciprocal overflows float16.
    target[:, :, 1] = 1e-5
    pred, target = pred.to(dtype), target.to(dtype)
    exact = MSTPlusPlusLoss(1e-6)(pred.float(), target.float())
    with torch.autocast("cpu", dtype=dtype):
        loss = MSTPlusPlusLoss(1e-6)(pred, target)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_floor_of_the_loss_is_a_function_of_the_step():
    loss = MSTPlusPlusLoss(floor=0.01, floor_start=0.16, floor_steps=4)
    floors = [loss.floor_at(step) for step in range(6)]
    assert floors == pytest.approx([0.16, 0.08, 0.04, 0.02, 0.01, 0.01])
    pred, target = torch.full((1, 1, 2, 2), 0.1), torch.zeros(1, 1, 2, 2)
    assert loss(pred, target).item() == pytest.approx(0.1 / 0.16)
    loss.step = 100
    assert loss(pred, target).item() == pytest.approx(10)
    assert not loss.state_dict()


def test_bad_floor_and_shapes_of_the_loss_are_errors():
    with pytest.raises(UserError, match="--train_floor 0"):
        MSTPlusPlusLoss(0)
    with pytest.raises(UserError, match="--train_floor_start -1"):
        MSTPlusPlusLoss(0.01, -1)
    with pytest.raises(ValueError, match="differ in shape"):
        MSTPlusPlusLoss()(torch.zeros(2, 31, 4, 4), torch.zeros(1, 31, 4, 4))


# --- a second set


def test_a_second_set_has_a_share_of_each_batch_that_falls_to_none(staged, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(staged, other)
    for path in (other / "train").glob("*.cube.npy"):
        np.save(path, np.full_like(np.load(path), 7))  # nothing of the first set is 7
    settings = {"batch_size": 8, "iterations_per_epoch": 40, "mix_root": str(other)}
    made = config(staged, mix_share=0.5, mix_until=80, **settings)
    loader = train_loader(made)
    counts = []
    for epoch in (0, 1, 2):
        found = epoch_of(loader, epoch)
        counts += [int((batch.cube == 7).all(dim=(1, 2, 3)).sum()) for batch in found]
        assert all(len(batch.rgb) == 8 for batch in found)
    assert np.mean(counts[:20]) == pytest.approx(0.4375 * 8, abs=0.4)
    assert np.mean(counts[40:60]) == pytest.approx(0.1875 * 8, abs=0.4)
    assert counts[80:] == [0] * 40
    again = train_loader(made)
    assert same(epoch_of(again, 1, 5), epoch_of(loader, 1, 5))
    plain = train_loader(config(staged, batch_size=8, iterations_per_epoch=40))
    mixed, alone = epoch_of(loader, 0)[0], epoch_of(plain, 0)[0]
    kept = 8 - counts[0]
    assert torch.equal(mixed.cube[-kept:], alone.cube[-kept:])  # the first set's order stays


def test_the_share_of_a_second_set_falls_over_the_epochs_that_ranks_divide(staged):
    settings = {"batch_size": 8, "iterations_per_epoch": 0, "world_size": 2, "mix_share": 0.8}
    loader = train_loader(config(staged, mix_root=str(staged), **settings))
    loader.config.mix_until = 2 * len(loader)
    assert len(loader) == 3  # of 39 patches
    assert loader.dataset.mixed_in(1, 0) in (3, 4)  # half of the run is done: 0.4 of 8


def test_a_second_set_of_another_kind_is_refused(staged, staged16):
    with pytest.raises(UserError, match="--mix_root .* differs from .* in its RGB type"):
        train_loader(config(staged, mix_root=str(staged16)))
    with pytest.raises(UserError, match="^--mix_root nowhere: neither index.json nor Train_Spec"):
        train_loader(config(staged, mix_root="nowhere"))
    with pytest.raises(UserError, match="--mix_share 1.0"):
        config(staged, mix_share=1.0)


def test_a_damaged_second_set_is_noticed(staged, tmp_path):
    other = shutil.copytree(staged, tmp_path / "other")
    index = read_index(other)
    index["splits"]["train"][0]["cube_sha256"] = "0" * 64
    write_index(other, index)
    train, _ = create_optimized_dataloaders(config(staged, mix_root=str(other)))
    damaged = other / index["splits"]["train"][0]["cube"]
    assert [path for path, _ in train.check.checksums] == [damaged]
