"""The catalogue of all metrics: `python -m forwardpass_server.telemetry.catalogue > docs/metrics.md`."""

from __future__ import annotations

import itertools
import sys

from forwardpass_server.telemetry.families import Family
from forwardpass_server.telemetry.metrics import Metrics

_HEAD = """# Metrics

What `forwardpass-server` shows at `/metrics` of its `--metrics-port`. Times are in seconds, sizes in bytes. A histogram
`NAME` is three series: `NAME_bucket`, `NAME_sum` and `NAME_count`. `/metrics?name[]=NAME` shows one metric or one
series alone, and may name several.

Labels are bounded: methods, codes, functions, and names of models, which the operator chose. None holds an id, or a
word that a caller sent. The series of a model end when its last version is unloaded.

A call takes its decode, queue, execute and encode time, and what gRPC adds: `grpc_server_handling_seconds` holds all of
it, but for the reading of the request. Which alerts are made of these metrics says [runbook.md](runbook.md).

This page is generated: `make docs/metrics.md`.
"""


def markdown() -> str:
    """All that there is, as docs/metrics.md has it."""
    lines = [_HEAD]
    for subject, families in itertools.groupby(Metrics().families, lambda family: family.subject):
        lines += [f"## {subject}", "", "| metric | kind | labels | meaning |", "|---|---|---|---|"]
        lines += [*map(_row, families), ""]
    return "\n".join(lines)


def _row(family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in family.labels)
    meaning = f"{family.meaning} {family.condition}".rstrip()
    return f"| `{family.name}` | {family.kind} | {labels} | {meaning} |"


if __name__ == "__main__":
    sys.stdout.write(markdown())
