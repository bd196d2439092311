"""When certificates expire, read off their DER: Python's ssl tells it of verified peers alone.

    Certificate ::= SEQUENCE { tbsCertificate SEQUENCE {
        [0] version OPTIONAL, serialNumber, signature, issuer, validity SEQUENCE { notBefore, notAfter }, ... }, ... }

Source: RFC 5280, 4.1.
"""

from __future__ import annotations

import base64
import datetime
import logging
import math
import re

_LOGGER = logging.getLogger(__name__)

_PEM = re.compile(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----([^-]+)-----END")

_VERSION = 0xA0
_UTC_TIME = 0x17


def first_end_s(pem: bytes) -> float:
    """When the first of a file's certificates expires, in seconds since 1970; infinite where none tells."""
    return min(map(_end_s, _PEM.findall(pem)), default=math.inf)


def _end_s(encoded: bytes) -> float:
    try:
        return _not_after(base64.b64decode(encoded)).timestamp()
    except (IndexError, ValueError, OverflowError):
        # Whether it is good for anything is for OpenSSL to say.
        _LOGGER.warning("a certificate does not tell when it expires")
        return math.inf


def _not_after(der: bytes) -> datetime.datetime:
    _, at, _ = _element(der, 0)
    _, at, _ = _element(der, at)
    tag, _, end = _element(der, at)
    if tag == _VERSION:
        at = end
    for _ in ("serialNumber", "signature", "issuer"):
        _, _, at = _element(der, at)
    _, at, _ = _element(der, at)
    _, _, at = _element(der, at)
    tag, at, end = _element(der, at)
    text = der[at:end].decode()
    if tag == _UTC_TIME:
        # Two digits of a year, of 1950 to 2049.
        text = ("19" if text[:2] >= "50" else "20") + text
    return datetime.datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=datetime.timezone.utc)


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """The tag of what stands there, and where its content begins and ends. Raises IndexError beyond the end."""
    tag, length = der[at], der[at + 1]
    at += 2
    if length & 0x80:
        size = length & 0x7F
        length = int.from_bytes(der[at : at + size], "big")
        at += size
    return tag, at, at + length
