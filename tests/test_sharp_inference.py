"""Images to cubes: files that others open, the training normalisation, any size and mode, one line
for bad input."""

import dataclasses
import importlib
import json
import os
import pickle
import re
import shutil

import h5py
import numpy as np
import pytest
import standin_model
import torch
from conftest import ROOT
from PIL import Image

import common_utils_v32 as common
import cube_files
import model_export
import sharp_inference as inference
from camera_colour import cube_to_srgb, linear_light
from cube_files import read_cube
from frame_prediction import FACTORIES, forward, load_model, plan_tile, predict, tile_offsets
from hsifusion_v252_complete import create_hsifusion_lightning_pro
from photo_files import read_photo
from sharp_v322_hardened import create_sharp_v32


@pytest.fixture(autouse=True)
def standin(monkeypatch):
    monkeypatch.setitem(FACTORIES, "hsifusion", ("standin_model", "create"))


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "run" / "best.ckpt")


def write_checkpoint(path, rgb_norm="per_image", ema_shift=0.0, **overrides):
    model = standin_model.create("tiny", **overrides)
    state = {
        "model": "hsifusion",
        "model_config": dataclasses.asdict(model.config),
        "state_dict": model.state_dict(),
        "ema": {k: v + ema_shift for k, v in model.state_dict().items()},
        "data": {
            "rgb_norm": rgb_norm,
            "wavelengths": [405.0 + 10 * i for i in range(model.config.out_channels)],
        },
    }
    common.save_checkpoint(path, state)
    return path


def photo(path, size=(72, 90), seed=0):
    pixels = np.random.default_rng(seed).integers(20, 201, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def run(*argv):
    return inference.main([str(arg) for arg in argv])


def write_cube_of(checkpoint, source, target, *more):
    run("--checkpoint", checkpoint, "--input", source, "--output", target, *more)


def expected(pixels, rgb_norm="per_image"):
    x = pixels.astype(np.float32)
    x = (x - x.min()) / (x.max() - x.min()) if rgb_norm == "per_image" else x / 255
    with torch.no_grad():
        return standin_model.create("tiny")(torch.from_numpy(x).permute(2, 0, 1)[None])[0].numpy()


@pytest.mark.parametrize("rgb_norm", ["per_image", "unit"])
@pytest.mark.parametrize("tiles", [[], ["--patch-size", 64, "--overlap", 16, "--batch_size", 2]])
def test_cube_is_the_models_output_for_the_normalised_whole_image(
    tmp_path, rgb_norm, tiles, capsys
):
    checkpoint = write_checkpoint(tmp_path / "m.ckpt", rgb_norm)
    pixels = photo(tmp_path / "a.png")
    write_cube_of(checkpoint, tmp_path / "a.png", tmp_path / "a.npy", *tiles)
    cube = np.load(tmp_path / "a.npy")
    assert cube.dtype == np.float32 and cube.flags.c_contiguous
    np.testing.assert_allclose(cube, expected(pixels, rgb_norm), atol=1e-5)
    said = capsys.readouterr().out
    assert rgb_norm in said and ("20..200" in said) == (rgb_norm == "per_image")


def test_all_formats_hold_the_same_cube_with_wavelengths_and_the_right_axes(tmp_path, checkpoint):
    envi = pytest.importorskip("spectral.io.envi")
    pixels = photo(tmp_path / "a.png")
    for name in ("a.npy", "a.mat", "a.hdr", "a.npz"):
        write_cube_of(checkpoint, tmp_path / "a.png", tmp_path / "out" / name)
    cube, wavelengths = expected(pixels), [405.0 + 10 * i for i in range(31)]
    np.testing.assert_allclose(np.load(tmp_path / "out/a.npy"), cube, atol=1e-6)
    with np.load(tmp_path / "out/a.npz") as file:
        np.testing.assert_allclose(file["cube"], cube, atol=1e-6)
        assert file["wavelengths"].tolist() == wavelengths
    with h5py.File(tmp_path / "out/a.mat") as file:
        assert (
            file["cube"].shape == (31, 90, 72) and file["cube"].attrs["MATLAB_class"] == b"single"
        )
        np.testing.assert_allclose(np.transpose(file["cube"], (0, 2, 1)), cube, atol=1e-6)
        assert file["bands"][:, 0].tolist() == wavelengths
    header = (tmp_path / "out/a.mat").read_bytes()[:128]
    assert header.startswith(b"MATLAB 7.3 MAT-file") and header[124:] == b"\x00\x02IM"
    image = envi.open(str(tmp_path / "out/a.hdr"))
    np.testing.assert_allclose(np.asarray(image.load()).transpose(2, 0, 1), cube, atol=1e-6)
    assert image.bands.centers == wavelengths and image.bands.band_unit == "Nanometers"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "a.hdr",
        "a.img",
        "a.mat",
        "a.npy",
        "a.npz",
    ]


