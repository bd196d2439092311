"""Settings as options of a command: each is said once, with the field of the dataclass that holds it."""

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


@dataclasses.dataclass(frozen=True)
class Option:
    """How a setting is given: stands in its field's annotation, `port: Annotated[int, Option("--port", ...)] = 8500`.

    What it takes is the annotated type: of `T | None`, of a tuple or of a mapping, the first within. A bool that is on
    by default has a --no-FLAG beside.
    flag: on the command line, and as FORWARDPASS_FLAG in the environment unless there is a `variable`.
    text: for --help. begins: the heading there under which it and those after it stand. otherwise: in words, a default
    that is computed.
    least, most: of a number, in the flag's unit; without a `most`, whatever is finite. unit: what of the field's unit
    one of the flag's is: MIB for bytes. none: the number that stands for None.
    type: where the annotated one says too little. parse: makes the field's value of what was given.
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

    def complaints(self, value: Any) -> Iterator[str]:
        """What is wrong with a field's value by itself."""
        for one in value if isinstance(value, tuple) else [value]:
            if self.choices and one not in self.choices:
                yield f"{self.flag}: expected one of {', '.join(self.choices)}, got {one!r}"
        if self.least is None or value is None:
            return
        number = value / self.unit
        if not self.least <= number < math.inf or (self.most is not None and number > self.most):
            # What need not be whole is a time.
            expected = f"seconds >= {self.least:g}" if isinstance(value, float) else f"at least {self.least:g}"
            if self.most is not None:
                expected = f"{self.least:g} to {self.most:g}"
            yield f"{self.flag}: expected {expected}, got {number:.15g}"


def complaints(settings: Any) -> Iterator[str]:
    """What is wrong with each setting by itself, naming its flag."""
    for field, option, _ in _fields(type(settings)):
        yield from option.complaints(getattr(settings, field.name))


def of(settings: Any) -> list[click.Parameter]:
    """The options of a command that takes all fields of a dataclass, in their order and under their names."""
    made: list[click.Parameter] = []
    section = ""
    for field, option, kind in _fields(settings):
        section = option.begins or section
        made.append(_SectionedOption(section, field, option, kind))
    return made


def read(settings: type[SettingsT], given: Mapping[str, Any]) -> SettingsT:
    """The dataclass of what a command was given by its options; what was not given is left to the field's default."""
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
    """Every field, how it is given, and the type of what is given."""
    hints = typing.get_type_hints(settings, include_extras=True)
    for field in dataclasses.fields(settings):
        hint, option = typing.get_args(hints[field.name])
        kind, *_ = typing.get_args(hint) or [hint]
        yield field, option, kind


class _SectionedOption(click.Option):
    """The option of one field, which stands under a heading."""

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
    """A command whose options stand under their headings in --help."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title = parameter.section if isinstance(parameter, _SectionedOption) else "Help"
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)
