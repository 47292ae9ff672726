"""The inputs that are mutated: good ones of every kind, written small, and what reads each."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import fuzzing
import h5py
import numpy as np
import torch
from conftest import run_setup, write_raw_arad
from PIL import Image
from training_helpers import make_run, stop_after

import common_utils_v32 as common
import dataset_setup
import hsifusion_training
import sharp_inference
from checkpoint_files import save_checkpoint, save_weights
from compute_devices import Ranks
from frame_prediction import LoadOptions, load_model
from optimized_dataloader import DataConfig, create_optimized_dataloaders, prepare_batch

SIDE, BANDS = 32, 31
TRAINER = "hsifusion_training"


class Kind(NamedTuple):
    """A file that is mutated in a copy of its folder, and what reads that folder."""

    name: str
    folder: Path
    file: str
    mutate: Any
    main: Any  # of (folder), as a script's main
    only_same: bool = False  # a changed file has to be refused, or to mean the same


def picture(side=SIDE):
    rng = np.random.default_rng(3)
    coarse = rng.integers(20, 240, (side // 8, side // 8, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))


def cube_of(image):
    weights = image.astype(np.float32) / 255
    shapes = np.random.default_rng(4).uniform(0.1, 0.3, (3, BANDS)).astype(np.float32)
    return weights @ shapes


# --- what reads them


def stage(folder):
    run_setup(
        *("--cubes", folder / "cubes", "--output-root", folder / "out", "--render-rgb"),
        *("--patch-size", 16, "--workers", 1, "--wavelengths", 400, 700),
    )


def verify_arad(folder):
    raw, sizes = folder / "raw", ("--patch-size", 16, "--workers", 1)
    run_setup("--arad-root", raw, "--output-root", folder / "out", *sizes)


def predict(folder):
    (photo,) = folder.glob("photo.*")
    files = ["--checkpoint", str(folder / "m.ckpt"), "--input", str(photo)]
    sharp_inference.main([*files, "--output", str(folder / "cubes"), "--device", "cpu"])


def load(folder):
    for file in ("staged", "raw"):
        if (folder / file).exists():
            _load(folder / file)


def _load(root):
    config = DataConfig(
        str(root), "lazy", 16, 16, batch_size=4, iterations_per_epoch=3, num_workers=0
    )
    train, val = create_optimized_dataloaders(config)
    for batch in train:
        prepare_batch(batch)
    for _ in val:
        pass
    train.check.finish(Ranks())


def parse(folder):
    common.parse_dataclass(hsifusion_training.Settings, ["--config", str(folder / "c.json")])


def weights_of(folder):
    (file,) = folder.glob("m.*")
    model = load_model(str(file), torch.device("cpu"), LoadOptions())
    total = sum(value.double().sum().item() for value in model.module.state_dict().values())
    (folder / "sum").write_text(json.dumps([total, model.wavelengths, model.rgb_norm]))


def resume(folder):
    make_run(TRAINER, folder / "staged", folder, "--resume_from", "auto", "--no-verify")


# --- what is written


def _photos(folder):
    """Photos as an inference's input, each in a folder with a checkpoint."""
    image = Image.fromarray(picture(64))
    deep = Image.fromarray(picture(64)[..., 0].astype(np.uint16) * 257)
    files = {"photo.png": image, "photo.jpg": image, "photo.bmp": image, "photo.webp": image}
    files |= {"photo.tif": image, "photo.tiff": deep}
    for name, content in files.items():
        place = folder / name.replace(".", "-")
        place.mkdir(parents=True)
        content.save(place / name)
        write_model(place / "m.ckpt")
        yield Kind(place.name, place, name, fuzzing.mutate_bytes, predict)
    place = folder / "photo-rgb-npy"
    place.mkdir()
    np.save(place / "photo.rgb.npy", picture(64))
    write_model(place / "m.ckpt")
    yield Kind(place.name, place, "photo.rgb.npy", fuzzing.mutate_bytes, predict)


def write_model(path):
    """A checkpoint of the stand-in model."""
    import standin_model

    model = standin_model.create("tiny", width=2)
    config = {"model_size": "tiny", "width": 2, "out_channels": BANDS}
    data = {"rgb_norm": "per_image", "wavelengths": np.linspace(400, 700, BANDS).tolist()}
    if path.suffix == ".safetensors":
        save_weights(path, model.state_dict(), "hsifusion", config, data, averaged=True)
        return
    state = {"model": "hsifusion", "model_config": config, "data": data}
    save_checkpoint(path, state | {"state_dict": model.state_dict(), "ema": model.state_dict()})