def test_mat_reads_back_through_the_projects_reader_and_scipy_knows_the_version(
    tmp_path, checkpoint
):

    pixels = photo(tmp_path / "a.png")
    run("--checkpoint", checkpoint, "--input", tmp_path / "a.png", "--output", tmp_path / "a.mat")
    cube = read_cube(tmp_path / "a.mat")
    np.testing.assert_allclose(np.asarray(cube).transpose(2, 0, 1), expected(pixels), atol=1e-6)
    scipy_io = pytest.importorskip("scipy.io.matlab")
    with open(tmp_path / "a.mat", "rb") as file:
        assert scipy_io.matfile_version(file)[0] == 2  # 7.3


def test_ensemble_is_the_mean_of_the_eight_views(checkpoint):
    model = standin_model.loaded()
    args = inference.Settings(checkpoint=["x"], input=["x"], output="x", ensemble=True)
    x = torch.rand(1, 3, 70, 90)
    views = []
    for turns in range(4):
        for flip in (False, True):
            view = torch.rot90(x.flip(3) if flip else x, turns, (2, 3))
            with torch.no_grad():
                back = torch.rot90(model.module(view.contiguous()), -turns, (2, 3))
            views.append(back.flip(3) if flip else back)
    assert len({tuple(v.flatten()[:9].tolist()) for v in views}) == 8
    torch.testing.assert_close(
        forward(model, x, args), torch.stack(views).mean(0), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("size", [(20, 100), (1, 1), (63, 64), (300, 5)])
def test_images_smaller_than_the_models_least_input_are_padded_and_cut_back(
    tmp_path, checkpoint, size
):
    photo(tmp_path / "a.png", size)
    run("--checkpoint", checkpoint, "--input", tmp_path / "a.png", "--output", tmp_path / "a.npy")
    cube = np.load(tmp_path / "a.npy")
    assert cube.shape == (31, *size) and np.isfinite(cube).all()


@pytest.mark.parametrize(
    "mode, remark",
    [("L", "grey"), ("RGBA", "alpha"), ("I;16", "grey"), ("P", "RGB"), ("CMYK", "RGB")],
)
def test_other_image_modes_are_handled_and_said(tmp_path, checkpoint, capsys, mode, remark):
    pixels = photo(tmp_path / "rgb.png")
    if mode == "I;16":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "a.tif")
    else:
        Image.fromarray(pixels).convert(mode).save(tmp_path / "a.tif")
    rgb, _, _ = read_photo(tmp_path / "a.tif", tmp_path)
    if mode in ("L", "I;16"):
        assert (rgb == rgb[..., :1]).all()
    if mode == "RGBA":
        assert (rgb[..., 0] == pixels[..., 0]).all()
    run("--checkpoint", checkpoint, "--input", tmp_path / "a.tif", "--output", tmp_path / "a.npy")
    assert remark in capsys.readouterr().out


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 70)).save(tmp_path / "a.jpg", exif=exif)
    rgb, remarks, _ = read_photo(tmp_path / "a.jpg", tmp_path)
    assert rgb.shape == (90, 70, 3) and any("EXIF" in remark for remark in remarks)


