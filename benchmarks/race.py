"""Accuracy for the same training time: each model from scratch on the same patches, scored on the
same full frames.

    python benchmarks/race.py --mst-root ../MST-plus-plus --data_root data/ARAD_1K \
        --minutes 10 --seeds 0 1 2 --json race.json
    python benchmarks/race.py ... --folds 3   # cross-validation over the training scenes

Batch 4, patch 64, RGB / 255, dihedral augmentation, Adam 4e-4 with a cosine over the time budget,
MRAE with floor 1e-2, clip 1.0, weights as they are at the end. Fitting the spectral path counts as
training time; data preparation does not, it is the same for all. Nothing else may run on the
machine.
"""

import importlib
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common_utils_v32 as common  # noqa: E402
from optimized_dataloader import DataConfig, MSTPlusPlusLoss, val_loader  # noqa: E402
from spectral_evaluation import mrae, psnr, rmse, sam  # noqa: E402
from training_runs import environment_record  # noqa: E402

BATCH, PATCH, LR, FLOOR = 4, 64, 4e-4, 1e-2
RIVAL = "mst++"
METRICS = ("mrae", "rmse", "psnr", "sam")


def build(name: str, size: str, mst_root: Path | None) -> torch.nn.Module:
    """`hsifusion`, `sharp` or `mst++`, untrained."""
    if name == RIVAL:
        sys.path.insert(0, str(mst_root / "train_code" / "architecture"))
        return importlib.import_module("MST_Plus_Plus").MST_Plus_Plus()
    if name == "sharp":
        from sharp_v322_hardened import create_sharp_v32 as create
    else:
        from hsifusion_v252_complete import create_hsifusion_lightning_pro as create
    return create(size)


def load(data_root: str, split: str) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    loader = val_loader(DataConfig(data_root=data_root, rgb_norm="unit", val_split=split))
    return [(scene.name, scene.rgb[0], scene.cube[0]) for scene in loader]


def batches(scenes: list, seed: int):
    """The same endless sequence of patches for every model."""
    rng = np.random.default_rng(seed)
    while True:
        pairs = []
        for _ in range(BATCH):
            _, rgb, cube = scenes[rng.integers(len(scenes))]
            top, left = (rng.integers(side - PATCH + 1) for side in rgb.shape[1:])
            turns, flip = rng.integers(4), rng.integers(2)
            pair = [
                torch.rot90(x[:, top : top + PATCH, left : left + PATCH], int(turns), (1, 2))
                for x in (rgb, cube)
            ]
            pairs.append([x.flip(2) for x in pair] if flip else pair)
        yield tuple(
            torch.stack(parts).contiguous(memory_format=torch.channels_last)
            for parts in zip(*pairs, strict=True)
        )


def train(model: torch.nn.Module, scenes: list, seconds: float, seed: int) -> int:
    """Train in place for a time; returns the number of steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=(0.9, 0.999), fused=True)
    loss_fn, steps, spent = MSTPlusPlusLoss(FLOOR), 0, 0.0
    start = time.perf_counter()
    if hasattr(model, "fit_spectral_path"):
        side = min(min(scene[1].shape[1:]) for scene in scenes)
        model.fit_spectral_path(
            *(torch.stack([s[i][:, :side, :side] for s in scenes]) for i in (1, 2))
        )
    spent = time.perf_counter() - start
    for rgb, cube in batches(scenes, seed):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * min(1.0, spent / seconds)))
        loss = loss_fn(model(rgb), cube)
        if hasattr(model, "auxiliary_loss"):
            loss = loss + model.auxiliary_loss()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        spent, steps = spent + time.perf_counter() - start, steps + 1
        if spent >= seconds:
            return steps


@torch.no_grad()
def score(model: torch.nn.Module, scenes: list) -> dict[str, dict]:
    """MRAE (floor 1e-2), RMSE, PSNR and SAM of full frames."""
    model.eval()
    out = {}
    for name, rgb, cube in scenes:
        pred = model(rgb[None])[0]
        out[name] = {
            "mrae": mrae(pred, cube, FLOOR),
            "rmse": rmse(pred, cube),
            "psnr": psnr(pred, cube),
            "sam": sam(pred, cube),
        }
    return out


def splits(data_root: str, folds: int):
    """(label, training scenes, scenes to score): the official split, or `folds` parts of the
    training scenes in turn."""
    scenes = load(data_root, "train")
    if not folds:
        yield "val", scenes, load(data_root, "val")
    for fold in range(folds):
        yield (
            f"fold {fold}",
            [s for i, s in enumerate(scenes) if i % folds != fold],
            scenes[fold::folds],
        )


def table(results: list[dict]) -> str:
    """Means over scenes, seeds and folds; and their ratios to MST++."""
    means: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(result["model"] for result in results):
        mine = [result for result in results if result["model"] == name]
        scenes = [scene for result in mine for scene in result["scenes"].values()]
        means[name] = {metric: float(np.mean([s[metric] for s in scenes])) for metric in METRICS}
        means[name]["steps"] = float(np.mean([result["steps"] for result in mine]))
    lines = ["| model | steps | MRAE | RMSE | PSNR | SAM | MRAE, RMSE, SAM over MST++ |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, m in means.items():
        ratios = ""
        if RIVAL in means:
            ratios = ", ".join(f"{m[k] / means[RIVAL][k]:.3f}" for k in ("mrae", "rmse", "sam"))
        scores = f"{m['mrae']:.4f} | {m['rmse']:.4f} | {m['psnr']:.2f} | {m['sam']:.2f}"
        lines.append(f"| {name} | {m['steps']:.0f} | {scores} | {ratios} |")
    return "\n".join(lines)


def main() -> int:
    parser = common.CliParser(description=__doc__)
    parser.add_argument("--data_root", required=True, help="raw ARAD-1K or staged folder")
    parser.add_argument(
        "--mst-root", type=Path, help="a checkout of MST++; without it MST++ does not run"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=[RIVAL, "hsifusion", "sharp"],
        choices=[RIVAL, "hsifusion", "sharp"],
    )
    parser.add_argument("--model_size", default="tiny")
    parser.add_argument("--minutes", type=float, default=10.0, help="training time of each model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--folds", type=int, default=0, help="cross-validate over the training scenes"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write all results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names, results = [n for n in args.models if n != RIVAL or args.mst_root], []
    for label, train_scenes, held_out in splits(args.data_root, args.folds):
        for seed in args.seeds:
            for name in names:
                torch.manual_seed(seed)
                model = build(name, args.model_size, args.mst_root)
                steps = train(model, train_scenes, 60 * args.minutes, seed)
                results.append(
                    {
                        "model": name,
                        "seed": seed,
                        "split": label,
                        "steps": steps,
                        "scenes": score(model, held_out),
                    }
                )
                shown = {k: v for k, v in results[-1].items() if k != "scenes"}
                scores = results[-1]["scenes"].values()
                mean = {
                    m: round(float(np.mean([s[m] for s in scores])), 4)
                    for m in ("mrae", "rmse", "sam")
                }
                print(shown | mean, flush=True)
                if args.json:
                    common.write_json(
                        args.json,
                        {
                            "settings": {k: str(v) for k, v in vars(args).items()},
                            "environment": environment_record(),
                            "results": results,
                        },
                    )
    print(table(results))
    return 0


if __name__ == "__main__":
    common.run_cli(main)
