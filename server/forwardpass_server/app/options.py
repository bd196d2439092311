"""Command-line options from a dataclass: each option is declared once, at its field."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import click

MIB = 2**20

FILE = click.Path(dir_okay=False, path_type=pathlib.Path)
FOLDER = click.Path(file_okay=False, path_type=pathlib.Path)

SettingsT = TypeVar("SettingsT")


class _FolderOrUrl(click.Path):
    """A folder as a path, or a URL as a string."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if "://" in str(value) else super().convert(value, param, ctx)


FOLDER_OR_URL = _FolderOrUrl(file_okay=False, path_type=pathlib.Path)


@dataclasses.dataclass(frozen=True)
class Option:
    """The option of one field, in its annotation: `port: Annotated[int, Option("--port", ...)] = 8500`.

    The option takes a value of the annotated type; for `T | None`, a tuple or a mapping, of its first argument. A bool
    that is on by default also gets --no-FLAG.

    flag: the flag. The variable FORWARDPASS_FLAG, or `variable`, sets it in the environment.
    text: the text of --help. begins: a heading of --help, above this option and those after it.
    otherwise: describes a computed default.
    least, most: the bounds of a number, in the flag's unit; without `most` any finite number is valid.
    unit: the flag's unit in units of the field: MIB for a field in bytes. none: the number that stands for None.
    type: replaces the annotated type. parse: converts the given value to that of the field.
    """

    flag: str
    text: str
    _: dataclasses.KW_ONLY
    variable: str = ""
    begins: str = ""
    otherwise: str = ""
    metavar: str | None = None
    least: float | None = None
    most: float | None = None
    unit: int = 1
    none: int | None = None
    choices: Sequence[str] = ()
    is_repeated: bool = False
    type: click.ParamType[Any] | None = None
    parse: Callable[[Any], Any] | None = None

    def problems(self, value: Any) -> Iterator[str]:
        """A sentence for each rule of this option that a field's value violates."""
        for one in value if isinstance(value, tuple) else [value]:
            if self.choices and one not in self.choices:
                yield f"{self.flag}: expected one of {', '.join(self.choices)}, got {one!r}"
        if self.least is None or value is None:
            return
        number = value / self.unit
        if not self.least <= number < math.inf or (self.most is not None and number > self.most):
            # Every float setting is a time.
            expected = f"seconds >= {self.least:g}" if isinstance(value, float) else f"at least {self.least:g}"
            if self.most is not None:
                expected = f"{self.least:g} to {self.most:g}"
            yield f"{self.flag}: expected {expected}, got {number:.15g}"


def problems(settings: Any) -> Iterator[str]:
    """A sentence for each invalid setting. It names the flag."""
    for field, option, _ in _fields(type(settings)):
        yield from option.problems(getattr(settings, field.name))


def of(settings: Any) -> list[click.Parameter]:
    """The options of a command for all fields of a dataclass, in the order and with the names of the fields."""
    made: list[click.Parameter] = []
    section = ""
    for field, option, kind in _fields(settings):
        section = option.begins or section
        made.append(_SectionedOption(section, field, option, kind))
    return made


def read(settings: type[SettingsT], given: Mapping[str, Any]) -> SettingsT:
    """Creates the dataclass from the options of a command. Fields without a given option keep their default."""
    values = {}
    for field, option, _ in _fields(settings):
        value = given[field.name]
        if value is None:
            continue
        if value == option.none:
            value = None
        elif option.unit != 1:
            value *= option.unit
        values[field.name] = value if option.parse is None else option.parse(value)
    return settings(**values)


def _fields(settings: Any) -> Iterator[tuple[dataclasses.Field[Any], Option, Any]]:
    """Every field, its option, and the type of the option's value."""
    hints = typing.get_type_hints(settings, include_extras=True)
    for field in dataclasses.fields(settings):
        hint, option = typing.get_args(hints[field.name])
        kind, *_ = typing.get_args(hint) or [hint]
        yield field, option, kind


class _SectionedOption(click.Option):
    """A click option for one field. section: its heading."""

    def __init__(self, section: str, field: dataclasses.Field[Any], option: Option, kind: Any) -> None:
        self.section = section
        flag, default = option.flag, field.default
        if default in (None, dataclasses.MISSING):
            default = option.none
        elif option.unit != 1:
            default //= option.unit
        given: dict[str, Any] = {} if default is None else {"default": default}
        super().__init__(
            [f"{flag}/--no-{flag[2:]}" if kind is bool and default else flag, field.name],
            type=click.Choice(option.choices) if option.choices else option.type or kind,
            is_flag=kind is bool,
            multiple=option.is_repeated,
            metavar=option.metavar,
            envvar=option.variable or "FORWARDPASS_" + flag[2:].replace("-", "_").upper(),
            show_envvar=True,
            help=option.text,
            show_default=option.otherwise or True,
            **given,
        )


class SectionedCommand(click.Command):
    """A command that groups its options under headings in --help."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options by heading."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title = parameter.section if isinstance(parameter, _SectionedOption) else "Help"
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)
