"""A DNS server whose answers a test changes, as Kubernetes does for a headless Service."""

from __future__ import annotations

import socket
import struct
import threading
from typing import Any

_ADDRESS, _INTERNET = 1, 1
_ANSWER = 0x8180
_NAME_OF_THE_QUESTION = 0xC00C


class DnsServer:
    """Answers every question for IPv4 addresses with `addresses`, and other questions with nothing. A context manager.

    addresses: may be replaced at any time. gRPC asks this server for the targets of `target`.
    """

    def __init__(self, *addresses: str) -> None:
        self.addresses: tuple[str, ...] = addresses
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def target(self, port: int) -> str:
        """The gRPC target that stands for this port at all addresses."""
        return f"dns://127.0.0.1:{self._socket.getsockname()[1]}/replicas.test:{port}"

    def _run(self) -> None:
        while True:
            query, caller = self._socket.recvfrom(4096)
            if not query:
                return
            self._socket.sendto(_answer(query, self.addresses), caller)

    def __enter__(self) -> DnsServer:
        return self

    def __exit__(self, *_: Any) -> None:
        # An empty datagram ends the thread: closing a socket would not wake it.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as waking:
            waking.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()


def _answer(query: bytes, addresses: tuple[str, ...]) -> bytes:
    """The response to a query with one question. RFC 1035, section 4."""
    end = query.index(b"\0", 12) + 5
    kind, _ = struct.unpack("!HH", query[end - 4 : end])
    found = addresses if kind == _ADDRESS else ()
    header = query[:2] + struct.pack("!HHHHH", _ANSWER, 1, len(found), 0, 0)
    records = (
        struct.pack("!HHHIH", _NAME_OF_THE_QUESTION, _ADDRESS, _INTERNET, 0, 4) + socket.inet_aton(address)
        for address in found
    )
    return header + query[12:end] + b"".join(records)
