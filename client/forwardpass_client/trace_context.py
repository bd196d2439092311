"""The trace of a call, as metadata in the format of W3C Trace Context."""

from __future__ import annotations

import sys

Metadata = tuple[tuple[str, str], ...]


def metadata() -> Metadata:
    """The current span of OpenTelemetry; empty where there is none.

    OpenTelemetry is never imported here: a program that has a span has imported it.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return ()
    span = trace.get_current_span().get_span_context()
    if not span.is_valid:
        return ()
    parent = ("traceparent", f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}")
    state = span.trace_state.to_header()
    return (parent, ("tracestate", state)) if state else (parent,)
