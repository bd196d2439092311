"""Connections to a server."""

from __future__ import annotations

import abc
import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TypeVar

from forwardpass.wire import errors
from forwardpass_client import calls, replicas, targets
from forwardpass_client.calls import Call, FoundModel, ModelVersion
from forwardpass_client.credentials import Credentials, Tls, Token
from forwardpass_client.model import AsyncRemoteFunctionalModel, RemoteFunctionalModel
from forwardpass_client.options import Options
from forwardpass_client.processes import OfOneProcess, check_gevent
from forwardpass_client.replicas import Transports
from forwardpass_client.transfers import Steps
from forwardpass_client.transport import AsyncTransport, Transport

ResultT = TypeVar("ResultT")

DEFAULT_TIMEOUT_S = 60.0
DEFAULT_MAX_MESSAGE_BYTES = 256 * 2**20
_POLL_S = 0.2


def connect(
    target: str | Sequence[str],
    *,
    timeout_s: float | None = DEFAULT_TIMEOUT_S,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    reuse_weights: bool = True,
    tls: Tls | bool = False,
    token: Token | None = None,
    allow_insecure_token: bool = False,
    channel_options: Sequence[tuple[str, Any]] = (),
) -> Client:
    """A client of the server at `target`, "host:port" or any other gRPC target. Nothing is sent yet.

    target: several servers that stand for each other are "dns:///NAME:PORT", a name of them all such as that of a
      headless Service of Kubernetes, or a list of their addresses. Calls by value go to each in turn; where one cannot
      answer (it stops, loads its models, or lacks the version), another is asked. What other calls left on a server
      (weights by id), sessions and streams stay with one, taken at random, and move on when it goes.
    timeout_s: seconds that each call may take, retries included; None for no limit.
    max_message_bytes: the longest request and response. The server has a limit of its own. Weights are put and fetched
      in messages of 2 MiB, whatever they take.
    reuse_weights: weights of 1 MiB and more that are passed as the same arrays again are put on the server and named
      from then on. They may be changed in place: each call hashes them.
    tls: True, or a `Tls`, for a server that is reached through TLS.
    token: the bearer token of each call, or a function that is asked for it each time: let it return at once.
    allow_insecure_token: send the token without TLS to another machine too, because something else encrypts.
    channel_options: of gRPC, for both channels, in place of those of the same name that are set here:
      "grpc.service_config" (retries, balancing), "grpc.keepalive_time_ms" (10,000),
      "grpc.dns_min_time_between_resolutions_ms" (1000), "grpc.max_reconnect_backoff_ms" (2000) and so on.
    Calls that meet a server that is gone or stopping (UNAVAILABLE, CANCELLED) are sent again: up to four times within
    some seconds, and calls that any of several servers may answer for half a minute. Updates of sessions count once
    however often they are sent.
    Raises ValueError for a list of what are no addresses, and RuntimeError where gevent has patched Python's threads
    and gRPC was not told.
    """
    credentials = _credentials(target, tls, token, allow_insecure_token)
    return Client(credentials, _options(timeout_s, max_message_bytes, reuse_weights, channel_options))


def connect_async(
    target: str | Sequence[str],
    *,
    timeout_s: float | None = DEFAULT_TIMEOUT_S,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    reuse_weights: bool = True,
    tls: Tls | bool = False,
    token: Token | None = None,
    allow_insecure_token: bool = False,
    channel_options: Sequence[tuple[str, Any]] = (),
) -> AsyncClient:
    """`connect` for asyncio.

    The client belongs to the event loop on which it is first used; methods raise RuntimeError on another.
    """
    credentials = _credentials(target, tls, token, allow_insecure_token)
    return AsyncClient(credentials, _options(timeout_s, max_message_bytes, reuse_weights, channel_options))


def _options(
    timeout_s: float | None, max_message_bytes: int, reuse_weights: bool, channel_options: Sequence[tuple[str, Any]]
) -> Options:
    return Options(
        timeout_s=timeout_s,
        max_message_bytes=max_message_bytes,
        reuse_weights=reuse_weights,
        channel_options=tuple(channel_options),
    )


def _credentials(
    target: str | Sequence[str], tls: Tls | bool, token: Token | None, allow_insecure_token: bool
) -> Credentials:
    found = tls if isinstance(tls, Tls) else Tls() if tls else None
    return Credentials(target=targets.joined(target), tls=found, token=token, allow_insecure_token=allow_insecure_token)


