"""All benchmarks in turn, for one machine: `make bench MST_ROOT=path`. Hours on two cores.

    python benchmarks/bench_all.py --mst-root ../MST-plus-plus --data_root data/ARAD_1K

Each part's figures go to benchmarks/results/<machine>.json as it ends, its output to
<machine>.md beside it: the tables that benchmarks/RESULTS.md quotes. Parts that are there already
are not run again; races go on where they were stopped. Nothing else may run. MST++'s loader is
measured where cv2 is installed (`pip install opencv-python-headless`), which it needs.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from ablation import ABLATIONS  # noqa: E402

import common_utils_v32 as common  # noqa: E402

BUDGETS = ((300, 5), (1000, 5), (3000, 2))  # steps of MST++, folds that are run
FOLDS = 5


def machine() -> str:
    """A name for files: the processor's, or the machine type."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*: (.*)", cpuinfo.read_text(encoding="utf-8"))
        name = found[1] if found else name
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def parts(args: argparse.Namespace) -> dict[str, list[str]]:
    """Name of each part -> script and flags."""
    mst, data = ["--mst-root", str(args.mst_root)], ["--data_root", str(args.data_root)]
    found = {
        "models tiny": ["bench_models.py", *mst],
        "models larger": ["bench_models.py", *mst, "--sizes", "small", "base", "large"],
        "attention": ["bench_attention.py"],
        "data": ["bench_data.py", *(mst if importlib.util.find_spec("cv2") else [])],
        "trainers": ["bench_trainers.py", *data],
        "scenes": ["bench_scenes.py", *data],
    }
    found["models larger"] += ["--measure", "482x512", "step"]
    race = ["race.py", *mst, *data, "--folds", str(FOLDS)]
    for budget, folds in BUDGETS:
        found[f"race {budget}"] = [*race, "--budget", str(budget), "--most-folds", str(folds)]
        found[f"race {budget}"] += ["--curves"]
    found["ablation"] = [*race, "--budget", "300", "--most-folds", "2"]
    found["ablation"] += ["--ablation", *ABLATIONS]
    return found


def main() -> None:
    parser = common.CliParser(description=__doc__)
    parser.add_argument("--mst-root", type=Path, required=True, help="a checkout of MST++")
    parser.add_argument("--data_root", type=Path, required=True, help="raw or staged scenes")
    parser.add_argument("--parts", nargs="+", help="the first words of those to run; default all")
    args = parser.parse_args()
    folder = ROOT / "benchmarks" / "results"
    record, pages = folder / f"{machine()}.json", folder / f"{machine()}.md"
    facts = common.read_json(record) if record.exists() else {}
    for name, (script, *flags) in parts(args).items():
        if name in facts or (args.parts and not name.startswith(tuple(args.parts))):
            continue
        print(f"--- {name}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            figures = Path(scratch) / "figures.json"
            if script == "race.py":  # which goes on with it
                figures = folder / f"{machine()}_{name.replace(' ', '_')}.json"
            command = [sys.executable, str(ROOT / "benchmarks" / script), *flags]
            command += ["--json", str(figures)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            print(done.stdout, flush=True)
            missed_bar = done.returncode == 1 and figures.exists()
            if done.returncode != 0 and not missed_bar:
                raise common.UserError(f"{script}: ended with exit code {done.returncode}")
            facts[name] = common.read_json(figures)
        common.write_json(record, facts)
        before = pages.read_text(encoding="utf-8") if pages.exists() else ""
        common.write_text(pages, f"{before}\n## {name}\n\n{done.stdout}")


if __name__ == "__main__":
    common.run_cli(main)
