"""What a client shows of its caller, and to whom it does not."""

from __future__ import annotations

import pytest

import forwardpass_client
from forwardpass_client import Tls


@pytest.mark.parametrize("connect", [forwardpass_client.connect, forwardpass_client.connect_async])
def test_a_token_does_not_go_unencrypted_to_another_machine(connect):
    with pytest.raises(ValueError, match="expected tls with it, because example") as caught:
        connect("example.org:1", token="secret")
    assert "secret" not in str(caught.value)


def test_a_token_is_sent_if_something_else_encrypts():
    for more in ({"tls": True}, {"allow_insecure_token": True}):
        forwardpass_client.connect("example.org:1", token="secret", **more).close()


@pytest.mark.parametrize("token", ["", "two words", "line\n", "\u4e2d", None, b"secret"])
@pytest.mark.parametrize("is_asked", [True, False])
def test_a_token_that_cannot_be_a_header_is_refused(token, is_asked):
    if token is None and not is_asked:
        return
    with forwardpass_client.connect("localhost:1", token=(lambda: token) if is_asked else token) as client:
        with pytest.raises(ValueError, match="token: expected a str of ASCII characters without spaces"):
            client.models()


def test_an_error_of_the_token_function_reaches_the_caller():
    def ask() -> str:
        raise LookupError("no token today")

    with forwardpass_client.connect("localhost:1", token=ask) as client, pytest.raises(LookupError, match="today"):
        client.models()


def test_a_certificate_requires_its_key():
    with pytest.raises(ValueError, match="tls: expected a certificate and its key"):
        Tls(certificate=b"x")
    with pytest.raises(ValueError, match="tls: expected a certificate and its key"):
        Tls(key=b"x")


def test_secrets_are_not_shown():
    assert "secret" not in repr(Tls(certificate=b"x", key=b"secret"))
