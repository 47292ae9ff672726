"""Hours of load: what a trainer in `lazy` mode with worker processes, and inference over thousands
of photos, hold of memory, file handles and processes as they go on.

    python tests/faults/load.py --minutes 60 --trainer hsifusion_training

Half of the time is training, half inference; a line with the figures ends each."""

import argparse
import gc
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
from conftest import run_setup, write_raw_arad
from PIL import Image
from training_helpers import TRAINERS, after_step, make_run

import sharp_inference

WARM_UP = 0.2  # of the samples, which the slope leaves out
SCENES = tuple("abcdefgh")
PHOTOS = 60_000  # links to a few files: more than an hour takes


class TimeIsOver(Exception):
    pass


class Held(NamedTuple):
    """What a process holds."""

    done: int  # steps or photos
    memory: float  # MB, resident
    workers: float  # MB, of its processes together
    handles: int
    processes: int


def held(done=0):
    process = psutil.Process()
    workers = process.children(recursive=True)
    memory = sum(worker.memory_info().rss for worker in workers)
    own = process.memory_info().rss / 1e6
    return Held(done, own, memory / 1e6, process.num_fds(), len(workers))


def slope(counts, megabytes):
    """MB per 1000 of what is counted, by least squares, after the warm-up."""
    first = int(WARM_UP * len(counts))
    return 1000 * float(np.polyfit(counts[first:], megabytes[first:], 1)[0])


class Record:
    """Samples of what this process holds, each `every` things that are done."""

    def __init__(self, what, minutes, every):
        self.what, self.every = what, every
        self.before, self.samples, self.start = held(), [], time.monotonic()
        self.end = self.start + 60 * minutes

    def follow(self, done):
        """True when the time is over."""
        if done % self.every == 0:
            self.samples.append(held(done))
        return time.monotonic() > self.end

    def finish(self):
        """Print the figures -> (slope of memory, slope of the workers',
        handles left, processes left, how much was done)."""
        gc.collect()
        after, minutes = held(), (time.monotonic() - self.start) / 60
        first, last = self.samples[int(WARM_UP * len(self.samples))], self.samples[-1]
        counts = [sample.done for sample in self.samples]
        own = slope(counts, [sample.memory for sample in self.samples])
        workers = slope(counts, [sample.workers for sample in self.samples])
        print(
            f"{self.what}: {last.done} in {minutes:.0f} min; resident memory "
            f"{first.memory:.0f} to {last.memory:.0f} MB, {own:+.2f} MB per 1000; of its "
            f"{last.processes} worker processes {first.workers:.0f} to {last.workers:.0f} MB, "
            f"{workers:+.2f} MB per 1000; file handles {first.handles} to {last.handles}; at the "
            f"end {after.handles - self.before.handles} handles and "
            f"{after.processes - self.before.processes} processes more than before",
            flush=True,
        )
        left = (after.handles - self.before.handles, after.processes - self.before.processes)
        return (own, workers, *left, last.done)


def train(trainer, folder, minutes):
    """Training in lazy mode with two workers, epochs of 100 steps with a validation each."""
    raw = write_raw_arad(folder / "raw", train=SCENES, size=(128, 128))
    sizes = ("--patch-size", 64, "--workers", 1)
    run_setup("--arad-root", raw, "--output-root", folder / "staged", *sizes)
    record = Record(f"{trainer}, steps", minutes, 20)
    flags = ("--memory_mode", "lazy", "--num_workers", 2, "--epochs", 100_000)
    flags += ("--iterations_per_epoch", 100, "--log_interval", 50, "--save_minutes", 1)
    _train_until(record, make_run(trainer, folder / "staged", folder, *flags))
    return record.finish()  # when the run and its workers are no more


def _train_until(record, run):
    def sample(step):
        run.stop.requested |= record.follow(step)

    after_step(run, sample)
    run.train()


def predict(folder, minutes):
    """One run of sharp_inference.py over thousands of photos, by the weights that ship."""
    rng = np.random.default_rng(1)
    (folder / "photos").mkdir()
    originals = []
    for number in range(8):
        side = 64 + 8 * number
        coarse = rng.integers(20, 240, (side // 8, side // 8, 3), dtype=np.uint8)
        originals.append(folder / f"{number}.{'jpg' if number % 2 else 'png'}")
        Image.fromarray(coarse.repeat(8, 0).repeat(8, 1)).save(originals[-1])
    for number in range(PHOTOS):
        original = originals[number % len(originals)]
        os.link(original, folder / "photos" / f"{number:05}{original.suffix}")
    record, done = Record("inference, photos", minutes, 50), [0]
    reconstruct = sharp_inference.reconstruct

    def followed(model, path, target, *more):
        line = reconstruct(model, path, target, *more)
        target.unlink()
        done[0] += 1
        if record.follow(done[0]):
            raise TimeIsOver
        return line

    sharp_inference.reconstruct = followed
    files = ["--input", str(folder / "photos"), "--output", str(folder / "cubes")]
    words = open(folder / "words", "w")  # noqa: SIM115 (closed below)
    sys.stdout, terminal = words, sys.stdout
    try:
        sharp_inference.main([*files, "--device", "cpu", "--threads", "1"])
    except TimeIsOver:
        pass
    finally:
        sys.stdout, sharp_inference.reconstruct = terminal, reconstruct
        words.close()
    return record.finish()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--trainer", choices=TRAINERS, default=TRAINERS[0])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train(args.trainer, Path(folder), args.minutes / 2)
        predict(Path(folder), args.minutes / 2)


if __name__ == "__main__":
    main()
