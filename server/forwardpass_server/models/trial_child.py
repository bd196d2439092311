"""The program of the child process that runs graphs before they are served: see `trial_process`."""

from __future__ import annotations

import contextlib
import os
import pathlib
import queue
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

# An idle process takes 240 MB, and starting another one takes seconds.
IDLE_S = 120.0

_NICENESS = 5

# A kernel that corrupts memory may crash the process only after several calls. Quick graphs are called several times.
_REPEATS = 5
_REPEAT_S = 0.02


def main() -> None:
    """Answers messages over the connection whose file descriptor is the first argument, until the server closes it.

    Ends the process after IDLE_S without a message.
    """
    connection = Connection(int(sys.argv[1]))
    _prefer_as_oom_victim()
    _lower_priority()
    messages: queue.Queue[Any] = queue.Queue()
    # This thread notices that the server has ended, even while a graph runs or hangs.
    threading.Thread(target=_receive, args=(connection, messages), daemon=True).start()
    graphs = _Graphs()
    while True:
        try:
            kind, *arguments = messages.get(timeout=IDLE_S)
        except queue.Empty:
            os._exit(0)
        connection.send(getattr(graphs, kind)(*arguments))


def _receive(connection: Connection, messages: queue.Queue[Any]) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            messages.put(connection.recv())
    os._exit(0)


def _prefer_as_oom_victim() -> None:
    """Makes the kernel kill this process instead of the server when memory runs out. Best effort."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/oom_score_adj").write_text("1000")


def _lower_priority() -> None:
    """Lowers the priority to that of loads (`process.background`). Best effort."""
    with contextlib.suppress(OSError):
        os.nice(max(_NICENESS - os.nice(0), 0))


class _Graphs:
    """The functions of one model. Each method answers one message."""

    def __init__(self) -> None:
        import tensorflow as tf

        from forwardpass_server.models import private_tensorflow

        self._tf = tf
        self._private = private_tensorflow
        self._call = tf.raw_ops.StatefulPartitionedCall
        self._names: list[str] = []
        self._functions: dict[Any, tuple[Any, ...]] = {}
        self._weights: list[Any] = []

    def define(self, definitions: list[bytes], functions: dict[Any, tuple[Any, ...]], weights: list[Any]) -> None:
        """definitions: serialized FunctionDefs. functions: (name, arguments' types, results' types, captured arrays).

        weights: (shape, data type) of each. Replaces what was defined before.
        """
        while self._names:
            self._private.remove_definition(self._names.pop())
        for serialized in definitions:
            self._names.append(self._private.add_definition(serialized))
        as_dtype = self._tf.as_dtype
        self._functions = {
            key: (name, [*map(as_dtype, arguments)], [*map(as_dtype, results)], captured)
            for key, (name, arguments, results, captured) in functions.items()
        }
        # Zeros: shapes cause crashes, values hardly ever do, and sending the weights would double their memory.
        self._weights = [self._tf.zeros(shape, dtype) for shape, dtype in weights]

    def run(self, key: Any, has_weights: bool, leaves: list[Any]) -> tuple[str, Any]:
        """("results", arrays), or ("refusal", message) where TensorFlow raises."""
        name, argument_types, result_types, captured = self._functions[key]
        function = self._private.NamedFunction(name)
        try:
            count = len(self._weights) if has_weights else 0
            tensors = [
                self._tf.constant(leaf, dtype) for leaf, dtype in zip(leaves, argument_types[count:], strict=False)
            ]
            tensors = [*self._weights[:count], *tensors, *map(self._tf.constant, captured)]
            began = time.perf_counter()
            for _ in range(_REPEATS):
                results = self._call(args=tensors, Tout=result_types, f=function)
                arrays = [result.numpy() for result in results]
                if time.perf_counter() - began > _REPEAT_S:
                    break
        except Exception as error:  # A refusal of any kind: the server only asks whether this process survives.
            return "refusal", f"{type(error).__name__}: {str(error)[:2000]}"
        return "results", arrays


if __name__ == "__main__":
    main()
