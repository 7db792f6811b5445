"""The server under OpenAI's own client: formats, streams, chat, and equality with `generate`."""

import base64
import threading

import jax
import numpy as np
import openai
import pytest

from speechlm2_jax.inference.generate import PromptInputs, prepare_prompts, run_generation
from speechlm2_jax.inference.long_form.chunked import split_long_audio
from speechlm2_jax.inference.request.generation_request import read_request
from speechlm2_jax.inference.transcript_files import write_transcript
from speechlm2_jax.serving import pieces
from tests.serving.server_case import (
    OPTIONS,
    EvenAligner,
    load_tiny,
    recording,
    running,
    wav_bytes,
)


@pytest.fixture(scope="module")
def model():
    return load_tiny()


@pytest.fixture(scope="module")
def server(model):
    with running(model, aligner=EvenAligner()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def offline_text(model, samples, **settings):
    settings = {"max_new_tokens": OPTIONS.max_new_tokens, **settings}
    return model.transcribe([samples], prompt=OPTIONS.prompt, **settings)[0]


@pytest.fixture
def compilations(caplog):
    """The log of compilations in all threads."""
    jax.config.update("jax_log_compiles", True)
    yield lambda: [own for own in caplog.messages if own.startswith("Compiling")]
    jax.config.update("jax_log_compiles", False)


def test_no_request_waits_for_a_compilation(client, compilations):
    for number in range(3):
        file = ("a.wav", wav_bytes(recording(number, 2000 + 2000 * number)))
        client.audio.transcriptions.create(model="tiny", file=file, temperature=0.5 * number)
    assert compilations() == []


def test_a_transcription_is_that_of_the_model(model, client):
    samples = recording(1)
    found = client.audio.transcriptions.create(model="tiny", file=("a.wav", wav_bytes(samples)))
    assert found.text == offline_text(model, samples) != ""
    text = client.audio.transcriptions.create(
        model="tiny", file=("a.wav", wav_bytes(samples)), response_format="text"
    )
    assert text.strip() == found.text
    whole = client.audio.transcriptions.create(
        model="tiny", file=("a.wav", wav_bytes(samples)), response_format="verbose_json"
    )
    assert whole.text == found.text and whole.duration == pytest.approx(7000 / 16000, abs=1e-3)
    assert whole.segments[0].end <= 7000 / 16000


def test_a_streamed_transcription_joins_to_the_whole(model, client):
    samples = recording(2)
    events = list(
        client.audio.transcriptions.create(
            model="tiny", file=("a.wav", wav_bytes(samples)), stream=True
        )
    )
    deltas = [event.delta for event in events if event.type == "transcript.text.delta"]
    assert events[-1].type == "transcript.text.done"
    assert "".join(deltas) == events[-1].text == offline_text(model, samples)
    assert len(deltas) > 1


def test_a_chat_about_a_recording_is_that_of_the_model(model, client):
    samples = recording(3)
    data = base64.b64encode(wav_bytes(samples)).decode()
    messages = [
        {"role": "user", "content": [
            {"type": "text", "text": "What is"},
            {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
        ]}
    ]  # fmt: skip
    asked = dict(model="tiny", messages=messages, temperature=1.2, top_p=0.9, seed=7, max_tokens=9)
    whole = client.chat.completions.create(**asked, logprobs=True)
    parts = [{"type": "text", "text": "What is"}, {"type": "audio", "audio": samples}]
    dialog = [{"role": "user", "content": parts}]
    drawn = dict(do_sample=True, temperature=1.2, top_p=0.9, top_k=0, seed=7, max_new_tokens=9)
    (ids,) = model.generate([dialog], **drawn)
    ids = ids[~np.isin(ids, [*model.end_ids, model.text_pad_id])]
    choice = whole.choices[0]
    assert choice.message.content == model.tokenizer.ids_to_text(ids) != ""
    assert len(choice.logprobs.content) == len(ids)
    assert all(token.logprob <= 0 for token in choice.logprobs.content)
    joined = bytes(byte for token in choice.logprobs.content for byte in token.bytes)
    assert joined.decode() == choice.message.content
    assert whole.usage.completion_tokens in (len(ids), len(ids) + 1)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == choice.message.content and chunks[-1].usage == whole.usage
    end = choice.message.content[4:6]
    cut = client.chat.completions.create(**asked, stop=[end], logprobs=True).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.message.content == choice.message.content.partition(end)[0]
    kept = cut.logprobs.content
    assert kept == choice.logprobs.content[: len(kept)] and len(kept) < len(ids)
    shorter = model.tokenizer.ids_to_text(ids[: len(kept) - 1])
    assert len(shorter) < len(cut.message.content) or not kept


def test_under_load_every_response_is_that_of_generate_alone(model, client):
    """Greedy and sampled requests arrive at random times, some streamed, some abandoned."""
    rng = np.random.default_rng(0)
    kinds = [{}, dict(temperature=1.2, extra_body={"seed": 5, "top_p": 0.9}), dict(stream=True)]
    jobs = [(n % 4, kinds[n % 3], float(rng.uniform(0, 1.5))) for n in range(24)]
    found: dict[int, str] = {}

    def run(number):
        which, kind, delay = jobs[number]
        threading.Event().wait(delay)
        file = ("a.wav", wav_bytes(recording(which, 5000 + 600 * which)))
        reply = client.audio.transcriptions.create(model="tiny", file=file, **kind)
        if "stream" not in kind:
            found[number] = reply.text
        elif number % 2:
            next(iter(reply))
            reply.close()
        else:
            found[number] = list(reply)[-1].text

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(jobs))]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    drawn = dict(do_sample=True, temperature=1.2, top_p=0.9, top_k=0, seed=5)
    expected = {
        (which, is_drawn): offline_text(
            model, recording(which, 5000 + 600 * which), **(drawn if is_drawn else {})
        )
        for which in range(4)
        for is_drawn in (False, True)
    }
    assert len(found) >= 20
    for number, text in found.items():
        which, kind, _ = jobs[number]
        assert text == expected[which, "temperature" in kind], number


