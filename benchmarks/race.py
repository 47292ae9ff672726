"""Accuracy for the same training time: each model from scratch on the same patches, scored on the
same full frames, which it never saw.

    python benchmarks/race.py --mst-root ../MST-plus-plus --data_root data/ARAD_1K \\
        --budget 300 --folds 5 --json race.json
    python benchmarks/race.py ... --entrants mst++ hsifusion hsifusion:small sharp,sparse_mode=block

An entrant is MODEL[:SIZE][,FIELD=VALUE...]: any field of the model's configuration (a list as in
heads=[1,2,4]), and of training
`init` (weights to start from), `mix` (a second folder of scenes), `share` (of it in a batch at the
start, falling to none), `lr`, and `without` (a part of the model, see ablation.py). --ablation
races the variants listed there.

--budget N gives each the time that MST++ needs for N steps: seconds of a step are measured in the
same run, the models in turn, and become numbers of steps, so that a busy machine changes nothing.
--folds K holds out every K-th training scene in turn; without it the official split is scored.
Rows are saved as they end, and the same command goes on where it was stopped. The table gives means
over scenes, ratios to MST++ and their 95 % bootstrap intervals over scenes, paired.

Batch 4, patch 64, RGB / 255, dihedral augmentation, Adam with a cosine over the budget from 4e-4
for MST++, which is its own, from 8e-4 for our tiny models and 4e-4 for our larger ones, MRAE with
floor 1e-2, clip 1.0, weights as they are at the end. Fitting the spectral path counts as training
time; reading data does not, it is the same for all.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from ablation import ABLATIONS, take_out  # noqa: E402

import common_utils_v32 as common  # noqa: E402
from common_utils_v32 import UserError  # noqa: E402
from compute_devices import resolve_device  # noqa: E402
from optimized_dataloader import DataConfig, MSTPlusPlusLoss, val_loader  # noqa: E402
from spectral_evaluation import mrae, psnr, rmse, sam  # noqa: E402
from training_runs import environment_record, start_weights  # noqa: E402
from training_state import default_lr  # noqa: E402

BATCH, PATCH, FLOOR = 4, 64, 1e-2
RIVAL = "mst++"
METRICS = ("mrae", "rmse", "psnr", "sam")
RATIOS = ("mrae", "rmse", "sam")
TIMED_STEPS = 8  # of each entrant, in turn; the first warms up
CURVE_POINTS = 5  # scores on the way, for learning curves
DRAWS = 2000  # of the bootstrap
LR = 4e-4  # of MST++
TRAINING = {"init": "", "mix": "", "share": 0.25, "lr": LR, "without": ""}
AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}
# Settings that all rows of a results file share.
SAME = ("budget", "minutes", "steps", "folds", "batch", "patch", "data_root", "lr", "amp")
Scene = tuple[str, torch.Tensor, torch.Tensor]  # name, rgb (3, H, W), cube (bands, H, W)


@dataclass
class Entrant:
    """What an entrant's text says: model, size, fields of its configuration, training settings."""

    text: str
    model: str
    size: str
    options: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)


def parse_entrant(text: str) -> Entrant:
    head, *pairs = re.split(r",(?![^\[]*\])", text)  # not at commas of a list
    model, _, size = head.partition(":")
    if model not in (RIVAL, "hsifusion", "sharp"):
        raise UserError(f"--entrants {text}: choose mst++, hsifusion or sharp")
    entrant = Entrant(text, model, size or "tiny", {}, dict(TRAINING))
    if model != RIVAL:
        entrant.training["lr"] = default_lr(entrant.size)
    if model == RIVAL and (size or any(not pair.startswith("lr=") for pair in pairs)):
        raise UserError(f"--entrants {text}: of MST++ lr alone can be chosen")
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        if name in TRAINING:
            _check_training(text, name, parsed)
            entrant.training[name] = parsed
        else:
            entrant.options[name] = parsed
    return entrant


