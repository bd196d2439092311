"""The model that a command calls, with its version or label."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import click

_OPTIONS = (
    click.option("--version", type=click.IntRange(min=1), help="Version.  [default: the highest]"),
    click.option("--label", help="Instead of a version, its label, such as stable or canary."),
)


@dataclasses.dataclass(frozen=True)
class NamedModel:
    """The options of the command line for the model."""

    name: str
    version: int | None
    label: str | None


def model_argument(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the argument MODEL and the options of its version: it takes a `NamedModel` as `model`."""

    @functools.wraps(command)
    def with_model(model: str, version: int | None, label: str | None, **arguments: Any) -> None:
        command(model=NamedModel(model, version, label), **arguments)

    for option in reversed(_OPTIONS):
        with_model = option(with_model)
    return click.argument("model")(with_model)