def long_recording():
    """0.9 s, then a pause, then 0.4 s: of several parts of at most 0.5 s."""
    return np.concatenate([recording(4), recording(5), np.zeros(8000, np.float32), recording(6)])


@pytest.fixture(scope="module")
def long_transcript(model):
    return model.transcribe(
        [long_recording()],
        prompt=OPTIONS.prompt,
        max_new_tokens=OPTIONS.max_new_tokens,
        max_audio_s=OPTIONS.max_audio_s,
        timestamps="word",
        aligner=EvenAligner(),
    )[0]


def long_file():
    return ("a.wav", wav_bytes(long_recording()))


@pytest.mark.parametrize("form", ["srt", "vtt"])
def test_subtitles_of_a_long_recording_are_those_of_transcribe(client, long_transcript, form):
    text = client.audio.transcriptions.create(model="tiny", file=long_file(), response_format=form)
    assert len(long_transcript.segments) > 2
    assert text == write_transcript(long_transcript, form)


def test_segments_and_words_of_a_long_recording_are_those_of_transcribe(client, long_transcript):
    whole = client.audio.transcriptions.create(
        model="tiny",
        file=long_file(),
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
    )
    assert whole.text == long_transcript != ""
    words = [(word.word, word.start, word.end) for word in whole.words]
    assert words == [(word.text, word.start, word.end) for word in long_transcript.words]
    segments = [(own.text, own.start, own.end) for own in whole.segments]
    assert segments == [(own.text, own.start, own.end) for own in long_transcript.segments]
    assert all(segment.tokens and segment.avg_logprob < 0 for segment in whole.segments)
    only = client.audio.transcriptions.create(
        model="tiny",
        file=long_file(),
        response_format="verbose_json",
        timestamp_granularities=["word"],
    )
    assert only.words == whole.words and only.segments is None