def test_batch_goes_on_after_bad_inputs_and_lists_them(tmp_path, checkpoint, capsys):
    (tmp_path / "in").mkdir()
    photo(tmp_path / "in/a.png")
    photo(tmp_path / "in/c.png")
    (tmp_path / "in/b.png").write_bytes(b"not an image")
    whole = (tmp_path / "in/a.png").read_bytes()
    (tmp_path / "in/d.png").write_bytes(whole[: len(whole) // 2])
    np.save(tmp_path / "in/e.rgb.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(common.UserError) as error:
        run("--checkpoint", checkpoint, "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert all(name in str(error.value) for name in ("3 of 5", "b.png", "d.png", "e.rgb.npy"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.npy", "c.npy"]


def test_an_input_that_is_not_there_does_not_stop_the_others(tmp_path, checkpoint):
    photo(tmp_path / "a.png")
    with pytest.raises(common.UserError, match="1 of 2 inputs failed: .*gone.png: no such image"):
        run(
            "--checkpoint",
            checkpoint,
            "--input",
            tmp_path / "gone.png",
            tmp_path / "a.png",
            "--output",
            tmp_path / "out",
        )
    assert (tmp_path / "out" / "a.npy").exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"state_dict": [1]},
        {"model_config": [1]},
        {"data": "x"},
        {"model_config": {"in_channels": 4}},
    ],
)
def test_a_checkpoint_of_the_wrong_kind_is_one_line(tmp_path, checkpoint, damage):
    state = common.read_checkpoint(checkpoint)
    if "in_channels" in damage.get("model_config", ()):
        damage = {"model_config": state["model_config"] | damage["model_config"]}
    common.save_checkpoint(tmp_path / "bad.ckpt", state | damage)
    photo(tmp_path / "a.png")
    with pytest.raises(common.UserError, match="bad.ckpt"):
        write_cube_of(tmp_path / "bad.ckpt", tmp_path / "a.png", tmp_path / "a.npy")


def test_safetensors_say_whether_their_weights_are_averaged(tmp_path, checkpoint):
    state = common.read_checkpoint(checkpoint)
    for averaged in (True, False):
        path = tmp_path / f"{averaged}.safetensors"
        common.save_weights(
            path, state["state_dict"], "hsifusion", state["model_config"], state["data"], averaged
        )
        args = inference.Settings(checkpoint=[str(path)], input=["x"], output="y")
        assert load_model(str(path), torch.device("cpu"), args).weights == (
            "ema" if averaged else "raw"
        )


def test_bands_that_the_eye_cannot_see_have_a_preview_too(tmp_path):
    model = standin_model.create("tiny")
    state = {
        "model": "hsifusion",
        "model_config": dataclasses.asdict(model.config),
        "state_dict": model.state_dict(),
        "data": {"rgb_norm": "unit", "wavelengths": [800.0 + 10 * i for i in range(31)]},
    }
    common.save_checkpoint(tmp_path / "ir.ckpt", state)
    photo(tmp_path / "a.png")
    write_cube_of(
        tmp_path / "ir.ckpt", tmp_path / "a.png", tmp_path / "a.npy", "--preview", "--points", "3,4"
    )
    assert Image.open(tmp_path / "a_preview.png").size == (90, 72)


def test_existing_cube_is_kept_unless_overwrite(tmp_path, checkpoint):
    photo(tmp_path / "a.png")
    (tmp_path / "a.npy").write_bytes(b"mine")
    with pytest.raises(common.UserError, match="--overwrite"):
        write_cube_of(checkpoint, tmp_path / "a.png", tmp_path / "a.npy")
    assert (tmp_path / "a.npy").read_bytes() == b"mine"
    write_cube_of(checkpoint, tmp_path / "a.png", tmp_path / "a.npy", "--overwrite")
    assert np.load(tmp_path / "a.npy").shape == (31, 72, 90)


@pytest.mark.parametrize("name", ["cube.png", "cube.txt"])
def test_a_picture_or_text_as_output_is_refused_and_no_folder_of_that_name_made(tmp_path, name):
    with pytest.raises(common.UserError, match=r"give a folder, or a file \.npy"):
        inference.output_paths([tmp_path / "a.jpg"], tmp_path / name, None)
    (tmp_path / name).mkdir()  # who has such a folder means it
    targets, kind = inference.output_paths([tmp_path / "a.jpg"], tmp_path / name, None)
    assert targets == [tmp_path / name / "a.npy"] and kind == "npy"


