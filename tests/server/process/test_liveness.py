"""Liveness of a device."""

from __future__ import annotations

import threading

import pytest

from forwardpass_server.models.placement import CPU, TensorFlowDevice
from forwardpass_server.process.liveness import Liveness
from support.servers import wait_until


class Device:
    """Hangs while its gate is closed, and fails while it is broken."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.is_broken = False
        self.trials = 0

    def try_out(self) -> None:
        self.trials += 1
        self.gate.wait(30)
        if self.is_broken:
            raise RuntimeError("broken")


@pytest.fixture
def device():
    return Device()


@pytest.fixture
def liveness(device):
    liveness = Liveness(device, every_s=0.01, timeout_s=0.2)
    liveness.start()
    yield liveness
    device.gate.set()
    liveness.end()


def test_a_device_that_works_is_live(device, liveness):
    wait_until(lambda: device.trials > 3)
    assert liveness.is_alive


def test_a_device_that_hangs_is_not_live_until_it_continues(device, liveness):
    device.gate.clear()
    wait_until(lambda: not liveness.is_alive)
    trials = device.trials
    device.gate.set()
    wait_until(lambda: liveness.is_alive)
    wait_until(lambda: device.trials > trials)
    assert liveness.is_alive


def test_a_device_that_fails_is_not_live_until_it_works_and_is_logged_once(device, liveness, caplog):
    device.is_broken = True
    wait_until(lambda: not liveness.is_alive)
    trials = device.trials
    wait_until(lambda: device.trials > trials + 3)
    assert sum("failed a small operation" in record.message for record in caplog.records) == 1
    device.is_broken = False
    wait_until(lambda: liveness.is_alive)


def test_a_cpu_is_live():
    cpu, tried = TensorFlowDevice(CPU), threading.Event()

    class Cpu:
        def try_out(self) -> None:
            cpu.try_out()
            tried.set()

    liveness = Liveness(Cpu(), every_s=0.01, timeout_s=30)
    liveness.start()
    assert tried.wait(30)
    assert liveness.is_alive
    liveness.end()
