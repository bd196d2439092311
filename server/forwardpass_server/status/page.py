"""The status page: one HTML document without scripts and without further requests."""

from __future__ import annotations

import dataclasses
import html
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from forwardpass.wire.methods import MODEL_SERVICE, SESSION_SERVICE, WEIGHTS_SERVICE
from forwardpass_server.catalog.load_log import Load
from forwardpass_server.catalog.registry import Entry, State
from forwardpass_server.status.recent import Window
from forwardpass_server.status.style import STYLE
from forwardpass_server.telemetry.health import HealthReading

REFRESH_S = 10

_SERVICES = (MODEL_SERVICE, SESSION_SERVICE, WEIGHTS_SERVICE)
_HANDLING, _PIPELINE = "grpc_server_handling_seconds", "forwardpass_pipeline_call_seconds"
_SERVERS_FAULT = ("Internal", "Unknown", "DataLoss", "Unavailable")
_NOTHING = "&ndash;"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """The contents of the page.

    started: in seconds since 1970. unready_reasons: see `Readiness.reasons`. session_store_problem: see
    `SessionStore.problem`. loads: the last load of each version, by "name/version".
    """

    version: str
    tensorflow: str
    device: str
    started: float
    health: HealthReading
    unready_reasons: Sequence[str]
    session_store_problem: str
    entries: Sequence[Entry]
    loads: Mapping[str, Load]
    recent: Window


def render(status: Status) -> str:
    """The page as HTML."""
    word, tone = _state(status)
    about = [f"version {status.version}", f"TensorFlow {status.tensorflow}", status.device]
    about.append(f"up {_duration(time.time() - status.started)}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="refresh" content="{REFRESH_S}"><title>{_text(f"forwardpass: {word}")}</title>'
        f"<style>{STYLE}</style></head><body><main>"
        f'<header><h1>forwardpass</h1><span class="pill {tone}">{_text(word)}</span>'
        f"<p>{_text(' · '.join(about))}</p>{_unready(status)}</header>"
        f"{_summary(status.recent)}{_models(status)}{_methods(status.recent)}"
        f'<div class="columns">{_weights(status.recent)}{_sessions(status)}{_machine(status)}</div>'
        f"<footer>Rates and times cover the last {_duration(status.recent.seconds)}. "
        f'This page reloads every {REFRESH_S} s. <a href="/metrics">All metrics</a></footer>'
        "</main></body></html>"
    )


def _state(status: Status) -> tuple[str, str]:
    """The state of the server in a few words, and its tone: "good", "busy" or "bad"."""
    health = status.health
    if health.is_draining:
        return "draining", "busy"
    if not health.is_live:
        return "the device does not work", "bad"
    if not health.has_started and any(entry.state is State.LOADING for entry in status.entries):
        return "loading", "busy"
    if not health.is_ready:
        return "not ready", "bad"
    return ("ready", "good") if status.entries else ("ready, without a model", "busy")


def _unready(status: Status) -> str:
    """The reasons why the server is not ready, as HTML."""
    if status.health.is_ready or status.health.is_draining:
        return ""
    return "".join(f"<p>{_text(reason)}</p>" for reason in status.unready_reasons)


def _summary(recent: Window) -> str:
    calls = _calls(recent)
    failed = sum(
        recent.rate("grpc_server_handled_total", grpc_type="unary", grpc_service=service, grpc_code=code)
        for service in _SERVICES
        for code in _SERVERS_FAULT
    ) + sum(recent.rate("forwardpass_pipeline_calls_total", code=code) for code in _SERVERS_FAULT)
    examples = recent.rate("forwardpass_batch_examples_sum")
    all_calls: list[tuple[str, dict[str, str]]] = [
        *((_HANDLING, {"grpc_type": "unary", "grpc_service": service}) for service in _SERVICES),
        (_PIPELINE, {}),
    ]
    return _tiles(
        [
            ("calls per second", _number(calls)),
            ("examples per second", _number(examples)),
            ("training steps per second", _number(recent.rate("forwardpass_training_step_seconds_count"))),
            ("failed by the server", _share(failed / calls if calls else None)),
            ("median call", _seconds(recent.quantile(0.5, all_calls))),
            ("99% of calls within", _seconds(recent.quantile(0.99, all_calls))),
            ("mean wait in the queue", _seconds(recent.mean("forwardpass_queue_seconds"))),
        ]
    )


def _calls(recent: Window) -> float:
    unary = (recent.rate("grpc_server_handled_total", grpc_type="unary", grpc_service=one) for one in _SERVICES)
    return sum(unary) + recent.rate("forwardpass_pipeline_calls_total")


