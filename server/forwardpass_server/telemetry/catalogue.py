"""The catalogue of all metrics: `python -m forwardpass_server.telemetry.catalogue > docs/metrics.md`."""

from __future__ import annotations

import itertools
import sys

from forwardpass_server.telemetry.families import Family
from forwardpass_server.telemetry.metrics import Metrics

_HEAD = """# Metrics

The metrics that `forwardpass-server` exposes at `/metrics` on its `--metrics-port`. Times are in seconds, sizes in
bytes. A histogram `NAME` has three series: `NAME_bucket`, `NAME_sum` and `NAME_count`. `/metrics?name[]=NAME` returns a
single metric or series; repeat `name[]` for several.

The number of label values is bounded: methods, codes, functions, and the names of models, which the operator chooses.
No label holds an id or text from a request. The series of a model are removed when its last version is unloaded.

The duration of a call is its decode, queue, execute and encode time, and the time in gRPC.
`grpc_server_handling_seconds` covers all of it except the time to receive the request. [runbook.md](runbook.md) lists
the alerts on these metrics.

This page is generated: `make docs/metrics.md`.
"""


def markdown() -> str:
    """The contents of docs/metrics.md."""
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
