"""Objects in a bucket: `s3://` by the package s3fs, `gs://` by gcsfs."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from forwardpass_server.storage.objects import ObjectState, StoreUnreachable

T = TypeVar("T")

# A request of some bytes. The libraries try again on their own in this time.
_TIMEOUT_S = 20.0

# A slower transfer counts as a store that does not answer.
_BYTES_PER_S = 2**20

# As many as threads use a store. The default of botocore is 10.
_CONNECTIONS = 64

# The default of botocore is 60 s for each of five attempts.
_S3_CONFIG = {
    "connect_timeout": 4,
    "read_timeout": 10,
    "retries": {"max_attempts": 2, "mode": "standard"},
    "max_pool_connections": _CONNECTIONS,
}


class BucketObjects:
    """See `ObjectStore`. A write of an object is atomic in S3 and in Google Cloud Storage.

    filesystem: of fsspec, without a cache of listings. root: the bucket, and the prefix of all names.
    """

    def __init__(self, url: str, filesystem: Any, root: str) -> None:
        self._url = url
        self._files = filesystem
        self._root = root

    @property
    def url(self) -> str:
        """See `ObjectStore`."""
        return self._url

    def open(self) -> None:
        """See `ObjectStore`."""
        bucket = self._root.split("/")[0]
        _translated(lambda: self._files.info(bucket, timeout=_TIMEOUT_S))

    def read(self, name: str) -> bytes:
        """See `ObjectStore`."""
        data = _translated(lambda: self._files.cat_file(self._path(name), timeout=_TIMEOUT_S))
        return bytes(data)

    def read_into(self, name: str, start: int, buffer: memoryview) -> int:
        """See `ObjectStore`."""
        timeout_s = _TIMEOUT_S + len(buffer) / _BYTES_PER_S
        end = start + len(buffer)
        if not len(buffer):
            if self.state(name) is None:
                raise FileNotFoundError(name)
            return 0
        try:
            data = _translated(lambda: self._files.cat_file(self._path(name), start=start, end=end, timeout=timeout_s))
        except FileNotFoundError:
            raise
        except OSError:
            # The stores refuse a range that begins at the end or after it.
            found_state = self.state(name)
            if found_state is None or found_state.size_bytes > start:
                raise
            return 0
        found = np.frombuffer(data, np.uint8)[: len(buffer)]
        # By numpy, which releases Python's lock.
        np.frombuffer(buffer, np.uint8)[: len(found)] = found
        return len(found)

    def write(self, name: str, data: Any) -> None:
        """See `ObjectStore`."""
        view = memoryview(data).cast("B")
        # The libraries take bytes or a bytearray. numpy copies without Python's lock.
        body = bytearray(len(view))
        np.frombuffer(body, np.uint8)[:] = np.frombuffer(view, np.uint8)
        timeout_s = _TIMEOUT_S + len(view) / _BYTES_PER_S
        _translated(lambda: self._files.pipe_file(self._path(name), body, timeout=timeout_s))

    def remove(self, name: str) -> None:
        """See `ObjectStore`."""
        with contextlib.suppress(FileNotFoundError):
            _translated(lambda: self._files.rm_file(self._path(name), timeout=_TIMEOUT_S))

    def state(self, name: str) -> ObjectState | None:
        """See `ObjectStore`."""
        try:
            found = _translated(lambda: self._files.info(self._path(name), timeout=_TIMEOUT_S))
        except FileNotFoundError:
            return None
        return _state(name, found) if found["type"] == "file" else None

    def list(self, prefix: str = "") -> Iterator[ObjectState]:
        """See `ObjectStore`."""
        folder = self._path(prefix).rstrip("/")
        # Ten times as long: a listing takes a request for each 1000 objects.
        found = _translated(lambda: self._files.find(folder, detail=True, timeout=10 * _TIMEOUT_S))
        for path, one in sorted(found.items()):
            name = path.removeprefix(f"{self._root}/")
            # Some tools create empty objects as folders.
            if one["type"] == "file" and not path.endswith("/") and name.startswith(prefix):
                yield _state(name, one)

    def unfinished(self) -> Iterator[ObjectState]:
        """See `ObjectStore`. The store's rules of life cycle delete them."""
        return iter(())

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def s3(url: str, root: str) -> BucketObjects:
    """A bucket of S3, or of another store with its interface. Raises ImportError without s3fs."""
    import s3fs

    # A listing may not be cached: other servers write too.
    return BucketObjects(
        url, s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=_S3_CONFIG), root
    )


def gcs(url: str, root: str) -> BucketObjects:
    """A bucket of Google Cloud Storage. Raises ImportError without gcsfs."""
    import gcsfs

    return BucketObjects(url, gcsfs.GCSFileSystem(skip_instance_cache=True, use_listings_cache=False), root)


def _translated(call: Callable[[], T]) -> T:
    """Calls a function of fsspec. Raises StoreUnreachable for each error that is none of a file."""
    try:
        return call()
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        # Libraries raise exceptions of their own for broken connections, and OSError for the rest.
        if (
            isinstance(error, OSError)
            and error.errno is not None
            and not isinstance(error, (ConnectionError, TimeoutError))
        ):
            raise
        raise StoreUnreachable(f"{type(error).__name__}: {error}") from error


def _state(name: str, found: dict[str, Any]) -> ObjectState:
    modified = found.get("LastModified") or found.get("mtime")
    tag = found.get("ETag") or found.get("etag") or ""
    seconds = modified.timestamp() if isinstance(modified, datetime.datetime) else float(modified or 0)
    return ObjectState(name, int(found["size"]), seconds, str(tag).strip('"'))