class ClientApi(OfOneProcess, abc.ABC):
    """What can be asked of a server, for whoever makes the call.

    timeout_s: seconds that one call may take; None for the client's own.
    """

    def __init__(self, options: Options) -> None:
        self._options = options

    @property
    @abc.abstractmethod
    def _servers(self) -> int:
        """How many servers may have to be asked until each was."""

    def model(
        self, name: str, version: int | None = None, *, label: str | None = None, timeout_s: float | None = None
    ) -> Any:
        """A model of the server; without a version, the highest that is available now, and that one from then on.

        label: in place of a version, what the operator calls it, such as "stable" or "canary": the version that it
          stands for now, and that one from then on. Specs, weights and sessions are of one version: to follow a label
          that moves, ask for the model again.

        Of several servers one is asked, with which the model then stays; where it lacks the version, or is not ready,
        others are asked.

        Raises ModelNotFound, ModelVersionNotFound, ModelFailed, or ModelLoading.
        """
        return self._look_up(calls.get_model(name, version, label), timeout_s)

    def models(self, *, timeout_s: float | None = None) -> Any:
        """Every version of every model, by name and version, those that failed to load included.

        Of several servers one answers, ready or not: the one of calls by id.
        """
        return self._run(calls.list_models(), timeout_s)

    def is_ready(self, *, timeout_s: float | None = None) -> Any:
        """Whether the server takes calls: its required models can be called, its device works, and it does not drain.

        Of several servers, whether one is ready. Where none is, `unready_reasons` says why. Raises ServerUnavailable.
        """
        return self.is_serving("", timeout_s=timeout_s)

    def unready_reasons(self, *, timeout_s: float | None = None) -> Any:
        """Why the server is not ready, such as a required model that cannot be called; an empty list when it is."""
        return self._run(calls.unready_reasons(), timeout_s)

    def is_serving(self, service: str, *, timeout_s: float | None = None) -> Any:
        """Whether grpc.health.v1 answers SERVING for a service, such as `model/NAME`; "" is the server as a whole.

        Of several servers up to 8 are asked, one after another, until one answers SERVING.
        Raises ServerUnavailable, DeadlineExceeded, ForwardPassError for a service that the server does not know.
        """
        until = replicas.deadline(self._deadline(timeout_s))
        steps = replicas.is_any_serving(calls.check_health(service), self._servers, until)
        return self._run_steps(steps, timeout_s)

    @abc.abstractmethod
    def _look_up(self, call: Call[FoundModel], timeout_s: float | None) -> Any:
        """The model that was looked up, or what to await for it."""

    @abc.abstractmethod
    def _run(self, call: Call[Any], timeout_s: float | None) -> Any:
        """Makes the call: returns its result, or what to await for it."""

    @abc.abstractmethod
    def _run_steps(self, steps: Steps, timeout_s: float | None) -> Any:
        """Makes the calls: returns their result, or what to await for it."""

    def _deadline(self, timeout_s: float | None) -> float | None:
        return self._options.timeout_s if timeout_s is None else timeout_s