def test_two_images_for_one_output_are_an_error_not_a_loss(tmp_path, checkpoint):
    photo(tmp_path / "a.png")
    photo(tmp_path / "a.bmp", (80, 80))
    with pytest.raises(common.UserError, match="already"):
        run("--checkpoint", checkpoint, "--input", tmp_path / "a.*", "--output", tmp_path / "out")
    assert np.load(tmp_path / "out/a.npy").shape == (31, 80, 80)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/inference-was-here",)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"--checkpoint": "none.ckpt"}, "none.ckpt"),
        ({"--checkpoint": "evil.pth"}, "refused"),
        ({"--checkpoint": "cut.ckpt"}, "cut.ckpt"),
        ({"--checkpoint": "other.ckpt"}, "fit"),
        ({"--checkpoint": "bare.pth"}, "--model"),
        ({"--input": "none*.png"}, "none"),
        ({"--output": "file/x"}, "file"),
        ({"--patch-size": "8"}, "--patch_size"),
        ({"--overlap": "2000"}, "--overlap"),
        ({"--device": "tpu"}, "--device"),
        ({"--format": "mat"}, "--format|folder"),
        ({"--points": "3;4"}, "--points"),
        ({"--points": "3,4"}, "--points needs --preview"),
        ({"--metric_floor": "nan"}, "--metric_floor"),
    ],
)
def test_bad_input_is_one_line(tmp_path, checkpoint, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    photo("a.png")
    (tmp_path / "file").write_text("")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Evil()}))
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:2000])
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state["state_dict"], "bare.pth")
    torch.save(state | {"model_config": state["model_config"] | {"width": 9}}, "other.ckpt")
    flags = {"--checkpoint": str(checkpoint), "--input": "a.png", "--output": "out.npy"} | change
    with pytest.raises((common.UserError, OSError, SystemExit)) as error:
        run(*(part for flag in flags.items() for part in flag))
    if error.type is not SystemExit:
        assert any(word in str(error.value) for word in words.split("|")) and "\n" not in str(
            error.value
        )
    assert not os.path.exists("/tmp/inference-was-here")
    assert not (tmp_path / "out.npy").exists()


def test_bare_state_dict_works_with_the_model_named(tmp_path, checkpoint):
    pixels = photo(tmp_path / "a.png")
    torch.save(
        {f"module.{k}": v for k, v in standin_model.create(width=5).state_dict().items()},
        tmp_path / "bare.pth",
    )
    run(
        "--checkpoint",
        tmp_path / "bare.pth",
        "--model",
        "hsifusion",
        "--model_size",
        "tiny",
        "--model-options",
        json.dumps({"width": 5}),
        "--input",
        tmp_path / "a.png",
        "--output",
        tmp_path / "a.npy",
        "--rgb_norm",
        "unit",
    )
    assert np.load(tmp_path / "a.npy").shape == (31, *pixels.shape[:2])


def test_the_normalisation_of_training_is_asked_for_and_not_contradicted(tmp_path, checkpoint):
    photo(tmp_path / "a.png")
    torch.save(standin_model.create().state_dict(), tmp_path / "bare.pth")
    rest = ("--input", tmp_path / "a.png", "--output", tmp_path / "a.npy")
    with pytest.raises(common.UserError, match="give --rgb_norm"):
        run("--checkpoint", tmp_path / "bare.pth", "--model", "hsifusion", *rest)
    with pytest.raises(common.UserError, match="was trained with --rgb_norm per_image"):
        run("--checkpoint", checkpoint, "--rgb_norm", "unit", *rest)


@pytest.mark.parametrize("kind", ["hsifusion", "sharp"])
def test_a_checkpoint_of_either_model_gives_what_the_model_gives(tmp_path, monkeypatch, kind):
    monkeypatch.undo()  # no stand-in
    module, factory = FACTORIES[kind]
    torch.manual_seed(0)
    model = getattr(importlib.import_module(module), factory)("tiny").eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02) if name.startswith(
            ("head.coefficients", "head.direct")
        ) else None
    common.save_checkpoint(
        tmp_path / "m.ckpt",
        {
            "model": kind,
            "model_config": dataclasses.asdict(model.config),
            "state_dict": model.state_dict(),
            "ema": None,
            "data": {"rgb_norm": "unit", "wavelengths": list(range(400, 701, 10))},
        },
    )
    pixels = photo(tmp_path / "a.png")
    write_cube_of(tmp_path / "m.ckpt", tmp_path / "a.png", tmp_path / "a.npy")
    with torch.no_grad():
        want = model(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)[0]
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), want, atol=1e-5)


