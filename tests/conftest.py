"""Shared by all tests: the project root on sys.path, a small raw data set written by h5py and
Pillow alone, and a small staged one written by NumPy alone."""

import json
import shutil
import signal
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # so that tests run well beside other work
import dataset_setup  # noqa: E402 (the project is on the path now)
import training_runs  # noqa: E402
import training_state  # noqa: E402
from optimized_dataloader import DataConfig, RawBatch  # noqa: E402

BANDS = 31
LINEAR16 = {"dtype": "uint16", "encoding": "linear", "camera": "some camera"}
STAGED_SIZES = {"a": (40, 56), "b": (48, 32)}  # H, W of the scenes of write_staged


def write_raw_arad(
    root: Path, train=("a", "b", "c"), valid=("v",), size=(96, 80), bands=31, seed=0
) -> Path:
    """A raw ARAD-1K folder of smooth random scenes: cube in MATLAB order, JPEG, split lists."""
    rng = np.random.default_rng(seed)
    for folder in ("Train_Spec", "Train_RGB", "split_txt"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "split_txt" / "train_list.txt").write_text("\n".join(train) + "\n", encoding="utf-8")
    (root / "split_txt" / "valid_list.txt").write_text("\n".join(valid), encoding="utf-8")
    wavelengths = np.linspace(400, 700, bands)
    for name in (*train, *valid):
        coarse = rng.uniform(0.02, 0.9, (size[0] // 8, size[1] // 8, 3))
        weights = np.kron(coarse, np.ones((8, 8, 1)))
        shapes = np.exp(-0.5 * ((wavelengths - np.array([[450], [550], [620]])) / 60) ** 2)
        cube = (weights @ shapes * 0.5 + 0.01).astype(np.float32)
        rgb = np.clip(weights * 220 + rng.normal(0, 2, weights.shape), 0, 255).astype(np.uint8)
        with h5py.File(root / "Train_Spec" / f"{name}.mat", "w") as file:
            file["cube"] = cube.transpose(2, 1, 0)
            file["bands"] = wavelengths[:, None]
        Image.fromarray(rgb).save(root / "Train_RGB" / f"{name}.jpg", quality=95)
    return root


def run_setup(*argv):
    return dataset_setup.main([str(argument) for argument in argv])


def folder_bytes(root):
    """The bytes of all files below a folder, by relative path."""
    files = sorted(path for path in Path(root).rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture
def runs_in_this_process(monkeypatch):
    """No settings from outside, pytest keeps its own signal handlers, and no figure is drawn, which
    would take longer than the run."""
    for name in ("HSI_LOG_DIR", "HSI_CKPT_DIR", "HSI_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(training_state, "scene_figure", lambda *args: None)
    monkeypatch.setattr(training_state, "write_run_figure", lambda folder: None)
    monkeypatch.setattr(training_runs.RunLog, "figure", lambda *args: None)


@pytest.fixture(scope="session")
def raw_arad(tmp_path_factory) -> Path:
    return write_raw_arad(tmp_path_factory.mktemp("raw"))


def write_scene(folder, name, cube, rgb):
    """The two arrays of a staged scene, and its entry in the index."""
    split = folder.name
    entry = {
        "name": name,
        "shape": cube.shape,
        "dtype": cube.dtype.name,
        "cube": f"{split}/{name}.cube.npy",
        "rgb": f"{split}/{name}.rgb.npy",
        "rgb_range": [int(rgb.min()), int(rgb.max())],
    }
    np.save(folder / f"{name}.cube.npy", cube)
    np.save(folder / f"{name}.rgb.npy", rgb)
    return entry


def write_staged(root, dtype="float16", val_dtype="float32", rgb=None):
    """A staged folder; cube and RGB hold the same picture, so that a test sees whether they are
    turned alike. `rgb`: the index's facts, of version 2."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, kind in (("train", dtype), ("val", val_dtype)):
        (root / split).mkdir(parents=True)
        splits[split] = []
        for name, (height, width) in STAGED_SIZES.items():
            image = rng.integers(3, 250, (height, width, 3), dtype=np.uint8)
            cube = np.repeat(image[..., :1] / np.float32(255), BANDS, axis=2).astype(kind)
            if rgb is not None and rgb["dtype"] == "uint16":
                image = image * np.uint16(257)
            splits[split].append(write_scene(root / split, name, cube, image))
    index = {
        "format": "hsi-staged",
        "version": 1,
        "bands": BANDS,
        "wavelengths": list(range(400, 701, 10)),
    }
    if rgb is not None:
        index |= {"version": 2, "rgb": rgb}
    write_index(root, index | {"splits": splits})
    return root


def read_index(root):
    return json.loads((root / "index.json").read_text(encoding="utf-8"))


def write_index(root, index):
    (root / "index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic") / "raw"
    run_setup(
        "--synthetic",
        6,
        "--output-root",
        root,
        "--size",
        "96x128",
        "--patch-size",
        64,
        "--workers",
        2,
    )
    return root


@pytest.fixture(scope="session")
def staged(tmp_path_factory):
    return write_staged(tmp_path_factory.mktemp("staged") / "s")


@pytest.fixture(scope="session")
def staged16(tmp_path_factory):
    """The same scenes with RGB values times 257, as uint16: white stays white."""
    return write_staged(tmp_path_factory.mktemp("staged16") / "s", rgb=LINEAR16)


@pytest.fixture
def broken(staged, tmp_path):
    """A copy of the staged folder, to break."""
    shutil.copytree(staged, tmp_path / "broken")
    return tmp_path / "broken"


@pytest.fixture
def raw_copy(raw_arad, tmp_path):
    shutil.copytree(raw_arad, tmp_path / "raw")
    return tmp_path / "raw"


def config(root, **changes):
    settings = {
        "data_root": str(root),
        "memory_mode": "lazy",
        "patch_size": 16,
        "stride": 8,
        "batch_size": 4,
        "iterations_per_epoch": 3,
        "num_workers": 0,
    }
    return DataConfig(**settings | changes)


def epoch_of(loader, epoch=0, iteration=0):
    loader.set_position(epoch, iteration)
    return [RawBatch(*(tensor.clone() for tensor in batch)) for batch in loader]


def same(one, other):
    """Whether two lists of batches hold the same tensors."""
    if len(one) != len(other):
        return False
    for batch, twin in zip(one, other, strict=True):
        for tensor, expected in zip(batch, twin, strict=True):
            if tensor.dtype != expected.dtype or not torch.equal(tensor, expected):
                return False
    return True
