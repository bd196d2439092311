"""Reads the memory and utilisation of a GPU from NVIDIA's management library."""

from __future__ import annotations

import logging
import os

from forwardpass_server.telemetry.machine import DeviceReading, ReadDevice

_LOGGER = logging.getLogger(__name__)


def reader(device: str) -> ReadDevice:
    """A function that reads a device. device: TensorFlow's name, such as "GPU:0".

    The function returns None for a CPU, without the library, and for a GPU that the library does not know. This is
    decided once: neither a library nor a GPU appears while the process runs.
    """
    kind, _, index = device.partition(":")
    if kind != "GPU":
        return lambda: None
    try:
        import pynvml
    except ImportError:
        _LOGGER.warning("no metrics of the GPU: the package nvidia-ml-py is not installed")
        return lambda: None
    try:
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        name = visible.split(",")[int(index)].strip() if visible else index
        # A number, a UUID of a GPU (GPU-...), or of a part of one (MIG-...).
        by_number = name.isdecimal()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if by_number else pynvml.nvmlDeviceGetHandleByUUID(name)
    except (pynvml.NVMLError, IndexError) as error:
        _LOGGER.warning("no metrics of %s: %s", device, error)
        return lambda: None

    def read() -> DeviceReading | None:
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            utilisation = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        except pynvml.NVMLError:
            # A GPU that fails must not break the scrape of the other metrics.
            return None
        return DeviceReading(int(memory.used), int(memory.total), utilisation)

    return read
