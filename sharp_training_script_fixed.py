"""Train SHARP v3.2.2 on a staged data set or a raw ARAD-1K folder.

One process (a laptop, or one GPU):
    python sharp_training_script_fixed.py --data_root data/staged --model_size tiny --epochs 20
Four GPUs of one machine; --batch_size is per process:
    python -m torch.distributed.run --nproc_per_node=4 sharp_training_script_fixed.py --data_root data/staged --memory_mode lazy
Go on after a stop, a crash or a preemption, bit for bit on a CPU:
    python sharp_training_script_fixed.py --data_root data/staged --model_size tiny --epochs 20 --resume_from auto

A run lives in <output_dir>/<experiment_name>: config.json, last.ckpt, best.ckpt, best.safetensors, metrics.jsonl,
summary.json and TensorBoard files. SIGTERM, SIGINT and SIGUSR1 finish the step, save, and exit with code 75.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common_utils_v32 as common
from common_utils_v32 import Ranks, RunFolder, RunLog, UserError, opt
from optimized_dataloader import (
    DataConfig,
    MSTPlusPlusLoss,
    create_optimized_dataloaders,
    prepare_batch,
)
from sharp_v322_hardened import SIZES, SHARPv32Config, SHARPv32Trainer, create_sharp_v32
from spectral_evaluation import bootstrap_interval, mean_metrics, scene_figure, scene_metrics

MODEL = "sharp"
PROGRESS = (
    "epoch",
    "iteration",
    "step",
    "validated",
    "best",
    "best_metrics",
    "metrics",
)  # how far a run is
FIT_PIXELS = 2**18  # that the linear path is fitted on
AGREE_EVERY = 10  # steps between two looks at what other ranks were asked


@dataclasses.dataclass
class TrainConfig(DataConfig):
    """Settings of a run; every field is a flag, those of the data set's configuration too."""

    data_root: str = opt(
        "", "staged or raw ARAD-1K folder (default: $HSI_DATA_DIR or ./data/ARAD_1K)", group="data"
    )
    batch_size: int = opt(20, "patches per batch and process", group="data")

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
    compile_model: bool | None = opt(
        None, "torch.compile; by default on for CUDA, or with --compile_mode", group="speed"
    )
    use_channels_last: bool = opt(
        True, "weights of convolutions in channels_last memory", group="speed"
    )
    device: str = opt("auto", "auto, cpu, cuda or cuda:N", group="speed")
    deterministic: bool = opt(
        False, "deterministic CUDA kernels; a warning names those that are not", group="speed"
    )

    val_interval: int = opt(1, "epochs between validations", group="validation")
    val_crop_border: int = opt(
        128, "pixels removed on each side before scoring", group="validation"
    )
    metric_floor: float = opt(1e-6, "smallest denominator of the reported MRAE", group="validation")

    output_dir: str = opt("./experiments", "folder of runs", group="run")
    experiment_name: str = opt("", "folder of this run (default: sharp)", group="run")
    resume_from: str | None = opt(
        None, "checkpoint to go on from; `auto`: last.ckpt if any", group="run"
    )
    log_interval: int = opt(50, "optimizer steps between log lines", group="run")
    save_minutes: float = opt(10.0, "minutes between saves inside an epoch", group="run")
    wandb: str | None = opt(None, "mirror the log to this Weights & Biases project", group="run")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data_root = self.data_root or os.environ.get("HSI_DATA_DIR") or "./data/ARAD_1K"
        self.experiment_name = self.experiment_name or MODEL
        positive = (
            "epochs",
            "batch_size",
            "accumulate_steps",
            "ema_update_every",
            "val_interval",
            "log_interval",
            "lr",
            "metric_floor",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must be above 0")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay {self.ema_decay}: must lie in [0, 1)")
        if not 0 <= self.eta_min <= self.lr:
            raise ValueError(f"--eta_min {self.eta_min}: must lie between 0 and --lr {self.lr}")


