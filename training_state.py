"""What both trainers keep of a run beside the model and the loop that each owns: its data, how far
it is, validation, the lines that it says, and the files that it leaves.

    class Run(RunState): ...          # adds make_model, learnt, learn_from and the loop"""

import dataclasses
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import common_utils_v32 as common
import compute_devices as devices
import terminal
import training_runs as runs
from checkpoint_files import restoring, save_weights
from common_utils_v32 import UserError
from compute_devices import Ranks
from evaluation_report import write_run_figure
from frame_prediction import predict_frame
from optimized_dataloader import MSTPlusPlusLoss, create_optimized_dataloaders
from spectral_evaluation import centre_crop, scene_figure, scene_metrics, validation_record
from training_runs import RunFolder

# How far a run is: attributes that a checkpoint keeps.
PROGRESS = ("epoch", "iteration", "step", "validated", "best", "best_metrics", "metrics")
FIT_PIXELS = 2**18  # that the linear path is fitted on
WARMUP_EPOCHS, WARMUP_SHARE = 5.0, 0.05  # at most; of the run
AGREE_EVERY = 10  # steps between two looks at what other ranks were asked, but for slow ones
SLOW_STEP = 0.5  # seconds
LARGEST_SEED = 2**62


def default_lr(size: str) -> float:
    """The peak learning rate of a model of this size."""
    return 8e-4 if size == "tiny" else 4e-4


def complete_settings(cfg: Any, name: str) -> None:
    """Fill what was not given of a trainer's settings; ValueError for what cannot be."""
    cfg.data_root = cfg.data_root or os.environ.get("HSI_DATA_DIR") or "./data/ARAD_1K"
    cfg.experiment_name = cfg.experiment_name or name
    if cfg.lr is None:
        cfg.lr = default_lr(cfg.model_size)
    positive = ("epochs", "batch_size", "accumulate_steps", "ema_update_every", "val_interval")
    for field in (*positive, "log_interval", "lr", "metric_floor"):
        if getattr(cfg, field) <= 0:
            raise ValueError(f"--{field} {getattr(cfg, field)}: must be above 0")
    for field in ("weight_decay", "gradient_clip", "warmup_epochs", "val_crop_border"):
        if (getattr(cfg, field) or 0) < 0:
            raise ValueError(f"--{field} {getattr(cfg, field)}: must be 0 or above")
    if not 0 <= cfg.ema_decay < 1:
        raise ValueError(f"--ema_decay {cfg.ema_decay}: must lie in [0, 1)")
    for field, least in (("save_minutes", 0), ("num_workers", -1)):
        if getattr(cfg, field) < least:
            raise ValueError(f"--{field} {getattr(cfg, field)}: give {least} or more")
    if abs(cfg.seed) >= LARGEST_SEED:
        raise ValueError(f"--seed {cfg.seed}: give one between -2**62 and 2**62")
    path = Path(cfg.experiment_name)
    if path.anchor or ".." in path.parts or path == Path():
        raise ValueError(f"--experiment_name {path}: leaves --output_dir; give a name in it")
    if not 0 <= cfg.eta_min <= cfg.lr:
        raise ValueError(f"--eta_min {cfg.eta_min}: must lie between 0 and --lr {cfg.lr}")


def warmup_steps(cfg: Any, steps_per_epoch: int) -> int:
    epochs = cfg.warmup_epochs
    if epochs is None:
        epochs = min(WARMUP_EPOCHS, cfg.epochs * WARMUP_SHARE)
    return int(epochs * steps_per_epoch)