class Client(ClientApi):
    """One connection, for any number of threads. A context manager: leaving it closes the connection."""

    def __init__(self, credentials: Credentials, options: Options) -> None:
        check_gevent(is_async=False)
        super().__init__(options)
        self._transports = Transports(lambda: Transport(credentials, options))

    @property
    def _servers(self) -> int:
        return self._transports.servers

    def model(
        self, name: str, version: int | None = None, *, label: str | None = None, timeout_s: float | None = None
    ) -> RemoteFunctionalModel:
        model: RemoteFunctionalModel = super().model(name, version, label=label, timeout_s=timeout_s)
        return model

    def models(self, *, timeout_s: float | None = None) -> list[ModelVersion]:
        found: list[ModelVersion] = super().models(timeout_s=timeout_s)
        return found

    def wait_until_ready(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Waits for a server that is still starting. Raises DeadlineExceeded."""
        polling = _Polling(timeout_s)
        while not self._is_ready(polling.remaining_s()):
            time.sleep(_POLL_S)

    def _is_ready(self, timeout_s: float) -> bool:
        try:
            return bool(self.is_ready(timeout_s=timeout_s))
        except _NOT_YET:
            return False

    def close(self) -> None:
        """Ends the connection. Calls in flight, and later ones, raise CallCancelled."""
        for transport in self._transports.all:
            transport.close()

    def _look_up(self, call: Call[FoundModel], timeout_s: float | None) -> RemoteFunctionalModel:
        until = replicas.deadline(self._deadline(timeout_s))
        failure: errors.ForwardPassError | None = None
        for transport in self._transports.candidates():
            try:
                remaining_s = replicas.remaining_s(until, failure)
                found = call.read(transport.call(call.path, call.request, remaining_s, stays=True))
            except errors.ForwardPassError as error:
                if not self._transports.is_kept(transport):
                    transport.close()
                failure = self._transports.next_failure(error, failure)
            else:
                self._transports.keep(transport)
                return RemoteFunctionalModel(transport, found, self._options)
        assert failure is not None
        raise failure

    def _run(self, call: Call[ResultT], timeout_s: float | None) -> ResultT:
        deadline = self._deadline(timeout_s)
        return call.read(self._transports.own.call(call.path, call.request, deadline, stays=True))

    def _run_steps(self, steps: Steps, timeout_s: float | None) -> Any:
        return self._transports.own.run(steps, self._deadline(timeout_s))

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(ClientApi):
    """`Client` for asyncio: the same methods, whose results are to be awaited."""

    def __init__(self, credentials: Credentials, options: Options) -> None:
        check_gevent(is_async=True)
        super().__init__(options)
        self._transports = Transports(lambda: AsyncTransport(credentials, options))

    @property
    def _servers(self) -> int:
        return self._transports.servers

    async def model(
        self, name: str, version: int | None = None, *, label: str | None = None, timeout_s: float | None = None
    ) -> AsyncRemoteFunctionalModel:
        model: AsyncRemoteFunctionalModel = await super().model(name, version, label=label, timeout_s=timeout_s)
        return model

    async def models(self, *, timeout_s: float | None = None) -> list[ModelVersion]:
        found: list[ModelVersion] = await super().models(timeout_s=timeout_s)
        return found

    async def wait_until_ready(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """See `Client.wait_until_ready`."""
        polling = _Polling(timeout_s)
        while True:
            if await self._is_ready(polling.remaining_s()):
                return
            await asyncio.sleep(_POLL_S)

    async def _is_ready(self, timeout_s: float) -> bool:
        try:
            return bool(await self.is_ready(timeout_s=timeout_s))
        except _NOT_YET:
            return False

    async def close(self) -> None:
        """See `Client.close`."""
        for transport in self._transports.all:
            await transport.close()

    async def _look_up(self, call: Call[FoundModel], timeout_s: float | None) -> AsyncRemoteFunctionalModel:
        until = replicas.deadline(self._deadline(timeout_s))
        failure: errors.ForwardPassError | None = None
        for transport in self._transports.candidates():
            try:
                remaining_s = replicas.remaining_s(until, failure)
                found = call.read(await transport.call(call.path, call.request, remaining_s, stays=True))
            except errors.ForwardPassError as error:
                if not self._transports.is_kept(transport):
                    await transport.close()
                failure = self._transports.next_failure(error, failure)
            else:
                self._transports.keep(transport)
                return AsyncRemoteFunctionalModel(transport, found, self._options)
        assert failure is not None
        raise failure

    async def _run(self, call: Call[ResultT], timeout_s: float | None) -> ResultT:
        deadline = self._deadline(timeout_s)
        return call.read(await self._transports.own.call(call.path, call.request, deadline, stays=True))

    async def _run_steps(self, steps: Steps, timeout_s: float | None) -> Any:
        return await self._transports.own.run(steps, self._deadline(timeout_s))

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


# How a server that is not there, or is stuck, answers whether it is ready.
_NOT_YET = (errors.ServerUnavailable, errors.DeadlineExceeded)


class _Polling:
    """The time that is left to wait for a server."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s

    def remaining_s(self) -> float:
        """Raises DeadlineExceeded where none is left."""
        remaining_s = self._deadline - time.monotonic()
        if remaining_s <= 0:
            raise errors.DeadlineExceeded(f"the server was not ready within {self._timeout_s:g} s")
        return remaining_s
