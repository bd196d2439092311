"""URLs of stores: which there are, and how one is opened."""

from __future__ import annotations

import pathlib
import urllib.parse

from forwardpass_server.errors import SettingsError
from forwardpass_server.storage import buckets
from forwardpass_server.storage.folder import FolderObjects
from forwardpass_server.storage.objects import ObjectStore

EXPECTED = "a folder, or a URL file:///FOLDER, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"

_BUCKETS = {"s3": (buckets.s3, "s3fs", "s3"), "gs": (buckets.gcs, "gcsfs", "gcs")}


def check(url: str, flag: str) -> None:
    """Raises SettingsError for a URL that names no store. flag: the option, for the message."""
    parts = urllib.parse.urlsplit(url)
    is_folder = parts.scheme == "file" and not parts.netloc and parts.path.startswith("/")
    if "@" in parts.netloc:
        # The message does not quote the URL: it may hold a password.
        raise SettingsError(f"{flag}: expected a URL without credentials: the environment gives them")
    if parts.query or parts.fragment or not (is_folder or (parts.scheme in _BUCKETS and parts.netloc)):
        raise SettingsError(f"{flag}: expected {EXPECTED}, got {url!r}")


def open_store(url: str, flag: str, *, is_written: bool) -> ObjectStore:
    """The store of a URL that `check` has accepted. Does not connect.

    is_written: whether this process writes objects. Raises SettingsError if a package is missing.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file":
        return FolderObjects(pathlib.Path(urllib.parse.unquote(parts.path)), is_written)
    make, package, extra = _BUCKETS[parts.scheme]
    root = f"{parts.netloc}{parts.path}".rstrip("/")
    try:
        return make(url, root)
    except ImportError:
        raise SettingsError(f"{flag}: {package} is not installed: pip install 'forwardpass[{extra}]'") from None
