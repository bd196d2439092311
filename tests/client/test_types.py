"""What a type checker knows of the SDK."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

PROGRAM = pathlib.Path(__file__).parent / "programs" / "types_of_results.py"
ROOT = pathlib.Path(__file__).parents[2]
FORGETFUL = """
import forwardpass_client

async def forget(client: forwardpass_client.AsyncClient) -> None:
    model = await client.model("digits")
    output = model.forward_pass(((), ()), ([1.0], [1]))
    print(output.loss)
"""


def mypy(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def shortened(revealed: str) -> str:
    """A type as people write it: without modules, and the same for every release of mypy and numpy."""
    revealed = re.sub(r"\b[a-z_]\w*\.(?=\w)", "", revealed).rstrip("*")
    revealed = re.sub(r"tuple\[[^\[\]]*, fallback=(\w+)\]", r"\1", revealed)
    return re.sub(r"ndarray\[tuple\[Any, \.\.\.\], dtype\[Any\]\]", "ndarray[Any, Any]", revealed)


def test_results_have_the_types_that_the_program_says():
    done = mypy(str(PROGRAM))
    assert "error:" not in done.stdout, done.stdout
    found = {
        int(line): shortened(revealed)
        for line, revealed in re.findall(r'py:(\d+): note: Revealed type is "(.*)"', done.stdout)
    }
    lines = PROGRAM.read_text().splitlines()
    expected = {number: line.rpartition("  # ")[2] for number, line in enumerate(lines, 1) if "reveal_type(" in line}
    assert len(expected) > 35
    assert found == expected


def test_a_forgotten_await_is_an_error(tmp_path):
    program = tmp_path / "forgetful.py"
    program.write_text(FORGETFUL)
    done = mypy(str(program))
    assert '"Coroutine[Any, Any, BatchOutput]" has no attribute "loss"' in done.stdout, done.stdout
