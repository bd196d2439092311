"""Proxies between a client and a real server that break in a chosen way."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import threading
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import Any

import grpc

from forwardpass import v1
from forwardpass.wire.methods import METHODS


class ConnectionProxy:
    """Forwards TCP connections to a server, until it stalls or drops them. A context manager."""

    def __init__(self, server_address: str) -> None:
        host, _, port = server_address.rpartition(":")
        self._server = host, int(port)
        self._flowing = threading.Event()
        self._flowing.set()
        self._is_dropping = False
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._start(self._accept)

    def stall(self) -> None:
        """From now on connections are accepted and no byte passes."""
        self._flowing.clear()

    def drop(self) -> None:
        """Closes every connection, and from now on each new one as soon as it is accepted."""
        self._is_dropping = True
        self._close_all()

    def _start(self, target: Any, *arguments: Any) -> None:
        threading.Thread(target=target, args=arguments, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = self._listening.accept()
                if self._is_dropping:
                    accepted.close()
                    continue
                server = socket.create_connection(self._server)
                with self._lock:
                    self._sockets += [accepted, server]
                self._start(self._forward, accepted, server)
                self._start(self._forward, server, accepted)

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                self._flowing.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def _close_all(self) -> None:
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def __enter__(self) -> ConnectionProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.close()
        self._flowing.set()
        self._close_all()


class LosingProxy:
    """Forwards gRPC calls to a server that loses weights: it deletes them before it forwards a call.

    weights_ids: the weights to lose. loses_uploads: whether the tensors of each upload are lost, too.
    """

    def __init__(self, server_address: str) -> None:
        self.weights_ids: Collection[str] = ()
        self.loses_uploads = False
        self._channel = grpc.insecure_channel(server_address, _OPTIONS)
        # A thread for each call that is in progress.
        self._pool = concurrent.futures.ThreadPoolExecutor(128)
        self._grpc = grpc.server(self._pool, handlers=[_Forwarding(self)], options=_OPTIONS)
        self.address = f"127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"
        self._grpc.start()

    def forward(self, path: str, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """The server's responses."""
        if path not in _PUTTING:
            self._lose()
        elif self.loses_uploads and path == _UPLOAD:
            for _ in requests:
                pass
            yield v1.UploadTensorsResponse().SerializeToString()
            return
        responses = self._channel.stream_stream(path)(requests, timeout=context.time_remaining())
        context.add_callback(responses.cancel)
        try:
            yield from responses
        except grpc.RpcError as error:
            context.set_trailing_metadata(error.trailing_metadata() or ())
            context.abort(error.code(), error.details())

    def _lose(self) -> None:
        delete = self._channel.unary_unary(METHODS["DeleteWeights"].path)
        for weights_id in self.weights_ids:
            delete(v1.DeleteWeightsRequest(weights_id=bytes.fromhex(weights_id)).SerializeToString())

    def __enter__(self) -> LosingProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._grpc.stop(None).wait()
        self._channel.close()
        self._pool.shutdown()


_UPLOAD = METHODS["UploadTensors"].path
_PUTTING = (_UPLOAD, METHODS["PutWeights"].path)
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class _Forwarding(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Every method as a stream of bytes both ways: a call with one message looks the same on the wire."""

    def __init__(self, proxy: LosingProxy) -> None:
        self._proxy = proxy

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.stream_stream_rpc_method_handler(
            lambda requests, context: self._proxy.forward(details.method, requests, context)
        )
