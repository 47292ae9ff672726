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
threads wait busily, and two trainers on two cores slow each other tenfold without it."""

import dataclasses
import math
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import common_utils_v32 as common
import compute_devices as devices
import hsifusion_v252_complete as hsifusion
from common_utils_v32 import opt
from hsifusion_v252_complete import SIZES, LightningProConfig
from optimized_dataloader import DataConfig, prepare_batch
from training_state import RunState, complete_settings, run_trainer

MODEL = "hsifusion"
SKIPPED_LIMIT = 20  # steps with non-finite gradients in a row before a run gives up
CHECK_EVERY = 50  # steps between two looks of a GPU at their count
LIKELIHOOD_WEIGHT = 0.1  # of the uncertainty head's term in the loss
_data, _model = partial(opt, group="data"), partial(opt, group="model")
_learn, _speed = partial(opt, group="optimisation"), partial(opt, group="speed")
_validation, _run = partial(opt, group="validation"), partial(opt, group="run")


@dataclasses.dataclass
class TrainConfig(DataConfig):
    """Settings of a run; every field is a flag, those of the data set's configuration too."""

    data_root: str = _data("", "staged or raw ARAD-1K (default: $HSI_DATA_DIR or ./data/ARAD_1K)")
    batch_size: int = _data(12, "patches per batch and process")

    model_size: str = _model("base", "preset of the model's fields", choices=tuple(SIZES))

    epochs: int = _learn(300, "length of the run")
    accumulate_steps: int = _learn(1, "batches per optimizer step")
    optimizer: str = _learn("adamw", "update rule", choices=("adamw", "adam"))
    lr: float | None = _learn(None, "peak learning rate (default: 8e-4 for tiny, else 4e-4)")
    eta_min: float = _learn(1e-6, "learning rate at the end of the cosine")
    warmup_epochs: float | None = _learn(
        None, "epochs of linear warm-up (default: 5, at most a twentieth of the run)"
    )
    weight_decay: float = _learn(1e-4, "on weight matrices; never on norms, biases, layer scales")
    gradient_clip: float = _learn(1.0, "largest gradient norm; 0 is no clipping")
    train_floor: float = _learn(1e-3, "smallest denominator of the training MRAE")
    train_floor_start: float | None = _learn(None, "its value at first, falling over the warm-up")
    ema_decay: float = _learn(0.999, "decay of the averaged weights; 0 is no averaging")
    ema_update_every: int = _learn(1, "steps between two updates of the average")

    use_amp: bool = _speed(True, "mixed precision where --amp_dtype gives one")
    amp_dtype: str = _speed(
        "auto",
        "auto: on CUDA bf16, or fp16 where that is missing; on a CPU float32",
        choices=("auto", "bf16", "fp16"),
    )
    compile_model: bool | None = _speed(None, "torch.compile; by default on for CUDA")
    device: str = _speed("auto", "auto, cpu, cuda or cuda:N")
    threads: int | None = _speed(None, "threads of a CPU (default: all cores)")
    deterministic: bool = _speed(False, "deterministic kernels alone, an error where there is none")

    val_interval: int = _validation(1, "epochs between validations")
    val_crop_border: int = _validation(128, "pixels removed on each side before scoring")
    metric_floor: float = _validation(1e-6, "smallest denominator of the reported MRAE")

    output_dir: str = _run("./experiments", "folder of runs")
    experiment_name: str = _run("", "folder of this run (default: hsifusion_<size>)")
    resume_from: str | None = _run(None, "checkpoint to go on from; `auto`: last.ckpt if any")
    init_from: str | None = _run(None, "weights to start a new run from, .ckpt or .safetensors")
    log_interval: int = _run(50, "optimizer steps between log lines")
    save_minutes: float = _run(10.0, "minutes between saves inside an epoch")
    wandb: str | None = _run(None, "mirror the log to this Weights & Biases project")

    def __post_init__(self) -> None:
        super().__post_init__()
        complete_settings(self, f"{MODEL}_{self.model_size}")


# The model's fields are flags too; one that is not given keeps the size's value.
NOT_FLAGS = ("in_channels", "out_channels")
Settings = dataclasses.make_dataclass(
    "Settings", common.optional_fields(LightningProConfig, skip=NOT_FLAGS), bases=(TrainConfig,)
)


class Run(RunState):
    """One training run: the model, what trains it, and the loop."""

    kind, parts = MODEL, ("optimizer", "scaler")

    def make_model(self, state: dict | None, resume: Path | None) -> None:
        """Model, what wraps it, its average, optimizer and schedule."""
        cfg, device = self.cfg, self.device
        # The same weights on every rank: DDP broadcasts rank 0's, which start at the linear path.
        common.seed_everything(cfg.seed)
        model = self.create(hsifusion.create_hsifusion_lightning_pro, LightningProConfig)
        self.model = model.to(device)
        self.place_weights(self.model, state, resume)
        if self.model.config.use_channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.network: nn.Module = self.model
        self.distributed: DistributedDataParallel | None = None
        if self.ranks.world_size > 1:
            self.distributed = devices.distribute(self.model, device)
            self.network = self.distributed
        self.average = common.make_average(self.model, cfg.ema_decay, cfg.ema_update_every)
        self.amp = devices.autocast_type(cfg.use_amp, cfg.amp_dtype, device)
        self.compiled = self.compile()
        common.seed_everything(cfg.seed + self.ranks.rank)  # dropout differs between ranks

        kind = torch.optim.AdamW if cfg.optimizer == "adamw" else torch.optim.Adam
        groups = common.decay_groups(self.model, cfg.weight_decay)
        self.optimizer = kind(groups, lr=cfg.lr, betas=(0.9, 0.999), fused=True)
        self.schedule = self.make_schedule(self.optimizer)
        self.scaler = common.make_scaler(device, self.amp)
        self.skipped = torch.zeros((), device=device)  # steps in a row
        self.trained = [self.model, self.optimizer, self.scaler]
        if self.average is not None:
            self.trained.append(self.average)

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

    def train(self) -> int:
        start, done = time.monotonic(), False
        with self.bar:
            while self.epoch < self.cfg.epochs:
                done = self.train_epoch() and self.validate() and self.end_epoch()
                if not done:
                    break
        return self.finish(done, time.monotonic() - start)

    def train_epoch(self) -> bool:
        """The rest of the epoch; False when a signal stops it, after a whole optimizer step."""
        cfg, group = self.cfg, self.cfg.accumulate_steps
        self.network.train()
        self.train_loader.set_position(self.epoch, self.iteration)
        self.totals = torch.zeros(3, device=self.device)  # loss, MRAE, batches since the last line
        self.logged = (time.monotonic(), self.iteration)
        begun = self.iteration
        for batch in self.train_loader:
            first = self.iteration - (self.iteration - begun) % group
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
                loss = loss + LIKELIHOOD_WEIGHT * hsifusion.laplace_nll(pred, scale, cube)
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

    def learnt(self) -> dict:
        average = {"ema": None, "ema_updates": 0}
        if self.average is not None:
            average = self.average.state_dict()
        return average | {
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def learn_from(self, state: dict) -> None:
        common.restore(self.optimizer, self.scaler, state)
        if self.average is not None and state["ema"]:
            self.average.load_state_dict(state)


def main() -> int:
    return run_trainer(Settings, Run, __doc__)


if __name__ == "__main__":
    common.run_cli(main)
