"""Train HSIFusionNet v2.5.3 on a staged data set or a raw ARAD-1K folder.

One process (a laptop, or one GPU):
    python hsifusion_training.py --data_root data/staged --model_size tiny --epochs 20
Four GPUs of one machine; --batch_size is per process:
    python -m torch.distributed.run --nproc_per_node=4 \\
        hsifusion_training.py --data_root data/staged --memory_mode lazy
Go on after a stop, a crash or a preemption, bit for bit on a CPU:
    the same command and --resume_from auto

A run lives in <output_dir>/<experiment_name>: config.json, last.ckpt, best.ckpt, best.safetensors,
metrics.jsonl, summary.json, run.png and TensorBoard files. SIGTERM, SIGINT and SIGUSR1 finish the
step, save, and exit with code 75.

On a CPU that other programs use too, set GOMP_SPINCOUNT=1000 (or OMP_WAIT_POLICY=PASSIVE): OpenMP's
threads wait busily, and two trainers on two cores slow each other tenfold without it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import common_utils_v32 as common
import compute_devices as devices
import terminal
from checkpoint_files import load_weights, restoring, save_weights
from common_utils_v32 import UserError, opt
from compute_devices import Ranks
from evaluation_report import write_run_figure
from frame_prediction import predict_frame
from hsifusion_v252_complete import (
    SIZES,
    HSIFusionNet,
    LightningProConfig,
    create_hsifusion_lightning_pro,
    laplace_nll,
)
from optimized_dataloader import (
    DataConfig,
    MSTPlusPlusLoss,
    create_optimized_dataloaders,
    prepare_batch,
)
from spectral_evaluation import scene_figure, scene_metrics, validation_record
from training_runs import (
    STOPPED,
    RunFolder,
    RunLog,
    SoundState,
    StopSignal,
    check_progress,
    check_resumed_data,
    environment_record,
    keeps_best,
    rng_state,
    set_rng_state,
    start_weights,
)

MODEL = "hsifusion"
# How far a run is: attributes of Run that a checkpoint keeps.
PROGRESS = ("epoch", "iteration", "step", "validated", "best", "best_metrics", "metrics")
FIT_PIXELS = 2**18  # that the linear path is fitted on
AGREE_EVERY = 10  # steps between two looks at what other ranks were asked
SKIPPED_LIMIT = 20  # steps with non-finite gradients in a row before a run gives up
CHECK_EVERY = 50  # steps between two looks of a GPU at their count
LIKELIHOOD_WEIGHT = 0.1  # of the uncertainty head's term in the loss


@dataclasses.dataclass
class TrainConfig(DataConfig):
    """Settings of a run; every field is a flag, those of the data set's configuration too."""

    data_root: str = opt(
        "", "staged or raw ARAD-1K folder (default: $HSI_DATA_DIR or ./data/ARAD_1K)", group="data"
    )
    batch_size: int = opt(12, "patches per batch and process", group="data")

    model_size: str = opt(
        "base", "preset of the model's fields", group="model", choices=tuple(SIZES)
    )

    epochs: int = opt(300, "length of the run", group="optimisation")
    accumulate_steps: int = opt(1, "batches per optimizer step", group="optimisation")
    optimizer: str = opt("adamw", "update rule", group="optimisation", choices=("adamw", "adam"))
    lr: float = opt(4e-4, "peak learning rate", group="optimisation")
    eta_min: float = opt(1e-6, "learning rate at the end of the cosine", group="optimisation")
    warmup_epochs: float = opt(5.0, "epochs of linear warm-up", group="optimisation")
    weight_decay: float = opt(
        1e-4, "on weight matrices; never on norms, biases, layer scales", group="optimisation"
    )
    gradient_clip: float = opt(1.0, "largest gradient norm; 0 is no clipping", group="optimisation")
    train_floor: float = opt(
        1e-3, "smallest denominator of the training MRAE", group="optimisation"
    )
    train_floor_start: float | None = opt(
        None, "its value at first, falling over the warm-up", group="optimisation"
    )
    ema_decay: float = opt(
        0.999, "decay of the averaged weights; 0 is no averaging", group="optimisation"
    )
    ema_update_every: int = opt(1, "steps between two updates of the average", group="optimisation")

    use_amp: bool = opt(True, "mixed precision where --amp_dtype gives one", group="speed")
    amp_dtype: str = opt(
        "auto",
        "auto: on CUDA bf16, or fp16 where that is missing; on a CPU float32",
        group="speed",
        choices=("auto", "bf16", "fp16"),
    )
    compile_model: bool | None = opt(None, "torch.compile; by default on for CUDA", group="speed")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N", group="speed")
    threads: int | None = opt(None, "threads of a CPU (default: all cores)", group="speed")
    deterministic: bool = opt(
        False, "deterministic kernels alone, an error where there is none", group="speed"
    )

    val_interval: int = opt(1, "epochs between validations", group="validation")
    val_crop_border: int = opt(
        128, "pixels removed on each side before scoring", group="validation"
    )
    metric_floor: float = opt(1e-6, "smallest denominator of the reported MRAE", group="validation")

    output_dir: str = opt("./experiments", "folder of runs", group="run")
    experiment_name: str = opt("", "folder of this run (default: hsifusion_<size>)", group="run")
    resume_from: str | None = opt(
        None, "checkpoint to go on from; `auto`: last.ckpt if any", group="run"
    )
    init_from: str | None = opt(
        None, "weights to start a new run from, .ckpt or .safetensors", group="run"
    )
    log_interval: int = opt(50, "optimizer steps between log lines", group="run")
    save_minutes: float = opt(10.0, "minutes between saves inside an epoch", group="run")
    wandb: str | None = opt(None, "mirror the log to this Weights & Biases project", group="run")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data_root = self.data_root or os.environ.get("HSI_DATA_DIR") or "./data/ARAD_1K"
        self.experiment_name = self.experiment_name or f"{MODEL}_{self.model_size}"
        for name in ("epochs", "batch_size", "accumulate_steps", "ema_update_every"):
            self._check_positive(name)
        for name in ("val_interval", "log_interval", "lr", "metric_floor"):
            self._check_positive(name)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay {self.ema_decay}: must lie in [0, 1)")
        if not 0 <= self.eta_min <= self.lr:
            raise ValueError(f"--eta_min {self.eta_min}: must lie between 0 and --lr {self.lr}")

    def _check_positive(self, name: str) -> None:
        if getattr(self, name) <= 0:
            raise ValueError(f"--{name} {getattr(self, name)}: must be above 0")


