"""Proxies of the environment: when gRPC would use one, when it must not, and what the error says."""

from __future__ import annotations

import socket
import threading

import pytest

import forwardpass_client
from forwardpass_client import errors, proxies

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy", "NO_PROXY", "HTTP_PROXY")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "target",
    ["localhost:1", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "unix:/run/models", "ipv4:127.0.0.1:1,127.0.0.1:2"],
)
@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy"])
def test_this_machine_has_no_proxy(monkeypatch, target, variable):
    monkeypatch.setenv(variable, "http://proxy:3128")
    assert proxies.of(target) == ""
    assert proxies.of("models:1") == f"proxy:3128 ({variable})"


def test_the_first_variable_of_grpcs_counts_and_secrets_are_not_shown(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://second:1")
    monkeypatch.setenv("https_proxy", "http://user:secret@first:2")
    assert proxies.of("dns:///models:1") == "first:2 (https_proxy)"


@pytest.mark.parametrize("proxy", ["", "https://proxy:3128", "socks5://proxy:3128", "proxy:3128"])
def test_proxy_values_that_grpc_ignores_are_ignored(monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    assert proxies.of("models:1") == ""


@pytest.mark.parametrize("variable", ["no_grpc_proxy", "no_proxy", "NO_PROXY"])
@pytest.mark.parametrize(
    "exceptions, target, is_direct",
    [
        ("models", "models:1", True),
        ("other, .example.org", "models.example.org:1", True),
        ("*.example.org", "dns:///models.EXAMPLE.org:1", True),
        ("10.0.0.0/8", "10.1.2.3:1", True),
        ("10.0.0.0/8", "ipv4:10.1.2.3:1,10.1.2.4:1", True),
        ("10.1.2.3", "ipv4:10.1.2.3:1,10.1.2.4:1", False),
        ("fd00::/8", "[fd00::1]:1", True),
        ("*", "models:1", True),
        (" , .", "models:1", False),
        ("models.example.org", "models:1", False),
        ("10.0.0.0/8", "models:1", False),
    ],
)
def test_exceptions_count_under_each_of_their_names(monkeypatch, variable, exceptions, target, is_direct):
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv(variable, exceptions)
    assert (proxies.of(target) == "") is is_direct


class Proxy:
    """Takes connections, remembers what each asks for, and refuses it."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.asked: list[bytes] = []
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(4096).split(b"\r\n")[0])
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()


@pytest.fixture
def proxy(monkeypatch):
    proxy = Proxy()
    monkeypatch.setenv("http_proxy", proxy.url)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_server_on_this_machine_is_called_directly(server, proxy, host):
    with forwardpass_client.connect(f"{host}:{server.port}") as client:
        assert client.is_ready()
    assert proxy.asked == []


def test_the_error_names_the_proxy_through_which_another_machine_is_called(proxy):
    with forwardpass_client.connect("models.invalid:8500") as client:
        with pytest.raises(errors.ServerUnavailable) as caught:
            client.models()
    assert proxy.asked[0] == b"CONNECT models.invalid:8500 HTTP/1.1"
    assert f"through the proxy {proxy.url.removeprefix('http://')} (http_proxy)" in str(caught.value)
    assert "no_proxy" in str(caught.value)


def test_a_host_in_the_upper_case_exceptions_is_called_directly(proxy, monkeypatch):
    # Nothing listens there; without a proxy the error does not mention one.
    monkeypatch.setenv("NO_PROXY", "127.0.0.0/8,.invalid")
    with forwardpass_client.connect("models.invalid:8500") as client:
        with pytest.raises(errors.ServerUnavailable) as caught:
            client.models()
    assert proxy.asked == []
    assert "proxy" not in str(caught.value)


def test_a_proxy_from_channel_options_is_used(proxy, monkeypatch):
    monkeypatch.delenv("http_proxy")
    with forwardpass_client.connect("models.invalid:1", channel_options=[("grpc.http_proxy", proxy.url)]) as client:
        with pytest.raises(errors.ServerUnavailable):
            client.models()
    assert proxy.asked[0] == b"CONNECT models.invalid:1 HTTP/1.1"