def test_a_long_recording_is_streamed_part_by_part(client, long_transcript):
    asked = dict(response_format="verbose_json", timestamp_granularities=["word"])
    stream = client.audio.transcriptions.create(
        model="tiny", file=long_file(), stream=True, **asked
    )
    *deltas, done = stream
    assert len(deltas) > 2
    assert "".join(delta.delta for delta in deltas) == done.text == long_transcript
    assert [word["word"] for word in done.words] == long_transcript.split()


def test_a_loop_is_generated_again_as_by_transcribe(server, client, monkeypatch, long_transcript):
    """The small model makes none: its texts are taken for loops."""
    jobs, scheduler = [], server.service.scheduler
    submit = scheduler.submit
    monkeypatch.setattr(scheduler, "submit", lambda job: jobs.append(job) or submit(job))
    monkeypatch.setattr(pieces, "has_loop", bool)
    asked = dict(model="tiny", file=long_file())
    found = client.audio.transcriptions.create(**asked)
    assert found.text == long_transcript and len(jobs) % 2 == 0
    assert sum(job.sampling.avoids_loops for job in jobs) == len(jobs) // 2 > 1
    *_, done = client.audio.transcriptions.create(**asked, stream=True)
    assert done.text == found.text
    assert done.usage.output_tokens == found.usage.output_tokens


def test_silence_has_no_text_and_does_not_reach_the_model(server, client):
    calls = server.service.scheduler.counts.encoded_clips
    file = ("a.wav", wav_bytes(np.zeros(9000, np.float32)))
    asked = dict(response_format="verbose_json")
    found = client.audio.transcriptions.create(model="tiny", file=file, **asked)
    assert (found.text, found.segments, found.duration) == ("", [], 0.562)
    (done,) = client.audio.transcriptions.create(model="tiny", file=file, stream=True)
    assert done.text == "" and server.service.scheduler.counts.encoded_clips == calls


def test_streams_run_on_while_words_are_aligned(client, monkeypatch):
    """The aligner waits until the stream of another request has ended."""
    ended = threading.Event()
    align = EvenAligner.align

    def waiting(self, waves, words):
        assert ended.wait(30)
        return align(self, waves, words)

    monkeypatch.setattr(EvenAligner, "align", waiting)
    found = []

    def subtitles():
        asked = dict(model="tiny", file=long_file(), response_format="srt")
        found.append(client.audio.transcriptions.create(**asked))

    thread = threading.Thread(target=subtitles)
    thread.start()
    file = ("a.wav", wav_bytes(recording(1)))
    assert list(client.audio.transcriptions.create(model="tiny", file=file, stream=True))
    ended.set()
    thread.join(30)
    assert found and "-->" in found[0]


def test_a_chat_about_a_long_recording_is_joined_from_chunks_as_by_generate(model, client):
    samples = np.tile(recording(4, 8000), 2)
    data = base64.b64encode(wav_bytes(samples)).decode()
    audio = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is"}, audio]}]
    whole = client.chat.completions.create(model="tiny", messages=messages)
    stream = client.chat.completions.create(model="tiny", messages=messages, stream=True)
    parts = [{"type": "text", "text": "What is"}, {"type": "audio", "audio": samples}]
    engine = model.engine()
    (example,), _ = prepare_prompts(engine, PromptInputs([[{"role": "user", "content": parts}]]))
    chunks = split_long_audio(example, OPTIONS.max_audio_s, model.sampling_rate)
    asked = read_request(model, {"max_new_tokens": OPTIONS.max_new_tokens})
    *_, output = run_generation(engine, chunks.rows, asked)
    responses = [ids[:n] for ids, n in zip(output.ids, output.lengths, strict=True)]
    ids = np.asarray(chunks.join(responses, model.tokenizer, model.end_ids))
    ids = ids[~np.isin(ids, [*model.end_ids, model.text_pad_id])]
    assert whole.choices[0].message.content == model.tokenizer.ids_to_text(ids) != ""
    deltas = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(deltas) == whole.choices[0].message.content
