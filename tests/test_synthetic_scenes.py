"""The scene generator: spectra, light and statistics like those of real scenes."""

import json

import h5py
import numpy as np
import pytest
import torch
from conftest import folder_bytes, run_setup

from camera_colour import camera_response
from common_utils_v32 import UserError
from cube_files import read_rgb
from measured_spectra import LAMPS, WAVELENGTHS, measured_light, measured_reflectances
from optimized_dataloader import DataConfig, prepare_batch, train_loader, val_loader
from synthetic_scenes import (
    FAMILIES,
    absorption,
    draw_illuminants,
    draw_material,
    reflectance,
    synthetic_cube,
)


def reflectances(family, n, rng):
    return np.stack([reflectance(draw_material(family, rng)) for _ in range(n)])


def test_reflectances_are_smooth_within_0_and_1_and_mostly_three_dimensional():
    """Published sets of measured reflectances keep 97 % or more of their energy in three components
    (Parkkinen et al., JOSA A 1989; Vrhel et al., Color Res. Appl. 1994); step to step, 10 nm apart,
    they change little."""
    spectra = np.concatenate(
        [reflectances(family, 150, np.random.default_rng(0)) for family in FAMILIES]
    )
    assert spectra.min() > 0.005 and spectra.max() < 1
    assert np.sqrt(np.mean(np.diff(spectra, 2, axis=1) ** 2)) < 0.02
    energy = np.linalg.svd(spectra, compute_uv=False) ** 2
    assert 0.97 < energy[:3].sum() / energy.sum() < 0.999


def test_scenes_have_natural_statistics():
    cubes = np.stack([synthetic_cube(np.random.default_rng([7, i]), 96, 96) for i in range(12)])
    assert cubes.dtype == np.float32 and cubes.min() > 0 and cubes.max() <= 1
    assert (
        0.05 < cubes.mean() < 0.25
        and 0.15 < (cubes < 0.05).mean() < 0.6
        and 0.001 < (cubes > 0.5).mean() < 0.1
    )
    pixels = cubes.reshape(-1, 31)[::7].astype(float)
    energy = np.linalg.eigvalsh(np.cov(pixels.T))[::-1]
    assert 0.92 < energy[:3].sum() / energy.sum() < 0.995 and energy[0] / energy.sum() < 0.9
    edges = np.abs(np.diff(cubes.mean(-1), axis=2))  # dead leaves: most steps small, some large
    assert np.quantile(edges, 0.99) > 10 * np.median(edges)


def test_metamers_of_two_families_look_alike_but_have_other_spectra_and_other_textures():
    response, rng = camera_response("analytic", WAVELENGTHS), np.random.default_rng(0)
    leaves, plastics = (reflectances(family, 1500, rng) for family in ("foliage", "plastic"))
    rgb = [spectra @ response for spectra in (leaves, plastics)]
    distance = np.abs(rgb[0][:, None] - rgb[1][None]).max(-1) / rgb[0].mean(-1)[:, None]
    pairs = np.argwhere(
        distance < 0.05
    )  # no camera channel differs by more than 5 % of the brightness
    cosine = (leaves[pairs[:, 0]] * plastics[pairs[:, 1]]).sum(-1)
    cosine /= np.linalg.norm(leaves[pairs[:, 0]], axis=-1) * np.linalg.norm(
        plastics[pairs[:, 1]], axis=-1
    )
    angles = np.degrees(np.arccos(cosine))
    assert len(pairs) >= 5 and angles.max() > 12 and np.median(angles) > 6
    assert FAMILIES["foliage"][2] != FAMILIES["plastic"][2]


def test_illuminants_are_of_several_kinds_and_ambient_light_has_another_colour():
    rng = np.random.default_rng(0)
    outdoor, indoor = (
        np.array([draw_illuminants(where, rng) for _ in range(40)]) for where in (True, False)
    )
    assert outdoor.min() > 0 and outdoor.max() <= 1
    blue_to_red = indoor[:, 0, 5] / indoor[:, 0, 25]
    assert blue_to_red.min() < 0.6 and blue_to_red.max() > 1
    assert (
        outdoor[:, 1, 3] / outdoor[:, 1, 27] > 1.2 * outdoor[:, 0, 3] / outdoor[:, 0, 27]
    ).all()  # the sky is bluer


# --- as a raw data set


def test_synthetic_scenes_are_in_the_arad_layout(synthetic):
    names = [
        (synthetic / "split_txt" / f"{part}_list.txt").read_text().split()
        for part in ("train", "valid")
    ]
    assert [len(part) for part in names] == [5, 1] and not set(names[0]) & set(names[1])
    assert len([*(synthetic / "Test_RGB").glob("*.jpg")]) == 2
    with h5py.File(synthetic / "Train_Spec" / f"{names[0][0]}.mat") as file:
        assert (
            file["cube"].shape == (31, 128, 96) and file["cube"].dtype == np.float32
        )  # bands, W, H: MATLAB's order
        assert file["bands"][:].ravel().tolist() == WAVELENGTHS.tolist()
    assert read_rgb(synthetic / "Train_RGB" / f"{names[0][0]}.jpg").shape == (96, 128, 3)


def test_the_same_seed_gives_the_same_files_and_another_seed_others(synthetic, tmp_path):
    small = ("--size", "64x64", "--patch-size", 64)
    for name, seed, workers in (("a", 3, 1), ("b", 3, 2), ("c", 4, 2)):
        run_setup(
            "--synthetic",
            2,
            "--output-root",
            tmp_path / name,
            *small,
            "--seed",
            seed,
            "--workers",
            workers,
        )
    a, b, c = (folder_bytes(tmp_path / name) for name in "abc")
    assert a == b
    assert a["Train_Spec/synthetic_0001.mat"] != c["Train_Spec/synthetic_0001.mat"]


