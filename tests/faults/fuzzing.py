"""Mutated inputs, and a forked child that is held to what a user may expect of any input: it is
accepted, or refused in one line; within some CPU time and memory."""

import json
import os
import random
import re
import resource
import signal
import struct
import sys
import time
from typing import NamedTuple

import psutil

from common_utils_v32 import run_cli

CPU_SECONDS = 10
MOST_MEMORY = 1.5 * 2**30  # resident, more than at the child's start
ADDRESSES = 12 << 30  # of memory, so that no bomb ends the machine
HANG_SECONDS = 120  # of the clock; a busy machine does not reach it
WORDS = ("", "-1", "0", "1", "2", "3.5", "1e999", "nan", "-inf", "65536", "4294967296", "9" * 30)
WORDS += ("x", "true", "null", "\ufeff", "\0", "é" * 300, "../../x", "/etc/passwd", "{", "[" * 5000)
VALUES = (None, True, False, -1, 0, 1, 3, 2.5, 1e30, 2**31, 2**63, 10**30, "", "x", "../x", "1")
VALUES += ([], [1], [None], {}, {"a": 1}, "\0", "nan", -(2**40), float("nan"))


class Outcome(NamedTuple):
    code: int  # of exit; below 0 the signal that ended it
    text: str  # what it said
    cpu: float  # seconds
    memory: float  # bytes, more than at its start

    @property
    def refused(self):
        return self.code == 2

    @property
    def problem(self):
        """What is wrong with it, or nothing."""
        if self.code == -signal.SIGXCPU or self.cpu > CPU_SECONDS:
            return f"{self.cpu:.1f} s of CPU time"
        if self.memory > MOST_MEMORY:
            return f"{self.memory / 2**30:.2f} GiB of memory"
        if self.code not in (0, 2) or "Traceback" in self.text:
            return f"exit code {self.code}"
        errors = [line for line in self.text.splitlines() if line.startswith("error: ")]
        if self.refused and (len(errors) != 1 or not self.text.endswith(errors[0] + "\n")):
            return "not one line"
        return ""


def attempt(main, log):
    """Run a script's main in a child, its words in the file `log` -> Outcome."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _run_limited(main, log)
    deadline = time.monotonic() + HANG_SECONDS
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
    text = log.read_text(encoding="utf-8", errors="replace")
    memory = usage.ru_maxrss * 1024 - int(log.with_suffix(".start").read_text())
    return Outcome(os.waitstatus_to_exitcode(status), text, usage.ru_utime + usage.ru_stime, memory)


def _run_limited(main, log):
    """The child: it never returns."""
    try:
        log.with_suffix(".start").write_text(str(psutil.Process().memory_info().rss))
        addresses = psutil.Process().memory_info().vms + ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 2))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (pytest's own are elsewhere)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        run_cli(main)
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# --- mutations


def _place(rng, size):
    """A position, in the first 600 bytes half of the time: headers lie there."""
    return rng.randrange(min(size, 600) if rng.random() < 0.5 else size)


def mutate_bytes(data, rng):
    """One damage, sometimes several, of any file."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not data:
            return bytes(data)
        kind, place = rng.randrange(7), _place(rng, len(data))
        length = rng.choice((1, 2, 4, 8, 30, 300))
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place : place + length] = rng.randbytes(length)
        elif kind == 2:
            number = rng.choice((0, 1, -1, 2**31 - 1, -(2**31), 0x00FFFFFF, 0x01000000))
            packed = struct.pack(rng.choice("<>") + "i", number)
            data[place : place + 4] = packed * rng.choice((1, 2))
        elif kind == 3:
            del data[place:]
        elif kind == 4:
            data += rng.randbytes(length)
        elif kind == 5:
            del data[place : place + length]
        else:
            data[place:place] = data[place : place + length]
    return bytes(data)


def mutate_text(data, rng):
    """One damage of a text: a number, a word or a line, else of its bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    text = data.decode()
    kind = rng.randrange(4)
    if kind == 0:
        numbers = list(re.finditer(r"-?\d+(\.\d+)?", text))
        if numbers:
            found = rng.choice(numbers)
            return (text[: found.start()] + rng.choice(WORDS) + text[found.end() :]).encode()
    lines = text.splitlines(keepends=True) or [""]
    place = rng.randrange(len(lines))
    if kind == 1:
        lines[place] = rng.choice(WORDS) + "\n"
    elif kind == 2:
        lines.insert(place, rng.choice(lines))
    else:
        del lines[place]
    return "".join(lines).encode(rng.choice(("utf-8", "utf-8", "utf-16")))


def mutate_tree(tree, rng, values=VALUES):
    """A copy of nested lists and tables with one node replaced, removed or repeated."""
    tree = _copy(tree)
    while True:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        if not keys:
            return tree
        key = rng.choice(list(keys))
        if isinstance(tree[key], (dict, list)) and tree[key] and rng.random() < 0.8:
            tree[key] = mutate_tree(tree[key], rng, values)
            return tree
        if rng.random() < 0.15:
            del tree[key]
        else:
            tree[key] = rng.choice(values)
        return tree


def _copy(tree):
    if isinstance(tree, dict):
        return dict(tree)
    return list(tree)


def mutate_json(data, rng):
    if rng.random() < 0.2:
        return mutate_text(data, rng)
    return json.dumps(mutate_tree(json.loads(data), rng)).encode()


def random_of(*seed):
    return random.Random(repr(seed))