def _cubes(folder):
    """Cubes of every format, each staged with its photo."""
    from scipy.io import savemat
    from spectral.io import envi

    cube, nm = cube_of(picture()), np.linspace(400, 700, BANDS)

    def hdf5(path):
        with h5py.File(path, "w", userblock_size=512) as file:
            file.create_dataset("cube", data=cube.T, chunks=(8, 16, 16), compression="gzip")
            file["bands"] = nm[:, None]

    def header(path):
        facts = {"wavelength": list(nm), "wavelength units": "nm"}
        envi.save_image(str(path), cube, metadata=facts, interleave="bil", ext=".img")

    def matlab(path):
        savemat(path, {"cube": cube, "bands": nm})

    def packed(path):
        savemat(path, {"cube": cube, "bands": nm}, do_compression=True)

    def arrays(path):
        np.savez_compressed(path, cube=cube, wavelengths=nm)

    writers = {"v73.mat": hdf5, "v5.mat": matlab, "v5-packed.mat": packed, "c.npz": arrays}
    writers |= {"c.npy": lambda path: np.save(path, cube), "c.hdr": header}
    for name, write in writers.items():
        place = folder / f"cube-{name.replace('.', '-')}"
        (place / "cubes").mkdir(parents=True)
        write(place / "cubes" / name)
        stem = name.rpartition(".")[0]
        Image.fromarray(picture()).save(place / "cubes" / f"{stem}.png")
        mutate = fuzzing.mutate_text if name == "c.hdr" else fuzzing.mutate_bytes
        yield Kind(place.name, place, f"cubes/{name}", mutate, stage)
    yield Kind("cube-envi-data", place, "cubes/c.img", fuzzing.mutate_bytes, stage)
    yield Kind("staged-photo", place, "cubes/c.png", fuzzing.mutate_bytes, stage)


def _data_sets(folder):
    raw = write_raw_arad(folder / "lists" / "raw", size=(SIDE, SIDE))
    yield Kind("list", raw.parent, "raw/split_txt/train_list.txt", fuzzing.mutate_text, verify_arad)
    yield Kind("raw-mat", raw.parent, "raw/Train_Spec/a.mat", fuzzing.mutate_bytes, load)
    staged = folder / "staged" / "staged"
    sizes = ("--patch-size", 16, "--workers", 1)
    run_setup("--arad-root", raw, "--output-root", staged, *sizes)
    yield Kind("index", staged.parent, "staged/index.json", fuzzing.mutate_json, load)
    for name in ("train/a.cube.npy", "train/b.rgb.npy", "val/v.cube.npy"):
        shown = f"staged-{Path(name).stem}"
        yield Kind(shown, staged.parent, f"staged/{name}", fuzzing.mutate_bytes, load, True)


def _settings_and_weights(folder):
    config = folder / "config"
    config.mkdir()
    given = {"epochs": 3, "lr": 1e-3, "depths": [1, 1, 1], "use_amp": False, "model_size": "tiny"}
    given |= {"data_root": "x", "amp_dtype": "bf16", "wandb": None, "window_size": 8}
    (config / "c.json").write_text(json.dumps(given))
    yield Kind("config", config, "c.json", fuzzing.mutate_json, parse)
    for name in ("m.ckpt", "m.safetensors"):
        place = folder / name.replace(".", "-")
        place.mkdir()
        write_model(place / name)
        yield Kind(place.name, place, name, fuzzing.mutate_bytes, weights_of, True)
        weights_of(place)
    yield Kind("weights-facts", folder / "m-ckpt", "m.ckpt", mutate_state, weights_of)
    place = folder / "resume"
    raw = write_raw_arad(place / "staged", train=("a",), size=(64, 64))
    run = make_run(TRAINER, raw, place)
    stop_after(run, 1)
    run.train()
    yield Kind("resume-facts", place, "run/last.ckpt", mutate_state, resume)


def mutate_state(data, rng):
    """A checkpoint whose checksums are right and whose content is not: a stranger's."""
    state = torch.load(io.BytesIO(data), weights_only=True)
    # Weights are many: what is said of them is as likely.
    part = rng.choice(list(state))
    if isinstance(state[part], (dict, list)) and state[part] and rng.random() < 0.8:
        values = (*fuzzing.VALUES, torch.ones(2), torch.zeros(0), torch.ones(1).expand(2**40))
        state[part] = fuzzing.mutate_tree(state[part], rng, values)
    else:
        state = fuzzing.mutate_tree(state, rng)
    memory = io.BytesIO()
    torch.save(state, memory)
    return memory.getvalue()


def all_kinds(folder):
    """Every kind of input, written below a folder."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return [
            *_photos(folder / "photos"),
            *_cubes(folder / "cubes"),
            *_data_sets(folder / "data"),
            *_settings_and_weights(folder),
        ]


def without_processes(work, jobs, workers, what):
    """In the place of dataset_setup.run_jobs: everything in the child that is measured."""
    for job in jobs:
        yield work(job)


assert dataset_setup.run_jobs  # what without_processes stands for