def test_camera_and_exposure_change_the_photo_and_not_the_cube(tmp_path):
    for name, more in (
        ("a", ()),
        ("b", ("--camera", "analytic2")),
        ("c", ("--exposure", "0.5")),
        ("d", ("--exposure", "auto")),
    ):
        run_setup(
            "--synthetic",
            2,
            "--output-root",
            tmp_path / name,
            "--size",
            "64x64",
            "--patch-size",
            64,
            "--workers",
            1,
            *more,
        )
    cubes = {(tmp_path / n / "Train_Spec" / "synthetic_0001.mat").read_bytes() for n in "abcd"}
    a, b, c, d = (
        read_rgb(tmp_path / n / "Train_RGB" / "synthetic_0001.jpg").astype(float) for n in "abcd"
    )
    assert len(cubes) == 1
    assert np.abs(a - b).mean() > 1 and c.mean() < 0.5 * a.mean()
    assert d.mean() == pytest.approx(0.18 * 255, rel=0.1)


def test_a_synthetic_folder_is_not_overwritten_by_other_settings(synthetic, tmp_path):
    before = folder_bytes(synthetic)
    with pytest.raises(UserError, match="seed 0, not 5"):
        run_setup(
            "--synthetic",
            6,
            "--output-root",
            synthetic,
            "--size",
            "96x128",
            "--patch-size",
            64,
            "--seed",
            5,
        )
    run_setup(
        "--synthetic",
        6,
        "--output-root",
        synthetic,
        "--size",
        "96x128",
        "--patch-size",
        64,
        "--workers",
        1,
    )
    assert folder_bytes(synthetic) == before
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds other things"):
        run_setup("--synthetic", 2, "--output-root", tmp_path)
    for bad in (("--synthetic", 1), ("--synthetic", 4, "--size", "100x90")):
        with pytest.raises(UserError, match="--synthetic 1|--size 100x90"):
            run_setup(*bad, "--output-root", tmp_path / "none")
    assert not (tmp_path / "none").exists()


# --- measured spectra and ordinary photos


def test_measured_samples_are_reflectances_and_lamps_are_lights():
    table = measured_reflectances()
    assert table.shape == (99 + 24 + 24 + 24 + 30, 31) and table.min() >= 0 and table.max() <= 1
    back = reflectance(absorption(table))
    inside = (table > 0.02) & (table < 0.99)
    np.testing.assert_allclose(back[inside], table[inside], atol=1e-6)
    lights = [measured_light(name) for names in LAMPS.values() for name in names]
    assert np.allclose(np.max(lights, axis=1), 1) and np.min(lights) >= 0
    assert measured_light("A")[-1] == 1 and measured_light("A")[0] < 0.2


def test_scenes_of_neutral_light_are_like_measured_ones():
    """Twenty measured indoor scenes: 0.974, 0.996 and 0.998 of the variance in 3, 6 and 8
    components, mean 0.16, 7 % above 0.5, and 1.08 times as much at 700 nm as at 680."""
    cubes = [synthetic_cube(np.random.default_rng([5, i]), 96, 96, neutral=True) for i in range(24)]
    pixels = np.stack(cubes).reshape(-1, 31)[::7].astype(float)
    energy = np.linalg.eigvalsh(np.cov(pixels.T))[::-1].cumsum()
    energy /= energy[-1]
    assert 0.95 < energy[2] < 0.99 and energy[5] > 0.99 and energy[7] > 0.995
    assert 0.1 < pixels.mean() < 0.25 and 0.02 < (pixels > 0.5).mean() < 0.15
    assert 1.02 < np.median(pixels[:, 30] / pixels[:, 28].clip(1e-3)) < 1.2
    greys = [np.ptp(cube[cube.max(-1) > 0.98], axis=-1) for cube in cubes]
    assert min(np.concatenate(greys)) < 0.02  # white is the same in every band


def test_ordinary_photos_are_recorded_as_srgb_and_reach_the_model_as_linear_light(tmp_path):
    flags = ("--size", "64x64", "--patch-size", 64, "--workers", 1, "--camera", "srgb")
    run_setup("--synthetic", 3, "--output-root", tmp_path / "raw", *flags)
    staged = tmp_path / "staged"
    run_setup("--arad-root", tmp_path / "raw", "--output-root", staged, "--patch-size", 64)
    facts = json.loads((staged / "index.json").read_text())["rgb"]
    assert facts == {"dtype": "uint8", "encoding": "srgb", "camera": "srgb"}
    for root in (staged, tmp_path / "raw"):
        settings = DataConfig(str(root), "lazy", 64, batch_size=2, rgb_norm="unit", augment=False)
        loader = train_loader(settings)
        rgb, cube = prepare_batch(loader.dataset.read(np.array([0, 1]), np.zeros(2, np.uint8)))
        want = torch.from_numpy(camera_response("srgb", WAVELENGTHS))
        seen = torch.einsum("bchw,ck->bkhw", cube, want).clamp(0, 1)
        inside = (seen > 0.05) & (seen < 0.9)
        assert ((rgb - seen)[inside].abs() / seen[inside]).median() < 0.08
        scene = next(iter(val_loader(settings)))
        assert scene.rgb.max() <= 1 and scene.rgb.dtype == torch.float32
    with pytest.raises(UserError, match="--rgb-encoding linear: scene .* camera srgb are srgb"):
        more = ("--render-rgb", "all", "--camera", "srgb", "--rgb-encoding", "linear")
        target = ("--output-root", tmp_path / "b", "--patch-size", 64, "--workers", 1)
        run_setup("--arad-root", tmp_path / "raw", *target, *more)