# A field of the model that is not given keeps the size's value.
Settings = dataclasses.make_dataclass(
    "Settings",
    common.optional_fields(
        SHARPv32Config, skip=("in_channels", "out_channels", "ema_update_every")
    ),
    bases=(TrainConfig,),
)


def learning_rate(step: int, cfg: TrainConfig, steps_per_epoch: int) -> float:
    """Linear warm-up from above 0, then a cosine to eta_min, where it stays. A pure function of the step."""
    warmup = min(int(cfg.warmup_epochs * steps_per_epoch), cfg.epochs * steps_per_epoch // 2)
    if step < warmup:
        return cfg.lr * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, cfg.epochs * steps_per_epoch - warmup))
    return cfg.eta_min + 0.5 * (cfg.lr - cfg.eta_min) * (1 + math.cos(math.pi * progress))


def precision(cfg: TrainConfig, device: torch.device) -> torch.dtype | None:
    """The autocast type, or None for float32."""
    if not cfg.use_amp or (cfg.amp_dtype == "auto" and device.type == "cpu"):
        return None
    if cfg.amp_dtype == "auto":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    return torch.bfloat16 if cfg.amp_dtype == "bf16" else torch.float16


def compile_in_place(network: nn.Module, cfg: Settings, device: torch.device) -> bool:
    """Compile without changing the state dict's keys; True when it is on."""
    wanted = (
        cfg.compile_model
        if cfg.compile_model is not None
        else device.type == "cuda" or cfg.compile_mode is not None
    )
    if wanted and not common.find_compiler():
        if cfg.compile_model:
            raise UserError(
                "--compile_model needs a C++ compiler: install g++ or give --no-compile_model"
            )
        print("no C++ compiler found: going on without torch.compile", file=sys.stderr)
        return False
    if wanted:
        network.compile(mode=cfg.compile_mode)
    return wanted


