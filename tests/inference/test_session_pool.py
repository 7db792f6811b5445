"""Sessions that share a step give what each gives alone, whatever the others do."""

from functools import cache

import jax
import numpy as np
import pytest

from speechlm2_jax.data.audio import resample
from speechlm2_jax.generation.sampling import SamplingConfig
from speechlm2_jax.inference.sessions.duplex_step import make_start
from speechlm2_jax.inference.sessions.session_pool import PoolLimits, SessionRefusedError
from speechlm2_jax.inference.sessions.step_times import WINDOW, StepTimes
from tests.parity.duplex_golden import golden, pretrained, recorded_batch
from tests.parity.sampled import sampled

ATOL = 1e-4
SLOTS = 4
RUNS = [
    "duplex_s2s_speech_decoder_cfg",
    pytest.param("duplex_s2s", marks=pytest.mark.slow),  # another compilation of the step
]


@cache
def opened(run):
    return pretrained(run).session_pool(SLOTS, session_window_s=4.0, max_load=float("inf"))


@pytest.fixture(params=RUNS)
def run(request):
    return request.param


@pytest.fixture
def pool(run):
    pool = opened(run)  # it has run its step
    programs = pool._step._cache_size()
    yield pool
    for session in pool.sessions:
        session.leave()
    assert pool._step._cache_size() == programs
    assert pool._restart._cache_size() == 1


def recording(row=0):
    batch = recorded_batch()
    return batch["source_audio"][row, : batch["source_audio_lens"][row]]


def check(run, row, frames, *, is_whole=True):
    """Compares frames with NeMo's for the recording alone."""
    g, part = golden(run), ("infer_pair/", "infer_pair/single1/")[row]
    text, codes = g[part + "tokens_text"][0], g[part + "tokens_audio"][0]
    count = len(text) if is_whole else len(frames)
    assert [frame.text_token for frame in frames] == text[:count].tolist()
    if not frames:
        return
    np.testing.assert_array_equal([frame.codes for frame in frames], codes[:count])
    if row == 0:  # NeMo's audio of the other one is that of a padded batch
        made = np.concatenate([frame.audio for frame in frames])
        sample = sampled(made)
        expected = g["infer_pair/audio:sample"][: len(sample.values)]
        np.testing.assert_allclose(sample.values, expected, atol=ATOL)
        if len(made) == g["infer_pair/audio_len"][0]:
            np.testing.assert_allclose(sample.rms, g["infer_pair/audio:rms"][:1], atol=ATOL)


def ran(pool, *sessions):
    """Runs steps until no chunk waits; the frames of each session."""
    frames = {session: [] for session in sessions}
    while given := pool.step():
        for session, new in given.items():
            frames[session] += new
    return list(frames.values())


class Caller:
    """Feeds a recording to a session in pieces of random sizes, and stalls at times."""

    def __init__(self, session, random):
        self.session, self.random, self.row = session, random, int(random.integers(2))
        self.left, self.frames = recording(self.row), []

    def feed(self):
        if self.session.is_complete or self.random.random() < 0.3:
            return
        size = int(self.random.choice([1, 333, 1280, 5000]))
        if len(self.left):
            self.session.feed(self.left[:size])
            self.left = self.left[size:]
        elif not self.session.conversation.is_finished:
            self.session.finish()


def test_sessions_that_join_stall_and_leave_do_not_change_each_other(run, pool):
    random, callers, gone = np.random.default_rng(0), {}, []
    while len(gone) < 8:
        if pool.can_join() and random.random() < 0.3:
            session = pool.join()
            callers[session] = Caller(session, random)
        for caller in callers.values():
            caller.feed()
        for session, frames in pool.step().items():
            callers[session].frames += frames
        for session in list(callers):
            if session.is_complete or random.random() < 0.01:
                session.leave()
                gone.append(callers.pop(session))
    for caller in gone:
        check(run, caller.row, caller.frames, is_whole=caller.session.is_complete)
    assert 4 <= sum(caller.session.is_complete for caller in gone) < len(gone)


def test_a_slot_without_a_chunk_keeps_its_state_bit_for_bit(pool):
    first, second = pool.join(), pool.join()
    for session in (first, second):
        session.feed(recording()[:12800])
    ran(pool, first, second)
    before = [np.asarray(x) for x in jax.tree.leaves(pool._state)]
    second.feed(recording()[12800:])
    assert (first.has_chunk, second.has_chunk) == (False, True)
    ran(pool, second)
    one = make_start(pool._program)(pool._weights.network, pool._silence)
    changed = []
    for old, new, of_one in zip(*map(jax.tree.leaves, (before, pool._state, one)), strict=True):
        axis = next(n for n, size in enumerate(of_one.shape) if size != old.shape[n])
        rows = np.split(old != np.asarray(new), SLOTS, axis)
        changed.append([row.any() for row in rows])
    assert np.any(changed, axis=0).tolist() == [slot == second.slot for slot in range(SLOTS)]


