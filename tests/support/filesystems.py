"""Filesystems of a test's own, where mounting is allowed."""

from __future__ import annotations

import contextlib
import pathlib
import subprocess
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def mounted(folder: pathlib.Path, *arguments: str) -> Iterator[pathlib.Path]:
    """Mounts what the arguments of `mount` say in a folder, which is made. Skips the test where that is not allowed."""
    folder.mkdir()
    _run("mount", *arguments, str(folder))
    try:
        yield folder
    finally:
        # Also where a test that has failed left a file open: a mount that stays is in the way of later runs.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def make_ext4(image: pathlib.Path, size_mib: int) -> None:
    """Makes a file that `mounted` takes with `-o loop`."""
    with image.open("wb") as file:
        file.truncate(size_mib * 2**20)
    _run("mkfs.ext4", "-q", str(image))


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"needs {command[0]}: {error}")
    if done.returncode:
        pytest.skip(f"needs what this machine does not allow: {' '.join(command)}: {done.stderr.strip()}")