def _models(status: Status) -> str:
    by_name: dict[str, list[Entry]] = {}
    for entry in status.entries:
        by_name.setdefault(entry.source.name, []).append(entry)
    rows = []
    for name, entries in by_name.items():
        recent, queue, execute = status.recent, "forwardpass_queue_seconds", "forwardpass_execute_seconds"
        versions = "".join(_version(entry, status.loads.get(str(entry.source))) for entry in reversed(entries))
        rows.append(
            [
                f"<strong>{_text(name)}</strong>",
                f'<ul class="versions">{versions}</ul>',
                _number(recent.rate(f"{queue}_count", model=name)),
                _seconds(recent.mean(queue, model=name)),
                _seconds(recent.quantile(0.5, [(execute, {"model": name})])),
                _seconds(recent.quantile(0.99, [(execute, {"model": name})])),
            ]
        )
    heads = ("Model", "Versions", "Calls/s", "Mean wait", "Compute", "99% within")
    return _section("Models", _table(heads, rows, figures=4) if rows else "<p>No models.</p>")


_TONES = {State.AVAILABLE: "good", State.LOADING: "busy", State.FAILED: "bad"}


def _version(entry: Entry, load: Load | None) -> str:
    details = ""
    if load is not None and entry.state is not State.LOADING:
        ago = _duration(time.time() - load.ended_at)
        details = f" <small>loaded in {_seconds(load.seconds)}, {ago} ago</small>"
        if entry.state is State.FAILED:
            details = f" <small>{ago} ago: {_text(entry.error)}</small>"
    if entry.waiting:
        details += f" <small>{_text(entry.waiting)}</small>"
    state = f'<span class="pill {_TONES[entry.state]}">{_text(entry.state.value)}</span>'
    return f"<li><b>{entry.source.version}</b> {state}{details}</li>"


def _methods(recent: Window) -> str:
    found = [
        _Method(
            method, "grpc_server_handled_total", "grpc_code", _HANDLING, {"grpc_service": one, "grpc_method": method}
        )
        for one in _SERVICES
        for method in recent.labels("grpc_server_started_total", "grpc_method")
    ] + [
        _Method(f"{method} on pipelines", "forwardpass_pipeline_calls_total", "code", _PIPELINE, {"method": method})
        for method in recent.labels("forwardpass_pipeline_calls_total", "method")
    ]
    rates = [(recent.rate(method.ended, **method.labels), method) for method in found]
    rates = sorted(((rate, method) for rate, method in rates if rate), key=lambda one: one[0], reverse=True)
    rows = [
        [
            _text(method.title),
            _number(rate),
            _number(rate - recent.rate(method.ended, **{method.code: "OK"}, **method.labels)),
            *(_seconds(recent.quantile(share, [(method.seconds, method.labels)])) for share in (0.5, 0.99)),
        ]
        for rate, method in rates
    ]
    heads = ("Method", "Calls/s", "Not OK/s", "Median", "99% within")
    if not rows:
        return _section("Methods", "<p>No calls.</p>")
    return _section("Methods", _table(heads, rows, figures=4, is_dense=True))


class _Method(NamedTuple):
    """A method and its metrics.

    ended: the counter of its calls. code: the label of that counter that holds the status. seconds: the histogram of
    its duration. labels: the labels of its series.
    """

    title: str
    ended: str
    code: str
    seconds: str
    labels: Mapping[str, str]


def _weights(recent: Window) -> str:
    hits = recent.total("forwardpass_weights_lookups_total", outcome="hit")
    lookups = recent.total("forwardpass_weights_lookups_total")
    used, budget = recent.total("forwardpass_weights_bytes"), recent.total("forwardpass_weights_budget_bytes")
    content = _bar("On the device", used, budget)
    disk_budget = recent.total("forwardpass_weights_disk_budget_bytes")
    if disk_budget:
        content += _bar("On disk", recent.total("forwardpass_weights_disk_bytes"), disk_budget)
    facts = [
        ("Sets", _number(recent.total("forwardpass_weights_sets"))),
        ("Different tensors", _number(recent.total("forwardpass_weights_tensors"))),
        ("Hits on the device", _share(hits / lookups if lookups else None)),
        ("Evicted", _number(recent.total("forwardpass_weights_evictions_total"))),
    ]
    if disk_budget:
        facts.append(("Disk failures", _number(recent.total("forwardpass_weights_disk_failures_total"))))
    return _section("Weights", content + _facts(facts))


