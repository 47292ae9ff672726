"""Preparing data: synthetic scenes, staging, splits, verification, and bad input."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from conftest import folder_bytes, run_setup, write_raw_arad
from PIL import Image

import dataset_setup as ds
from common_utils_v32 import UserError, run_cli
from cube_files import read_cube, read_rgb
from optimized_dataloader import DataConfig, create_optimized_dataloaders, patch_grid
from scene_folders import find_scenes, rgb_facts

NEW_IN_VERSION_2 = ("rgb_dtype", "rendered")
SMALL = ("--patch-size", "32", "--workers", "1")


def stage(raw, staged, *more):
    run_setup("--arad-root", raw, "--output-root", staged, *SMALL, *more)
    return json.loads((Path(staged) / "index.json").read_text())


@pytest.fixture(autouse=True)
def no_contact_sheet(request, monkeypatch):
    """The picture takes most of a second, so only the test that looks at it has it drawn."""
    if "contact_sheet" not in request.node.name:
        monkeypatch.setattr(ds, "contact_sheet", lambda root, index: None)


@pytest.fixture
def raw(tmp_path):
    return write_raw_arad(tmp_path / "raw")


# --- staging


def test_a_staged_folder_holds_the_scenes_their_statistics_and_checksums(raw, tmp_path):
    (raw / "Test_RGB").mkdir()
    shutil.copy(raw / "Train_RGB" / "a.jpg", raw / "Test_RGB" / "t.jpg")
    index = stage(raw, tmp_path / "staged", "--stride", "4")
    assert (
        index["format"] == "hsi-staged"
        and index["bands"] == 31
        and index["wavelengths"][::30] == [400, 700]
    )
    names = {
        split: [entry["name"] for entry in entries] for split, entries in index["splits"].items()
    }
    assert names == {"train": ["a", "b", "c"], "val": ["v"], "test": ["t"]}
    cubes = {name: read_cube(raw / "Train_Spec" / f"{name}.mat") for name in "abcv"}
    for split in ("train", "val"):
        for entry in index["splits"][split]:
            stored, cube = np.load(tmp_path / "staged" / entry["cube"]), cubes[entry["name"]]
            assert stored.dtype == entry["dtype"] == ("float16" if split == "train" else "float32")
            assert stored.flags.c_contiguous and np.allclose(stored, cube, rtol=2**-10, atol=1e-6)
            assert entry["range"] == pytest.approx([cube.min(), cube.max()]) and entry["zeros"] == 0
            grid = [len(axis) for axis in patch_grid(96, 80, 32, 4)]
            assert entry["grid"] == grid and entry["patches"] == grid[0] * grid[1]
            rgb = np.load(tmp_path / "staged" / entry["rgb"])
            assert np.array_equal(rgb, read_rgb(raw / "Train_RGB" / f"{entry['name']}.jpg"))
            assert entry["rgb_range"] == [rgb.min(), rgb.max()]
            for kind in ("cube", "rgb"):
                content = (tmp_path / "staged" / entry[kind]).read_bytes()
                assert entry[f"{kind}_sha256"] == hashlib.sha256(content).hexdigest()
    train = np.concatenate([cubes[name].reshape(-1, 31) for name in "abc"])
    for name, value in (
        ("mean", train.mean(0)),
        ("std", train.std(0)),
        ("min", train.min(0)),
        ("max", train.max(0)),
    ):
        assert index["statistics"][name] == pytest.approx(value, rel=1e-4)
    assert len(index["statistics"]["rgb_mean"]) == 3
    assert "cube" not in index["splits"]["test"][0] and index["splits"]["test"][0]["shape"] == [
        96,
        80,
    ]


def test_the_contact_sheet_shows_the_rgb_beside_the_cube(raw, tmp_path):
    stage(raw, tmp_path / "staged")
    with Image.open(tmp_path / "staged" / "contact_sheet.png") as image:
        sheet = np.asarray(image.convert("RGB"))
    assert sheet.shape[1] > 600 and sheet.shape[0] > 400
    columns = np.ptp(
        sheet[:, : sheet.shape[1] // 6 * 6].reshape(sheet.shape[0], 6, -1), axis=(0, 2)
    )
    assert (columns > 100).all()  # six pictures a row, none of them blank


def test_the_loaders_read_what_was_staged(synthetic, tmp_path):
    stage(synthetic, tmp_path / "staged", "--patch-size", "64")
    config = DataConfig(
        data_root=str(tmp_path / "staged"),
        patch_size=64,
        batch_size=2,
        memory_mode="lazy",
        num_workers=0,
    )
    train, val = create_optimized_dataloaders(config)
    assert next(iter(train)).cube.shape == (2, 64, 64, 31)
    assert next(iter(val)).cube.shape == (1, 31, 96, 128)


def test_dtype_scale_and_patch_grid_change_what_they_name(raw, tmp_path):
    flags = ("--dtype", "float32", "--scale", "2", "--patch-grid", "cover", "--stride", "30")
    plain, other = stage(raw, tmp_path / "a"), stage(raw, tmp_path / "b", *flags)
    assert other["splits"]["train"][0]["dtype"] == "float32"
    assert other["statistics"]["mean"] == pytest.approx(
        np.array(plain["statistics"]["mean"]) / 2, rel=1e-4
    )
    assert other["splits"]["train"][0]["grid"] == [4, 3]  # rows 0 30 60 64, columns 0 30 48


def test_a_stopped_staging_carries_on_and_gives_the_same_folder(raw, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    stage(raw, whole)

    def stop(work, jobs, workers, what):
        for i, job in enumerate(jobs):
            if what == "staging" and i == 2:
                raise KeyboardInterrupt
            yield work(job)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ds, "run_jobs", stop)
        stage(raw, stopped)
    assert not (stopped / "index.json").exists()
    (stopped / "train" / "c.cube.npy").write_bytes(
        b"half"
    )  # a file without its record is written again
    kept = (stopped / "train" / "a.cube.npy").stat().st_mtime_ns
    stage(raw, stopped)
    assert (stopped / "train" / "a.cube.npy").stat().st_mtime_ns == kept
    assert folder_bytes(stopped) == folder_bytes(whole)


def test_a_changed_raw_file_is_staged_again(raw, tmp_path):
    before = stage(raw, tmp_path / "staged")
    with h5py.File(raw / "Train_Spec" / "b.mat", "r+") as file:
        file["cube"][...] *= 0.5
    after = stage(raw, tmp_path / "staged")
    sums = [
        [entry["cube_sha256"] for entry in index["splits"]["train"]] for index in (before, after)
    ]
    assert [x == y for x, y in zip(*sums, strict=True)] == [True, False, True]


def test_a_stopped_staging_of_changed_files_leaves_no_index_of_the_old_ones(raw, tmp_path):
    stage(raw, tmp_path / "staged")
    with h5py.File(raw / "Train_Spec" / "b.mat", "r+") as file:
        file["cube"][...] = np.nan
    with pytest.raises(UserError, match="b.mat"):
        stage(raw, tmp_path / "staged")
    assert not (tmp_path / "staged" / "index.json").exists()


def test_scenes_of_other_wavelengths_are_refused(raw, tmp_path):
    with h5py.File(raw / "Train_Spec" / "b.mat", "r+") as file:
        file["bands"][...] += 20
    with pytest.raises(UserError, match="b.mat: 420..720 nm, not 400..700"):
        stage(raw, tmp_path / "staged")
    with pytest.raises(UserError, match="b.mat.*420..720 nm.*400..700"):
        create_optimized_dataloaders(DataConfig(data_root=str(raw), patch_size=32))


def test_a_damaged_staged_file_is_staged_again(raw, tmp_path):
    before = stage(raw, tmp_path / "staged") and folder_bytes(tmp_path / "staged")
    with (tmp_path / "staged" / "train" / "b.rgb.npy").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    assert folder_bytes(tmp_path / "staged") != before
    stage(raw, tmp_path / "staged")
    assert folder_bytes(tmp_path / "staged") == before


@pytest.mark.parametrize(
    "flag", [("--stride", "4"), ("--patch-size", "48"), ("--dtype", "float32"), ("--scale", "2")]
)
def test_a_folder_staged_with_other_settings_is_refused_and_left_as_it_is(raw, tmp_path, flag):
    stage(raw, tmp_path / "staged")
    before = folder_bytes(tmp_path / "staged")
    with pytest.raises(UserError, match=f"{flag[0][2:].replace('-', '_')} .*, not .*--output-root"):
        stage(raw, tmp_path / "staged", *flag)
    assert folder_bytes(tmp_path / "staged") == before


def test_a_full_disk_is_refused_before_anything_is_written(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="GB.*--output-root"):
        stage(raw, tmp_path / "staged")
    assert not (tmp_path / "staged").exists() and "GB to write" in capsys.readouterr().out


def test_what_staging_says_it_will_write_is_what_it_writes(raw, tmp_path):
    settings = {"bands": 31, "dtype": "float16", "patch_size": 32, "stride": 8, "render_rgb": None}
    settings["patch_grid"] = "floor"
    jobs = []
    for split, scenes in find_scenes(raw).items():
        jobs += [(split, scene) for scene in scenes]
    said = sum(ds._bytes_needed(job, settings) for job in jobs)
    stage(raw, tmp_path / "staged")
    assert sum(p.stat().st_size for p in (tmp_path / "staged").rglob("*.npy")) == pytest.approx(
        said, rel=0.01
    )


# --- bad input


def break_nothing_there(raw):
    shutil.rmtree(raw / "Train_Spec")
    (raw / "Train_Spec").mkdir()
    shutil.rmtree(raw / "split_txt")
    return "no scenes"


def break_jpeg(raw):
    (raw / "Train_RGB" / "b.jpg").unlink()
    return "b has no RGB image.*--render-rgb"


def break_listed_cube(raw):
    (raw / "Train_Spec" / "c.mat").unlink()
    return "c.mat: no such file"


def break_size(raw):
    Image.new("RGB", (40, 96)).save(raw / "Train_RGB" / "c.jpg")
    return "c.mat.*96.*40"


def break_mat(raw):
    content = (raw / "Train_Spec" / "a.mat").read_bytes()
    (raw / "Train_Spec" / "a.mat").write_bytes(content[: len(content) // 2])
    return "a.mat"


def break_values(raw):
    with h5py.File(raw / "Train_Spec" / "c.mat", "r+") as file:
        file["cube"][3, 4, 5] = np.nan
    return "c.mat.*NaN"


def break_range(raw):
    with h5py.File(raw / "Train_Spec" / "a.mat", "r+") as file:
        file["cube"][...] *= 4095
    return "a.mat.*--scale"


def break_all_values(raw):
    with h5py.File(raw / "Train_Spec" / "c.mat", "r+") as file:
        file["cube"][...] = np.nan
    return "c.mat.*NaN"


DEFECTS = [
    break_nothing_there,
    break_jpeg,
    break_listed_cube,
    break_size,
    break_mat,
    break_values,
    break_all_values,
    break_range,
]


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_one_line_that_names_the_file_and_leaves_no_half_scene(raw, tmp_path, defect):
    message = defect(raw)
    with pytest.raises(UserError, match=message) as error:
        stage(raw, tmp_path / "staged")
    assert "\n" not in str(error.value)
    staged = folder_bytes(tmp_path / "staged") if (tmp_path / "staged").exists() else {}
    assert not [name for name in staged if "index" in name or "/." in name]
    complete = {name[:-5] for name in staged if name.endswith(".json") and "/" in name}
    assert complete <= {f"train/{n}" for n in "abc"} | {"val/v"}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("defect", DEFECTS[1:])
def test_verify_only_prints_the_problem_in_a_table_writes_nothing_and_returns_1(
    raw, defect, capsys
):
    message = defect(raw)
    before = folder_bytes(raw)
    assert run_setup("--arad-root", raw, "--verify-only", "--workers", 1) == 1
    out = capsys.readouterr().out
    assert (
        "PROBLEM" in out and "4 scenes, 1 with problems" in out and out.count("96 x 80 x 31") >= 3
    )
    assert message.split(".*")[-1] in out and folder_bytes(raw) == before


def test_verify_only_returns_0_when_all_is_well(raw, capsys):
    assert run_setup("--arad-root", raw, "--verify-only", "--workers", 2) == 0
    assert "4 scenes, 0 with problems" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--patch-size", "0"), "--patch-size"),
        (("--workers", "0"), "--workers"),
        (("--scale", "-1"), "--scale"),
        (("--exposure", "bright"), "--exposure"),
        (("--size", "12y"), "--size"),
        (("--dtype", "int8"), "--dtype"),
        (("--val-fraction", "1.5"), "--val-fraction"),
        (("--exposure", "2", "--camera", "srgb"), "--exposure 2.0"),
        (("--nonsense",), "nonsense"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(raw, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: stage(raw, tmp_path / "staged", *flags))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "staged").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--patch-size", "97"), "97"),
        (("--val-fraction", "0.5"), "--val-fraction.*split_txt"),
        (("--render-rgb", "--camera", "x"), "camera x"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused_before_anything_is_written(
    raw, tmp_path, flags, message
):
    with pytest.raises(UserError, match=message):
        stage(raw, tmp_path / "staged", *flags)
    assert not (tmp_path / "staged").exists()


# --- other sources, splits, rendering


@pytest.fixture
def cubes(tmp_path):
    """Ten cubes of 28 bands without images or lists."""
    folder = tmp_path / "cubes"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        cube, other = rng.uniform(0, 200, (64, 80, 28)), np.zeros((2, 2, 2))
        np.savez(folder / f"c{i}.npz", hsi=cube, wavelengths=np.linspace(450, 650, 28), other=other)
    return folder


def stage_cubes(cubes, staged, *more):
    run_setup(
        "--cubes", cubes, "--output-root", staged, *SMALL, "--scale", 200, "--render-rgb", *more
    )
    return json.loads((staged / "index.json").read_text())


def test_cubes_of_other_bands_are_scaled_rendered_and_split_by_seed(cubes, tmp_path):
    index = stage_cubes(cubes, tmp_path / "a", "--val-fraction", "0.3")
    assert index["bands"] == 28 and index["wavelengths"][0] == 450
    assert [len(index["splits"][s]) for s in ("train", "val", "test")] == [7, 3, 0]
    assert 0.99 < max(index["statistics"]["max"]) <= 1
    mean = np.mean(index["statistics"]["rgb_mean"])
    assert mean == pytest.approx(0.18 * 255, rel=0.1)  # automatic exposure

    def drawn(folder, seed):
        flags = ("--val-fraction", "0.3", "--split-seed", seed)
        staged = stage_cubes(cubes, tmp_path / folder, *flags)
        return {entry["name"] for entry in staged["splits"]["val"]}

    first = {entry["name"] for entry in index["splits"]["val"]}
    assert drawn("b", 0) == first != drawn("c", 1)
    assert len(stage_cubes(cubes, tmp_path / "d")["splits"]["val"]) == 1


def test_camera_exposure_and_seed_change_the_rendered_images(cubes, tmp_path):
    variants = {
        "a": (),
        "b": ("--camera", "analytic2"),
        "c": ("--exposure", "0.9"),
        "d": ("--seed", "1"),
        "e": (),
    }
    sums = {
        n: stage_cubes(cubes, tmp_path / n, *more)["splits"]["train"][0]["rgb_sha256"]
        for n, more in variants.items()
    }
    assert sums["a"] == sums["e"] and len(set(sums.values())) == 4


def test_render_rgb_all_replaces_the_images_and_missing_only_adds(raw, tmp_path):
    (raw / "Train_RGB" / "b.jpg").unlink()
    missing, everything = (
        stage(raw, tmp_path / how, "--render-rgb", how) for how in ("missing", "all")
    )
    given = [
        read_rgb(raw / "Train_RGB" / "a.jpg"),
        np.load(tmp_path / "missing" / "train" / "a.rgb.npy"),
    ]
    assert np.array_equal(*given)
    sums = [[e["rgb_sha256"] for e in index["splits"]["train"]] for index in (missing, everything)]
    assert [x == y for x, y in zip(*sums, strict=True)] == [False, True, False]


def test_test_photos_cannot_be_rendered_and_are_left_out(synthetic, tmp_path, capsys):
    """They keep the camera that they have, which is not that of the others."""
    assert len(stage(synthetic, tmp_path / "a")["splits"]["test"]) == 2
    capsys.readouterr()
    index = stage(synthetic, tmp_path / "b", "--render-rgb", "all", "--camera", "srgb")
    assert index["splits"]["test"] == [] and "test photos have no cube" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [("--val-fraction", "0.5"), ("--clip",), ("--bands", "1-9")])
def test_flags_of_staging_are_refused_where_scenes_are_made(tmp_path, flag):
    with pytest.raises(UserError, match=f"^{flag[0]}: is for staging"):
        run_setup("--synthetic", 2, "--output-root", tmp_path / "raw", *flag)
    assert not (tmp_path / "raw").exists()


def test_key_and_axes_are_used_and_wavelengths_asked_for(tmp_path):
    folder, cube = tmp_path / "cubes", np.random.default_rng(0).random((40, 48, 12))
    folder.mkdir()
    for i in range(2):
        np.savez(folder / f"c{i}.npz", first=cube.transpose(2, 0, 1) / 2, second=cube)
    flags = ("--render-rgb", "--cube-key", "first", "--axes", "chw")
    with pytest.raises(UserError, match="--wavelengths"):
        run_setup("--cubes", folder, "--output-root", tmp_path / "s", *SMALL, *flags)
    run_setup(
        "--cubes",
        folder,
        "--output-root",
        tmp_path / "s",
        *SMALL,
        *flags,
        "--wavelengths",
        420,
        680,
    )
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    assert index["wavelengths"][0] == 420 and index["wavelengths"][-1] == 680
    assert np.load(tmp_path / "s" / index["splits"]["val"][0]["cube"]) == pytest.approx(
        cube / 2, rel=1e-6
    )


def test_two_files_of_one_scene_are_an_error_not_a_choice(tmp_path):
    for name in ("a.npy", "a.npz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="a.np. and .*a.np. are both scene a"):
        ds.main(["--cubes", str(tmp_path), "--output-root", str(tmp_path / "staged")])


def test_a_cave_folder_is_staged_with_its_picture(tmp_path):
    rng = np.random.default_rng(0)
    planes = {}
    for scene in ("beads_ms", "cloth_ms"):
        inner = tmp_path / "cave" / scene / scene
        inner.mkdir(parents=True)
        planes[scene] = rng.integers(0, 60000, (31, 40, 48)).astype(np.uint16)
        for i, plane in enumerate(planes[scene]):
            Image.fromarray(plane).save(inner / f"{scene}_{i + 1:02d}.png")
        Image.fromarray(rng.integers(0, 255, (40, 48, 3)).astype(np.uint8)).save(
            inner / f"{scene.removesuffix('_ms')}_RGB.bmp"
        )
    run_setup(
        "--cave-root",
        tmp_path / "cave",
        "--output-root",
        tmp_path / "staged",
        *SMALL,
        "--dtype",
        "float32",
    )
    index = json.loads((tmp_path / "staged" / "index.json").read_text())
    entry = index["splits"]["train"][0]
    assert {e["name"] for s in ("train", "val") for e in index["splits"][s]} == {"beads", "cloth"}
    expected = planes[f"{entry['name']}_ms"].transpose(1, 2, 0) / 65535
    assert np.load(tmp_path / "staged" / entry["cube"]) == pytest.approx(expected, abs=1e-6)
    assert entry["rgb_range"][1] > 240 and index["wavelengths"][0] == 400


# --- how photos are stored and encoded


def test_the_index_says_how_photos_are_stored_encoded_and_by_whom(raw, tmp_path):
    index = stage(raw, tmp_path / "a")
    assert index["version"] == 2
    assert index["rgb"] == {"dtype": "uint8", "encoding": "linear", "camera": None}
    index = stage(raw, tmp_path / "b", "--rgb-encoding", "srgb")
    assert index["rgb"]["encoding"] == "srgb"
    index = stage(raw, tmp_path / "c", "--render-rgb", "all", "--camera", "nikon5100")
    assert index["rgb"] == {"dtype": "uint8", "encoding": "linear", "camera": "nikon5100"}


def test_photos_of_which_some_were_rendered_have_no_one_camera(raw, tmp_path):
    next((raw / "Train_RGB").iterdir()).unlink()
    assert stage(raw, tmp_path / "a", "--render-rgb")["rgb"]["camera"] is None


def test_the_camera_of_synthetic_scenes_is_known(synthetic, tmp_path):
    assert stage(synthetic, tmp_path / "staged")["rgb"]["camera"] == "analytic"


def test_rendered_photos_cannot_be_called_srgb(raw, tmp_path):
    with pytest.raises(UserError, match="--rgb-encoding srgb: scene .* is rendered"):
        stage(raw, tmp_path / "a", "--render-rgb", "all", "--rgb-encoding", "srgb")


def test_photos_stored_in_two_ways_are_refused_by_name():
    entries = [{"rgb": "train/a.rgb.npy"}, {"rgb": "train/b.rgb.npy", "rgb_dtype": "uint16"}]
    with pytest.raises(UserError, match="uint8 .train/a.rgb.npy., uint16 .train/b.rgb.npy."):
        rgb_facts(entries, {"rgb_encoding": "linear", "camera": "analytic"}, None)


def test_a_folder_of_version_1_is_carried_on_and_becomes_version_2(raw, tmp_path, capsys):
    staged = tmp_path / "staged"
    stage(raw, staged)
    before = folder_bytes(staged / "train")
    settings = json.loads((staged / "settings.json").read_text())
    del settings["rgb_encoding"]
    (staged / "settings.json").write_text(json.dumps(settings))
    for path in staged.glob("*/*.json"):
        entry = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in entry.items() if k not in NEW_IN_VERSION_2}))
    assert stage(raw, staged)["rgb"] == {"dtype": "uint8", "encoding": "linear", "camera": None}
    assert "(0 were there)" not in capsys.readouterr().out.splitlines()[-1]
    arrays = {name for name in before if name.endswith(".npy")}
    assert all(folder_bytes(staged / "train")[name] == before[name] for name in arrays)


def test_a_camera_file_that_has_changed_is_noticed(raw, tmp_path):
    table = tmp_path / "camera.csv"
    flags = ("--render-rgb", "all", "--camera", table)
    found = []
    for row in ("{nm},1,{x},9", "{nm},{x},9,1"):
        rows = [row.format(nm=nm, x=nm - 379) for nm in range(380, 740, 10)]
        table.write_text("\n".join(["nm,r,g,b", *rows]))
        index = stage(raw, tmp_path / "a", *flags)
        found.append(index["splits"]["train"][0]["rgb_sha256"])
    assert found[0] != found[1]


def test_photos_that_are_there_keep_their_encoding(raw, tmp_path):
    """--render-rgb is for those that are missing."""
    flags = ("--render-rgb", "--camera", "srgb")
    assert stage(raw, tmp_path / "a", *flags)["rgb"]["encoding"] == "linear"
    assert stage(raw, tmp_path / "b", *flags, "--rgb-encoding", "srgb")["rgb"]["encoding"] == "srgb"
    photo = next(iter((raw / "Train_RGB").glob("*")))
    photo.unlink()
    with pytest.raises(UserError, match="is rendered, .* are srgb; give --rgb-encoding srgb if"):
        stage(raw, tmp_path / "c", *flags)


def test_counts_are_made_reflectance_once(raw, tmp_path):
    np.save(tmp_path / "white.npy", np.ones((1, 31), np.float32))
    with pytest.raises(UserError, match="--scale 4095: --white makes counts reflectance"):
        stage(raw, tmp_path / "a", "--white", tmp_path / "white.npy", "--scale", 4095)
