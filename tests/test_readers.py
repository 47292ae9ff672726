"""Every file format of the field, written by an independent writer, comes back as H x W x bands."""

import h5py
import numpy as np
import pytest
from PIL import Image

from common_utils_v32 import UserError
from cube_files import FIELD_BANDS, check_cube, read_cube, read_rgb, read_wavelengths
from optimized_dataloader import find_scenes, patch_grid

RGB_SHAPE = (20, 24, 3)


@pytest.fixture
def cube():
    return np.random.default_rng(0).random((20, 24, 31), dtype=np.float32)


def write_hdf5(path, array, key="cube"):
    with h5py.File(path, "w") as file:
        file[key] = array
        file["bands"] = np.arange(400.0, 701.0, 10)[:, None]
        file["norm_factor"] = np.ones((1, 1))
    return path


def test_v73_in_matlab_order(tmp_path, cube):
    path = write_hdf5(tmp_path / "s.mat", cube.transpose(2, 1, 0))
    for hints in (
        {},
        {"bands": 31},
        {"rgb_shape": RGB_SHAPE},
        {"bands": 31, "rgb_shape": RGB_SHAPE},
    ):
        assert np.array_equal(read_cube(path, **hints), cube)
    assert read_wavelengths(path) == FIELD_BANDS


@pytest.mark.parametrize("order", [(2, 0, 1), (0, 1, 2), (1, 0, 2)])
def test_hdf5_in_other_orders_is_told_by_the_rgb(tmp_path, cube, order):
    path = write_hdf5(tmp_path / "s.mat", cube.transpose(order))
    assert np.array_equal(read_cube(path, rgb_shape=RGB_SHAPE), cube)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("suffix", ["npy", "npz", "mat"])
def test_numpy_and_matlab_v5(tmp_path, cube, order, suffix):
    scipy_io = pytest.importorskip("scipy.io")
    path, array = tmp_path / f"s.{suffix}", cube.transpose(order)
    if suffix == "npy":
        np.save(path, array)
    elif suffix == "npz":
        np.savez(path, hsi=array, wavelengths=FIELD_BANDS)
    else:
        scipy_io.savemat(path, {"rad": array, "bands": np.array(FIELD_BANDS)})
    assert np.array_equal(read_cube(path, rgb_shape=RGB_SHAPE), cube)
    assert read_wavelengths(path) == (None if suffix == "npy" else FIELD_BANDS)
    if order != (2, 1, 0):  # bands x W x H needs the RGB to be told
        assert np.array_equal(read_cube(path, bands=31), cube)


def test_square_scene_with_bands_last_in_hdf5_asks_for_axes(tmp_path, cube):
    square = cube[:, :20]
    path = write_hdf5(tmp_path / "s.mat", square)
    with pytest.raises(UserError, match="s.mat.*--axes"):
        read_cube(path, rgb_shape=(20, 20))
    assert np.array_equal(
        read_cube(path, rgb_shape=(20, 20), axes="whc"), square.transpose(1, 0, 2)
    )
    with pytest.raises(UserError, match="--axes hxc"):
        read_cube(path, axes="hxc")


def test_other_band_counts_and_band_mismatch(tmp_path):
    np.save(tmp_path / "s.npy", np.zeros((60, 70, 28)))
    assert read_cube(tmp_path / "s.npy").shape == (60, 70, 28)
    with pytest.raises(UserError, match="s.npy.*31 bands"):
        read_cube(tmp_path / "s.npy", bands=31)
    with pytest.raises(UserError, match="s.npy.*61 x 70"):
        read_cube(tmp_path / "s.npy", rgb_shape=(61, 70, 3))


def test_cube_key_is_found_or_asked_for(tmp_path, cube):
    path = tmp_path / "s.npz"
    np.savez(path, left=cube, right=cube + 1)
    with pytest.raises(UserError, match="--cube-key.*left, right"):
        read_cube(path)
    assert np.array_equal(read_cube(path, key="right"), cube + 1)
    with pytest.raises(UserError, match="no array middle"):
        read_cube(path, key="middle")
    np.savez(path, odd_name=cube, mask=cube[..., 0])
    assert np.array_equal(read_cube(path), cube)


@pytest.mark.parametrize("interleave", ["bsq", "bil", "bip"])
def test_envi(tmp_path, cube, interleave):
    envi = pytest.importorskip("spectral.io.envi")
    path = tmp_path / "s.hdr"
    envi.save_image(str(path), cube, interleave=interleave, metadata={"wavelength": FIELD_BANDS})
    assert np.array_equal(read_cube(path), cube)
    assert read_wavelengths(path) == FIELD_BANDS
    (tmp_path / "s.img").unlink()
    with pytest.raises(UserError, match="s.hdr"):
        read_cube(path)


def test_wavelengths_in_micrometres_become_nm(tmp_path, cube):
    np.savez(tmp_path / "s.npz", cube=cube, wavelength=np.array(FIELD_BANDS) / 1000)
    assert np.allclose(read_wavelengths(tmp_path / "s.npz"), FIELD_BANDS)


