"""What NVIDIA's management library says of a GPU, where there is one."""

from __future__ import annotations

import logging
import os

from forwardpass_server.telemetry.machine import DeviceReading, ReadDevice

_LOGGER = logging.getLogger(__name__)


def reader(device: str) -> ReadDevice:
    """Reads a device, as TensorFlow calls it: "GPU:0". For one that cannot be read, what reads nothing.

    That is known once: neither a library nor a GPU appears while a process runs.
    """
    kind, _, index = device.partition(":")
    if kind != "GPU":
        return lambda: None
    try:
        import pynvml
    except ImportError:
        _LOGGER.warning("without the package nvidia-ml-py nothing is shown of the GPU")
        return lambda: None
    try:
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        name = visible.split(",")[int(index)].strip() if visible else index
        # A number, or the GPU's own name: GPU-..., or MIG-... of a part of one.
        by_number = name.isdecimal()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if by_number else pynvml.nvmlDeviceGetHandleByUUID(name)
    except (pynvml.NVMLError, IndexError) as error:
        _LOGGER.warning("nothing is shown of %s: %s", device, error)
        return lambda: None

    def read() -> DeviceReading | None:
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            utilisation = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        except pynvml.NVMLError:
            # A GPU that has fallen off the bus must not take the other metrics along.
            return None
        return DeviceReading(int(memory.used), int(memory.total), utilisation)

    return read
