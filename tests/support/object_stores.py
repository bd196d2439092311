"""Places that servers share, each empty at first: a folder with a `file://` URL, and a bucket of an S3 server."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import uuid
from collections.abc import Mapping
from unittest import mock

from forwardpass_server.storage import urls
from forwardpass_server.storage.objects import ObjectStore
from support.s3_servers import BUCKET, S3Process


@dataclasses.dataclass
class Place:
    """url: of the place. environment: what a server needs to reach it. s3: the S3 server; None for a folder."""

    url: str
    environment: Mapping[str, str]
    s3: S3Process | None = None

    def store(self) -> ObjectStore:
        """A store of this process."""
        store = urls.open_store(self.url, "URL", is_written=True)
        store.open()
        return store


class Places:
    """Makes places of one kind. A context manager: leaving it ends the S3 server."""

    def __init__(self, kind: str, folder: pathlib.Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self.s3 = self._stack.enter_context(S3Process()) if kind == "s3" else None
        environment = {} if self.s3 is None else self.s3.environment
        self._stack.enter_context(mock.patch.dict(os.environ, environment))

    def make(self) -> Place:
        name = uuid.uuid4().hex
        if self.s3 is None:
            return Place((self._folder / name).as_uri(), {})
        return Place(f"s3://{BUCKET}/{name}", self.s3.environment, self.s3)

    def close(self) -> None:
        self._stack.close()