def _sessions(status: Status) -> str:
    recent = status.recent
    commit: list[tuple[str, dict[str, str]]] = [("forwardpass_session_commit_seconds", {})]
    facts = [
        ("Store", _text(status.session_store_problem or "works")),
        ("Open", _number(recent.total("forwardpass_sessions"))),
        ("Updates per second", _number(recent.rate("forwardpass_session_updates_total", outcome="applied"))),
        ("Duplicate updates", _number(recent.total("forwardpass_session_updates_total", outcome="duplicate"))),
        ("Median commit", _seconds(recent.quantile(0.5, commit))),
        ("99% of commits within", _seconds(recent.quantile(0.99, commit))),
    ]
    return _section("Metric sessions", _facts(facts))


def _machine(status: Status) -> str:
    recent, content = status.recent, ""
    facts = [("Device", _text(status.device))]
    total = recent.total("forwardpass_device_memory_total_bytes")
    if total:
        content = _bar("GPU memory", recent.total("forwardpass_device_memory_used_bytes"), total)
        facts.append(("GPU utilisation", _share(recent.total("forwardpass_device_utilisation_ratio"))))
    facts += [
        ("Memory of the process", _bytes(recent.total("process_resident_memory_bytes"))),
        ("Cores in use", _number(recent.rate("process_cpu_seconds_total"))),
        ("Files and sockets", _number(recent.total("process_open_fds"))),
        ("Received", f"{_bytes(recent.rate('forwardpass_received_bytes_total'))}/s"),
        ("Sent", f"{_bytes(recent.rate('forwardpass_sent_bytes_total'))}/s"),
    ]
    return _section("Device and process", content + _facts(facts))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>"


def _tiles(tiles: Iterable[tuple[str, str]]) -> str:
    shown = "".join(f"<div><dd>{value}</dd><dt>{_text(name)}</dt></div>" for name, value in tiles)
    return f'<dl class="tiles">{shown}</dl>'


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    shown = "".join(f"<div><dt>{_text(name)}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{shown}</dl>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], figures: int, is_dense: bool = False) -> str:
    """A table as HTML.

    rows: cells that are HTML already. figures: the number of columns, from the right, that hold numbers.
    is_dense: on a phone each row takes one line, and two columns are hidden; otherwise each row becomes a card.
    """
    first = len(heads) - figures
    marks = [' class="figure"' if index >= first else "" for index in range(len(heads))]
    head = "".join(f'<th scope="col"{mark}>{_text(name)}</th>' for name, mark in zip(heads, marks, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            # On a narrow screen the style sheet shows this name before the value.
            f'<td data-name="{_text(name)}"{mark}>{cell}</td>'
            for name, mark, cell in zip(heads, marks, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    kind = "dense" if is_dense else "cards"
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _bar(name: str, used: float, total: float) -> str:
    share = min(used / total, 1.0) if total else 0.0
    tone = "bad" if share > 0.95 else "busy" if share > 0.8 else "good"
    return (
        f'<div class="bar"><span>{_text(name)}</span><span>{_bytes(used)} of {_bytes(total)}</span>'
        f'<div><i class="{tone}" style="width:{share:.1%}"></i></div></div>'
    )


def _text(text: str) -> str:
    return html.escape(text)


def _number(number: float) -> str:
    if number == round(number) or number >= 100:
        return f"{number:,.0f}"
    if number >= 1:
        return f"{number:.3g}"
    return f"{number:.2f}" if number >= 0.01 else "&lt; 0.01"


def _share(share: float | None) -> str:
    if share is None:
        return _NOTHING
    return f"{share:.1%}".replace(".0%", "%") if share >= 0.001 or not share else "&lt; 0.1%"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return _NOTHING
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.0f} µs"


def _bytes(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024 or unit == "GiB":
            break
        size_bytes /= 1024
    return f"{size_bytes:.3g} {unit}" if size_bytes < 1000 else f"{size_bytes:,.0f} {unit}"


def _duration(seconds: float) -> str:
    """A duration in its largest unit and the next smaller one, such as "2 h 5 min"."""
    whole = round(max(seconds, 0.0))
    for (unit, size), (lower, lower_size) in (
        (("d", 86400), ("h", 3600)),
        (("h", 3600), ("min", 60)),
        (("min", 60), ("s", 1)),
    ):
        if whole >= size:
            rest = whole % size // lower_size
            return f"{whole // size} {unit}" + (f" {rest} {lower}" if rest else "")
    return f"{whole} s"