def _check_training(text: str, name: str, value: object) -> None:
    kinds = (int, float) if isinstance(TRAINING[name], float) else str
    if not isinstance(value, kinds):
        raise UserError(f"--entrants {text}: {name} cannot be {value!r}")
    if name in ("init", "mix") and not Path(str(value)).exists():
        raise UserError(f"--entrants {text}: {value}: no such file or folder")


def build(
    name: str, size: str, mst_root: Path | None, options: dict | None = None
) -> torch.nn.Module:
    """`hsifusion`, `sharp` or `mst++`, untrained."""
    if name == RIVAL:
        if mst_root is None:
            raise UserError("--mst-root: MST++ is needed, give a checkout of it")
        folder = mst_root / "train_code" / "architecture"
        if not folder.is_dir():
            raise UserError(f"--mst-root {mst_root}: no train_code/architecture; give a checkout")
        sys.path.insert(0, str(folder))
        return importlib.import_module("MST_Plus_Plus").MST_Plus_Plus()
    if name == "sharp":
        from sharp_v322_hardened import create_sharp_v32 as create
    else:
        from hsifusion_v252_complete import create_hsifusion_lightning_pro as create
    try:
        return create(size, **(options or {}))
    except (TypeError, ValueError) as error:
        raise UserError(f"--entrants {name}:{size}: {error}") from None


# --- data


def load(data_root: str, split: str) -> list[Scene]:
    loader = val_loader(DataConfig(data_root=data_root, rgb_norm="unit", val_split=split))
    return [(scene.name, scene.rgb[0], scene.cube[0]) for scene in loader]


def splits(data_root: str, folds: int, most: int | None) -> Iterator[tuple[str, list, list]]:
    """(label, training scenes, scenes to score): the official split, or `folds` parts of the
    training scenes in turn, `most` of them."""
    scenes = load(data_root, "train")
    if not folds:
        yield "val", scenes, load(data_root, "val")
    if folds == 1 or folds > len(scenes):
        what = f"--folds {folds}: of {len(scenes)} training scenes"
        raise UserError(f"{what}, give from 2 to as many, or 0 for the official split")
    for fold in range(folds if most is None else min(folds, most)):
        kept = [scene for number, scene in enumerate(scenes) if number % folds != fold]
        yield f"fold {fold}", kept, scenes[fold::folds]


class Patches:
    """The same endless sequence of batches for every entrant; with `mixed` scenes, a share of each
    batch that falls from `share` to none comes from them."""

    def __init__(self, scenes: list[Scene], batch: int, patch: int, seed: int) -> None:
        self.scenes, self.batch, self.patch = scenes, batch, patch
        self.rng = np.random.default_rng(seed)

    def draw(self, scenes: list[Scene]) -> list[torch.Tensor]:
        """One patch of rgb and cube, turned alike."""
        name, rgb, cube = scenes[self.rng.integers(len(scenes))]
        if self.patch > min(rgb.shape[1:]):
            raise UserError(f"--patch {self.patch}: larger than scene {name}; give a smaller one")
        top, left = (self.rng.integers(side - self.patch + 1) for side in rgb.shape[1:])
        turns, flip = int(self.rng.integers(4)), self.rng.integers(2)
        pair = []
        for image in (rgb, cube):
            part = image[:, top : top + self.patch, left : left + self.patch]
            part = torch.rot90(part, turns, (1, 2))
            pair.append(part.flip(2) if flip else part)
        return pair

    def next(self, mixed: list[Scene], share: float) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = []
        for _ in range(self.batch):
            other = bool(mixed) and self.rng.random() < share
            pairs.append(self.draw(mixed if other else self.scenes))
        rgb, cube = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        layout = torch.channels_last
        return rgb.contiguous(memory_format=layout), cube.contiguous(memory_format=layout)


# --- training and scoring