class Run:
    """One training run: what it trains, how far it is, and the loop."""

    def __init__(
        self, cfg: Settings, ranks: Ranks, device: torch.device, folder: RunFolder
    ) -> None:
        self.cfg, self.ranks, self.device, self.folder = cfg, ranks, device, folder
        self.stop, self.say = (
            common.StopSignal(),
            tqdm.write if ranks.is_main else lambda text: None,
        )
        resume = folder.resume_path(cfg.resume_from)
        state = common.read_checkpoint(resume) if resume else None
        ranks.agree(
            (str(resume), state.get("step") if state else 0), "the checkpoint to go on from"
        )
        cfg.rank, cfg.world_size = ranks.rank, ranks.world_size
        self.train_loader, self.val_loader = create_optimized_dataloaders(cfg)
        self.say(f"data: {self.train_loader.describe()}")

        # The same weights on every rank: DDP broadcasts rank 0's, which start at the fitted linear path.
        fields = {f.name: getattr(cfg, f.name, None) for f in dataclasses.fields(SHARPv32Config)}
        given = {
            name: value
            for name, value in fields.items()
            if value is not None and name != "compile_mode"
        }
        common.seed_everything(cfg.seed)
        bands = len(self.train_loader.wavelengths)
        try:
            model = create_sharp_v32(cfg.model_size, out_channels=bands, **given).to(device)
        except ValueError as error:
            raise UserError(str(error)) from None
        if cfg.patch_size < model.config.min_input_size:
            raise UserError(
                f"--patch_size {cfg.patch_size}: below --min_input_size {model.config.min_input_size}"
            )
        if state:
            common.load_weights(model, state["state_dict"], resume)
        elif ranks.is_main:
            model.fit_spectral_path(*(x.to(device) for x in self.train_loader.spread(FIT_PIXELS)))
        if cfg.use_channels_last:
            model.to(memory_format=torch.channels_last)
        network, self.amp = model, precision(cfg, device)
        if ranks.world_size > 1:
            network = DistributedDataParallel(
                model, device_ids=[device] if device.type == "cuda" else None
            )
        compiled = compile_in_place(network, cfg, device)
        self.iterations = len(self.train_loader)
        steps = math.ceil(self.iterations / cfg.accumulate_steps)
        self.loss_fn = MSTPlusPlusLoss(
            cfg.train_floor, cfg.train_floor_start, int(cfg.warmup_epochs * steps)
        )
        self.engine = SHARPv32Trainer(
            network,
            self.loss_fn,
            lr=cfg.lr,
            weight_decay=cfg.weight_decay,
            optimizer=torch.optim.AdamW if cfg.optimizer == "adamw" else torch.optim.Adam,
            amp_dtype=self.amp,
            grad_clip=cfg.gradient_clip,
            ema_decay=cfg.ema_decay,
            ema_update_every=cfg.ema_update_every,
        )
        common.seed_everything(cfg.seed + ranks.rank)  # dropout differs between ranks

        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.engine.optimizer, lambda step: learning_rate(step, cfg, steps) / cfg.lr
        )
        self.data_facts = {
            "rgb_norm": cfg.rgb_norm,
            "wavelengths": list(self.train_loader.wavelengths),
            "train_floor": cfg.train_floor,
            "metric_floor": cfg.metric_floor,
        }
        self.epoch = self.iteration = self.step = 0
        self.validated, self.best, self.best_metrics, self.metrics = -1, math.inf, {}, {}
        if state:
            self.load(state, resume)

        self.settings = {
            f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if "help" in f.metadata
        } | {
            "compile_model": compiled,
            "use_amp": self.amp is not None,
            "device": str(device),
        }  # --config reads it back
        if self.amp is not None:
            self.settings["amp_dtype"] = "bf16" if self.amp == torch.bfloat16 else "fp16"
        self.log = RunLog(folder.logs, ranks, self.step, cfg.wandb, self.settings)
        if ranks.is_main:
            common.write_json(folder.logs / "config.json", self.settings)
        parameters = sum(p.numel() for p in self.engine.model.parameters())
        self.say(
            f"model: {MODEL} {cfg.model_size}, {parameters / 1e6:.2f} M parameters, {bands} bands; {device}, "
            f"{self.amp or torch.float32}, compile {'on' if compiled else 'off'}; run: {folder.logs}"
        )

        self.saved_at = time.monotonic()
        self.bar = tqdm(
            total=cfg.epochs * self.iterations,
            initial=self.epoch * self.iterations + self.iteration,
            unit="it",
            smoothing=0.02,
            disable=not ranks.is_main,
            dynamic_ncols=True,
            desc="train",
            mininterval=0.2 if sys.stderr.isatty() else 60,
            maxinterval=60,
        )  # a log file is not filled with bars

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
        last = self.folder.checkpoints / "last.ckpt"
        if not done and self.epoch < self.cfg.epochs:
            self.save("last.ckpt")
            self.say(f"stopped by a signal: saved {last}; go on with --resume_from auto")
            return common.STOPPED
        if self.ranks.is_main:
            common.write_json(
                self.folder.logs / "summary.json",
                {
                    "settings": self.settings,
                    "model": dataclasses.asdict(self.engine.model.config),
                    "data": self.data_facts,
                    "environment": common.environment_record(),
                    "steps": self.step,
                    "best_mrae": self.best,
                    "best": self.best_metrics,
                    "last": self.metrics,
                    "seconds": time.monotonic() - start,
                },
            )
        self.say(f"done: best crop MRAE {self.best:.4f} in {self.folder.checkpoints / 'best.ckpt'}")
        return 0

    def train_epoch(self) -> bool:
        """The rest of the epoch; False when a signal stops it, always after a whole optimizer step."""
        cfg = self.cfg
        self.engine.wrapped.train()
        self.train_loader.set_position(self.epoch, self.iteration)
        self.totals = torch.zeros(
            3, device=self.device
        )  # loss, MRAE, steps since the last log line
        self.logged = (time.monotonic(), self.iteration)
        group = []
        for batch in self.train_loader:
            group.append(prepare_batch(batch, self.device))
            self.bar.update()
            done = self.iteration + len(group)
            if len(group) < cfg.accumulate_steps and done < self.iterations:
                continue
            self.loss_fn.step = self.step
            self.iteration, self.lr = done, self.engine.optimizer.param_groups[0]["lr"]
            try:
                result = self.engine.train_step(group)
            except FloatingPointError as error:
                raise UserError(
                    f"step {self.step}: {error}; try a lower --lr or a higher --train_floor"
                ) from None
            self.totals += torch.stack(
                [result["loss"], result["error"], torch.ones_like(self.totals[0])]
            )
            self.norm = result["grad_norm"]
            self.schedule.step()
            self.step += 1
            group = []
            if self.step % cfg.log_interval == 0 or self.iteration == self.iterations:
                self.log_progress()
            stop, save = self.asked()
            if stop and self.iteration < self.iterations:
                return False
            if save:
                self.save("last.ckpt")
        return True

    def log_progress(self) -> None:
        """One line of metrics.jsonl and the bar's text; the only place where a step waits for the device."""
        loss, error = (self.ranks.sum(self.totals)[:2] / self.totals[2]).tolist()
        now, (then, iteration) = time.monotonic(), self.logged
        speed = (
            (self.iteration - iteration)
            * self.cfg.batch_size
            * self.ranks.world_size
            / (now - then)
        )
        memory = common.memory_gb(self.device)
        self.log.write(
            "train",
            self.step,
            {
                "epoch": self.epoch,
                "loss": loss,
                "mrae": error,
                "lr": self.lr,
                "grad_norm": self.norm.item(),
                "patches_per_second": speed,
                "memory_gb": memory,
            },
        )
        self.bar.set_postfix_str(
            f"loss {loss:.4f} MRAE {error:.4f} lr {self.lr:.1e} {speed:.0f} patches/s {memory:.1f} GB",
            refresh=sys.stderr.isatty(),
        )
        self.totals.zero_()
        self.logged = (now, self.iteration)

    def asked(self) -> tuple[bool, bool]:
        """(stop, save) now? All ranks give the same answer."""
        due = time.monotonic() - self.saved_at > 60 * self.cfg.save_minutes
        if self.ranks.world_size > 1 and self.step % AGREE_EVERY:
            return False, False
        return self.ranks.any(self.stop.requested, due, device=self.device)

    @torch.no_grad()
    def validate(self) -> bool:
        """Score full frames with the averaged weights where it is due, keep the best; False when a signal stops it."""
        cfg = self.cfg
        due = (self.epoch + 1) % cfg.val_interval == 0 or self.epoch + 1 == cfg.epochs
        if not due or self.validated >= self.epoch:
            return True
        average = self.engine.average
        model = (average.module if average is not None else self.engine.model).eval()
        scores, figure = [], None
        for scene in self.val_loader:
            if self.stop.requested:
                break
            with (
                torch.compiler.set_stance("force_eager")
                if self.settings["compile_model"]
                else nullcontext()
            ):
                output = model(scene.rgb.to(self.device))
            pred, cube = (
                output[0] if isinstance(output, tuple) else output,
                scene.cube.to(self.device),
            )
            scores.append(
                (
                    scene.name,
                    scene_metrics(pred, cube, floor=cfg.metric_floor, border=cfg.val_crop_border),
                )
            )
            if figure is None and self.ranks.is_main:
                parts = (x[0].float().cpu() for x in (scene.rgb, pred, cube))
                figure = scene_figure(*parts, self.data_facts["wavelengths"])
        if self.ranks.any(self.stop.requested, device=self.device)[0]:
            return False
        scores = [metrics for _, metrics in sorted(sum(self.ranks.gather(scores), []))]
        interval = bootstrap_interval([metrics["mrae"] for metrics in scores])
        self.metrics = mean_metrics(scores) | {
            "mrae_interval_95": list(interval),
            "border": scores[0]["border"],
            "scenes": len(scores),
        }
        self.validated = self.epoch
        self.log.write(
            "val", self.step, {"epoch": self.epoch, "rgb_norm": cfg.rgb_norm} | self.metrics
        )
        self.log.figure("val/scene", self.step, figure)
        m = self.metrics
        self.say(
            f"epoch {self.epoch + 1}/{cfg.epochs}: MRAE {m['mrae']:.4f}, RMSE {m['rmse']:.4f}, PSNR {m['psnr']:.2f} dB, "
            f"SAM {m['sam']:.2f} degrees; full frame MRAE {m['mrae_full']:.4f} (floor {cfg.metric_floor:g}, "
            f"rgb {cfg.rgb_norm})"
        )
        if m["mrae"] < self.best:
            self.best, self.best_metrics = m["mrae"], m
            self.save("best.ckpt")
            if self.ranks.is_main:
                common.save_weights(
                    self.folder.checkpoints / "best.safetensors",
                    model.state_dict(),
                    MODEL,
                    dataclasses.asdict(self.engine.model.config),
                    self.data_facts,
                    average is not None,
                )
        return True

    # --- state

    def save(self, name: str) -> None:
        """Write a checkpoint with all that a bit-exact resume needs; every rank takes part."""
        rng = self.ranks.gather(common.rng_state())
        self.saved_at = time.monotonic()
        if not self.ranks.is_main:
            return
        engine = self.engine.state_dict()
        common.save_checkpoint(
            self.folder.checkpoints / name,
            {
                "model": MODEL,
                "model_config": dataclasses.asdict(self.engine.model.config),
                "data": self.data_facts,
                "settings": self.settings,
                "schedule": self.schedule.state_dict(),
                "rng": rng,
                "state_dict": engine.pop("state_dict"),
                "ema": engine.pop("ema"),
                "engine": engine,
                **{key: getattr(self, key) for key in PROGRESS},
            },
        )

    def load(self, state: dict, path: Path) -> None:
        """Go on from a checkpoint's state (the model's weights are loaded already)."""
        missing = [
            key for key in ("settings", "engine", "schedule", "rng", *PROGRESS) if key not in state
        ]
        if missing:
            raise UserError(
                f"--resume_from {path}: holds weights but no run to go on from (no {missing[0]})"
            )
        for key in ("rgb_norm", "wavelengths"):
            if state["data"].get(key) != self.data_facts[key]:
                raise UserError(
                    f"--resume_from {path}: trained with {key} {state['data'].get(key)}, not {self.data_facts[key]}"
                )
        self.engine.load_state_dict(
            state["engine"] | {"state_dict": state["state_dict"], "ema": state["ema"]}
        )
        common.restore_schedule(
            self.schedule, state["schedule"], self.cfg.lr, self.cfg.weight_decay
        )
        if len(state["rng"]) == self.ranks.world_size:
            common.set_rng_state(state["rng"][self.ranks.rank])
        for key in PROGRESS:
            setattr(self, key, state[key])
        if self.iteration > self.iterations:
            raise UserError(
                f"--resume_from {path}: stands at iteration {self.iteration} of an epoch that now has "
                f"{self.iterations}; give the --iterations_per_epoch, --batch_size and ranks of that run"
            )
        if any(
            state["settings"][key] != getattr(self.cfg, key)
            for key in ("metric_floor", "val_crop_border")
        ):
            self.best, self.best_metrics = math.inf, {}  # of another measure
        self.say(
            f"resumed: {path} at epoch {self.epoch}, iteration {self.iteration}, step {self.step}"
        )


def main() -> int:
    cfg = common.parse_dataclass(Settings, description=__doc__)
    common.set_default_environment()
    ranks, device = common.init_process_group(cfg.device)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(
            True, warn_only=True
        )  # few operators have no deterministic kernel: they are named
    run = Run(cfg, ranks, device, RunFolder.of(cfg.output_dir, cfg.experiment_name))
    code = run.train()
    ranks.leave()
    return code


if __name__ == "__main__":
    common.run_cli(main)
