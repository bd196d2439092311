"""The settings of gRPC's channels: load balancing, reconnects, keepalive, message sizes."""

from __future__ import annotations

import json
from typing import Any

from forwardpass_client.options import Options


def sticky(options: Options, *, in_order: bool = False) -> list[tuple[str, Any]]:
    """For a channel that keeps one server of several until the connection ends.

    in_order: it takes the first server of the target that can be reached, and otherwise any at random.

    Without a retry policy: `retries` makes further attempts, by the one backoff of the client and until the deadline
    of the call. gRPC's retries would nest in it, and end at a deadline without the reason of the last failure.
    """
    channel = _options({"loadBalancingConfig": [{"pick_first": {"shuffleAddressList": not in_order}}]}, options)
    # pick_first prefers a connection that another channel has open to any of its servers: this one shares none.
    return [*channel, ("grpc.use_local_subchannel_pool", 1)] if in_order else channel


def spread(options: Options) -> list[tuple[str, Any]]:
    """For a channel that calls one server after another.

    Without a retry policy: `replicas` asks another server at once.
    Without health checks: with them, round_robin drops servers that drain, and does not look the name up again before
    they close their connections. When all the servers that it knows drain, calls would fail, although the servers still
    answer and new ones are in DNS. A server that cannot answer a call refuses it at once.
    """
    return _options({"loadBalancingConfig": [{"round_robin": {}}]}, options)


def _options(config: dict[str, Any], options: Options) -> list[tuple[str, Any]]:
    defaults = {
        "grpc.service_config": json.dumps(config),
        "grpc.enable_retries": 1,
        # gRPC sends a request again by itself only where no server has seen it (a connection that closes meanwhile).
        # A request that is longer than this buffer would not be sent again.
        "grpc.per_rpc_retry_buffer_size": options.max_message_bytes,
        "grpc.max_send_message_length": options.max_message_bytes,
        "grpc.max_receive_message_length": options.max_message_bytes,
        # gRPC doubles its pauses between connection attempts up to two minutes. A server restarts in seconds.
        "grpc.max_reconnect_backoff_ms": 2000,
        # A server that ends has a successor at another address. By default gRPC looks a name up again only after 30 s.
        "grpc.dns_min_time_between_resolutions_ms": 1000,
        # Finds a server that is gone without closing its connection, while a call waits for it: within 15 s. The server
        # accepts a ping each second.
        "grpc.keepalive_time_ms": 10_000,
        "grpc.keepalive_timeout_ms": 5_000,
    }
    return list({**defaults, **dict(options.channel_options)}.items())