def test_averaged_weights_are_used_unless_declined(tmp_path):
    path = write_checkpoint(tmp_path / "m.ckpt", ema_shift=0.5)
    args = inference.Settings(checkpoint=["x"], export="x")
    loads = [
        load_model(str(path), torch.device("cpu"), dataclasses.replace(args, ema=ema))
        for ema in (True, False)
    ]
    first, second = (model.module.first.weight for model in loads)
    torch.testing.assert_close(first, second + 0.5)
    assert [model.weights for model in loads] == ["ema", "raw"] and loads[0].name == "m"


def test_out_of_memory_halves_the_tile_and_goes_on(capsys):
    model = standin_model.loaded()
    args = inference.Settings(checkpoint=["x"], input=["x"], output="x")
    image = torch.rand(3, 200, 260)

    def source(y0, y1, x0, x1):
        return image[:, y0:y1, x0:x1]

    def allocate(channels):
        return np.empty((channels, 200, 260), np.float32)

    full, patch = predict(model, source, (200, 260), args, allocate)
    assert patch == 260
    model.module.largest = 70 * 70
    tiles, patch = predict(model, source, (200, 260), args, allocate)
    assert patch == 64 and "260 px: going on with 128 px" in capsys.readouterr().out
    np.testing.assert_allclose(tiles, full, atol=1e-5)
    model.module.largest = 10
    with pytest.raises(common.UserError, match="out of memory"):
        predict(model, source, (200, 260), args, allocate)


