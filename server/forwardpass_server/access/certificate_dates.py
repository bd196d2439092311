"""When certificates expire."""

from __future__ import annotations

import logging
import math

from cryptography import x509

_LOGGER = logging.getLogger(__name__)


def first_end_s(pem: bytes) -> float:
    """When the first of a file's certificates expires, in seconds since 1970; infinite where they cannot be read."""
    try:
        found = x509.load_pem_x509_certificates(pem)
        return min(certificate.not_valid_after_utc.timestamp() for certificate in found)
    except ValueError as error:
        # Whether they are good for anything is for OpenSSL to say.
        _LOGGER.warning("certificates do not tell when they expire: %s", error)
        return math.inf
