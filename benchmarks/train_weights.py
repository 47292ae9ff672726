"""Trains the weights that ship, from nothing: `make weights`. Started again it goes on.

    python benchmarks/train_weights.py --work weights/work
    HSI_REAL_SCENES=data/real python benchmarks/train_weights.py --work weights/work  # scores there

Both tiny models learn on 400 synthetic scenes of measured reflectances and pigments, seen by an
ordinary camera (dataset_setup.py --synthetic --camera srgb). The averaged weights are kept as
float16, with a card that says what they are and how well they do: on synthetic scenes that were
held out, and on real ones where the variable names a raw ARAD-1K folder, whose cubes are rendered
to sRGB photos here. Beside them stands Mallett and Yuksel's map from sRGB to spectra (EGSR 2019).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common_utils_v32 as common  # noqa: E402
from camera_colour import camera_response, encode_srgb, linear_light  # noqa: E402
from checkpoint_files import read_checkpoint, save_weights  # noqa: E402
from optimized_dataloader import DataConfig, val_loader  # noqa: E402
from sharp_inference import load_model, predict_image  # noqa: E402
from spectral_evaluation import mrae, rmse, sam  # noqa: E402

SCENES, SEED = 500, 100  # a fifth of them is held out
EPOCHS = 10
TRAINERS = {  # script, iterations of an epoch
    "hsifusion": ("hsifusion_training.py", 450),
    "sharp": ("sharp_training_script_fixed.py", 320),
}
FLAGS = [
    *("--model_size", "tiny", "--patch_size", "64", "--batch_size", "4", "--rgb_norm", "unit"),
    *("--memory_mode", "lazy", "--num_workers", "0", "--lr", "8e-4", "--warmup_epochs", "0.5"),
    *("--train_floor", "0.01", "--metric_floor", "0.01", "--val_crop_border", "0"),
    *("--val_interval", "5", "--epochs", str(EPOCHS), "--resume_from", "auto"),
]
FLOOR = 0.01
MOST_SCORED = 20  # held-out synthetic scenes
Predict = Callable[[np.ndarray], np.ndarray]  # (H, W, 3) uint8 -> (31, H, W)


def run(*command: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)


def make_scenes(work: Path) -> Path:
    raw, staged = work / "raw", work / "staged"
    if not (staged / "index.json").exists():
        made = ("--synthetic", str(SCENES), "--camera", "srgb", "--seed", str(SEED))
        run(ROOT / "dataset_setup.py", *made, "--output-root", raw)
        patch = ("--patch-size", "64")
        run(ROOT / "dataset_setup.py", "--arad-root", raw, "--output-root", staged, *patch)
    return staged


def train(kind: str, staged: Path, work: Path) -> Path:
    script, iterations = TRAINERS[kind]
    places = ("--data_root", staged, "--output_dir", work, "--experiment_name", kind)
    run(ROOT / script, *FLAGS, *places, "--iterations_per_epoch", str(iterations))
    return work / kind / "last.ckpt"


def ship(kind: str, checkpoint: Path, folder: Path) -> Path:
    """Write the averaged weights as float16."""
    state = read_checkpoint(checkpoint)
    weights = {}
    for name, value in (state["ema"] or state["state_dict"]).items():
        weights[name] = value.half() if value.is_floating_point() else value
    path = folder / f"{kind}_tiny_srgb.safetensors"
    save_weights(path, weights, kind, state["model_config"], state["data"], averaged=True)
    return path


# --- scores


def held_out(staged: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(photo (H, W, 3) uint8, cube (31, H, W)) of synthetic scenes that were not trained on."""
    scenes = val_loader(DataConfig(data_root=str(staged), rgb_norm="unit")).scenes
    found = []
    for number in range(min(MOST_SCORED, len(scenes.names))):
        frame = scenes.arrays(number)
        found.append((np.array(frame.rgb), np.array(frame.cube).transpose(2, 0, 1)))
    return found


