"""The device thread: what becomes of its jobs, its counts and its server when the device fails."""

import logging
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from speechlm2_jax.serving import service as services
from speechlm2_jax.serving.device import DeviceSlots
from speechlm2_jax.serving.jobs import Progress, SchedulerCounts, ServedJob
from speechlm2_jax.serving.options import ServeOptions
from speechlm2_jax.serving.scheduler import Scheduler
from speechlm2_jax.serving.service import Service
from speechlm2_jax.settings import SettingsError


@dataclass
class FakeDevice:
    """Slots without a model: every job has one token, after which it ends."""

    table: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(slots=1))
    busy: dict = field(default_factory=dict)
    faults: deque = field(default_factory=deque)
    """What `decode` raises, one after another."""
    reset_fault: Exception | None = None

    def positions(self, job):
        return 1

    def free_slot(self, taken):
        return None if self.busy or taken else 0

    def begin(self, job, slot, frames):
        return SimpleNamespace(job=job, slot=slot)

    def advance(self, prefill):
        return True

    def admit(self, prefill):
        self.busy[prefill.slot] = prefill.job

    def decode(self, tokens):
        if self.faults:
            raise self.faults.popleft()
        jobs, self.busy = list(self.busy.values()), {}
        return [
            (job, Progress(np.zeros(1, np.int32), np.zeros(1, np.float32), True)) for job in jobs
        ]

    def reset(self):
        self.busy = {}
        if self.reset_fault is not None:
            raise self.reset_fault


def submitted(scheduler, count):
    """The reports of some jobs, of which the last one stops the scheduler."""
    reports = [[] for _ in range(count)]

    def take(own, progress):
        own.append(progress)
        if all(reports):
            scheduler.stop()

    for own in reports:
        report = lambda progress, own=own: take(own, progress)  # noqa: E731
        scheduler.submit(ServedJob(tokens=np.zeros(1, np.int32), limit=1, report=report))
    return reports


def test_a_fault_fails_what_runs_and_the_rest_goes_on():
    scheduler = Scheduler(FakeDevice(faults=deque([MemoryError("KV cache")])))
    reports = submitted(scheduler, 5)
    scheduler.run()
    errors = [own[-1].error for own in reports]
    assert "MemoryError: KV cache" in errors and None in errors
    assert scheduler.counts.faults == 1


def test_a_device_that_cannot_be_reset_fails_every_job_and_takes_no_other():
    device = FakeDevice(faults=deque([MemoryError("first")]), reset_fault=MemoryError("again"))
    scheduler = Scheduler(device)
    reports = submitted(scheduler, 5)
    with pytest.raises(MemoryError, match="again"):
        scheduler.run()
    assert all(own[-1].error.startswith("MemoryError: ") for own in reports)
    with pytest.raises(RuntimeError, match="has ended"):
        submitted(scheduler, 1)


def test_counts_are_zero_when_nothing_is_left():
    scheduler = Scheduler(FakeDevice())
    submitted(scheduler, 3)
    scheduler.run()
    assert (scheduler.counts.running, scheduler.counts.waiting) == (0, 0)


def test_a_reset_frees_the_slots_before_it_allocates_others():
    device = DeviceSlots.__new__(DeviceSlots)
    device.busy, device._served = {0: None}, "the KV cache"
    device._empty = lambda: hasattr(device, "_served")
    device.reset()
    assert device._served is False and not device.busy


class BrokenScheduler:
    counts = SchedulerCounts()

    def run(self):
        raise MemoryError("no room for the slots")

    def stop(self):
        pass


def ended(monkeypatch, prepared):
    """A service after the end of its device thread."""
    service, faults = Service(ServeOptions(model="m"), None), []
    service.on_fault = lambda: faults.append(service.fault)
    monkeypatch.setattr(service, "_prepared", prepared)
    service._run()
    assert faults == [service.fault] == [service.why_unready]
    return service


def test_the_end_of_the_device_thread_is_a_fault_of_the_server(monkeypatch, caplog):
    service = ended(monkeypatch, lambda: (object(), BrokenScheduler()))
    assert service.fault == "the device thread has ended: no room for the slots"
    assert caplog.records[-1].exc_info


def test_after_the_stop_of_the_server_it_is_none(monkeypatch):
    service = Service(ServeOptions(model="m"), None)
    monkeypatch.setattr(service, "_prepared", lambda: (object(), BrokenScheduler()))
    service.stop()
    service._run()
    assert service.fault is None


@pytest.mark.parametrize("kind", [SettingsError, OSError])
def test_a_model_that_cannot_be_loaded_is_told_with_its_place_unless_it_is_a_setting(
    kind, monkeypatch, caplog
):
    def fail():
        raise kind("no such model")

    with caplog.at_level(logging.ERROR, services.__name__):
        service = ended(monkeypatch, fail)
    assert service.fault == "the model could not be loaded: no such model"
    assert bool(caplog.records) == (kind is not SettingsError)
