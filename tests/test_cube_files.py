"""Every file format of the field, written by an independent writer, comes back as H x W x bands,
and what is written here is read by others."""

import h5py
import numpy as np
import pytest
from PIL import Image

import cube_files
from common_utils_v32 import UserError
from cube_files import (
    FIELD_BANDS,
    check_cube,
    find_stored_cube,
    read_cube,
    read_rgb,
    read_wavelengths,
    read_window,
    write_cube,
)

RGB_SHAPE = (20, 24, 3)
NM = [405.0 + 10 * i for i in range(31)]


@pytest.fixture
def cube():
    return np.random.default_rng(0).random((20, 24, 31), dtype=np.float32)


def write_hdf5(path, array, key="cube"):
    with h5py.File(path, "w") as file:
        file[key] = array
        file["bands"] = np.arange(400.0, 701.0, 10)[:, None]
        file["norm_factor"] = np.ones((1, 1))
    return path


@pytest.mark.parametrize(
    "hints", [{}, {"bands": 31}, {"rgb_shape": RGB_SHAPE}, {"bands": 31, "rgb_shape": RGB_SHAPE}]
)
def test_v73_in_matlab_order(tmp_path, cube, hints):
    path = write_hdf5(tmp_path / "s.mat", cube.transpose(2, 1, 0))
    assert np.array_equal(read_cube(path, **hints), cube)
    assert read_wavelengths(path) == FIELD_BANDS


@pytest.mark.parametrize("order", [(2, 0, 1), (0, 1, 2), (1, 0, 2)])
def test_hdf5_in_other_orders_is_told_by_the_rgb(tmp_path, cube, order):
    path = write_hdf5(tmp_path / "s.mat", cube.transpose(order))
    assert np.array_equal(read_cube(path, rgb_shape=RGB_SHAPE), cube)


@pytest.mark.parametrize("order", [(2, 1, 0), (2, 0, 1), (0, 1, 2), (1, 0, 2)])
def test_a_window_of_an_hdf5_cube_is_that_of_the_whole(tmp_path, cube, order):
    path = write_hdf5(tmp_path / "s.mat", cube.transpose(order))
    stored = find_stored_cube(path, None, None, None, RGB_SHAPE)
    assert stored.bands == 31
    assert np.array_equal(read_window(stored, slice(3, 9), slice(5, 6)), cube[3:9, 5:6])


def test_a_file_that_decodes_only_as_a_whole_has_no_windows(tmp_path, cube):
    np.savez(tmp_path / "s.npz", cube=cube)
    assert find_stored_cube(tmp_path / "s.npz", None, None, None, None) is None


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
    turned = read_cube(path, rgb_shape=(20, 20), axes="whc")
    assert np.array_equal(turned, square.transpose(1, 0, 2))
    with pytest.raises(UserError, match="--axes hxc"):
        read_cube(path, axes="hxc")
    with pytest.raises(UserError, match="as --axes chw does not have 31 bands"):
        read_cube(path, axes="chw", bands=31)


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
    np.savez(path, other=cube, RAD=cube + 1)
    assert np.array_equal(read_cube(path), cube + 1)


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


@pytest.mark.parametrize("values", [[1.0], [np.nan] * 31, range(31), [0.0] * 31])
def test_numbers_that_are_no_wavelengths_are_not_taken_for_them(tmp_path, cube, values):
    np.savez(tmp_path / "s.npz", cube=cube, bands=np.array(values))
    assert read_wavelengths(tmp_path / "s.npz") is None


@pytest.mark.parametrize("nested", [False, True])
def test_cave_folder_of_16_bit_pngs(tmp_path, cube, nested):
    folder = tmp_path / "toy_ms" / "toy_ms" if nested else tmp_path / "toy_ms"
    folder.mkdir(parents=True)
    stored = (cube * 65535).astype(np.uint16)
    for band in range(31):
        Image.fromarray(stored[..., band]).save(folder / f"toy_ms_{band + 1:02d}.png")
    Image.new("RGB", (24, 20)).save(folder / "toy_RGB.bmp")
    expected = stored.astype(np.float32) / np.float32(65535)
    assert np.array_equal(read_cube(tmp_path / "toy_ms"), expected)
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
    Image.fromarray(rgba[..., [0, 3, 1]]).save(folder / "water_ms_02.png")
    with pytest.raises(UserError, match="water_ms_02.png: a colour picture"):
        read_cube(folder)


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