# The model's fields are flags too; one that is not given keeps the size's value.
NOT_FLAGS = ("in_channels", "out_channels")
Settings = dataclasses.make_dataclass(
    "Settings", common.optional_fields(LightningProConfig, skip=NOT_FLAGS), bases=(TrainConfig,)
)


def learning_rate(step: int, cfg: TrainConfig, steps_per_epoch: int) -> float:
    """Linear warm-up from above 0, then a cosine to eta_min, where it stays: a pure function of the
    step."""
    total = cfg.epochs * steps_per_epoch
    warmup = min(int(cfg.warmup_epochs * steps_per_epoch), total // 2)
    if step < warmup:
        return cfg.lr * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return cfg.eta_min + 0.5 * (cfg.lr - cfg.eta_min) * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """Fused Adam or AdamW; weight decay on matrices and kernels alone."""
    kind = torch.optim.AdamW if cfg.optimizer == "adamw" else torch.optim.Adam
    groups = common.decay_groups(model, cfg.weight_decay)
    return kind(groups, lr=cfg.lr, betas=(0.9, 0.999), fused=True)


class Run:
    """One training run: what it trains, how far it is, and the loop."""

    def __init__(
        self, cfg: TrainConfig, ranks: Ranks, device: torch.device, folder: RunFolder
    ) -> None:
        self.cfg, self.ranks, self.device, self.folder = cfg, ranks, device, folder
        self.stop = StopSignal()
        resume, state = folder.resume(cfg.resume_from)

        cfg.rank, cfg.world_size = ranks.rank, ranks.world_size
        cfg.on_gpu = device.type == "cuda"
        self.train_loader, self.val_loader = create_optimized_dataloaders(cfg)
        cfg.mix_until = cfg.epochs * len(self.train_loader)
        self.train_loader.start_workers()
        ranks.join(device)
        found = (str(resume), state.get("step") if state else 0)
        ranks.agree(found, "the checkpoint to go on from")
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
        warmup_steps = int(cfg.warmup_epochs * self.steps_per_epoch)
        self.loss_fn = MSTPlusPlusLoss(cfg.train_floor, cfg.train_floor_start, warmup_steps)

        self.make_model(state, resume)
        self.epoch = self.iteration = self.step = 0
        self.validated = -1  # the last epoch that was
        self.best = math.inf
        self.best_metrics: dict = {}
        self.metrics: dict = {}
        if state and resume:
            with restoring(resume):
                self.load(state, resume)
        learnt = (self.model, self.optimizer, self.scaler, self.average)
        self.sound = SoundState(*(part for part in learnt if part is not None))
        self.start_log()

    def say(self, text: str) -> None:
        if self.ranks.is_main:
            terminal.say(text)

    def make_model(self, state: dict | None, resume: Path | None) -> None:
        """Model, what wraps it, its average, optimizer and schedule."""
        cfg, device = self.cfg, self.device
        # The same weights on every rank: DDP broadcasts rank 0's, which start at the linear path.
        common.seed_everything(cfg.seed)
        self.model = self.create().to(device)
        if state and resume:
            load_weights(self.model, state["state_dict"], resume)
        elif self.ranks.is_main:
            rgb, cube = self.train_loader.spread(FIT_PIXELS)
            rgb, cube = rgb.to(device), cube.to(device)
            self.say(start_weights(self.model, MODEL, cfg.init_from, rgb, cube, self.loss_fn))
        if self.model.config.use_channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network: nn.Module = self.model
        self.distributed: DistributedDataParallel | None = None
        if self.ranks.world_size > 1:
            self.distributed = devices.distribute(self.model, device)
            self.network = self.distributed
        self.average = common.make_average(self.model, cfg.ema_decay, cfg.ema_update_every)
        self.amp = devices.autocast_type(cfg.use_amp, cfg.amp_dtype, device)
        self.compiled = self.compile()
        common.seed_everything(cfg.seed + self.ranks.rank)  # dropout differs between ranks

        self.optimizer = make_optimizer(self.model, cfg)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate(step, cfg, self.steps_per_epoch) / cfg.lr
        )
        self.scaler = common.make_scaler(device, self.amp)
        self.skipped = torch.zeros((), device=device)  # steps in a row

    def compile(self) -> bool:
        """Compile the network where it is asked for, or pays, and works."""
        cfg, obstacle = self.cfg, ""
        if self.model.config.use_moe:
            obstacle = "each of --use_moe's experts breaks the compiled graph"
        shape = (cfg.batch_size, self.model.config.in_channels, cfg.patch_size, cfg.patch_size)
        return devices.compile_in_place(
            self.network,
            self.device,
            self.ranks,
            lambda: devices.trial_step(self.network, shape, self.device, self.amp),
            wanted=cfg.compile_model,
            obstacle=obstacle,
        )

    def create(self) -> HSIFusionNet:
        cfg, given = self.cfg, common.given_fields(self.cfg, LightningProConfig)
        bands = len(self.train_loader.wavelengths)
        try:
            model = create_hsifusion_lightning_pro(cfg.model_size, out_channels=bands, **given)
        except ValueError as error:
            raise UserError(str(error)) from None
        least = model.config.min_input_size
        if cfg.patch_size < least:
            raise UserError(f"--patch_size {cfg.patch_size}: below --min_input_size {least}")
        return model

    def start_log(self) -> None:
        """config.json, which --config reads back, the log, and the bar."""
        cfg = self.cfg
        fields = dataclasses.fields(cfg)
        settings = {field.name: getattr(cfg, field.name) for field in fields if field.metadata}
        settings |= {"compile_model": self.compiled, "use_amp": self.amp is not None}
        settings["device"] = str(self.device)
        if self.amp is not None:
            settings["amp_dtype"] = "bf16" if self.amp == torch.bfloat16 else "fp16"
        self.settings = settings
        self.log = RunLog(self.folder.logs, self.ranks, self.step, cfg.wandb, settings)
        if self.ranks.is_main:
            common.write_json(self.folder.logs / "config.json", settings)
        parameters = sum(p.numel() for p in self.model.parameters())
        bands, compiled = len(self.train_loader.wavelengths), "on" if self.compiled else "off"
        self.say(
            f"model: {MODEL} {cfg.model_size}, {parameters / 1e6:.2f} M parameters, {bands} bands; "
            f"{self.device}, {self.amp or torch.float32}, compile {compiled}; "
            f"run: {self.folder.logs}"
        )
        self.saved_at = time.monotonic()
        self.bar = terminal.bar(
            total=cfg.epochs * self.iterations,
            initial=self.epoch * self.iterations + self.iteration,
            unit="it",
            smoothing=0.02,
            desc="train",
        )

    # --- the loop

    def train(self) -> int:
        """All epochs -> exit code."""
        start, done = time.monotonic(), False
        with self.bar:
            while self.epoch < self.cfg.epochs:
                done = self.train_epoch() and self.validate()
                if not done:
                    break
                self.epoch, self.iteration = self.epoch + 1, 0
                self.save("last.ckpt")
        self.log.close()
        if not done and self.epoch < self.cfg.epochs:
            self.save("last.ckpt")
            last = self.folder.checkpoints / "last.ckpt"
            self.say(f"stopped by a signal: saved {last}; go on with --resume_from auto")
            return STOPPED
        if self.ranks.is_main:
            self.write_summary(time.monotonic() - start)
        best = f"best crop MRAE {self.best:.4f} in {self.folder.checkpoints / 'best.ckpt'}"
        self.say(f"done: {best if math.isfinite(self.best) else 'no validation gave a number'}")
        return 0

    def train_epoch(self) -> bool:
        """The rest of the epoch; False when a signal stops it, always after a whole optimizer
        step."""
        cfg, group = self.cfg, self.cfg.accumulate_steps
        self.network.train()
        self.train_loader.set_position(self.epoch, self.iteration)
        self.totals = torch.zeros(3, device=self.device)  # loss, MRAE, batches since the last line
        self.logged = (time.monotonic(), self.iteration)
        for batch in self.train_loader:
            first = self.iteration - self.iteration % group
            size = min(group, self.iterations - first)  # of this group; the last may be smaller
            last = self.iteration + 1 == first + size
            with self.gradients_stay_here(not last):
                self.backward(*prepare_batch(batch, self.device), size)
            self.iteration += 1
            self.bar.update()
            if not last:
                continue
            self.optimizer_step()
            if self.step % cfg.log_interval == 0 or self.iteration == self.iterations:
                self.log_progress()
            stop, save = self.asked()
            if stop and self.iteration < self.iterations:
                return False
            if save:
                self.save("last.ckpt")
        return True

    def gradients_stay_here(self, here: bool) -> AbstractContextManager:
        """Ranks exchange gradients with the last batch of a group only."""
        if here and self.distributed is not None:
            return self.distributed.no_sync()
        return nullcontext()

    def backward(self, rgb: Tensor, cube: Tensor, group: int) -> None:
        """Forward and backward of one of `group` batches whose gradients make a step."""
        self.loss_fn.step = self.step
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            output = self.network(rgb)
            pred, scale = output if isinstance(output, tuple) else (output, None)
            error = self.loss_fn(pred, cube)
            loss = error + self.model.auxiliary_loss()
            if scale is not None:
                loss = loss + LIKELIHOOD_WEIGHT * laplace_nll(pred, scale, cube)
        self.scaler.scale(loss / group).backward()
        found = torch.stack([loss, error, torch.ones_like(error)]).detach()
        self.totals += found.where(found.isfinite().all(), 0)  # else the step is skipped

    def optimizer_step(self) -> None:
        self.scaler.unscale_(self.optimizer)
        limit = self.cfg.gradient_clip or math.inf
        self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.skipped = (self.skipped + 1) * ~self.norm.isfinite()
        self.scaler.step(self.optimizer)  # fused: it reads the scaler's flag on the device, no sync
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.schedule.step()
        self.step += 1
        self.check_skipped()
        if self.average is not None and self.step % self.cfg.ema_update_every == 0:
            self.average.update()

    def check_skipped(self) -> None:
        if self.device.type != "cpu" and self.step % CHECK_EVERY:
            return  # to look would wait for the device
        if self.skipped >= SKIPPED_LIMIT:
            count = int(self.skipped)
            what = f"step {self.step}: {count} steps in a row had non-finite gradients"
            self.say(self.sound.go_back(what))
            self.skipped.zero_()

    def log_progress(self) -> None:
        """One line of metrics.jsonl and the bar's text; the only place where a step waits for the
        device."""
        loss, error, batches = self.ranks.sum(self.totals).tolist()
        self.totals.zero_()
        if not batches:
            return  # the gradients of no step were finite
        loss, error = loss / batches, error / batches
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
        due = time.monotonic() - self.saved_at > 60 * self.cfg.save_minutes
        if self.ranks.world_size > 1 and self.step % AGREE_EVERY:
            return False, False
        stop, save = self.ranks.any(self.stop.requested, due)
        return stop, save

    # --- validation

    def validate(self) -> bool:
        """Where it is due, score full frames with the averaged weights and keep the best; False
        when a signal stops it."""
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
            self.save("best.ckpt")
            self.save_best_weights()
        return True

    @torch.no_grad()
    def score_scenes(self) -> list[tuple[str, dict]]:
        """(name, metrics) of this rank's scenes, or of some where a signal stops it; the first one
        is drawn."""
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
        average = self.average
        return self.model if average is None else average.module

    # --- state

    def save(self, name: str) -> None:
        """Write a checkpoint with all that a bit-exact resume needs; every rank takes part."""
        self.train_loader.check.finish(self.ranks)
        rng = self.ranks.gather(rng_state())
        self.saved_at = time.monotonic()
        if not self.ranks.is_main:
            return
        average = {"ema": None, "ema_updates": 0}
        if self.average is not None:
            average = self.average.state_dict()
        state = {
            "model": MODEL,
            "model_config": dataclasses.asdict(self.model.config),
            "data": self.data_facts,
            "settings": self.settings,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": rng,
        }
        state |= average | {key: getattr(self, key) for key in PROGRESS}
        self.folder.save(name, state)

    def save_best_weights(self) -> None:
        """best.safetensors: the weights that were scored, for inference."""
        if not self.ranks.is_main:
            return
        save_weights(
            self.folder.checkpoints / "best.safetensors",
            self.averaged_model().state_dict(),
            MODEL,
            dataclasses.asdict(self.model.config),
            self.data_facts,
            averaged=self.average is not None,
        )

    def write_summary(self, seconds: float) -> None:
        summary = {
            "settings": self.settings,
            "model": dataclasses.asdict(self.model.config),
            "data": self.data_facts,
            "environment": environment_record(self.device),
            "steps": self.step,
            "best_mrae": self.best,
            "best": self.best_metrics,
            "last": self.metrics,
            "seconds": seconds,
        }
        common.write_json(self.folder.logs / "summary.json", summary)
        write_run_figure(self.folder.logs)

    def load(self, state: dict, path: Path) -> None:
        """Go on from a checkpoint's state; the model's weights are loaded already."""
        cfg = self.cfg
        needed = ("settings", "optimizer", "schedule", "scaler", "rng", *PROGRESS)
        check_progress(state, needed, self.iterations, path)
        check_resumed_data(state["data"], self.data_facts, path)
        common.restore(self.optimizer, self.scaler, state)
        if self.average is not None and state["ema"]:
            self.average.load_state_dict(state)
        common.restore_schedule(self.schedule, state["schedule"], cfg.lr, cfg.weight_decay)
        if len(state["rng"]) == self.ranks.world_size:
            set_rng_state(state["rng"][self.ranks.rank])
        for key in PROGRESS:
            setattr(self, key, state[key])
        if not keeps_best(state["settings"], cfg, self.folder):
            self.best, self.best_metrics = math.inf, {}
        place = f"epoch {self.epoch}, iteration {self.iteration}, step {self.step}"
        self.say(f"resumed: {path} at {place}")


def main() -> int:
    cfg = common.parse_dataclass(Settings, description=__doc__)
    devices.prepare_cuda(cfg.deterministic)
    devices.use_threads(cfg.threads)
    ranks = Ranks.announced()
    device = devices.resolve_device(cfg.device, ranks.local_rank)
    with devices.errors_in_one_line(device):
        run = Run(cfg, ranks, device, RunFolder.of(cfg.output_dir, cfg.experiment_name))
        code = run.train()
    ranks.leave()
    return code


if __name__ == "__main__":
    common.run_cli(main)
