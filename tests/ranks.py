"""Ranks of a trainer on this machine, as torchrun would start them, from one process that has
imported everything: python ranks.py TRAINER COUNT ARGUMENTS..."""

import importlib
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Imported once, not by each rank: an optimizer imports the compiler.
import torch._dynamo  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401

from common_utils_v32 import run_cli  # noqa: E402


def main():
    trainer, count = sys.argv[1], int(sys.argv[2])
    sys.argv = [trainer, *sys.argv[3:]]
    module = importlib.import_module(trainer)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
            place |= {"LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
            run_cli(module.main)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
