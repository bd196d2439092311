"""Code blocks of Markdown pages, and a reader who runs those of one page in order."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading
from typing import Any

_FENCE = re.compile(r"^```(\w*)$")
_MARK = re.compile(r"^<!-- (not run|file|raises|new process)(?:: (.*?))? -->$")

LANGUAGES = ("python", "shell", "json", "yaml", "tokens", "text")
"""tokens: lines of the file of `serve --tokens`. text: the output of the block before it."""

TIMEOUT_S = 240.0


@dataclasses.dataclass(frozen=True)
class Block:
    """One code block. marks: HTML comments directly before it, by their first words.

    "not run": the reason why the block cannot run in a test.
    "file": the path of the file whose content the block is, relative to the reader's folder.
    "raises": the exception with which a Python block ends.
    "new process": a Python block that runs in an interpreter of its own.
    """

    page: str
    line: int
    language: str
    code: str
    marks: dict[str, str]

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def title(self) -> str:
        """The beginning of its first line."""
        return self.code.strip().splitlines()[0][:60]


def blocks_of(page: str, text: str) -> list[Block]:
    """The code blocks of a page, in order. Raises ValueError for one that no reader could run or mark."""
    found: list[Block] = []
    marks: dict[str, str] = {}
    inside: list[str] | None = None
    previous = ""
    language, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if inside is not None:
            if line == "```":
                found.append(Block(page, start, language, "\n".join(inside) + "\n", marks))
                inside, marks = None, {}
            else:
                inside.append(line)
        elif fence := _FENCE.match(line):
            language, start, inside = fence[1], number, []
            if language not in LANGUAGES:
                raise ValueError(f"{page}:{number}: expected one of the languages {LANGUAGES}, got {language!r}")
        elif line.startswith("```"):
            raise ValueError(f"{page}:{number}: expected a fence with a language alone, got {line!r}")
        elif line.startswith("    ") and not previous:
            raise ValueError(f"{page}:{number}: an indented code block; use a fence with a language")
        elif line.startswith("<!--"):
            mark = _MARK.match(line)
            if not mark:
                raise ValueError(f"{page}:{number}: not a mark of a code block: {line}")
            marks[mark[1]] = mark[2] or ""
        elif line and marks:
            raise ValueError(f"{page}:{number}: a mark without a code block after it")
        previous = line
    if inside is not None or marks:
        raise ValueError(f"{page}: ends within a code block or after a mark")
    return found


def commands_of(code: str) -> list[str]:
    """The commands of a shell block, with continued lines joined, and without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


# Runs blocks that it reads from stdin, each a line of JSON, in one namespace. Answers with a line of JSON each.
_INTERPRETER = r"""
import contextlib, io, json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
sys.path[0] = ""
namespace = {"__name__": "__main__"}
for line in sys.stdin:
    place, code = json.loads(line)
    printed, error = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, place, "exec"), namespace)
    except Exception as raised:
        error = [type(raised).__name__, traceback.format_exc()]
    answers.write(json.dumps([printed.getvalue(), error]) + "\n")
    answers.flush()
"""


class Reader:
    """Runs the blocks of one page in order, in a folder, as a person who reads it would. A context manager.

    replacements: texts of the page that stand for something of this machine, such as the address of a server.
    environment: of the programs that are run.
    """

    def __init__(self, folder: pathlib.Path, replacements: dict[str, str], environment: dict[str, str]) -> None:
        self._folder = folder
        self._replacements = replacements
        self._environment = environment
        self._interpreter: subprocess.Popen[str] | None = None
        self._output = ""

    def run(self, block: Block) -> None:
        """Runs a block. Raises AssertionError with the place of the block and what was printed."""
        code = block.code
        for text, replacement in self._replacements.items():
            code = code.replace(text, replacement)
        if "file" in block.marks:
            self._write(block, code)
        elif block.language == "python":
            self._output = self._run_python(block, code)
        elif block.language == "shell":
            self._output = "".join(self._run_command(block, command) for command in commands_of(code))
        elif block.language == "text":
            assert self._output == code, f"{block.place} is not what the block before it prints:\n{self._output}"
        else:
            raise AssertionError(f"{block.place}: name the file of this block, or why it is not run")

    def _write(self, block: Block, code: str) -> None:
        if block.language == "json":
            json.loads(code)
        path = self._folder / block.marks["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)

    def _run_python(self, block: Block, code: str) -> str:
        if "new process" in block.marks:
            self.close()
        if self._interpreter is None:
            self._interpreter = subprocess.Popen(
                [sys.executable, "-c", _INTERPRETER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=self._folder,
                env=self._environment,
            )
        answer = _ask(self._interpreter, [block.place, code])
        assert answer, f"{block.place}: the interpreter ended, or ran for {TIMEOUT_S:.0f} s"
        output, error = json.loads(answer)
        expected = block.marks.get("raises")
        assert (error and error[0]) == expected, f"{block.place}: {error[1] if error else f'{expected} is not raised'}"
        return output

    def _run_command(self, block: Block, command: str) -> str:
        is_serving = shlex.split(command, comments=True)[:2] == ["forwardpass-server", "serve"]
        process = subprocess.Popen(
            # With exec, signals reach the server itself.
            ["bash", "-euo", "pipefail", "-c", f"exec {command}" if is_serving else command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self._folder,
            env=self._environment,
        )
        watchdog = threading.Timer(TIMEOUT_S, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if is_serving and line.startswith(("ready on ", "not ready: ")):
                    process.send_signal(signal.SIGTERM)
            status = process.wait()
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
        output = "".join(lines)
        assert status == 0, f"{block.place}: {command} exits with {status}:\n{output}"
        assert not is_serving or "ready on " in output, f"{block.place}: {command} was not ready:\n{output}"
        return output

    def close(self) -> None:
        if self._interpreter is not None:
            self._interpreter.kill()
            self._interpreter.wait()
            for pipe in (self._interpreter.stdin, self._interpreter.stdout):
                if pipe is not None:
                    pipe.close()
            self._interpreter = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _ask(interpreter: subprocess.Popen[str], question: Any) -> str:
    """The interpreter's answer; "" if it ends first. One that does not answer in time is killed."""
    assert interpreter.stdin is not None
    assert interpreter.stdout is not None
    watchdog = threading.Timer(TIMEOUT_S, interpreter.kill)
    watchdog.start()
    try:
        interpreter.stdin.write(json.dumps(question) + "\n")
        interpreter.stdin.flush()
        return interpreter.stdout.readline()
    finally:
        watchdog.cancel()


def path_with(*folders: pathlib.Path) -> str:
    """PATH with the programs of these folders before all others."""
    return os.pathsep.join([*map(str, folders), os.environ["PATH"]])
