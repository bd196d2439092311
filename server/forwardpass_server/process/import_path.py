"""Python's import path: the working directory holds an operator's own modules."""

from __future__ import annotations

import os
import sys


def append_working_directory() -> None:
    """Makes the modules of the working directory importable, as `python -m` and uvicorn do.

    The directory goes to the end of `sys.path`, where uvicorn puts it at the front: a file such as random.py or
    tensorflow.py there must not replace the standard library's or an installed package. The price is that an installed
    module hides a file of the same name. Processes that `multiprocessing` spawns inherit the path. Does nothing under
    PYTHONSAFEPATH or `python -P`, which ask for exactly that.

    Call it after TensorFlow is imported: TensorFlow and Keras try to import optional packages, and must not find files
    of the working directory in their place.
    """
    # Python 3.10 has no safe path.
    if getattr(sys.flags, "safe_path", False):
        return
    try:
        folder = os.getcwd()
    except FileNotFoundError:  # Deleted since the start.
        return
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
