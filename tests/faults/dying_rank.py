"""A rank of a trainer that dies in its third step, under torchrun: python dying_rank.py error|kill
TRAINER ARGUMENTS. Rank 1 meets an error of its disk, or is killed."""

import importlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common_utils_v32 import run_cli


def main():
    how, name = sys.argv[1:3]
    del sys.argv[1:3]
    trainer = importlib.import_module(name)
    prepare, count = trainer.prepare_batch, [0]

    def dying(*args):
        count[0] += 1
        if count[0] == 3 and os.environ["RANK"] == "1":
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(5, "Input/output error", "scene.cube.npy")
        return prepare(*args)

    trainer.prepare_batch = dying
    run_cli(trainer.main)


if __name__ == "__main__":
    main()