def test_an_interruption_changes_one_session_and_its_slot_starts_afresh(run, pool):
    one, other = pool.join(), pool.join()
    for session in (one, other):
        session.feed(recording()[:12800])
    begins = ran(pool, one, other)
    one.conversation.is_in_turn = True  # these models never begin a turn
    one.interrupt()
    for session in (one, other):
        session.feed(recording()[12800:])
        session.finish()
    ends = ran(pool, one, other)
    check(run, 0, begins[1] + ends[1])
    assert (ends[0][0].codes == pretrained(run).speech_eos_id).all()
    assert any((a.codes != b.codes).any() for a, b in zip(*(e[1:] for e in ends), strict=True))
    one.leave()
    after = pool.join()
    assert after.slot == one.slot
    other.reset()
    for session in (after, other):
        session.feed(recording(1))
        session.finish()
    for frames in ran(pool, after, other):
        check(run, 1, frames)


def test_sessions_have_rates_and_times_of_their_own(run, pool):
    plain, wide = pool.join(), pool.join(sampling_rate=48000)
    assert (plain.chunk_s, plain.latency_s) == (pool.chunk_s, 0.08) == (0.16, 0.08)
    assert 0 < wide.latency_s - plain.latency_s < 0.002
    assert plain.state_bytes * SLOTS == pool.state_bytes > 0
    wave = resample(recording(), 16000, 48000)
    wide.feed(wave)
    plain.feed(resample(wave, 48000, 16000))
    assert not wide.is_complete
    for session in (plain, wide):
        session.finish()
    frames, same = ran(pool, plain, wide)
    assert [f.text_token for f in frames] == [f.text_token for f in same]
    np.testing.assert_array_equal([f.codes for f in frames], [f.codes for f in same])
    assert wide.is_complete and frames[0].compute_s > 0
    assert frames[-1].end_s == pytest.approx(0.08 * len(frames))


def test_a_session_that_left_or_ended_takes_nothing(pool):
    session = pool.join()
    session.finish()
    with pytest.raises(ValueError, match=r"ended; call reset\(\)"):
        session.feed(recording())
    session.leave()
    session.leave()
    for use in (session.finish, session.reset, session.interrupt, lambda: session.feed([0.0])):
        with pytest.raises(ValueError, match="left its pool"):
            use()
    assert pool.sessions == () and pool.step() == {}


def test_a_pool_refuses_more_sessions_than_slots_or_than_its_time_allows(pool, monkeypatch):
    sessions = [pool.join() for _ in range(SLOTS)]
    with pytest.raises(SessionRefusedError, match="all 4 slots are taken"):
        pool.join()
    sessions[0].leave()
    assert pool.can_join()
    monkeypatch.setattr(pool, "_limits", PoolLimits(slots=SLOTS, max_load=0.875))
    monkeypatch.setattr(pool, "_times", slow := StepTimes())
    for _ in range(WINDOW):
        slow.add(0.15)
    message = r"150\.0 ms \(95th percentile\), more than 0\.875 of the 160 ms of a chunk"
    with pytest.raises(SessionRefusedError, match=message):
        pool.join()
    for session in sessions:
        session.leave()
    pool.refusal()  # without sessions it measures anew
    assert pool._times is not slow


def test_the_percentile_is_of_the_last_steps():
    times = StepTimes()
    assert times.p95_s == 0
    for seconds in [9.0] * WINDOW + [1.0] * (WINDOW - 20) + [2.0] * 20:
        times.add(seconds)
    assert times.p95_s == 2.0


@pytest.mark.parametrize(("slots", "max_load"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_limits_without_room_are_refused(slots, max_load):
    with pytest.raises(ValueError, match=r"(slots|max_load)=\S+ must be"):
        PoolLimits(slots=slots, max_load=max_load)


@pytest.mark.slow  # another compilation of both steps
def test_each_session_has_its_seed():
    model, random = pretrained("duplex_s2s"), SamplingConfig(do_sample=True)
    sampling = {"text_sampling": random, "audio_sampling": random, "session_window_s": 4.0}
    pool = model.session_pool(2, max_load=float("inf"), **sampling)
    sessions = [pool.join(seed=seed) for seed in (3, 4)]
    for session in sessions:
        session.feed(recording())
        session.finish()
    for seed, frames in zip((3, 4), ran(pool, *sessions), strict=True):
        alone = model.session(seed=seed, **sampling)
        expected = [*alone.push(recording()), *alone.finish()]
        assert [f.text_token for f in frames] == [f.text_token for f in expected]
        np.testing.assert_array_equal([f.codes for f in frames], [f.codes for f in expected])
