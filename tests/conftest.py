"""Shared by all tests: the project root on sys.path, and a small raw data set written by h5py and Pillow alone."""

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def write_raw_arad(
    root: Path, train=("a", "b", "c"), valid=("v",), size=(96, 80), bands=31, seed=0
) -> Path:
    """A raw ARAD-1K folder of smooth random scenes: cube in MATLAB order, JPEG, split lists."""
    rng = np.random.default_rng(seed)
    for folder in ("Train_Spec", "Train_RGB", "split_txt"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "split_txt" / "train_list.txt").write_text("\n".join(train) + "\n")
    (root / "split_txt" / "valid_list.txt").write_text("\n".join(valid))
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


@pytest.fixture(scope="session")
def raw_arad(tmp_path_factory) -> Path:
    return write_raw_arad(tmp_path_factory.mktemp("raw"))
