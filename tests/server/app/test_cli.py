"""The command forwardpass-server."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

import forwardpass_client
from forwardpass_server.access.tokens import Tokens
from forwardpass_server.app.cli import main
from support import zoo
from support.servers import ServerProcess


def run(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def test_help_names_the_commands_and_shows_a_repository():
    shown = run("--help").output
    assert "serve" in shown
    assert "export" in shown
    assert "models/digits/1/" in shown


@pytest.mark.parametrize("command", ["serve", "export", "check", "token"])
def test_every_option_says_what_it_does(command):
    for option in main.commands[command].params:
        assert option.param_type_name == "argument" or option.help, option.name


def test_every_setting_of_serve_can_come_from_the_environment():
    for option in main.commands["serve"].params:
        assert option.envvar
        assert option.envvar.startswith("FORWARDPASS_")


def test_help_needs_no_tensorflow():
    code = (
        "import sys; from click.testing import CliRunner; from forwardpass_server.app.cli import main;"
        "print(CliRunner().invoke(main, ['serve', '--help']).exit_code, 'tensorflow' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "0 False\n"


def test_an_error_in_a_models_code_is_one_line(tmp_path):
    done = run("export", "support.zoo:keras_batch", str(tmp_path / "models"), "mine")
    assert done.exit_code == 1
    assert "support.zoo:keras_batch: TypeError: " in done.output
    assert "Traceback" not in done.output


def test_a_module_that_cannot_be_imported_is_one_line(tmp_path):
    done = run("export", "--import", "no_such_module", "support.zoo:structures", str(tmp_path / "models"), "mine")
    assert done.exit_code == 1
    assert "--import: module 'no_such_module' cannot be imported (ModuleNotFoundError" in done.output
    assert "Traceback" not in done.output


def test_a_python_function_is_exported_and_served(tmp_path):
    done = run("export", "support.zoo:structures", str(tmp_path / "models"), "mine")
    assert done.exit_code == 0, done.output
    assert done.output.strip() == f"wrote {tmp_path}/models/mine/1"
    again = run("export", "support.zoo:structures", str(tmp_path / "models"), "mine")
    assert again.output.strip() == f"wrote {tmp_path}/models/mine/2"
    assert sorted(path.name for path in (tmp_path / "models" / "mine").iterdir()) == ["1", "2"]
    with ServerProcess("--model-repository", str(tmp_path / "models")) as server:
        with forwardpass_client.connect(server.address) as client:
            assert client.model("mine").version == 2


@pytest.mark.parametrize("beside", [True, False])
def test_a_keras_file_is_exported(tmp_path, beside):
    zoo.keras_cnn(1).save(tmp_path / "model.keras")
    config = tmp_path / ("forwardpass.json" if beside else "other.json")
    config.write_text(json.dumps(zoo.KERAS_CONFIG))
    more = () if beside else ("--config", str(config))
    done = run("export", str(tmp_path / "model.keras"), str(tmp_path / "models"), "m", "--version", "7", *more)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "models" / "m" / "7" / "saved_model.pb").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("support.zoo:slow", "{}", "../x"), "name: expected"),
        (("support.zoo:nothing", "{}", "m"), "support.zoo has no function 'nothing'"),
        (("no_colon", "{}", "m"), "factory: expected module:function, got 'no_colon'"),
        (("{}/none.keras", "{}", "m"), "none.keras"),
        (("support.zoo:slow", "{}", "taken", "--version", "1"), "exists: choose another --version"),
        (("support.zoo:slow", "{}", "m", "--config", "{}/file"), "--config: expected a .keras file as SOURCE"),
    ],
)
def test_an_invalid_export_is_refused_and_leaves_no_files(tmp_path, arguments, message):
    (tmp_path / "taken" / "1").mkdir(parents=True)
    (tmp_path / "file").write_text("{}")
    done = run("export", *(argument.format(tmp_path) for argument in arguments))
    assert done.exit_code == 1
    assert message in done.output
    assert not (tmp_path / "m" / "1").exists()


def test_a_failed_export_leaves_no_version(tmp_path, monkeypatch):
    from forwardpass_server.app import export

    def fail(model, path):
        path.mkdir()
        (path / "half").write_text("")
        raise OSError("disk full")

    monkeypatch.setattr(export, "save_functional_model", fail)
    done = run("export", "support.zoo:slow", str(tmp_path), "m")
    assert done.exit_code == 1
    assert "disk full" in done.output
    assert list((tmp_path / "m").iterdir()) == []


def test_a_token_is_created_with_its_line(tmp_path):
    done = run("token", "alice", "--role", "call", "--role", "manage", "--expires", "2999-01-01")
    assert done.exit_code == 0, done.output
    secret, line = (line.partition(":")[2].strip() for line in done.output.splitlines())
    assert line.endswith(" alice call,manage 2999-01-01T00:00:00Z")
    (tmp_path / "tokens").write_text(line + "\n")
    assert Tokens(tmp_path / "tokens").find(secret).principal == "alice"
    assert " bob call 20" in run("token", "bob").output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("two words",), "principal: expected 1 to 128 characters"),
        (("alice", "--expires", "soon"), "expiry: expected a date, a time, 30d or never, got 'soon'"),
        (("alice", "--role", "root"), "'root' is not one of"),
    ],
)
def test_invalid_arguments_of_token_are_refused(arguments, message):
    done = run("token", *arguments)
    assert done.exit_code
    assert message in done.output
