"""The thread that owns the device: jobs join the running batch as slots become free."""

import logging
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from speechlm2_jax.serving.device import DeviceSlots, Frames, Prefill
from speechlm2_jax.serving.jobs import Clip, Progress, SchedulerCounts, ServedJob

log = logging.getLogger(__name__)
NOTHING = np.zeros(0, np.int32)
SMOOTHING = 0.2
"""Weight of the newest of the measured times."""


@dataclass(frozen=True, kw_only=True)
class SchedulerPace:
    """How the device's time is divided."""

    tokens_at_once: int = 4
    """Tokens per call of `decode`: new jobs join between two calls."""
    encoded_ahead: int = 2
    """Jobs whose clips are encoded before a slot is free for them."""
    kept_clips: int = 16
    """Clips whose frames are kept, for further questions about them."""


@dataclass(eq=False)
class _Waiting:
    """A job before its prefill."""

    job: ServedJob
    frames: list[Frames] | None = None
    """None until encoding has begun."""

    @property
    def is_encoded(self) -> bool:
        return self.frames is not None and all(map(_is_there, self.frames))


def _is_there(frames: Any) -> bool:
    """Whether an array has been computed."""
    return frames.is_ready()


class Scheduler:
    """Runs jobs on the device in the thread that calls `run`, until it is told to stop.

    While somebody waits for the tokens of a running job, one round of prefill takes no longer than
    the tokens of one call of `decode` usually do. So the time between two tokens at most doubles.
    """

    def __init__(self, device: DeviceSlots, pace: SchedulerPace = SchedulerPace()) -> None:
        self.counts, self._device, self._pace = SchedulerCounts(), device, pace
        self._lock = threading.Condition()
        self._inbox: deque[ServedJob] = deque()
        self._waiting: deque[_Waiting] = deque()
        self._prefills: list[Prefill] = []
        self._frames: OrderedDict[bytes, Frames] = OrderedDict()
        self._is_stopped = self._has_failed = False
        self._usual_s = 0.0
        """What a call of `decode` usually takes."""

    def submit(self, job: ServedJob) -> int:
        """Takes a job, and returns the positions of its prompt.

        Raises TooLongError for a prompt that no slot has room for, and RuntimeError if `run` has
        ended with an error.
        """
        positions = self._device.positions(job)
        with self._lock:
            if self._has_failed:
                raise RuntimeError("the device thread has ended")
            self._inbox.append(job)
            self._lock.notify()
        return positions

    def cancel(self, job: ServedJob) -> None:
        """Ends a job without a further report."""
        job.is_cancelled = True
        with self._lock:
            self._lock.notify()

    def stop(self) -> None:
        """Ends the thread after the present round."""
        with self._lock:
            self._is_stopped = True
            self._lock.notify()

    @property
    def is_idle(self) -> bool:
        """Whether there are no jobs."""
        with self._lock:
            return not (self._inbox or self._has_work)

    @property
    def _has_work(self) -> bool:
        return bool(self._waiting or self._prefills or self._device.busy)

    def run(self) -> None:
        """Runs rounds of prefill and decoding; a fault fails the jobs under way, not the server.

        Raises the error after which the device cannot be used any more; then all jobs have failed.
        """
        try:
            while self._next_jobs():
                try:
                    self._round()
                except Exception as error:  # noqa: BLE001 - the server must live on
                    self._fail(error)
                self._count()
        except BaseException as error:
            self._fail_all(error)
            raise

    def _next_jobs(self) -> bool:
        """Waits for jobs. Returns whether there are some: False when `run` is to end."""
        with self._lock:
            while not (self._inbox or self._has_work or self._is_stopped):
                self._lock.wait()
            self._waiting.extend(_Waiting(job) for job in self._inbox)
            self._inbox.clear()
            return not self._is_stopped

    def _count(self) -> None:
        self.counts.waiting = len(self._waiting) + len(self._prefills)
        self.counts.running = len(self._device.busy)

    def _round(self) -> None:
        self._waiting = deque(w for w in self._waiting if not w.job.is_cancelled)
        self._prefills = [p for p in self._prefills if not p.job.is_cancelled]
        self._encode()
        self._prefill()
        self._count()
        if self._device.busy:
            self._decode()
        elif self._waiting and not self._prefills:
            first = self._waiting[0].frames
            if first:
                first[0].block_until_ready()

    def _encode(self) -> None:
        """Starts to encode the clips of the next jobs, unless others are being encoded."""
        ahead = [w for w in self._waiting if w.frames is not None]
        under_way = sum(not w.is_encoded for w in ahead)
        free = self._device.table.slots - len(self._device.busy) - len(self._prefills)
        most = min(free, 8) + self._pace.encoded_ahead if not self._is_awaited else 1
        for waiting in self._waiting:
            if waiting.frames is not None:
                continue
            if under_way >= (1 if self._is_awaited else 2) or len(ahead) >= most:
                return
            waiting.frames = [self._frames_of(clip) for clip in waiting.job.clips]
            ahead.append(waiting)
            under_way += not waiting.is_encoded

    def _frames_of(self, clip: Clip) -> Frames:
        """The frames of a clip; those of equal samples are encoded once."""
        if clip.key is not None and clip.key in self._frames:
            self._frames.move_to_end(clip.key)
            self.counts.reused_clips += 1
            return self._frames[clip.key]
        frames = self._device.encode(clip)
        self.counts.encoded_clips += 1
        self.counts.encoded_s += len(clip.samples) / self._device.engine.sampling_rate
        if clip.key is not None:
            self._frames[clip.key] = frames
            while len(self._frames) > self._pace.kept_clips:
                self._frames.popitem(last=False)
        return frames

    @property
    def _is_awaited(self) -> bool:
        """Whether somebody waits for each token of a running job."""
        return any(job.is_streamed for job in self._device.busy.values())

    def _prefill(self) -> None:
        """Runs prompts until no slot is free, or running streams have waited long enough."""
        start_s, is_awaited = time.monotonic(), self._is_awaited
        while True:
            if not self._prefills and not self._begin_next():
                return
            prefill = self._prefills[0]
            is_done = self._device.advance(prefill)
            if is_awaited:
                prefill.staged.hidden.block_until_ready()
            if is_done:
                self._device.admit(self._prefills.pop(0))
            if is_awaited and time.monotonic() - start_s >= self._usual_s:
                return

    def _begin_next(self) -> bool:
        """Begins the prefill of the next encoded job, if a slot is free."""
        slot = self._device.free_slot([p.slot for p in self._prefills])
        ready = next((w for w in self._waiting if w.is_encoded), None)
        if slot is None or ready is None:
            return False
        self._waiting.remove(ready)
        self._prefills.append(self._device.begin(ready.job, slot, ready.frames or []))
        return True

    def _decode(self) -> None:
        start_s = time.monotonic()
        self.counts.steps += 1
        self.counts.occupied += len(self._device.busy)
        found = self._device.decode(self._pace.tokens_at_once)
        taken_s = time.monotonic() - start_s
        self._usual_s += SMOOTHING * (taken_s - self._usual_s) if self._usual_s else taken_s
        for job, progress in found:
            self.counts.tokens += len(progress.ids) - job.sent
            job.sent = len(progress.ids)
            if job.is_streamed or progress.is_last:
                job.report(progress)

    def _fail(self, error: Exception) -> None:
        """Reports a fault to all jobs that it may have touched, and makes all slots free again."""
        self.counts.faults += 1
        log.exception("the device thread failed; its %d jobs end", len(self._device.busy))
        traceback.clear_frames(error.__traceback__)  # they hold arrays, and memory may be short
        lost = [*self._device.busy.values(), *(p.job for p in self._prefills)]
        lost += [w.job for w in self._waiting if w.frames is not None]
        self._waiting = deque(w for w in self._waiting if w.frames is None)
        self._prefills, self._frames = [], OrderedDict()
        _report(lost, error)
        self._device.reset()

    def _fail_all(self, error: BaseException) -> None:
        """Reports the error that ends the thread to every job."""
        with self._lock:
            self._has_failed = True
            lost = [*self._inbox, *(w.job for w in self._waiting)]
            self._inbox.clear()
        lost += [*(p.job for p in self._prefills), *self._device.busy.values()]
        self._waiting, self._prefills = deque(), []
        _report(lost, error)


def _report(lost: Iterable[ServedJob], error: BaseException) -> None:
    """Tells jobs that they end by an error."""
    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for job in lost:
        if not job.is_cancelled:
            job.report(Progress(NOTHING, NOTHING.astype(np.float32), True, reason))