def learning_rate(step: int, cfg: Any, steps_per_epoch: int) -> float:
    """Linear warm-up from above 0, then a cosine to eta_min: a pure function of the step."""
    total = cfg.epochs * steps_per_epoch
    warmup = min(warmup_steps(cfg, steps_per_epoch), total // 2)
    if step < warmup:
        return cfg.lr * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return cfg.eta_min + 0.5 * (cfg.lr - cfg.eta_min) * (1 + math.cos(math.pi * progress))


class RunState:
    """A run without its loop: a Run sets what is declared here, and moves epoch, step, lr .."""

    kind: str  # which model
    parts: tuple[str, ...]  # of what `learnt` gives, beside the weights
    model: Any  # what is trained, unwrapped
    average: common.WeightAverage | None
    schedule: torch.optim.lr_scheduler.LambdaLR
    amp: torch.dtype | None
    compiled: bool
    trained: list[Any]  # what changes with a step, and has state_dict and load_state_dict
    totals: Tensor  # loss, MRAE and their count since the last line
    logged: tuple[float, int]  # time and iteration of the last line
    lr: float  # of the last step
    norm: Tensor  # of its gradients

    def __init__(self, cfg: Any, ranks: Ranks, device: torch.device, folder: RunFolder) -> None:
        self.cfg, self.ranks, self.device, self.folder = cfg, ranks, device, folder
        self.stop = runs.StopSignal()
        resume, state = folder.resume(cfg.resume_from)
        self.open_data(resume, state)
        self.make_model(state, resume)
        self.epoch = self.iteration = self.step = 0
        self.validated = -1  # the last epoch that was
        self.best = math.inf
        self.best_metrics: dict = {}
        self.metrics: dict = {}
        if state and resume:
            with restoring(resume):
                self.load(state, resume)
        self.sound = runs.SoundState(*self.trained)
        self.start_log()

    def make_model(self, state: dict | None, resume: Path | None) -> None:
        """From nothing, or to go on from a checkpoint."""
        raise NotImplementedError

    def train(self) -> int:
        """All epochs -> exit code."""
        raise NotImplementedError

    def learnt(self) -> dict:
        """What the loop has changed: `state_dict`, `ema`, and the states of what trains them."""
        raise NotImplementedError

    def learn_from(self, state: dict) -> None:
        """Go on from what `learnt` gave; the model's weights are loaded already."""
        raise NotImplementedError

    def say(self, text: str) -> None:
        if self.ranks.is_main:
            terminal.say(text)

    def open_data(self, resume: Path | None, state: dict | None) -> None:
        """Loaders, the facts that a checkpoint says of their data, and the loss; ranks meet."""
        cfg, ranks = self.cfg, self.ranks
        cfg.rank, cfg.world_size = ranks.rank, ranks.world_size
        cfg.on_gpu = self.device.type == "cuda"
        self.train_loader, self.val_loader = create_optimized_dataloaders(cfg)
        cfg.mix_until = cfg.epochs * len(self.train_loader)
        self.train_loader.start_workers()
        ranks.join(self.device)
        step = state.get("step") if state else 0
        ranks.agree((str(resume), step), "the checkpoint to go on from")
        self.say(f"data: {self.train_loader.describe()}")
        self.iterations = len(self.train_loader)  # batches of an epoch
        self.steps_per_epoch = math.ceil(self.iterations / cfg.accumulate_steps)
        rgb = self.train_loader.rgb
        self.data_facts: dict = {
            "rgb_norm": cfg.rgb_norm,
            "rgb_dtype": rgb.dtype,
            "rgb_encoding": rgb.encoding,
            "camera": rgb.camera,
            "wavelengths": list(self.train_loader.wavelengths),
            "train_floor": cfg.train_floor,
            "metric_floor": cfg.metric_floor,
        }
        identity = common.to_json(self.val_loader.scenes.identity())
        self.data_facts["val_scenes"] = hashlib.sha256(identity.encode()).hexdigest()
        self.check_crop()
        warmup = warmup_steps(cfg, self.steps_per_epoch)
        self.loss_fn = MSTPlusPlusLoss(cfg.train_floor, cfg.train_floor_start, warmup)

    def check_crop(self) -> None:
        """UserError where --val_crop_border leaves nothing of a scene."""
        border, scenes = self.cfg.val_crop_border, self.val_loader.scenes
        for name, shape in zip(scenes.names, scenes.shapes, strict=True):
            try:
                centre_crop(torch.empty(shape, device="meta"), border)
            except UserError as error:
                raise UserError(f"--val_crop_border {border}: scene {name}: {error}") from None

    def create(self, factory: Callable, fields: type, skip: tuple[str, ...] = ()) -> Any:
        """The model of the settings, with as many bands as the data."""
        cfg, given = self.cfg, common.given_fields(self.cfg, fields, skip)
        bands = len(self.train_loader.wavelengths)
        try:
            model = factory(cfg.model_size, out_channels=bands, **given)
        except ValueError as error:
            raise UserError(str(error)) from None
        least = model.config.min_input_size
        if cfg.patch_size < least:
            what = f"--patch_size {cfg.patch_size}: below --min_input_size {least}"
            raise UserError(f"{what}; give {least} or more")
        return model

    def place_weights(self, model: nn.Module, state: dict | None, resume: Path | None) -> None:
        """The weights that a run starts with, or goes on from; rank 0's are sent to the others."""
        if state and resume:
            runs.resume_weights(model, self.kind, state, resume)
        elif self.ranks.is_main:
            rgb, cube = self.train_loader.spread(FIT_PIXELS)
            rgb, cube = rgb.to(self.device), cube.to(self.device)
            init_from = self.cfg.init_from
            self.say(runs.start_weights(model, self.kind, init_from, rgb, cube, self.loss_fn))

    def make_schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        cfg, steps = self.cfg, self.steps_per_epoch
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(step, cfg, steps) / cfg.lr
        )

    def start_log(self) -> None:
        """config.json, which --config reads back, the log, and the bar."""
        cfg = self.cfg
        fields = dataclasses.fields(cfg)
        settings = {field.name: getattr(cfg, field.name) for field in fields if field.metadata}
        settings["resume_from"] = None  # --config of a run that went on is a run of its own
        settings |= {"compile_model": self.compiled, "use_amp": self.amp is not None}
        if cfg.device == "auto":  # a rank's own card is not that of all ranks
            settings["device"] = self.device.type
        if self.amp is not None:
            settings["amp_dtype"] = "bf16" if self.amp == torch.bfloat16 else "fp16"
        self.settings = settings
        if self.ranks.is_main:
            self.folder.make()
        self.log = runs.RunLog(self.folder.logs, self.ranks, self.step, cfg.wandb, settings)
        if self.ranks.is_main:
            common.write_json(self.folder.logs / "config.json", settings)
        parameters = sum(p.numel() for p in self.model.parameters())
        bands, compiled = len(self.train_loader.wavelengths), "on" if self.compiled else "off"
        self.say(
            f"model: {self.kind} {cfg.model_size}, {parameters / 1e6:.2f} M parameters, "
            f"{bands} bands; {self.device}, {self.amp or torch.float32}, compile {compiled}; "
            f"run: {self.folder.logs}"
        )
        self.saved_at = self.looked_at = time.monotonic()
        self.look_every = 1
        self.saved: tuple[int, int] | None = None  # where the last save was
        total, done = cfg.epochs * self.iterations, self.epoch * self.iterations + self.iteration
        self.bar = terminal.bar(total=total, initial=done, unit="it", smoothing=0.02, desc="train")

    def log_progress(self) -> None:
        """A line of metrics.jsonl and the bar's text; the only place that waits for the device."""
        loss, error, count = self.ranks.sum(self.totals).tolist()
        self.totals.zero_()
        if not count:
            return  # the gradients of no step were finite
        loss, error = loss / count, error / count
        now, (then, iteration) = time.monotonic(), self.logged
        patches = (self.iteration - iteration) * self.cfg.batch_size * self.ranks.world_size
        speed, memory = patches / (now - then), devices.memory_gb(self.device)
        values = {"epoch": self.epoch, "loss": loss, "mrae": error, "lr": self.lr}
        values |= {"grad_norm": self.norm.item(), "patches_per_second": speed}
        self.log.write("train", self.step, values | {"memory_gb": memory})
        text = f"loss {loss:.4f} MRAE {error:.4f} lr {self.lr:.1e} {speed:.0f} patches/s"
        self.bar.set_postfix_str(f"{text} {memory:.1f} GB", refresh=sys.stderr.isatty())
        self.logged = (now, self.iteration)
        note = self.sound.follow(self.step, error)
        if note:
            self.say(note)

    def asked(self) -> tuple[bool, bool]:
        """(stop, save) now? All ranks give the same answer."""
        if self.ranks.world_size > 1 and self.step % self.look_every:
            return False, False
        now = time.monotonic()
        due = now - self.saved_at > 60 * self.cfg.save_minutes
        slow = now - self.looked_at > SLOW_STEP * self.look_every
        stop, save, slow = self.ranks.any(self.stop.requested, due, slow)
        self.look_every, self.looked_at = 1 if slow else AGREE_EVERY, now
        return stop, save

    def end_epoch(self) -> bool:
        """Count and save the epoch; False where a signal asks to stop."""
        self.epoch, self.iteration = self.epoch + 1, 0
        self.save(runs.LAST)
        return not self.ranks.any(self.stop.requested)[0]

    def validate(self) -> bool:
        """Where due, score frames with the averaged weights, keep the best; False when stopped."""
        cfg = self.cfg
        due = (self.epoch + 1) % cfg.val_interval == 0 or self.epoch + 1 == cfg.epochs
        if not due or self.validated >= self.epoch:
            return True
        scores = self.score_scenes()
        if self.ranks.any(self.stop.requested)[0]:
            return False
        self.metrics = validation_record(self.ranks.gather_lists(scores))
        self.validated = self.epoch
        m = self.metrics
        self.log.write("val", self.step, {"epoch": self.epoch, "rgb_norm": cfg.rgb_norm} | m)
        self.say(
            f"epoch {self.epoch + 1}/{cfg.epochs}: MRAE {m['mrae']:.4f}, RMSE {m['rmse']:.4f}, "
            f"PSNR {m['psnr']:.2f} dB, SAM {m['sam']:.2f} degrees; "
            f"full frame MRAE {m['mrae_full']:.4f} "
            f"(floor {cfg.metric_floor:g}, rgb {cfg.rgb_norm})"
        )
        if m["mrae"] < self.best:
            self.best, self.best_metrics = m["mrae"], m
            self.save(runs.BEST)
            self.save_best_weights()
        return True

    @torch.no_grad()
    def score_scenes(self) -> list[tuple[str, dict]]:
        """(name, metrics) of this rank's scenes, fewer when stopped; the first one is drawn."""
        cfg, model = self.cfg, self.averaged_model().eval()
        scores: list[tuple[str, dict]] = []
        for scene in self.val_loader:
            if self.stop.requested:
                break
            eager = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
            with eager:
                pred = predict_frame(model, scene.rgb, self.device)
            cube = scene.cube.to(pred.device)
            metrics = scene_metrics(pred, cube, floor=cfg.metric_floor, border=cfg.val_crop_border)
            if self.ranks.is_main and not scores:
                rgb, pred, cube = (x[0].float().cpu() for x in (scene.rgb, pred, cube))
                figure = scene_figure(rgb, pred, cube, self.data_facts["wavelengths"])
                self.log.figure("val/scene", self.step, figure)
            scores.append((scene.name, metrics))
        return scores

    def averaged_model(self) -> nn.Module:
        return self.model if self.average is None else self.average.module

    def save(self, name: str) -> None:
        """Write a checkpoint with all that a bit-exact resume needs; every rank takes part."""
        self.train_loader.check.finish(self.ranks)
        rng = self.ranks.gather(runs.rng_state())
        self.saved_at = time.monotonic()
        if name == runs.LAST:
            self.saved = (self.epoch, self.iteration)
        if not self.ranks.is_main:
            return
        state = {
            "model": self.kind,
            "model_config": dataclasses.asdict(self.model.config),
            "data": self.data_facts,
            "settings": self.settings,
            "schedule": self.schedule.state_dict(),
            "rng": rng,
        }
        state |= self.learnt() | {key: getattr(self, key) for key in PROGRESS}
        self.folder.save(name, state)

    def load(self, state: dict, path: Path) -> None:
        """Go on from a checkpoint's state; the model's weights are loaded already."""
        cfg = self.cfg
        needed = ("settings", *self.parts, "schedule", "rng", *PROGRESS)
        runs.check_progress(state, needed, self.iterations, path)
        runs.check_resumed_data(state["data"], self.data_facts, path)
        self.learn_from(state)
        common.restore_schedule(self.schedule, state["schedule"], cfg.lr, cfg.weight_decay)
        if len(state["rng"]) == self.ranks.world_size:
            runs.set_rng_state(state["rng"][self.ranks.rank])
        for key in PROGRESS:
            setattr(self, key, state[key])
        note = runs.other_settings(state["settings"], cfg) + runs.other_batch(state, cfg)
        has_best = math.isfinite(self.best)
        if has_best and not runs.keeps_best(state, cfg, self.data_facts, self.folder):
            self.best, self.best_metrics = math.inf, {}
            note += "; its best was of other scenes, by another measure, or lies elsewhere"
        place = f"epoch {self.epoch}, iteration {self.iteration}, step {self.step}"
        self.say(f"resumed: {path} at {place}{note}")

    def save_best_weights(self) -> None:
        """best.safetensors: the weights that were scored, for inference."""
        if not self.ranks.is_main:
            return
        save_weights(
            self.folder.checkpoints / "best.safetensors",
            self.averaged_model().state_dict(),
            self.kind,
            dataclasses.asdict(self.model.config),
            self.data_facts,
            averaged=self.average is not None,
        )

    def finish(self, done: bool, seconds: float) -> int:
        """What is left to do after the loop -> exit code."""
        self.log.close()
        if not done and self.epoch < self.cfg.epochs:
            if self.saved != (self.epoch, self.iteration):
                self.save(runs.LAST)
            last = self.folder.checkpoints / runs.LAST
            self.say(f"stopped by a signal: saved {last}; go on with --resume_from auto")
            return runs.STOPPED
        if self.ranks.is_main:
            self.write_summary(seconds)
        best = f"best crop MRAE {self.best:.4f} in {self.folder.checkpoints / runs.BEST}"
        self.say(f"done: {best if math.isfinite(self.best) else 'no validation gave a number'}")
        return 0

    def write_summary(self, seconds: float) -> None:
        summary = {
            "settings": self.settings,
            "model": dataclasses.asdict(self.model.config),
            "data": self.data_facts,
            "environment": runs.environment_record(self.device),
            "steps": self.step,
            "best_mrae": self.best,
            "best": self.best_metrics,
            "last": self.metrics,
            "seconds": seconds,
        }
        common.write_json(self.folder.logs / "summary.json", summary)
        write_run_figure(self.folder.logs)


def run_trainer(settings: type, run: type[RunState], description: str | None) -> int:
    """A trainer's main: the command line's run, from its beginning to its end -> exit code."""
    cfg = common.parse_dataclass(settings, description=description or "")
    devices.prepare_cuda(cfg.deterministic)
    devices.use_threads(cfg.threads)
    ranks = Ranks.announced()
    device = devices.resolve_device(cfg.device, ranks.local_rank)
    with devices.errors_in_one_line(device):
        folder = RunFolder.of(cfg.output_dir, cfg.experiment_name)
        code = run(cfg, ranks, device, folder).train()
    ranks.leave()
    return code