def real_scenes(root: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same of all real scenes of a raw folder, rendered to sRGB without noise: their cubes are
    taken for reflectance in daylight."""
    found = []
    for split in ("train", "val"):
        for scene in val_loader(DataConfig(data_root=root, rgb_norm="unit", val_split=split)):
            cube = scene.cube[0].numpy()
            response = camera_response("srgb", list(range(400, 701, 10)))
            light = np.clip(cube.transpose(1, 2, 0) @ response, 0, 1)
            found.append((np.rint(255 * encode_srgb(light)).astype(np.uint8), cube))
    return found


def mallett(photo: np.ndarray) -> np.ndarray:
    """Mallett and Yuksel 2019: a fixed basis of three spectra, mixed by linear sRGB."""
    from colour.recovery import MSDS_BASIS_FUNCTIONS_sRGB_MALLETT2019 as table

    nm = np.arange(400, 701, 10)
    basis = [np.interp(nm, table.wavelengths, column) for column in table.values.T]
    return np.einsum("hwc,cb->bhw", linear_light(photo), np.array(basis)).astype(np.float32)


def score(predict: Predict, scenes: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    rows = []
    for photo, cube in scenes:
        pred, target = torch.from_numpy(predict(photo)), torch.from_numpy(cube)
        rows.append((mrae(pred, target, FLOOR), rmse(pred, target), sam(pred, target)))
    means = np.mean(rows, axis=0)
    return dict(zip(("mrae", "rmse", "sam"), means.tolist(), strict=True))


def score_table(paths: list[Path], sets: dict[str, list]) -> str:
    lines = ["| scenes | map | MRAE (floor 0.01) | RMSE | SAM |", "|---|---|---|---|---|"]
    for title, scenes in sets.items():
        maps: dict[str, Predict] = {"Mallett 2019": mallett}
        for path in paths:
            model = load_model(str(path))
            maps[path.stem] = lambda photo, model=model: predict_image(model, photo)[0]
        for name, predict in maps.items():
            s = score(predict, scenes)
            cells = f"{s['mrae']:.3f} | {s['rmse']:.4f} | {s['sam']:.1f}"
            lines.append(f"| {len(scenes)} {title} | {name} | {cells} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


CARD = """# The weights that ship

`hsifusion_tiny_srgb.safetensors` and `sharp_tiny_srgb.safetensors` (0.6 M parameters each): an
ordinary sRGB photo in, 31 bands of 400 to 700 nm out. float16; made by `make weights`.

**What the cube means.** Reflectance x shading x exposure, with the illuminant divided out: a
perfect white in full light is 1 in every band. Seen in daylight (D65) by the CIE 1931 observer and
encoded as sRGB, it is the photo before it clips.

**Trained on** synthetic scenes alone: {train} of them, of measured reflectances (CIE 224:2017,
colour charts) and of pigments, rendered as ordinary cameras deliver them: white balance off by 2 %,
exposure that varies and clips, photon noise, sRGB encoding, 8 bit, JPEG 70 to 95. {steps}
steps of 4 patches of 64 pixels, MRAE with floor 0.01, Adam, averaged weights. No photo, no measured
scene and no data set with a licence was used.

**Errors on scenes that they never saw** (`benchmarks/train_weights.py`):

{table}

**Good for** a first cube from a photo, previews, teaching, and as a start for training
(`--init_from`) on photos of your own. **Bad for** measurement: three channels do not determine a
spectrum, and metamers look alike. Spectra beyond 660 nm, narrow lines, fluorescence, coloured light
that the camera did not balance away, clipped highlights and heavy filters are guesses.
"""


def parse_arguments() -> argparse.Namespace:
    parser = common.CliParser(description=__doc__)
    add = parser.add_argument
    add("--work", type=Path, default=ROOT / "weights" / "work", help="scenes and runs")
    add("--out", type=Path, default=ROOT / "weights", help="the weights and their card")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    work, out = args.work.resolve(), args.out.resolve()
    staged = make_scenes(work)
    paths = [ship(kind, train(kind, staged, work), out) for kind in TRAINERS]
    sets = {"synthetic, held out": held_out(staged)}
    if os.environ.get("HSI_REAL_SCENES"):
        sets["real"] = real_scenes(os.environ["HSI_REAL_SCENES"])
    steps = " and ".join(f"{EPOCHS * iterations:,}" for _, iterations in TRAINERS.values())
    facts = {"train": SCENES - SCENES // 5, "steps": steps, "table": score_table(paths, sets)}
    common.write_text(out / "README.md", CARD.format(**facts))


if __name__ == "__main__":
    common.run_cli(main)
