"""Settings: declared once, validated, and named consistently in the docs."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from forwardpass_client.cli.commands import forwardpass
from forwardpass_server.app import options
from forwardpass_server.app.cli import main
from forwardpass_server.app.settings import Settings
from forwardpass_server.errors import SettingsError
from support.environments import ROOT

SERVE = {option.name: option for option in main.commands["serve"].params}

FACTORIES = {"slow": "support.zoo:slow"}

# Options of other programs that these pages mention.
OTHERS = {
    "docs/benchmarks.md": {"--rounds", "--seconds"},
    "docs/reliability.md": {"--callers", "--log-cli-level", "--mib", "--rounds"},
    "docs/security.md": {"--http", "--protocol", "--reflect-header"},
}
PAGES = sorted({"README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))})


def options_of(command: click.Command) -> Iterator[click.Option]:
    yield from (one for one in command.params if isinstance(one, click.Option))
    for other in command.commands.values() if isinstance(command, click.Group) else ():
        yield from options_of(other)


def read(*arguments: str) -> Settings:
    """The settings of a command line."""
    command = main.commands["serve"]
    with command.make_context("serve", list(arguments)) as context:
        return options.read(Settings, context.params)


def test_every_option_is_a_field_and_every_field_an_option():
    assert list(SERVE) == [field.name for field in dataclasses.fields(Settings)]


def test_a_command_line_without_options_gives_the_defaults_of_the_fields():
    assert read("--factory", "slow=support.zoo:slow") == Settings(factories=FACTORIES)


def test_given_values_are_converted_to_the_units_of_the_fields(monkeypatch, tmp_path):
    monkeypatch.setenv("FORWARDPASS_WEIGHTS_MIB", "3")
    monkeypatch.setenv("FORWARDPASS_FACTORIES", "slow=support.zoo:slow fast=support.zoo:fast")
    monkeypatch.setenv("FORWARDPASS_BATCHING", "false")
    monkeypatch.setenv("FORWARDPASS_IMPORTS", "shop.layers shop.losses")
    arguments = ("--max-message-mib", "64", "--metrics-port", "-1", "--management-port", "0", "--insecure")
    more = ("--open", "health", "--open", "reflection", "--tokens", str(tmp_path / "tokens"), "--drain-delay", "2")
    assert read(*arguments, *more) == Settings(
        factories={**FACTORIES, "fast": "support.zoo:fast"},
        imports=("shop.layers", "shop.losses"),
        weights_bytes=3 * 2**20,
        batching=False,
        max_message_bytes=64 * 2**20,
        metrics_port=None,
        management_port=0,
        insecure=True,
        open_services=("health", "reflection"),
        tokens=tmp_path / "tokens",
        drain_delay_s=2.0,
    )


@pytest.mark.parametrize("name", SERVE)
def test_help_shows_the_default_of_the_field(name):
    (field,) = (field for field in dataclasses.fields(Settings) if field.name == name)
    option, value = SERVE[name], getattr(Settings, name, None)
    shown = option.get_help_record(click.Context(main.commands["serve"]))[1]
    if isinstance(value, bool):
        assert option.default is value
    elif isinstance(value, (int, float, str)):
        unit = 2**20 if "_bytes" in name else 1
        assert f"default: {value // unit if isinstance(value, int) else value}]" in shown
    elif field.default_factory is not dataclasses.MISSING and name != "factories":
        assert "default: (" in shown


def test_help_has_a_heading_for_each_part():
    shown = CliRunner().invoke(main, ["serve", "--help"]).output
    headings = re.findall(r"^(\w+):$", shown, re.MULTILINE)
    assert headings == [
        *(
            "Models",
            "Listening",
            "Security",
            "Computing",
            "Limits",
            "Weights",
            "Sessions",
            "Shutdown",
            "Observability",
            "Help",
        )
    ]
    assert all(option.opts[-1] in shown for option in SERVE.values())


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"port": -1}, "--port: expected 0 to 65535, got -1"),
        ({"management_port": 65536}, "--management-port: expected 0 to 65535, got 65536"),
        ({"max_message_bytes": 2**31}, "--max-message-mib: expected 4 to 2047, got 2048"),
        ({"max_message_bytes": 2**20 + 2**19}, "--max-message-mib: expected 4 to 2047, got 1.5"),
        ({"max_sessions": 0}, "--max-sessions: expected at least 1, got 0"),
        ({"weights_bytes": 0}, "--weights-mib: expected at least 1, got 0"),
        ({"max_concurrent_calls": -1234567}, "--max-concurrent-calls: expected at least 1, got -1234567"),
        ({"drain_delay_s": float("inf")}, "--drain-delay: expected seconds >= 0, got inf"),
        ({"session_expiry_s": float("nan")}, "--session-expiry: expected seconds >= 1, got nan"),
        ({"log_level": "loud"}, "--log-level: expected one of debug, info, warning, error, got 'loud'"),
        ({"open_services": ("health", "all")}, "--open: expected one of health, reflection, got 'all'"),
    ],
)
def test_an_invalid_setting_is_refused_by_its_flag(setting, message):
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        Settings(factories=FACTORIES, **setting)


@pytest.mark.parametrize("name", [name for name, option in SERVE.items() if option.type in (click.INT, click.FLOAT)])
def test_every_number_has_bounds(name):
    for number in (-2, float("nan")):
        with pytest.raises(SettingsError, match=f"^{SERVE[name].opts[-1]}: expected"):
            Settings(factories=FACTORIES, **{name: number})


def test_every_variable_in_the_docs_belongs_to_an_option():
    known = {option.envvar for command in (main, forwardpass) for option in options_of(command)}
    files = [ROOT / "Dockerfile", *map(ROOT.joinpath, PAGES)]
    files += [file for file in (ROOT / "deploy").rglob("*") if file.is_file()]
    named = {(name, file) for file in files for name in re.findall(r"\bFORWARDPASS_[A-Z_]*[A-Z]\b", file.read_text())}
    assert {"FORWARDPASS_HOST", "FORWARDPASS_TLS_KEY"} <= {name for name, _ in named}
    assert {(name, file) for name, file in named if name not in known} == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_the_docs_belongs_to_an_option(page):
    known = {"--help", "--version", *OTHERS.get(page, ())}
    for command in (main, forwardpass):
        known.update(flag for option in options_of(command) for flag in (*option.opts, *option.secondary_opts))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", pathlib.Path(ROOT / page).read_text())) <= known
