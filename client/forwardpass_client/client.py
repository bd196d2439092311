"""Clients: connections to a server, and the models that it has."""

from __future__ import annotations

import abc
import asyncio
import functools
import time
from collections.abc import Coroutine, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from forwardpass.wire import errors
from forwardpass.wire.manifests import DIGEST_BYTES
from forwardpass_client import calls, combinations, ids, replicas, targets, transfers
from forwardpass_client.async_model import AsyncRemoteFunctionalModel
from forwardpass_client.call import Call
from forwardpass_client.calls import FoundModel, ModelVersion, ModelWeights
from forwardpass_client.combinations import Integers
from forwardpass_client.credentials import Credentials, Tls, Token
from forwardpass_client.deadlines import Deadline, check_timeout
from forwardpass_client.health import check_health
from forwardpass_client.held_weights import HeldWeights
from forwardpass_client.model import RemoteFunctionalModel
from forwardpass_client.options import Options
from forwardpass_client.processes import Connected, check_fork, check_gevent
from forwardpass_client.replicas import Transports
from forwardpass_client.routes import STICKY
from forwardpass_client.transfers import Progress, Steps
from forwardpass_client.transport import AsyncTransport, Transport
from forwardpass_client.weights_handles import AsyncWeightsHandle, WeightsHandle, WeightsHandleApi

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
    """A client of the server at `target`. Nothing is sent yet.

    target: "host:port", such as "localhost:8500", or any other gRPC target. Replicas are "dns:///NAME:PORT", where NAME
      stands for all of them as the name of a headless Service of Kubernetes does, or a list of their addresses. Calls
      by value go to each replica in turn; where one cannot answer (it stops, loads its models, or lacks the version),
      another is asked. Calls that need what other calls left on a server (weights by id), sessions and streams are
      sticky: they go to one replica, taken at random, until its connection ends.
    timeout_s: seconds until a call raises DeadlineExceeded, with all its attempts; None for no limit. In transfers of
      weights and in evaluations it limits the time without progress.
    max_message_bytes: the longest request and response. The server has a limit of its own. Weights are put and fetched
      in messages of 2 MiB, whatever their size.
    reuse_weights: weights of 1 MiB and more that are passed as the same arrays again are put on the server and named
      from then on. They may be changed in place: each call hashes them.
    tls: True, or a `Tls`, for a server that uses TLS.
    token: the bearer token of each call, or a function that returns it, called for each attempt: it must not block.
    allow_insecure_token: whether the token may be sent without TLS to another machine, because something else encrypts.
    channel_options: options of gRPC for both channels. They replace the values that are set here:
      "grpc.service_config" (load balancing), "grpc.keepalive_time_ms" (10,000),
      "grpc.dns_min_time_between_resolutions_ms" (1000), "grpc.max_reconnect_backoff_ms" (2000) and so on.
    Calls that find the server away (UNAVAILABLE, CANCELLED) are made again until their deadline: for some 3 s at most,
    or for half a minute where replicas, sessions, streams or transfers allow it. An update of a session counts once,
    however often it is sent.
    Raises TypeError or ValueError for an invalid target, timeout, token or Tls; and RuntimeError where gevent has
    patched Python's threads and gRPC was not told, and in a forked child of a process that has used an AsyncClient.
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
    """A client for asyncio of the server at `target`. Nothing is sent yet.

    The arguments are those of `connect`, and so are the errors. The client belongs to the event loop on which it is
    first used; on another loop its methods raise RuntimeError.
    """
    credentials = _credentials(target, tls, token, allow_insecure_token)
    return AsyncClient(credentials, _options(timeout_s, max_message_bytes, reuse_weights, channel_options))


def _options(
    timeout_s: float | None, max_message_bytes: int, reuse_weights: bool, channel_options: Sequence[tuple[str, Any]]
) -> Options:
    if isinstance(max_message_bytes, bool) or not isinstance(max_message_bytes, int):
        raise TypeError(f"max_message_bytes: expected an int, got {max_message_bytes!r}")
    if not 0 < max_message_bytes < 2**31:
        raise ValueError(f"max_message_bytes: expected 1 to {2**31 - 1}, got {max_message_bytes}")
    return Options(
        timeout_s=check_timeout(timeout_s),
        max_message_bytes=max_message_bytes,
        reuse_weights=reuse_weights,
        channel_options=tuple(channel_options),
    )


def _credentials(
    target: str | Sequence[str], tls: Tls | bool, token: Token | None, allow_insecure_token: bool
) -> Credentials:
    if not isinstance(tls, (bool, Tls)):
        raise TypeError(f"tls: expected True, False or a forwardpass_client.Tls, got {type(tls).__name__}")
    found = tls if isinstance(tls, Tls) else Tls() if tls else None
    return Credentials(target=targets.joined(target), tls=found, token=token, allow_insecure_token=allow_insecure_token)


class ClientApi(Connected, abc.ABC):
    """The methods of a client, for threads and for asyncio.

    timeout_s: seconds until DeadlineExceeded; None for the client's own.
    """

    def __init__(self, options: Options) -> None:
        super().__init__(options.timeout_s)
        self._options = options

    @property
    @abc.abstractmethod
    def _servers(self) -> int:
        """How many attempts it takes to ask every server."""

    def model(
        self, name: str, version: int | None = None, *, label: str | None = None, timeout_s: float | None = None
    ) -> Any:
        """Looks up a model of the server.

        name: the model's name, as `models()` lists it.
        version: None for the highest version that is available now. Specs, weights and sessions belong to the version
          that was found, and the model keeps it.
        label: instead of a version, the name that the operator gave it, such as "stable" or "canary". To follow a label
          that moves, look the model up again.
        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Of several replicas one is asked, and the model's sticky calls go there; where it lacks the version, or is not
        ready, others are asked.
        Raises ModelNotFound, ModelVersionNotFound, ModelFailed, ModelLoading, ServerUnavailable, DeadlineExceeded;
        TypeError and ValueError for an invalid name, version or label.
        """
        deadline = self._deadline(timeout_s)
        return self._look_up(calls.get_model(name, version, label), deadline)

    def models(self, *, timeout_s: float | None = None) -> Any:
        """A list of every version of every model, by name and version, with those that failed to load.

        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Of several replicas the sticky one answers, ready or not.
        Raises ServerUnavailable, DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        return self._run(calls.list_models(), deadline)

    def is_ready(self, *, timeout_s: float | None = None) -> Any:
        """Whether the server takes calls: its required models can be called, its device works, and it does not drain.

        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Of several replicas, whether one is ready. Where none is, `unready_reasons` says why.
        Raises ServerUnavailable, DeadlineExceeded.
        """
        return self.is_serving("", timeout_s=timeout_s)

    def unready_reasons(self, *, timeout_s: float | None = None) -> Any:
        """Why the server is not ready, such as a required model that cannot be called: a list, empty when it is ready.

        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Raises ServerUnavailable, DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        return self._run(calls.unready_reasons(), deadline)

    def is_serving(self, service: str, *, timeout_s: float | None = None) -> Any:
        """Whether grpc.health.v1 answers SERVING for a service.

        service: such as `model/NAME`; "" for the server as a whole.
        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Of several replicas up to 8 are asked, one after another, until one answers SERVING.
        Raises ServerUnavailable, DeadlineExceeded, ForwardPassError for a service that the server does not know.
        """
        deadline = self._deadline(timeout_s)
        steps = replicas.is_any_serving(check_health(service), self._servers, deadline)
        return self._run_steps(steps, deadline)

    def weights_handle(self, weights_id: str) -> Any:
        """A handle of weights that were put or computed before, of any model. Nothing is sent.

        weights_id: `id` of their handle, 64 hexadecimal digits. Raises ValueError or TypeError for anything else.
        """
        self._deadline()
        return self._handle(HeldWeights(ids.parse(weights_id, DIGEST_BYTES, "weights_id")))

    def get_weights(
        self, handle: WeightsHandleApi, *, progress: Progress | None = None, timeout_s: float | None = None
    ) -> Any:
        """The weights of a handle, of any model: a pair of read-only arrays in the containers of the put.

        progress, timeout_s, errors: as of `get_weights` of a model.
        """
        deadline = self._deadline(timeout_s, is_renewable=True)
        weights_id = calls.check_handle(handle, "handle").held.weights_id
        return self._run_steps(transfers.get(weights_id, deadline, progress), deadline, handle)

    def combine(
        self,
        terms: Iterable[tuple[Any, float]],
        *,
        float64: bool = False,
        integers: Integers = "equal",
        timeout_s: float | None = None,
    ) -> Any:
        """Computes a linear combination of weights on the server: the handle of the sum of coefficient * weights.

        For averages of weights, differences, and updates such as weights - 0.1 * gradients. Only ids are sent.
        terms: pairs of a handle and a finite number, at least one and at most 16,384. Structures, shapes and dtypes
          must agree with those of the first term, except that leaves of the others may be None: these terms do not
          change the leaf.
        float64: whether sums are computed in float64 (complex128) and rounded at the end. Otherwise they are computed
          in the dtype of each leaf, and in float32 for float16 and bfloat16. The terms are added in their order.
        integers: how leaves of integers, booleans and strings are treated, which are never multiplied. "equal": they
          must be equal in all terms. "first": the result has those of the first term. Use "first" for trained weights
          of Keras models with Dropout, whose random number states differ.
        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Where the server lacks weights whose arrays a handle keeps, they are put again.
        Raises TypeError or ValueError for other arguments before anything is sent; then StructureMismatch,
        DTypeMismatch, ShapeMismatch or InvalidRequest (naming the term and the leaf), WeightsNotFound, WeightStoreFull,
        OutOfMemory, ServerUnavailable, DeadlineExceeded.
        """
        deadline = self._deadline(timeout_s)
        pairs = combinations.terms_of(terms)
        first, _ = pairs[0]
        steps = combinations.combine(pairs, float64, integers, functools.partial(self._handle, near=first), deadline)
        return self._run_steps(steps, deadline, first)

    @abc.abstractmethod
    def _handle(self, held: HeldWeights, near: WeightsHandleApi | None = None) -> Any:
        """A handle of weights. near: a handle of weights on the same server; None for the sticky server."""

    @abc.abstractmethod
    def _look_up(self, call: Call[FoundModel], deadline: Deadline) -> Any:
        """The model that was looked up, or an awaitable of it."""

    @abc.abstractmethod
    def _run(self, call: Call[Any], deadline: Deadline) -> Any:
        """Makes a sticky call: returns its result, or an awaitable of it."""

    @abc.abstractmethod
    def _run_steps(self, steps: Steps, deadline: Deadline, handle: WeightsHandleApi | None = None) -> Any:
        """Carries out the steps: returns their result, or an awaitable of it. handle: of the weights that they use."""


class Client(ClientApi):
    """A connection for any number of threads. A context manager: leaving it closes the connection."""

    def __init__(self, credentials: Credentials, options: Options) -> None:
        check_gevent(is_async=False)
        check_fork()
        super().__init__(options)
        self._transports = Transports(
            functools.partial(Transport, credentials, options), targets.listed(credentials.target)
        )

    if TYPE_CHECKING:

        def model(
            self, name: str, version: int | None = None, *, label: str | None = None, timeout_s: float | None = None
        ) -> RemoteFunctionalModel: ...

        def models(self, *, timeout_s: float | None = None) -> list[ModelVersion]: ...

        def is_ready(self, *, timeout_s: float | None = None) -> bool: ...

        def unready_reasons(self, *, timeout_s: float | None = None) -> list[str]: ...

        def is_serving(self, service: str, *, timeout_s: float | None = None) -> bool: ...

        def weights_handle(self, weights_id: str) -> WeightsHandle: ...

        def get_weights(
            self, handle: WeightsHandleApi, *, progress: Progress | None = None, timeout_s: float | None = None
        ) -> ModelWeights: ...

        def combine(
            self,
            terms: Iterable[tuple[Any, float]],
            *,
            float64: bool = False,
            integers: Integers = "equal",
            timeout_s: float | None = None,
        ) -> WeightsHandle: ...

    @property
    def _servers(self) -> int:
        return self._transports.servers

    def wait_until_ready(self, timeout_s: float | None = DEFAULT_TIMEOUT_S) -> None:
        """Waits until the server is ready, such as one that is still starting.

        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Raises DeadlineExceeded, which names the last reason, and CallCancelled once the client is closed.
        """
        polling = _Polling(self._deadline(timeout_s))
        while not self._is_ready(polling):
            time.sleep(polling.pause_s())

    def _is_ready(self, polling: _Polling) -> bool:
        remaining_s = polling.remaining_s()
        try:
            return self.is_ready(timeout_s=remaining_s)
        except _NOT_YET as error:
            polling.reason = error
            return False

    def close(self) -> None:
        """Ends the connection. Calls in flight, and later ones, raise CallCancelled.

        In a forked child it does nothing: the connection belongs to the parent.
        """
        if self._is_in_forked_child:
            return
        for transport in self._transports.all:
            transport.close()

    def _look_up(self, call: Call[FoundModel], deadline: Deadline) -> RemoteFunctionalModel:
        failure: errors.ForwardPassError | None = None
        for transport in self._transports.candidates():
            try:
                found = transport.ask(call, deadline, sticky=True)
            except errors.ForwardPassError as error:
                if not self._transports.is_kept(transport):
                    transport.close()
                failure = self._transports.next_failure(error, failure, deadline)
            else:
                transport.share_weights(found.shares_weights, deadline)
                self._transports.keep(transport)
                return RemoteFunctionalModel(transport, found, self._options)
        assert failure is not None
        raise failure

    def _run(self, call: Call[ResultT], deadline: Deadline) -> ResultT:
        return self._transports.own.ask(call, deadline, sticky=True)

    def _run_steps(self, steps: Steps, deadline: Deadline, handle: WeightsHandleApi | None = None) -> Any:
        transport = self._transport_of(handle)
        return transport.run(steps, deadline, STICKY if handle is None else transport.route(handle.held))

    def _handle(self, held: HeldWeights, near: WeightsHandleApi | None = None) -> WeightsHandle:
        return WeightsHandle(held, self._transport_of(near), self._timeout_s)

    def _transport_of(self, handle: WeightsHandleApi | None) -> Transport:
        """The transport that leads to the weights of a handle, if it is one of this client."""
        if isinstance(handle, WeightsHandle) and self._transports.is_kept(handle.transport):
            return handle.transport
        return self._transports.own

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
        check_fork()
        super().__init__(options)
        self._transports = Transports(
            functools.partial(AsyncTransport, credentials, options), targets.listed(credentials.target)
        )

    if TYPE_CHECKING:

        def model(
            self, name: str, version: int | None = None, *, label: str | None = None, timeout_s: float | None = None
        ) -> Coroutine[Any, Any, AsyncRemoteFunctionalModel]: ...

        def models(self, *, timeout_s: float | None = None) -> Coroutine[Any, Any, list[ModelVersion]]: ...

        def is_ready(self, *, timeout_s: float | None = None) -> Coroutine[Any, Any, bool]: ...

        def unready_reasons(self, *, timeout_s: float | None = None) -> Coroutine[Any, Any, list[str]]: ...

        def is_serving(self, service: str, *, timeout_s: float | None = None) -> Coroutine[Any, Any, bool]: ...

        def weights_handle(self, weights_id: str) -> AsyncWeightsHandle: ...

        def get_weights(
            self, handle: WeightsHandleApi, *, progress: Progress | None = None, timeout_s: float | None = None
        ) -> Coroutine[Any, Any, ModelWeights]: ...

        def combine(
            self,
            terms: Iterable[tuple[Any, float]],
            *,
            float64: bool = False,
            integers: Integers = "equal",
            timeout_s: float | None = None,
        ) -> Coroutine[Any, Any, AsyncWeightsHandle]: ...

    @property
    def _servers(self) -> int:
        return self._transports.servers

    async def wait_until_ready(self, timeout_s: float | None = DEFAULT_TIMEOUT_S) -> None:
        """Waits until the server is ready, such as one that is still starting.

        timeout_s: seconds until DeadlineExceeded; None for the client's own.
        Raises DeadlineExceeded, which names the last reason, and CallCancelled once the client is closed.
        """
        polling = _Polling(self._deadline(timeout_s))
        while True:
            if await self._is_ready(polling):
                return
            await asyncio.sleep(polling.pause_s())

    async def _is_ready(self, polling: _Polling) -> bool:
        remaining_s = polling.remaining_s()
        try:
            return await self.is_ready(timeout_s=remaining_s)
        except _NOT_YET as error:
            polling.reason = error
            return False

    async def close(self) -> None:
        """Ends the connection. Calls in flight, and later ones, raise CallCancelled.

        In a forked child it does nothing: the connection belongs to the parent.
        """
        if self._is_in_forked_child:
            return
        for transport in self._transports.all:
            await transport.close()

    async def _look_up(self, call: Call[FoundModel], deadline: Deadline) -> AsyncRemoteFunctionalModel:
        deadline.restart()
        failure: errors.ForwardPassError | None = None
        for transport in self._transports.candidates():
            try:
                found = await transport.ask(call, deadline, sticky=True)
            except errors.ForwardPassError as error:
                if not self._transports.is_kept(transport):
                    await transport.close()
                failure = self._transports.next_failure(error, failure, deadline)
            else:
                await transport.share_weights(found.shares_weights, deadline)
                self._transports.keep(transport)
                return AsyncRemoteFunctionalModel(transport, found, self._options)
        assert failure is not None
        raise failure

    async def _run(self, call: Call[ResultT], deadline: Deadline) -> ResultT:
        deadline.restart()
        return await self._transports.own.ask(call, deadline, sticky=True)

    async def _run_steps(self, steps: Steps, deadline: Deadline, handle: WeightsHandleApi | None = None) -> Any:
        deadline.restart()
        transport = self._transport_of(handle)
        return await transport.run(steps, deadline, STICKY if handle is None else transport.route(handle.held))

    def _handle(self, held: HeldWeights, near: WeightsHandleApi | None = None) -> AsyncWeightsHandle:
        return AsyncWeightsHandle(held, self._transport_of(near), self._timeout_s)

    def _transport_of(self, handle: WeightsHandleApi | None) -> AsyncTransport:
        """See `Client._transport_of`."""
        if isinstance(handle, AsyncWeightsHandle) and self._transports.is_kept(handle.transport):
            return handle.transport
        return self._transports.own

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


# How a server that is not there, or is stuck, answers whether it is ready.
_NOT_YET = (errors.ServerUnavailable, errors.DeadlineExceeded)


class _Polling:
    """The time that is left to wait for a server, and why it was not ready the last time."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self.reason: Exception | None = None

    def remaining_s(self) -> float | None:
        """Seconds for the next question. Raises DeadlineExceeded where none are left."""
        wait_s = self._deadline.wait_s()
        if wait_s == 0:
            reason = "" if self.reason is None else f"; its last answer was {type(self.reason).__name__}: {self.reason}"
            raise errors.DeadlineExceeded(f"the server was not ready within {self._deadline.timeout_s:g} s{reason}")
        return wait_s

    def pause_s(self) -> float:
        """Seconds until the next question."""
        remaining_s = self.remaining_s()
        return _POLL_S if remaining_s is None else min(_POLL_S, remaining_s)
