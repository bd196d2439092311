"""The example of federated averaging, with few clients and rounds."""

from __future__ import annotations

import re
import struct

import pytest

from support.examples import execute

METHODS = ["FedAvg", "FedProx", "Personal heads", "FedAvg in one program"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("federated")


@pytest.fixture(scope="module")
def finished(folder):
    """The example after 10 rounds of 10 clients. It is the first program that draws on this machine."""
    (folder / "temporary").mkdir()
    options = ("--clients", "10", "--rounds", "10", "--picture", str(folder / "curves.png"))
    variables = {"TMPDIR": str(folder / "temporary"), "MPLCONFIGDIR": str(folder / "matplotlib")}
    done = execute("examples/federated_averaging.py", *options, **variables)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def table(finished):
    """The cells of the table behind each method."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in finished.splitlines() if line.startswith("│")]
    return {name: cells for name, *cells in rows}


def test_the_accuracy_rises(finished, table):
    assert list(table) == METHODS
    middle = dict(re.findall(r"^(.+): accuracy (\S+) after round 5 of 10$", finished, re.MULTILINE))
    assert list(middle) == METHODS
    for method in METHODS:
        assert float(table[method][0]) > max(float(middle[method]), 0.6), method
    # Each client has images of two digits, which its own last layer must tell apart.
    assert float(table["Personal heads"][0]) > float(table["FedAvg"][0])


def test_the_weights_are_those_of_one_program(finished, table):
    difference = float(re.search(r"from those in one program: (\S+)$", finished, re.MULTILINE)[1])
    # float32 over 10 rounds: graphs that add in another order differ by some 1e-7 in each step.
    assert difference <= 1e-5
    # The printed digits of the accuracy and the loss are the same.
    assert table["FedAvg"][:2] == table["FedAvg in one program"][:2]


def test_no_weights_travel(finished, table):
    moved, more = map(float, re.search(r"moved (\S+) MiB.* would move (\S+) MiB more", finished).groups())
    # 100 client updates fetch and send float32 weights of 21,386 numbers.
    assert more == pytest.approx(100 * 2 * 21_386 * 4 / 2**20, rel=0.02)
    assert moved < more
    # A single set of weights is larger than all that the client receives.
    for method in METHODS[:3]:
        assert 0 < float(table[method][4]) < 21_386 * 4 / 2**20
    sent, received = map(float, table["FedAvg"][3:])
    assert sent + received == pytest.approx(moved, abs=0.1)


def test_the_picture_is_written_and_nothing_else_is_left(finished, folder):
    picture = (folder / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    assert (width, height) == (1650, 750)
    assert list((folder / "temporary").iterdir()) == []


def test_the_example_fails_where_the_weights_differ(tmp_path):
    # The same example, whose local program trains with a slightly different learning rate.
    script = tmp_path / "broken_example.py"
    script.write_text(
        "import sys; sys.path.insert(0, 'examples')\n"
        "import federated_averaging\n"
        "local = federated_averaging.local_federated_averaging\n"
        "def other(*arguments):\n"
        "    federated_averaging.LEARNING_RATE *= 1.01\n"
        "    return local(*arguments)\n"
        "federated_averaging.local_federated_averaging = other\n"
        "federated_averaging.main()\n"
    )
    done = execute(str(script), "--clients", "5", "--rounds", "1", "--picture", str(tmp_path / "curves.png"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "expected at most 1e-04" in done.stderr


def test_another_number_of_clients_is_refused():
    done = execute("examples/federated_averaging.py", "--clients", "7")
    assert done.returncode == 2
    assert "--clients: expected a multiple of 5, from 5 to 100, got 7" in done.stderr