@pytest.mark.parametrize("nested", [False, True])
def test_cave_folder_of_16_bit_pngs(tmp_path, cube, nested):
    folder = tmp_path / "toy_ms" / "toy_ms" if nested else tmp_path / "toy_ms"
    folder.mkdir(parents=True)
    stored = (cube * 65535).astype(np.uint16)
    for band in range(31):
        Image.fromarray(stored[..., band]).save(folder / f"toy_ms_{band + 1:02d}.png")
    Image.new("RGB", (24, 20)).save(folder / "toy_RGB.bmp")
    assert np.array_equal(
        read_cube(tmp_path / "toy_ms"), stored.astype(np.float32) / np.float32(65535)
    )
    assert read_wavelengths(tmp_path / "toy_ms") == FIELD_BANDS
    (folder / "toy_ms_07.png").unlink()
    with pytest.raises(UserError, match="toy_ms.*number 7"):
        read_cube(tmp_path / "toy_ms")


def test_cave_folder_of_8_bit_rgba_pngs(tmp_path, cube):
    folder = tmp_path / "water_ms"
    folder.mkdir()
    stored = (cube * 255).astype(np.uint8)
    for band in range(31):
        grey = stored[..., band]
        rgba = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
        Image.fromarray(rgba).save(folder / f"water_ms_{band + 1:02d}.png")
    assert np.array_equal(read_cube(folder), stored.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("suffix", ["mat", "npy", "npz", "hdr"])
@pytest.mark.parametrize("content", [None, b"", b"not a cube at all"])
def test_missing_empty_and_corrupt_files_are_named(tmp_path, suffix, content):
    path = tmp_path / f"bad.{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"bad.{suffix}"):
        read_cube(path)


def test_truncated_hdf5_is_named(tmp_path, cube):
    path = write_hdf5(tmp_path / "cut.mat", cube.transpose(2, 1, 0))
    path.write_bytes(path.read_bytes()[:30000])
    with pytest.raises(UserError, match="cut.mat"):
        read_cube(path)


def test_values_that_spoil_training_are_named(cube):
    check_cube(cube, "ok.mat")
    for value, words in (
        (np.nan, "1 values.*NaN"),
        (np.inf, "NaN or infinite"),
        (4095, "to 4095.*--scale"),
        (-1, "from -1"),
    ):
        bad = cube.copy()
        bad[1, 2, 3] = value
        with pytest.raises(UserError, match=f"bad.mat.*{words}"):
            check_cube(bad, "bad.mat")
    flat = cube.copy()
    flat[..., 4] = 0.25
    with pytest.raises(UserError, match="band 5 of 31 is constant"):
        check_cube(flat, "flat.mat")


def test_rgb_is_8_bit_rgb_as_stored(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, RGB_SHAPE, dtype=np.uint8)
    for suffix in ("png", "bmp"):
        Image.fromarray(rgb).save(tmp_path / f"x.{suffix}")
        assert np.array_equal(read_rgb(tmp_path / f"x.{suffix}"), rgb)
    Image.fromarray(rgb.astype(np.uint16)[..., 0]).save(tmp_path / "deep.png")
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    for name in ("deep.png", "bad.jpg", "none.jpg"):
        with pytest.raises(UserError, match=name):
            read_rgb(tmp_path / name)


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
    (tmp_path / "split_txt" / "valid_list.txt").write_text("a")
    with pytest.raises(UserError, match="valid_list.txt: a is a training scene"):
        find_scenes(tmp_path)
    listing.write_text("b\nb\n")
    with pytest.raises(UserError, match="b is listed twice"):
        find_scenes(tmp_path)


def test_test_images_and_missing_scenes(raw_arad, tmp_path):
    for folder in ("Train_Spec", "Train_RGB"):
        (tmp_path / folder).symlink_to(raw_arad / folder)
    (tmp_path / "Test_RGB").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "Test_RGB" / "t.png")
    assert [s.name for s in find_scenes(tmp_path)["train"]] == ["a", "b", "c", "v"]
    assert find_scenes(tmp_path)["test"][0]._replace(rgb_path=None) == ("t", None, None)
    (tmp_path / "split_txt").mkdir()
    (tmp_path / "split_txt" / "train_list.txt").write_text("a\ngone\n")
    gone = find_scenes(tmp_path)["train"][1]
    assert gone.rgb_path is None
    with pytest.raises(UserError, match="Train_Spec/gone.mat: no such file"):
        read_cube(gone.cube_path)
    with pytest.raises(UserError, match="no Train_Spec"):
        find_scenes(tmp_path / "Train_RGB")


def test_patch_grid_is_that_of_mst_plus_plus_or_covers_the_frame():
    rows, cols = patch_grid(482, 512, 128, 8)
    assert (len(rows), len(cols), len(rows) * len(cols)) == (45, 49, 2205)
    assert (rows[-1] + 128, cols[-1] + 128) == (480, 512)
    covering = patch_grid(482, 512, 128, 8, "cover")
    assert covering[0] == [*rows, 354] and covering[1] == cols
    assert patch_grid(128, 128, 128, 8) == ([0], [0])
    with pytest.raises(UserError, match="--patch_size 128.*100 x 512"):
        patch_grid(100, 512, 128, 8)
