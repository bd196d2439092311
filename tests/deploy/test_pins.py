"""What the image installs, held against what pyproject.toml asks for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tomllib
from packaging.requirements import Requirement

from support.environments import ROOT
from support.pins import pins

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(extra: str) -> Iterator[Requirement]:
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if requirement.name == PROJECT["name"]:
            for other in requirement.extras:
                yield from requirements(other)
        else:
            yield requirement


@pytest.mark.parametrize("extra", ["server", "gpu"])
def test_an_extra_is_pinned_as_pyproject_asks_and_by_hash(extra):
    pinned = pins(extra)
    # Any of the server's settings is accepted in the image.
    others = [*requirements("redis"), *requirements("tracing")]
    wanted = [*map(Requirement, PROJECT["dependencies"]), *requirements(extra), *others]
    assert {"tensorflow-cpu", "tensorflow"} & {requirement.name for requirement in wanted}
    for requirement in wanted:
        assert pinned[requirement.name] in requirement.specifier, "make requirements"


def test_both_images_differ_only_in_tensorflow():
    server, gpu = pins("server"), pins("gpu")
    assert set(server) - set(gpu) == {"tensorflow-cpu"}
    assert all(name.startswith(("nvidia-", "tensorflow")) for name in set(gpu) - set(server))
    assert {name: gpu[name] for name in server if name in gpu} == {n: v for n, v in server.items() if n in gpu}


def test_the_tools_of_the_build_are_pinned():
    names = [line for line in (ROOT / "deploy" / "image" / "build.in").read_text().splitlines() if line[:1] != "#"]
    assert set(names) <= set(pins("build"))
