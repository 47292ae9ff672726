"""The whole way on synthetic scenes, with the scripts that a user runs: data, staging, training, inference, pictures.

    make demo                                     # or, in an environment that has the requirements:
    python benchmarks/demo.py --output demo

Ends with a table of the held-out scenes: the linear map RGB -> bands by least squares, the same map fitted for least
relative error, and the trained network; and with summary.json. Exits with 1 when the network is not ahead by MARGIN.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common_utils_v32 as common  # noqa: E402
from optimized_dataloader import DataConfig, val_loader  # noqa: E402
from spectral_evaluation import mean_metrics, scene_metrics  # noqa: E402
from spectral_layers import fit_linear_spectral_path  # noqa: E402

SCENES, SIDE, SEED = 24, 256, 0
EPOCHS, ITERATIONS = 5, 400
RGB_NORM, FLOOR = (
    "unit",
    0.01,
)  # one exposure for all scenes, so brightness means something; dark shadows
TRAIN_FLOOR = 0.3  # a larger one than the metric's: the network is to win in RMSE too, which bright pixels decide
MARKER = ".hsi-demo"  # in a folder that a demo made, and the next may remove
MARGIN = 0.85  # of the linear maps' errors, at most


def run(says: str, script: str, *arguments: str) -> None:
    """Run one of the scripts, its output and bars passed through; its error ends the demo."""
    print(f"\n$ python {script} {' '.join(arguments)}", flush=True)
    here = {
        name: value for name, value in os.environ.items() if not name.startswith("HSI_")
    }  # all files go to --output
    code = subprocess.run([sys.executable, str(ROOT / script), *arguments], env=here).returncode
    if code:
        sys.exit(code)
    print(f"=> {says}", flush=True)


def frames(staged: Path, split: str) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, rgb (3, H, W), cube (31, H, W)) of a split, as the models see them."""
    loader = val_loader(DataConfig(data_root=str(staged), rgb_norm=RGB_NORM, val_split=split))
    return [(scene.name, scene.rgb[0], scene.cube[0]) for scene in loader]


def score_linear(staged: Path, relative: bool) -> dict:
    """Held-out metrics of the affine map RGB -> bands fitted on the training scenes, by squared error or by error relative
    to max(target, 0.01)."""
    train = frames(staged, "train")
    rgb, cube = (
        torch.cat([scene[i].flatten(1) for scene in train], dim=1)[None, :, :, None] for i in (1, 2)
    )
    weight, bias = fit_linear_spectral_path(
        rgb, cube, floor=0.01 if relative else 2.0
    )  # 2.0: all weights equal
    scores = [
        scene_metrics(
            torch.einsum("oc,chw->ohw", weight, rgb) + bias[:, None, None], cube, floor=FLOOR
        )
        for _, rgb, cube in frames(staged, "val")
    ]
    return mean_metrics(scores)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("demo"), help="folder for everything; made anew"
    )
    output = parser.parse_args().output
    start = time.monotonic()
    raw, staged, runs, results = (
        output / name for name in ("raw", "staged", "experiments", "results")
    )
    if output.exists() and any(output.iterdir()):
        if not (output / MARKER).exists():
            sys.exit(
                f"error: --output {output}: holds other things than an earlier demo; give a new or empty folder"
            )
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()

    run(
        f"{SCENES} scenes in the ARAD-1K layout: {raw}",
        "dataset_setup.py",
        "--synthetic",
        str(SCENES),
        "--output-root",
        str(raw),
        "--size",
        f"{SIDE}x{SIDE}",
        "--seed",
        str(SEED),
        "--workers",
        "2",
    )
    run(
        f"staged scenes, statistics and a contact sheet: {staged}",
        "dataset_setup.py",
        "--arad-root",
        str(raw),
        "--output-root",
        str(staged),
        "--patch-size",
        "64",
        "--stride",
        "8",
        "--workers",
        "2",
    )
    run(
        f"a trained network: {runs / 'hsifusion_tiny'}",
        "hsifusion_training.py",
        "--data_root",
        str(staged),
        "--model_size",
        "tiny",
        "--patch_size",
        "64",
        "--batch_size",
        "4",
        "--epochs",
        str(EPOCHS),
        "--iterations_per_epoch",
        str(ITERATIONS),
        "--warmup_epochs",
        "0.2",
        "--rgb_norm",
        RGB_NORM,
        "--train_floor",
        str(TRAIN_FLOOR),
        "--metric_floor",
        str(FLOOR),
        "--lr",
        "8e-4",
        "--ema_decay",
        "0.99",
        "--val_interval",
        str(EPOCHS),
        "--output_dir",
        str(runs),
    )  # scored once: nothing is chosen by the held-out scenes
    best = str(runs / "hsifusion_tiny" / "best.ckpt")
    run(
        f"metrics and figures of the held-out scenes: {results}",
        "sharp_inference.py",
        "--checkpoint",
        best,
        "--evaluate",
        "--data_root",
        str(staged),
        "--split",
        "val",
        "--metric_floor",
        str(FLOOR),
        "--output",
        str(results),
    )
    photos = str(raw / "Test_RGB" / "*.jpg")
    run(
        f"cubes and pictures of photos without a cube: {results / 'photos'}",
        "sharp_inference.py",
        "--checkpoint",
        best,
        "--input",
        photos,
        "--output",
        str(results / "photos"),
        "--preview",
    )

    table = {
        "linear": score_linear(staged, relative=False),
        "linear_relative": score_linear(staged, relative=True),
        "network": common.read_json(results / "summary.json")["mean"],
    }
    seconds = time.monotonic() - start
    common.write_json(output / "summary.json", table | {"seconds": seconds, "metric_floor": FLOOR})
    names = {
        "linear": "linear map, least squares",
        "linear_relative": "linear map, least relative error",
        "network": "HSIFusionNet tiny",
    }
    print(
        f"\nHeld-out scenes, centre crop, MRAE with floor {FLOOR:g}:\n\n| {'':32} |   MRAE |   RMSE |  PSNR |   SAM |"
    )
    print(f"|{'-' * 34}|--------|--------|-------|-------|")
    for key, name in names.items():
        m = table[key]
        print(
            f"| {name:32} | {m['mrae']:.4f} | {m['rmse']:.4f} | {m['psnr']:5.2f} | {m['sam']:5.2f} |"
        )
    print(
        f"\n{seconds:.0f} s; numbers: {output / 'summary.json'}; pictures: {results / 'figures'}, {results / 'photos'}"
    )

    short = [
        f"{metric.upper()} is {table['network'][metric] / table[rival][metric]:.2f} of the {names[rival]}"
        for metric, rival in (("mrae", "linear_relative"), ("rmse", "linear"), ("sam", "linear"))
        if table["network"][metric] > MARGIN * table[rival][metric]
    ]
    if short:
        print(f"The network is not ahead by {1 - MARGIN:.0%}: {'; '.join(short)}.")
        return 1
    print(f"The network is ahead of both maps by more than {1 - MARGIN:.0%}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
