"""Fixtures for all tests: one repository of every kind of model, and one real server over it."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

# Before anything imports TensorFlow, here and in the processes that tests start.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# As a server does by default. Where TensorFlow uses oneDNN of its own accord depends on the CPU.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH")])
)

import hypothesis
import pytest

import forwardpass_client
from support.servers import ServerProcess

if TYPE_CHECKING:
    from support.object_stores import Places

# A deadline of an example is an assertion on time: it fails on a machine that does other work.
hypothesis.settings.register_profile("forwardpass", deadline=None)
hypothesis.settings.load_profile("forwardpass")


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model repository: see `support.zoo.write_repository`."""
    from support import zoo

    folder = tmp_path_factory.mktemp("models")
    zoo.write_repository(folder)
    return folder


@pytest.fixture(scope="session")
def server(repository: pathlib.Path) -> Iterator[ServerProcess]:
    """A server over `repository`, for tests that do it no harm."""
    from support import zoo

    factories = [argument for factory in zoo.FACTORIES for argument in ("--factory", factory)]
    trial = {"FORWARDPASS_TRIAL": "true"}
    with ServerProcess(*zoo.serving(repository), *factories, environment=trial) as process:
        yield process


@pytest.fixture(scope="module", params=["file", "s3"])
def places(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    """Places that servers share, each kind in turn: see `support.object_stores`."""
    from support.object_stores import Places

    made = Places(request.param, tmp_path_factory.mktemp("places"))
    yield made
    made.close()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[forwardpass_client.Client]:
    with forwardpass_client.connect(server.address) as connected:
        yield connected