class Training:
    """A model on its way through its steps."""

    def __init__(self, entrant: Entrant, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.entrant, self.args, self.device = entrant, args, args.torch_device
        self.model = build(entrant.model, entrant.size, args.mst_root, entrant.options)
        if entrant.training["without"]:
            try:
                take_out(self.model, entrant.training["without"])
            except ValueError as error:
                raise UserError(f"--entrants {entrant.text}: {error}") from None
        self.model.to(self.device).train()
        self.network = self.model
        if args.compile:
            self.model.compile()
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=LR, betas=(0.9, 0.999), fused=True
        )
        self.loss_fn = MSTPlusPlusLoss(FLOOR)

    def fit(self, scenes: list[Scene]) -> None:
        """The closed-form start of a model that has one, or its start from weights."""
        if not hasattr(self.model, "fit_spectral_path"):
            return
        side = min(min(scene[1].shape[1:]) for scene in scenes)
        rgb = torch.stack([scene[1][:, :side, :side] for scene in scenes])
        cube = torch.stack([scene[2][:, :side, :side] for scene in scenes])
        rgb, cube = rgb.to(self.device), cube.to(self.device)
        init = self.entrant.training["init"] or None
        start_weights(self.model, self.entrant.model, init, rgb, cube, self.loss_fn)

    def step(self, rgb: torch.Tensor, cube: torch.Tensor, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        rgb, cube = rgb.to(self.device), cube.to(self.device)
        amp = AMP_TYPES[self.args.amp]
        with torch.autocast(self.device.type, amp, enabled=amp is not None):
            pred = self.network(rgb)
        loss = self.loss_fn(pred, cube)
        if hasattr(self.model, "auxiliary_loss"):
            loss = loss + self.model.auxiliary_loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    @torch.no_grad()
    def score(self, scenes: list[Scene]) -> dict[str, dict]:
        """MRAE (floor 1e-2), RMSE, PSNR and SAM of full frames."""
        self.model.eval()
        out = {}
        for name, rgb, cube in scenes:
            with torch.compiler.set_stance("force_eager"):
                pred = self.model(rgb[None].to(self.device))[0].float()
            cube = cube.to(self.device)
            out[name] = {"mrae": mrae(pred, cube, FLOOR), "rmse": rmse(pred, cube)}
            out[name] |= {"psnr": psnr(pred, cube), "sam": sam(pred, cube)}
        self.model.train()
        return out


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_a_step(
    entrants: list[Entrant], scenes: list[Scene], args: argparse.Namespace
) -> dict[str, tuple[float, float]]:
    """Seconds of a training step, and of the closed-form start, of each entrant: the fastest of
    several taken in turn, so that a disturbance meets all."""
    runs = [Training(entrant, args) for entrant in entrants]
    batch = Patches(scenes, args.batch, args.patch, 0).next([], 0)
    fitting = []
    for run in runs:
        start = time.perf_counter()
        run.fit(scenes)
        wait_for(run.device)
        fitting.append(time.perf_counter() - start)
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(TIMED_STEPS):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run.step(*batch, LR)
            wait_for(run.device)
            taken.append(time.perf_counter() - start)
    found = {}
    for entrant, taken, fit in zip(entrants, times, fitting, strict=True):
        found[entrant.text] = (min(taken[1:]), fit)
    return found


def steps_of(
    entrants: list[Entrant], scenes: list[Scene], args: argparse.Namespace
) -> dict[str, int]:
    """How many steps each entrant has in the budget."""
    if args.steps:
        return {entrant.text: args.steps for entrant in entrants}
    timed = entrants
    if args.budget and all(entrant.text != RIVAL for entrant in entrants):
        timed = [parse_entrant(RIVAL), *entrants]
    seconds = seconds_a_step(timed, scenes, args)
    budget = 60 * args.minutes
    if args.budget:
        budget = args.budget * seconds[RIVAL][0]
    steps = {}
    for entrant in entrants:
        step, fit = seconds[entrant.text]
        steps[entrant.text] = max(1, round((budget - fit) / step))
    return steps


def race(
    entrant: Entrant, steps: int, scenes: list[Scene], held_out: list, args: argparse.Namespace
) -> dict:
    """Train for `steps` and score; -> the row, with the scores on the way."""
    run, start = Training(entrant, args), time.perf_counter()
    run.fit(scenes)
    settings = entrant.training
    mixed = load(settings["mix"], "train") if settings["mix"] else []
    patches = Patches(scenes, args.batch, args.patch, args.seed)
    marks = {round(steps * (part + 1) / CURVE_POINTS) for part in range(CURVE_POINTS - 1)}
    curve = []
    for number in range(steps):
        share = settings["share"] * (1 - number / steps)
        lr = settings["lr"] * 0.5 * (1 + math.cos(math.pi * number / steps))
        run.step(*patches.next(mixed, share), lr)
        if args.curves and number + 1 in marks:
            curve.append({"step": number + 1, **means(run.score(held_out))})
    row = {"steps": steps, "seconds": time.perf_counter() - start, "curve": curve}
    return row | {"scenes": run.score(held_out)}


# --- results


def means(scenes: dict[str, dict]) -> dict[str, float]:
    return {
        metric: float(np.mean([scene[metric] for scene in scenes.values()])) for metric in METRICS
    }


def interval(mine: np.ndarray, rival: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of two means over the same scenes."""
    draws = np.random.default_rng(0).integers(0, len(mine), (DRAWS, len(mine)))
    ratios = mine[draws].mean(1) / rival[draws].mean(1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def scenes_of(results: list[dict], name: str) -> dict[str, dict]:
    """Scores of an entrant by split, seed and scene."""
    found = {}
    for result in results:
        if result["entrant"] == name:
            for scene, scores in result["scenes"].items():
                found[f"{result['split']} {result['seed']} {scene}"] = scores
    return found


def table(results: list[dict], ablation: list[str]) -> str:
    """Means over all scenes, seeds and folds; ratios with intervals to MST++, or to the model as it
    is where its `ablation` was raced."""
    meanings = {}
    for model in ablation:
        meanings |= ABLATIONS[model]
    lines = ["| model | steps | MRAE | RMSE | PSNR | SAM | ratios of MRAE, RMSE, SAM (95 %) |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(result["entrant"] for result in results):
        mine = scenes_of(results, name)
        rival = scenes_of(results, name.split(",")[0] if name in meanings else RIVAL)
        m = means(mine)
        steps = np.mean([result["steps"] for result in results if result["entrant"] == name])
        scores = f"{m['mrae']:.4f} | {m['rmse']:.4f} | {m['psnr']:.2f} | {m['sam']:.2f}"
        label = f"{name}: {meanings[name]}" if name in meanings else name
        lines.append(f"| {label} | {steps:.0f} | {scores} | {ratios(mine, rival)} |")
    return "\n".join(lines)


def ratios(mine: dict[str, dict], rival: dict[str, dict]) -> str:
    """Of the means over the scenes that both have."""
    shared = [key for key in mine if key in rival]
    cells = []
    for metric in RATIOS if shared else ():
        ours = np.array([mine[key][metric] for key in shared])
        theirs = np.array([rival[key][metric] for key in shared])
        low, high = interval(ours, theirs)
        cells.append(f"{ours.mean() / theirs.mean():.3f} ({low:.2f}-{high:.2f})")
    return ", ".join(cells)


def draw_curves(results: list[dict], path: Path) -> None:
    """MRAE of the held-out scenes against the share of the budget, a line for each entrant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name in dict.fromkeys(result["entrant"] for result in results):
        mine = [result for result in results if result["entrant"] == name]
        rows = [row for row in mine if len(row["curve"]) == CURVE_POINTS - 1]
        if not rows:
            continue
        values = np.mean([[point["mrae"] for point in row["curve"]] for row in rows], axis=0)
        last = np.mean([means(row["scenes"])["mrae"] for row in rows])
        share = np.arange(1, CURVE_POINTS + 1) / CURVE_POINTS
        axes.plot(share, [*values, last], marker="o", label=name)
    axes.set(xlabel="share of the training time", ylabel="MRAE of held-out scenes (floor 0.01)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


class Record:
    """The results file: what is in it is not raced again."""

    def __init__(self, path: Path | None, settings: dict) -> None:
        self.path = path
        self.facts: dict = {"settings": settings, "steps": {}, "results": []}
        self.facts["environment"] = environment_record()
        if path is not None and path.exists():
            old = common.read_json(path)
            if not isinstance(old, dict) or old.keys() != self.facts.keys():
                raise UserError(f"--json {path}: not a race's; give another file")
            for key in SAME:
                if old["settings"].get(key) != settings[key]:
                    found = f"was made with {key} {old['settings'].get(key)}"
                    raise UserError(f"--json {path}: {found}; give another file")
            self.facts = old

    @property
    def results(self) -> list[dict]:
        return self.facts["results"]

    def has(self, entrant: str, split: str, seed: int) -> bool:
        wanted = (entrant, split, seed)
        return any((r["entrant"], r["split"], r["seed"]) == wanted for r in self.results)

    def save(self) -> None:
        if self.path is not None:
            common.write_json(self.path, self.facts)


def parse_arguments() -> argparse.Namespace:
    parser = common.CliParser(description=__doc__)
    add = parser.add_argument
    add("--data_root", required=True, help="raw ARAD-1K or staged folder")
    add("--mst-root", type=Path, help="a checkout of MST++; without it MST++ does not run")
    entrants_help = "MODEL[:SIZE][,FIELD=VALUE...], see above; default: all three, tiny"
    add("--entrants", nargs="+", metavar="MODEL", help=entrants_help)
    add("--ablation", nargs="+", choices=list(ABLATIONS), default=[], help="of these models")
    add("--budget", type=int, default=0, help="training time of each, in steps of MST++; 0: off")
    add("--minutes", type=float, default=10.0, help="training time of each, without --budget")
    add("--steps", type=int, default=0, help="the same number of steps for each instead; 0: off")
    add("--seeds", type=int, nargs="+", default=[0], help="each races once with each of them")
    add("--folds", type=int, default=0, help="cross-validate over the training scenes; 0: off")
    add("--most-folds", type=common.positive, help="run the first of the folds only")
    add("--curves", action=argparse.BooleanOptionalAction, default=False, help="score on the way")
    add("--batch", type=common.positive, default=BATCH, help="patches of a step")
    add("--patch", type=common.positive, default=PATCH, help="side of a patch, pixels")
    add("--threads", type=common.positive, default=2, help="of the CPU")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--amp", choices=["bf16", "fp16"], help="half precision; default: none")
    add("--compile", action="store_true", help="torch.compile of each")
    add("--json", type=Path, help="where all results are kept; a race that was stopped goes on")
    args = parser.parse_args()
    for name in ("budget", "steps", "folds"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)}: give 0 or more")
    return args


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    args.torch_device = resolve_device(args.device)
    texts = args.entrants or [RIVAL, "hsifusion", "sharp"]
    if args.ablation:
        texts = [text for model in args.ablation for text in ABLATIONS[model]]
    entrants = [parse_entrant(text) for text in texts]
    if args.mst_root is None and not args.entrants:
        entrants = [entrant for entrant in entrants if entrant.model != RIVAL]
    settings = {key: str(value) for key, value in vars(args).items()} | {
        "lr": str(default_lr("tiny"))
    }
    record = Record(args.json, settings)
    args.seed = args.seeds[0]
    for entrant in entrants:
        Training(entrant, args)  # complains of what cannot be built, before hours of racing
    for label, scenes, held_out in splits(args.data_root, args.folds, args.most_folds):
        for seed in args.seeds:
            args.seed = seed
            missing = [e for e in entrants if e.text not in record.facts["steps"]]
            if missing:
                record.facts["steps"] |= steps_of(missing, scenes, args)
                record.save()
            for entrant in entrants:
                if record.has(entrant.text, label, seed):
                    continue
                steps = record.facts["steps"][entrant.text]
                row = {"entrant": entrant.text, "seed": seed, "split": label}
                row |= race(entrant, steps, scenes, held_out, args)
                record.results.append(row)
                record.save()
                found = {k: round(v, 4) for k, v in means(row["scenes"]).items()}
                print(f"{label} seed {seed} {entrant.text}: {steps} steps, {found}", flush=True)
    print(table(record.results, args.ablation))
    if args.curves and args.json:
        draw_curves(record.results, args.json.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    common.run_cli(main)
