"""Systems without POSIX's own names, and any locale."""

import os
import subprocess
import sys

from conftest import ROOT, write_raw_arad
from training_helpers import ONE_THREAD, SMALL, TRAINERS

# As on Windows: none of these names, and processes that start by spawning.
WITHOUT_POSIX = """
import mmap, multiprocessing, os, signal, sys
import torch.multiprocessing
import torch.utils.tensorboard

if __name__ == "__main__":
    for module, names in (
        (signal, ("SIGUSR1", "SIGUSR2", "SIGHUP")),
        (os, ("fork", "fchmod", "setsid", "getpgid", "killpg")),
        (mmap, ("MADV_DONTNEED",)),
    ):
        for name in names:
            delattr(module, name)
    for module in (multiprocessing, torch.multiprocessing):
        module.get_all_start_methods = lambda: ["spawn"]

    import dataset_setup
    import sharp_inference
    {imports}

    dataset_setup.main({stage!r})
    for module, flags in zip(({modules}), {train!r}):
        sys.argv = [module.__name__, *flags]
        assert module.main() == 0
    sharp_inference.main({predict!r})
"""


def test_staging_training_and_predicting_need_no_posix_names(tmp_path):
    raw, staged, runs = (str(tmp_path / name) for name in ("raw", "staged", "runs"))
    write_raw_arad(tmp_path / "raw", train=("a", "b"), valid=("v",))
    size = ["--patch-size", "64", "--stride", "8", "--workers", "1"]
    common = ["--data_root", staged, "--model_size", "tiny", "--patch_size", "64"]
    common += ["--batch_size", "2", "--iterations_per_epoch", "2", "--epochs", "1"]
    common += ["--device", "cpu", "--output_dir", runs]
    others = sorted(path.stem for path in ROOT.glob("*.py"))
    code = WITHOUT_POSIX.format(
        imports="; ".join(f"import {name}" for name in others),
        modules=", ".join(TRAINERS),
        stage=["--arad-root", raw, "--output-root", staged, *size],
        train=[[*common, "--experiment_name", name, *SMALL[name]] for name in TRAINERS],
        predict=["--checkpoint", f"{runs}/{TRAINERS[0]}/best.ckpt", "--device", "cpu"]
        + ["--input", f"{raw}/Train_RGB/v.jpg", "--output", str(tmp_path / "v.npy")],
    )
    script = tmp_path / "main.py"
    script.write_text(code, encoding="utf-8")
    env = {**ONE_THREAD, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "v.npy").stat().st_size > 31 * 96 * 80 * 4


def test_no_text_file_is_opened_in_the_locales_encoding(tmp_path):
    """An EncodingWarning from one of our modules is an error."""
    raw, staged, runs = (str(tmp_path / name) for name in ("raw", "staged", "runs"))
    write_raw_arad(tmp_path / "raw", train=("a", "b"), valid=("v",))
    camera = tmp_path / "camera.csv"
    camera.write_text("nm,r,g,b\n400,0,0,1\n550,0,1,0\n700,1,0,0\n", encoding="utf-8")
    modules = "|".join(path.stem for path in ROOT.glob("*.py"))
    code = f"""
import sys, warnings
warnings.filterwarnings("error", category=EncodingWarning, module=r"({modules}|__main__)$")
import common_utils_v32 as common
import dataset_setup, hsifusion_training, sharp_inference
dataset_setup.main(["--arad-root", {raw!r}, "--output-root", {staged!r}, "--patch-size", "64",
                    "--workers", "1", "--render-rgb", "all", "--camera", {str(camera)!r}])
flags = ["--data_root", {staged!r}, "--model_size", "tiny", "--patch_size", "64", "--epochs", "1",
         "--batch_size", "2", "--iterations_per_epoch", "1", "--device", "cpu",
         "--output_dir", {runs!r}, "--experiment_name", "run", *{SMALL["hsifusion_training"]!r}]
sys.argv = ["hsifusion_training.py", *flags]
assert hsifusion_training.main() == 0
sys.argv += ["--resume_from", "auto", "--config", {runs + "/run/config.json"!r}]
assert hsifusion_training.main() == 0
sharp_inference.main(["--checkpoint", {runs + "/run/best.ckpt"!r}, "--evaluate", "--data_root",
                      {staged!r}, "--output", {str(tmp_path / "results")!r}, "--device", "cpu"])
"""
    command = [sys.executable, "-X", "warn_default_encoding", "-c", code]
    env = {**ONE_THREAD, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PATH": os.environ["PATH"]}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
