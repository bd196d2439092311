"""Expiry dates of certificates."""

from __future__ import annotations

import logging
import math

from cryptography import x509

_LOGGER = logging.getLogger(__name__)


def first_end_s(pem: bytes) -> float:
    """When the first of a file's certificates expires, in seconds since 1970; infinite if they cannot be parsed."""
    try:
        found = x509.load_pem_x509_certificates(pem)
        return min(certificate.not_valid_after_utc.timestamp() for certificate in found)
    except ValueError as error:
        # No error: OpenSSL decides whether the certificates are valid.
        _LOGGER.warning("the expiry date of certificates cannot be read: %s", error)
        return math.inf
