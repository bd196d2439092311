"""The models that must be callable before a server is ready."""

from __future__ import annotations

from collections.abc import Sequence

from forwardpass_server.catalog.registry import Entry, Registry, State


class RequiredModels:
    """The required models of a server. A model is callable while one of its versions is available.

    required: each as NAME or NAME/VERSION; empty for no model. None: every model that the registry has now is required
      until it is unloaded, and at least one model must be callable, because a server without models serves no call.
    """

    def __init__(self, registry: Registry, required: Sequence[str] | None) -> None:
        self._registry = registry
        self._required = required
        self._found = sorted({entry.source.name for entry in registry.entries()})

    def missing(self) -> list[str]:
        """A sentence for each required model that cannot be called, with the reason. Thread-safe."""
        entries = self._registry.entries()
        if self._required is not None:
            return [_reason(one, _of(one, entries)) for one in self._required if not _is_callable(_of(one, entries))]
        known = {name: _of(name, entries) for name in self._found}
        missing = [
            _reason(name, versions) for name, versions in known.items() if versions and not _is_callable(versions)
        ]
        if not missing and not _is_callable(entries):
            return ["no model can be called: add one to the model repository, or start with --required-models none"]
        return missing


def _of(required: str, entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if required in (entry.source.name, str(entry.source))]


def _is_callable(entries: Sequence[Entry]) -> bool:
    return any(entry.state is State.AVAILABLE for entry in entries)


def _reason(required: str, entries: Sequence[Entry]) -> str:
    if not entries:
        return f"model {required} cannot be called: it is not among the models of this server"
    states = (f"{entry.source} {entry.state.value}" + (f": {entry.error}" if entry.error else "") for entry in entries)
    return f"model {required} cannot be called: {'; '.join(states)}"
