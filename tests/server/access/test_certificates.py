"""Certificate files: invalid ones are refused when they are loaded, not at a handshake."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import serialization

from forwardpass_server.access.certificates import Certificates
from support.certificates import Signer


@pytest.fixture
def signer(tmp_path):
    return Signer(tmp_path / "signer")


def test_a_certificate_with_its_key_is_accepted(signer):
    assert not Certificates(signer.certificate, signer.key).are_mutual
    assert Certificates(signer.certificate, signer.key, signer.ca).are_mutual


def key_of_another(signer, tmp_path):
    signer.key.write_bytes(Signer(tmp_path / "other").key.read_bytes())


def encrypted_key(signer, tmp_path):
    key = serialization.load_pem_private_key(signer.key.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    signer.key.write_bytes(key.private_bytes(encoding, form, encryption))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (key_of_another, "expected a certificate and its unencrypted key in PEM: KEY_VALUES_MISMATCH"),
        (encrypted_key, "expected a certificate and its unencrypted key in PEM"),
        (lambda signer, _: signer.key.write_text(""), "unencrypted key in PEM: the file holds none"),
        (lambda signer, _: signer.certificate.write_text("x"), "expected a certificate and its unencrypted key in PEM"),
        (
            lambda signer, _: signer.ca.write_text("x"),
            "expected certificates of authorities for client certificates, in PEM",
        ),
        (
            lambda signer, _: signer.ca.write_text(""),
            "expected certificates of authorities for client certificates, in PEM",
        ),
    ],
)
def test_invalid_files_are_refused_and_do_not_replace_valid_ones(signer, tmp_path, caplog, spoil, message):
    good = Certificates(signer.certificate, signer.key, signer.ca)
    spoil(signer, tmp_path)
    with pytest.raises(ValueError, match=message):
        Certificates(signer.certificate, signer.key, signer.ca)
    ends = good.expire_s
    good.refresh()
    assert not good.are_good
    assert good.expire_s == ends
    assert "reload failed, the former contents stay in use" in caplog.text
    assert "PRIVATE KEY" not in caplog.text