@pytest.mark.parametrize("kind, suffix", cube_files.WRITTEN.items())
@pytest.mark.parametrize("mapped", [False, True])
def test_written_cubes_read_back_identically(tmp_path, monkeypatch, cube, kind, suffix, mapped):
    if kind == "envi":
        pytest.importorskip("spectral.io.envi")
    if mapped:
        monkeypatch.setattr(cube_files, "MAPPED_BYTES", 1000)
    path = tmp_path / "out" / f"a{suffix}"
    bands_first = cube_files.allocate_array((31, 20, 24), np.float32, tmp_path)
    assert isinstance(bands_first, np.memmap) == mapped
    bands_first[:] = cube.transpose(2, 0, 1)
    write_cube(path, bands_first, NM, kind, move=mapped)
    axes = "chw" if suffix in (".npy", ".npz") else None
    assert np.array_equal(read_cube(path, axes=axes, rgb_shape=RGB_SHAPE), cube)
    assert read_wavelengths(path) == (None if kind == "npy" else NM)
    assert {file.stem for file in path.parent.iterdir()} == {"a"}  # nothing is left beside it


def test_a_written_mat_is_matlabs_v73(tmp_path, cube):
    path = tmp_path / "a.mat"
    write_cube(path, cube.transpose(2, 0, 1), NM, "mat")
    with h5py.File(path) as file:
        assert file["cube"].shape == (31, 24, 20)  # column-major: H x W x bands in MATLAB
        assert file["cube"].attrs["MATLAB_class"] == b"single"
        assert file["bands"].attrs["MATLAB_class"] == b"double"
        assert np.array_equal(file["cube"][()].transpose(2, 1, 0), cube)
        assert file["bands"][:, 0].tolist() == NM
    header = path.read_bytes()[:128]
    assert header.startswith(b"MATLAB 7.3 MAT-file") and header[124:] == b"\x00\x02IM"
    scipy_io = pytest.importorskip("scipy.io.matlab")
    with open(path, "rb") as file:
        assert scipy_io.matfile_version(file)[0] == 2  # 7.3


def test_a_written_envi_header_holds_the_wavelengths_in_nm(tmp_path, cube):
    envi = pytest.importorskip("spectral.io.envi")
    write_cube(tmp_path / "a.hdr", cube.transpose(2, 0, 1), NM, "envi")
    image = envi.open(str(tmp_path / "a.hdr"))
    assert np.array_equal(np.asarray(image.load()), cube)
    assert image.bands.centers == NM and image.bands.band_unit == "Nanometers"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.hdr", "a.img"]


def test_a_failed_write_leaves_the_old_cube(tmp_path, cube):
    path = tmp_path / "a.mat"
    path.write_bytes(b"mine")
    with pytest.raises(ValueError):
        write_cube(path, cube[0], NM, "mat")
    assert [file.name for file in tmp_path.iterdir()] == ["a.mat"]
    assert path.read_bytes() == b"mine"


def test_blocks_cover_a_cube_once():
    counts = np.zeros((3, 25, 2), int)
    for band, rows in cube_files.blocks(counts, rows=10):
        counts[band, rows] += 1
    assert (counts == 1).all()


@pytest.mark.parametrize(
    "value, words",
    [
        (np.nan, "1 values.*NaN"),
        (np.inf, "NaN or infinite"),
        (4095, "to 4095.*--scale"),
        (-1, "from -1"),
    ],
)
def test_values_that_spoil_training_are_named(cube, value, words):
    check_cube(cube, "ok.mat")
    cube[1, 2, 3] = value
    with pytest.raises(UserError, match=f"bad.mat.*{words}"):
        check_cube(cube, "bad.mat")


def test_a_constant_band_is_named_where_whole_frames_are_judged(cube):
    cube[..., 4] = 0.25
    with pytest.raises(UserError, match="band 5 of 31 is constant"):
        check_cube(cube, "flat.mat")
    check_cube(cube, "patch.mat", constant_bands=False)


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
