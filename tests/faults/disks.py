"""Disks of the tests: small ones, and ones that refuse to be written."""

import contextlib
import shutil
import subprocess

import pytest


@contextlib.contextmanager
def disk(place, options):
    """A file system in memory at the folder `place`, of these options of mount."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", place]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)
