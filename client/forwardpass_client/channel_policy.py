"""How gRPC's channels are set: which server is called, what is tried again, how long a silent peer is believed."""

from __future__ import annotations

import json
from typing import Any

from forwardpass.wire.methods import MODEL_SERVICE, SERVICES, SESSION_SERVICE, WEIGHTS_SERVICE
from forwardpass_client.options import Options

# Every method is a pure function of its request, or an update that is applied once however often it comes: a call that
# a server dropped, or never got, may be sent again.
_RETRIES = [
    {
        "name": [{"service": MODEL_SERVICE}, {"service": WEIGHTS_SERVICE}, {"service": SESSION_SERVICE}],
        "retryPolicy": {
            # gRPC allows no more than 5. Together they span some 3 s, the restart of a process.
            "maxAttempts": 5,
            "initialBackoff": "0.2s",
            "maxBackoff": "2s",
            "backoffMultiplier": 2,
            # A server that stops answers CANCELLED to calls that it had begun.
            "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
        },
    },
    {
        # Streams are taken up where they broke: gRPC would have to keep all that was sent.
        "name": [
            {"service": service, "method": name}
            for service, methods in SERVICES.items()
            for name, method in methods.items()
            if not method.is_unary
        ]
    },
]


def staying(options: Options) -> list[tuple[str, Any]]:
    """For a channel that stays with a server while it is there; with any of several, so that clients spread."""
    balancing = {"loadBalancingConfig": [{"pick_first": {"shuffleAddressList": True}}]}
    return _options({**balancing, "methodConfig": _RETRIES}, options)


def spread(options: Options) -> list[tuple[str, Any]]:
    """For a channel that calls one server after another.

    It has no retry policy: `replicas` asks another server at once, where gRPC would wait for 0.1 to 1.6 s first. It
    does not check health: with health checks, round_robin drops servers that drain, and does not look the name up again
    before they close their connections. When all the servers that it knows drain, calls would fail, although the
    servers still answer and new ones are in DNS. A server that cannot answer a call refuses it at once.
    """
    return _options({"loadBalancingConfig": [{"round_robin": {}}]}, options)


def _options(config: dict[str, Any], options: Options) -> list[tuple[str, Any]]:
    defaults = {
        "grpc.service_config": json.dumps(config),
        "grpc.enable_retries": 1,
        # A request longer than this buffer would not be sent again.
        "grpc.per_rpc_retry_buffer_size": options.max_message_bytes,
        "grpc.max_send_message_length": options.max_message_bytes,
        "grpc.max_receive_message_length": options.max_message_bytes,
        # Within the patience of whoever waits for a server that starts anew; else gRPC waits for longer each time.
        "grpc.max_reconnect_backoff_ms": 2000,
        # When a server goes, its successor's address is looked for at once: by default a name is asked for again only
        # after half a minute.
        "grpc.dns_min_time_between_resolutions_ms": 1000,
        # A peer that is gone without a word is noticed while a call waits for it. The server lets pings come each
        # second.
        "grpc.keepalive_time_ms": 10_000,
        "grpc.keepalive_timeout_ms": 5_000,
    }
    return list({**defaults, **dict(options.channel_options)}.items())