def test_memory_budget_decides_between_whole_frame_and_tiles():
    model = standin_model.loaded()
    args = inference.Settings(checkpoint=["x"], input=["x"], output="x", memory_gb=1.0)
    assert plan_tile(model, (400, 500), args) == 500
    small = dataclasses.replace(args, memory_gb=0.1)
    tile = plan_tile(model, (4000, 5000), small)
    assert 64 <= tile < 500 and tile**2 * (1.3 * model.pixel_bytes + 8 * 31) <= 0.1 * 2**30
    assert (
        plan_tile(model, (4000, 5000), dataclasses.replace(small, batch_size=4)) <= tile // 2 + 16
    )
    wide = plan_tile(model, (2000, 4000), args)  # 15 of the largest tiles would predict twice that
    tiles = [len(tile_offsets(side, wide, wide // 8)) for side in (2000, 4000)]
    assert tiles[0] * tiles[1] * wide**2 < 1.4 * 2000 * 4000


def test_preview_writes_pictures_of_the_image_size(tmp_path, checkpoint, capsys):
    photo(tmp_path / "a.png")
    points = ("--preview", "--points", "3,4", "900,4")
    write_cube_of(checkpoint, tmp_path / "a.png", tmp_path / "out", *points)
    assert "pixels, without --points [(900, 4)]" in capsys.readouterr().out
    assert Image.open(tmp_path / "out/a_preview.png").size == (90, 72)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "a.npy",
        "a_preview.png",
        "a_bands.png",
        "a_spectra.png",
        "a_preview.html",
    }


def refuse_export(*args, **kwargs):
    raise torch.onnx.OnnxExporterError("refused")


def test_export_writes_files_that_give_the_same_cube(tmp_path, checkpoint, capfd, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run("--checkpoint", checkpoint, "--export", tmp_path / "art", "--patch_size", 64)
    assert capfd.readouterr().err == ""
    pixels = photo(tmp_path / "a.png", (64, 64))
    write_cube_of(tmp_path / "art/model.safetensors", tmp_path / "a.png", tmp_path / "a.npy")
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), expected(pixels), atol=1e-5)
    x = ((pixels - np.float32(pixels.min())) / (int(pixels.max()) - int(pixels.min()))).transpose(
        2, 0, 1
    )[None]
    session = onnxruntime.InferenceSession(
        tmp_path / "art/model.onnx", providers=["CPUExecutionProvider"]
    )
    np.testing.assert_allclose(
        session.run(None, {"rgb": x.astype(np.float32)})[0][0], expected(pixels), atol=1e-4
    )
    facts = json.loads((tmp_path / "art/config.json").read_text())
    assert (
        facts["rgb_norm"] == "per_image"
        and len(facts["wavelengths"]) == 31
        and facts["onnx_difference"] < 1e-4
    )
    assert "405" in (tmp_path / "art/README.md").read_text()
    assert {p.name for p in (tmp_path / "art").iterdir()} == set(model_export.FILES)
    with pytest.raises(common.UserError, match="model.safetensors exists; give --overwrite"):
        run("--checkpoint", checkpoint, "--export", tmp_path / "art")
    monkeypatch.setattr(torch.onnx, "export", refuse_export)
    with pytest.raises(common.UserError, match="model.onnx is not written, the other files are"):
        run("--checkpoint", checkpoint, "--export", tmp_path / "art", "--overwrite")
    assert not (tmp_path / "art/model.onnx").exists()
    assert "onnxruntime" not in (tmp_path / "art/README.md").read_text()
    with pytest.raises(common.UserError, match="--export .*a.png: a file; give a folder"):
        run("--checkpoint", checkpoint, "--export", tmp_path / "a.png")


def test_an_export_keeps_what_others_wrote(tmp_path, checkpoint):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(common.UserError, match="README.md exists"):
        run("--checkpoint", checkpoint, "--export", tmp_path, "--patch_size", 64)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("encoding, norm", [("srgb", "unit"), ("linear", "per_image")])
def test_the_recipe_of_an_exports_card_gives_the_cube(tmp_path, monkeypatch, encoding, norm):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    state = common.read_checkpoint(
        write_checkpoint(tmp_path / "m.ckpt", norm, estimate_uncertainty=True)
    )
    state["data"]["rgb_encoding"] = encoding
    common.save_checkpoint(tmp_path / "m.ckpt", state)
    run("--checkpoint", tmp_path / "m.ckpt", "--export", tmp_path / "art", "--patch_size", 64)
    Image.fromarray(photo(tmp_path / "a.png", (50, 70))).save(tmp_path / "art" / "photo.jpg")
    pixels = np.asarray(Image.open(tmp_path / "art" / "photo.jpg"))
    card = (tmp_path / "art" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "art")
    found: dict = {}
    exec(card.split("```python")[1].split("```")[0], found)
    cube, _ = inference.predict_image(load_model(tmp_path / "m.ckpt"), pixels)
    inner = np.s_[:, :48, :68]  # beside what is added, which the network sees mirrored or as 0
    np.testing.assert_allclose(found["cube"][inner], cube[inner], atol=1e-4)
    scale = found["session"].run(["scale"], {"rgb": found["rgb"].astype(np.float32)})[0]
    np.testing.assert_allclose(scale, np.full_like(scale, 0.1))


SMALL = {
    "hsifusion": {"base_channels": 16, "depths": (1, 1, 1), "num_heads": (2, 2, 2)},
    "sharp": {"base_dim": 16, "depths": (1, 1), "heads": (1, 1), "mlp_ratios": (1, 1)},
}
SIZES = {
    "hsifusion": ((1, 3, 64, 64), (2, 3, 96, 160), (5, 3, 192, 64)),
    "sharp": ((1, 3, 128, 128), (2, 3, 128, 128), (5, 3, 128, 128)),
}


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(SMALL))
def test_the_onnx_file_takes_any_batch_and_of_hsifusionnet_any_size(kind, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.undo()
    torch.manual_seed(0)
    create = {"hsifusion": create_hsifusion_lightning_pro, "sharp": create_sharp_v32}[kind]
    model = create("tiny", **SMALL[kind])
    facts = {"rgb_norm": "unit", "wavelengths": list(range(400, 701, 10))}
    state = {"model": kind, "data": facts, "state_dict": model.state_dict(), "ema": None}
    state["model_config"] = dataclasses.asdict(model.config)
    common.save_checkpoint(tmp_path / "m.ckpt", state)
    run("--checkpoint", tmp_path / "m.ckpt", "--export", tmp_path, "--patch_size", 128)
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    for shape in SIZES[kind]:
        rgb = torch.rand(shape)
        with torch.no_grad():
            want = model.eval()(rgb)
        np.testing.assert_allclose(session.run(None, {"rgb": rgb.numpy()})[0], want, atol=1e-4)


# --- without a checkpoint, and from Python


def test_a_photo_alone_takes_the_weights_that_ship(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()  # the real models
    pixels = photo(tmp_path / "a.jpg", (80, 96))
    run("--input", tmp_path / "a.jpg", "--output", tmp_path / "a.npy", "--check-rgb", "--preview")
    said = capsys.readouterr().out
    assert "the weights that ship" in said and "RGB srgb, unit" in said
    assert re.search(r"rendered back through camera srgb: mean [0-9.]+ %.*delta E 2000", said)
    assert "without camera consistency mean" in said
    assert Image.open(tmp_path / "a_round_trip.png").size == (3 * 96, 80)
    assert pixels.shape == (80, 96, 3)
    from sharp_inference import load_model, predict_image

    stored = np.asarray(Image.open(tmp_path / "a.jpg"))
    cube, wavelengths = predict_image(load_model(), stored)
    assert cube.shape == (31, 80, 96) and wavelengths == [float(nm) for nm in range(400, 701, 10)]
    np.testing.assert_allclose(cube, np.load(tmp_path / "a.npy"), atol=1e-6)
    deep, _ = predict_image(load_model(), stored.astype(np.uint16) * 257)
    np.testing.assert_allclose(deep, cube, atol=1e-4)
    for wrong in (stored.astype(np.float32), stored[:0], "photo.jpg"):
        with pytest.raises(ValueError, match="must be .H, W, 3. uint8 or uint16"):
            predict_image(load_model(), wrong)


def test_the_python_interface_takes_what_a_caller_has(checkpoint, tmp_path):
    pixels = photo(tmp_path / "a.png")
    model = load_model(checkpoint, "cpu")  # a path, and a device by name
    cube, nm = inference.predict_image(model, Image.open(tmp_path / "a.png"))
    np.testing.assert_allclose(cube, expected(pixels), atol=1e-5)
    nm[0] = 0.0
    assert inference.predict_image(model, pixels)[1][0] == 405.0  # the model's own stay
    deep = pixels.astype(">u2") * 257
    np.testing.assert_allclose(inference.predict_image(model, deep)[0], cube, atol=1e-4)
    np.save(tmp_path / "deep.rgb.npy", deep)
    write_cube_of(checkpoint, tmp_path / "deep.rgb.npy", tmp_path / "b.npy")
    np.testing.assert_allclose(np.load(tmp_path / "b.npy"), cube, atol=1e-4)


@pytest.mark.parametrize("mapped", [0, 1 << 40])
def test_a_model_that_knows_its_uncertainty_writes_it_beside_the_cube(
    tmp_path, monkeypatch, capsys, mapped
):
    monkeypatch.setattr(cube_files, "MAPPED_BYTES", mapped)
    checkpoint = write_checkpoint(tmp_path / "m.ckpt", estimate_uncertainty=True)
    pixels = photo(tmp_path / "a.png")
    for name in ("a.npy", "a.npz"):
        write_cube_of(checkpoint, tmp_path / "a.png", tmp_path / "out" / name, "--preview")
    assert "uncertainty, a Laplace scale: " in capsys.readouterr().out
    for cube, scale in (
        (np.load(tmp_path / "out/a.npy"), np.load(tmp_path / "out/a_scale.npy")),
        [np.load(tmp_path / "out" / name)["cube"] for name in ("a.npz", "a_scale.npz")],
    ):
        np.testing.assert_allclose(cube, expected(pixels), atol=1e-5)
        np.testing.assert_allclose(scale, np.full((31, 72, 90), 0.1), atol=1e-5)
    (tmp_path / "out/a.npy").unlink()
    with pytest.raises(common.UserError, match="a_scale.npy: exists; give --overwrite"):
        write_cube_of(checkpoint, tmp_path / "a.png", tmp_path / "out/a.npy")
    plain = write_checkpoint(tmp_path / "plain.ckpt")  # which writes no such file
    write_cube_of(plain, tmp_path / "a.png", tmp_path / "out/a.npy")
    photo(tmp_path / "a_scale.png")
    images = (tmp_path / "a.png", tmp_path / "a_scale.png")
    both = ("--checkpoint", checkpoint, "--input", *images, "--output", tmp_path / "both")
    with pytest.raises(common.UserError, match="a.png gives a_scale.npy already; rename one"):
        run(*both)


@pytest.mark.parametrize("kind", ["hsifusion", "sharp"])
def test_the_weights_that_ship_give_back_the_photos_colours(kind, monkeypatch):
    """A cube means: in daylight it looks like the photo."""
    monkeypatch.undo()
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(30, 220, (8, 8, 3)), np.ones((12, 12, 1))).astype(np.uint8)
    path = ROOT / "weights" / f"{kind}_tiny_srgb.safetensors"
    assert path.stat().st_size < 3e6
    model = inference.load_model(str(path))
    assert (model.encoding, model.rgb_norm, model.data["camera"]) == ("srgb", "unit", "srgb")
    cube, nm = inference.predict_image(model, pixels)
    seen = cube_to_srgb(cube.transpose(1, 2, 0), nm)
    assert np.abs(seen.astype(int) - pixels).mean() < 6


def test_a_linear_checkpoint_warns_of_an_ordinary_photo(tmp_path, checkpoint, capsys):
    exif = Image.Exif()
    exif[271] = "Some Maker"
    Image.new("RGB", (90, 70), (90, 80, 70)).save(tmp_path / "a.jpg", exif=exif)
    write_cube_of(checkpoint, tmp_path / "a.jpg", tmp_path / "a.npy")
    assert "WARNING: its EXIF names a camera, so it is sRGB" in capsys.readouterr().out


def test_the_encoding_is_the_checkpoints_or_asked_for(tmp_path, checkpoint):
    state = common.read_checkpoint(checkpoint)
    state["data"].pop("rgb_encoding", None)
    common.save_checkpoint(tmp_path / "old.ckpt", state)
    pixels = photo(tmp_path / "a.png")
    write_cube_of(
        tmp_path / "old.ckpt", tmp_path / "a.png", tmp_path / "a.npy", "--rgb_encoding", "srgb"
    )
    light = linear_light(pixels)
    light = (light - light.min()) / (light.max() - light.min())
    with torch.no_grad():
        want = standin_model.create("tiny")(torch.from_numpy(light).permute(2, 0, 1)[None])[0]
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), want, atol=1e-5)
    state["data"]["rgb_encoding"] = "linear"
    common.save_checkpoint(tmp_path / "new.ckpt", state)
    with pytest.raises(common.UserError, match="was trained with --rgb_encoding linear"):
        write_cube_of(
            tmp_path / "new.ckpt", tmp_path / "a.png", tmp_path / "b.npy", "--rgb_encoding", "srgb"
        )
    state["data"]["rgb_encoding"] = "sRGB"
    common.save_checkpoint(tmp_path / "bad.ckpt", state)
    with pytest.raises(common.UserError, match="damaged, its rgb_encoding is not linear or srgb"):
        write_cube_of(tmp_path / "bad.ckpt", tmp_path / "a.png", tmp_path / "b.npy")


def test_what_a_folder_holds_and_is_not_read_is_listed(tmp_path, checkpoint, capsys):
    (tmp_path / "in").mkdir()
    for name in ("b.heic", "c.MOV", "d.cr2", "._a.png", "notes.txt"):
        (tmp_path / "in" / name).write_bytes(b"x")
    with pytest.raises(common.UserError, match="in: no image in it"):
        write_cube_of(checkpoint, tmp_path / "in", tmp_path / "out")
    photo(tmp_path / "in" / "a.png")
    write_cube_of(checkpoint, tmp_path / "in", tmp_path / "out")
    assert "not read: b.heic, c.MOV, d.cr2" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.npy"]


def test_a_checkpoint_may_lie_in_a_folder_with_an_equals_sign(tmp_path, checkpoint):
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    path = shutil.copy(checkpoint, folder / "best.ckpt")
    for spec, name in ((f"{path}", "lr=0.1"), (f"A={path}", "A"), (f"x=y={path}", "x=y")):
        model = inference.load_model(spec)
        assert (model.name, model.path) == (name, str(path))
