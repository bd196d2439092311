"""Expiry dates of all kinds of certificates."""

from __future__ import annotations

import datetime
import math

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from forwardpass_server.access import certificate_dates

KEYS = {"ecdsa": lambda: ec.generate_private_key(ec.SECP256R1()), "rsa": lambda: rsa.generate_private_key(65537, 2048)}


def certificate(end: datetime.datetime, kind: str = "ecdsa") -> x509.Certificate:
    key = KEYS[kind]()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server" * 10)])
    start = datetime.datetime(1960, 1, 1)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), start, end)
    return builder.sign(key, hashes.SHA256())


def pem(made: x509.Certificate) -> bytes:
    return made.public_bytes(serialization.Encoding.PEM)


# Dates up to 2049 are encoded as UTCTime, later ones as GeneralizedTime.
@pytest.mark.parametrize("year", [1969, 1999, 2000, 2030, 2049, 2050, 9999])
@pytest.mark.parametrize("kind", KEYS)
def test_the_expiry_of_a_certificate_is_read(kind, year):
    end = datetime.datetime(year, 12, 31, 23, 59, 58, tzinfo=datetime.timezone.utc)
    assert certificate_dates.first_end_s(pem(certificate(end, kind))) == end.timestamp()


def test_the_first_expiry_of_several_certificates_counts():
    made = [certificate(datetime.datetime(year, 1, 1)) for year in (2040, 2035, 2060)]
    found = certificate_dates.first_end_s(b"# signers\n" + b"".join(map(pem, made)))
    assert found == datetime.datetime(2035, 1, 1, tzinfo=datetime.timezone.utc).timestamp()


def block(text: bytes) -> bytes:
    return b"-----BEGIN CERTIFICATE-----\n" + text + b"\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize("text", [b"", b"nothing", block(b"MAo="), block(b"MAo"), block(b"MIAAAA==")])
def test_a_file_without_certificates_never_expires(text):
    assert certificate_dates.first_end_s(text) == math.inf
