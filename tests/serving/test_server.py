"""The server under OpenAI's own client: formats, streams, chat, and equality with `generate`."""

import base64
import threading

import numpy as np
import openai
import pytest

from speechlm2_jax.inference.generate import PromptInputs, prepare_prompts, run_generation
from speechlm2_jax.inference.long_form.chunked import split_long_audio
from speechlm2_jax.inference.request.generation_request import read_request
from tests.serving.server_case import OPTIONS, load_tiny, recording, running, wav_bytes


@pytest.fixture(scope="module")
def model():
    return load_tiny()


@pytest.fixture(scope="module")
def server(model):
    with running(model) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def offline_text(model, samples, **settings):
    settings = {"max_new_tokens": OPTIONS.max_new_tokens, **settings}
    return model.transcribe([samples], prompt=OPTIONS.prompt, **settings)[0]


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
    assert whole.segments[0].end == pytest.approx(7000 / 16000, abs=1e-3)


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


def test_a_long_recording_is_joined_from_chunks_as_by_generate(model, client):
    samples = np.tile(recording(4, 8000), 2)
    file = ("a.wav", wav_bytes(samples))
    whole = client.audio.transcriptions.create(model="tiny", file=file)
    stream = client.audio.transcriptions.create(model="tiny", file=file, stream=True)
    *deltas, done = stream
    text = f"{OPTIONS.prompt} {model.audio_locator_tag}"
    dialog = [{"role": "user", "content": text, "audio": [samples]}]
    engine = model.engine()
    (example,), _ = prepare_prompts(engine, PromptInputs([dialog]))
    chunks = split_long_audio(example, OPTIONS.max_audio_s, model.sampling_rate)
    asked = read_request(model, {"max_new_tokens": OPTIONS.max_new_tokens})
    *_, output = run_generation(engine, chunks.rows, asked)
    responses = [ids[:n] for ids, n in zip(output.ids, output.lengths, strict=True)]
    ids = np.asarray(chunks.join(responses, model.tokenizer, model.end_ids))
    ids = ids[~np.isin(ids, [*model.end_ids, model.text_pad_id])]
    assert done.text == whole.text == model.tokenizer.ids_to_text(ids).strip() != ""
    assert deltas
