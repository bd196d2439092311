"""Starts TensorFlow, and builds the loader of models and the device that holds weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from forwardpass_server.models import device as devices
from forwardpass_server.models.loading import TensorFlowLoader
from forwardpass_server.models.placement import TensorFlowDevice
from forwardpass_server.models.trial_process import TrialProcess


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """device, batching, imports, factories: see `TensorFlowLoader`. cores: how many TensorFlow may use."""

    device: str
    cores: int
    batching: bool = True
    imports: Sequence[str] = ()
    factories: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelsRoom:
    """device: its name, as people know it."""

    loader: TensorFlowLoader
    placement: TensorFlowDevice
    device: str

    @property
    def is_on_cpu(self) -> bool:
        """Whether weights take the memory of the process."""
        return self.device.startswith("CPU")


def build(options: ModelsOptions, on_trace: Callable[[], None], trial_process: TrialProcess | None) -> ModelsRoom:
    """Starts TensorFlow on a device.

    on_trace: is called for each graph that Python builds. trial_process: see `TensorFlowLoader`.
    Raises DeviceNotFound, and ModelLoadError for a module of `imports` that cannot be imported.
    """
    devices.use_cores(options.cores)
    loader = TensorFlowLoader(
        options.device,
        on_trace,
        options.batching,
        trial_process,
        imports=options.imports,
        factories=options.factories,
    )
    return ModelsRoom(
        loader=loader,
        placement=TensorFlowDevice(loader.device),
        device=loader.device.removeprefix("/device:"),
    )
