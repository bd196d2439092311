"""The token file: valid and invalid lines."""

from __future__ import annotations

import hashlib
import math
import time

import pytest

from forwardpass_server.access import tokens
from forwardpass_server.access.tokens import Role, Tokens

HASH = "sha256:" + hashlib.sha256(b"secret").hexdigest()


@pytest.fixture
def read(tmp_path):
    def read(text: str) -> Tokens:
        (tmp_path / "tokens").write_text(text)
        return Tokens(tmp_path / "tokens")

    return read


def test_a_new_token_is_found_in_the_file_with_its_line(read):
    secret, token = tokens.create("alice@example.org", [Role.CALL, Role.MANAGE], None)
    assert token.line().endswith(" alice@example.org call,manage never")
    assert secret not in token.line()
    found = read(f"# who may call\n\n{token.line()}  # since May\n").find(secret)
    assert found == token
    assert not found.is_expired


def test_no_two_tokens_are_the_same_and_each_is_long():
    made = {tokens.create("a", [Role.CALL], None)[0] for _ in range(100)}
    assert len(made) == 100
    assert all(len(secret) >= 43 for secret in made)


@pytest.mark.parametrize("other", ["", "secret ", "Secret", "secre", HASH, "\ud800", "\u4e2d"])
def test_another_token_is_not_found(read, other):
    assert read(f"{HASH} alice call never\n").find(other) is None


@pytest.mark.parametrize(
    "expiry, is_expired",
    [
        ("never", False),
        ("2020-01-01", True),
        ("2020-01-01T12:00:00Z", True),
        ("2020-01-01T12:00:00+02:00", True),
        ("2999-01-01", False),
        ("2999-01-01T12:00:00", False),
    ],
)
def test_a_token_expires_when_its_line_says(read, expiry, is_expired):
    assert read(f"{HASH} alice call {expiry}\n").find("secret").is_expired is is_expired


def test_the_expiry_is_that_of_the_first_principal_without_a_valid_token(read):
    lines = [
        # The second token replaces the first.
        f"sha256:{'1' * 64} alice call 2030-01-01",
        f"sha256:{'2' * 64} alice call 2031-01-01",
        f"sha256:{'3' * 64} bob call,manage 2032-01-01",
        f"sha256:{'4' * 64} carol call never",
    ]
    found = read("\n".join(lines) + "\n")
    assert found.expire_s(Role.CALL) == tokens.parse_expiry("2031-01-01")
    assert found.expire_s(Role.MANAGE) == tokens.parse_expiry("2032-01-01")
    assert [read(lines[-1] + "\n").expire_s(role) for role in Role] == [math.inf, math.inf]


def test_times_without_an_offset_are_utc():
    assert tokens.parse_expiry("1970-01-02") == 24 * 3600
    assert tokens.parse_expiry("1970-01-01T00:00:05Z") == 5
    assert tokens.parse_expiry("1970-01-01T02:00:00+02:00") == 0
    assert tokens.parse_expiry("2d") == pytest.approx(time.time() + 2 * 24 * 3600, abs=60)


def test_a_token_file_with_only_comments_admits_no_caller(read):
    assert read("# nobody\n").find("secret") is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "tokens: expected a newline at its end"),
        (f"{HASH} alice call never", "tokens: expected a newline at its end"),
        (f"{HASH} alice call\n", r"line 1: expected sha256:HEX PRINCIPAL ROLE\[,ROLE\] EXPIRY, got 3 words"),
        (f"\n{HASH} alice call never more\n", "line 2: expected .* got 5 words"),
        ("secret alice call never\n", "line 1: expected sha256: and 64 hexadecimal digits at the start"),
        (f"{HASH[:-1]} alice call never\n", "line 1: expected sha256:"),
        (f"{HASH} alice root,call never\n", "line 1: expected roles of call, manage, got root"),
        (f"{HASH} alice , never\n", "line 1: expected roles of call, manage, got "),
        (f"{HASH} al\u00eece call never\n", "line 1: principal: expected 1 to 128 characters of ASCII"),
        (f"{HASH} {'a' * 129} call never\n", "line 1: principal: expected 1 to 128"),
        (f"{HASH} alice call soon\n", "line 1: expiry: expected a date, a time, 30d or never, got 'soon'"),
        (f"{HASH} alice call 30d\n", "line 1: expected a date, a time or never"),
        (f"{HASH} alice call never\n{HASH} bob call never\n", "line 2: the token is already in the file"),
    ],
)
def test_an_invalid_line_is_refused_by_its_number(read, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(text)
    assert "secret" not in str(caught.value)


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "tokens").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="utf-8"):
        Tokens(tmp_path / "tokens")


@pytest.mark.parametrize("principal", ["", "two words", "a#b", "x" * 129, "tab\t"])
def test_an_invalid_name_of_a_principal_is_refused(principal):
    with pytest.raises(ValueError, match="principal: expected 1 to 128 characters"):
        tokens.create(principal, [Role.CALL], None)
