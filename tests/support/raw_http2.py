"""A client of HTTP/2 that does what no client of gRPC would."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions


class RawConnection:
    """One connection without TLS. A context manager: leaving it closes the socket. Nothing is read but by `wait`."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=30)
        config = h2.config.H2Configuration(client_side=True, header_encoding="utf-8", validate_outbound_headers=False)
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        self.flush()
        self.wait(lambda event: isinstance(event, h2.events.RemoteSettingsChanged))

    def open(self, path: str, *headers: tuple[str, str], end: bool = False) -> int:
        """Begins a call, and returns its stream. Sent with the next `flush`."""
        stream = self.h2.get_next_available_stream_id()
        whole = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            *headers,
        ]
        self.h2.send_headers(stream, whole, end_stream=end)
        return stream

    def send(self, stream: int, message: bytes, *, size: int | None = None, flag: int = 0, end: bool = True) -> None:
        """A message of gRPC. size: the length that it claims, where that is another than its own."""
        data = struct.pack(">BI", flag, len(message) if size is None else size) + message
        self.h2.send_data(stream, data, end_stream=end)
        self.flush()

    def flush(self, frames: bytes = b"") -> bool:
        """Sends what there is, and frames that h2 would not send. Returns whether the other end still takes it."""
        try:
            self._socket.sendall(self.h2.data_to_send() + frames)
        except OSError:
            return False
        return True

    def wait(self, is_it: Callable[[Any], bool], timeout_s: float = 30) -> Any:
        """Reads until an event is the one; None where the connection ends before."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                data = self._socket.recv(65536)
            except ConnectionError:
                return None
            if not data:
                return None
            try:
                events = self.h2.receive_data(data)
            except h2.exceptions.ProtocolError:
                # It was the other end's last word.
                return None
            self.flush()
            for event in events:
                if is_it(event):
                    return event

    def status(self, stream: int) -> tuple[str, str]:
        """The status of a call and its message, or ("reset", "") where its stream or connection is cut off."""
        ends = (h2.events.TrailersReceived, h2.events.ResponseReceived, h2.events.StreamReset)

        def is_end(event: Any) -> bool:
            if not isinstance(event, ends) or event.stream_id != stream:
                return False
            return isinstance(event, h2.events.StreamReset) or "grpc-status" in dict(event.headers)

        event = self.wait(is_end)
        if event is None or isinstance(event, h2.events.StreamReset):
            return "reset", ""
        headers = dict(event.headers)
        return headers["grpc-status"], headers.get("grpc-message", "")

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(self, *_: Any) -> None:
        self._socket.close()
