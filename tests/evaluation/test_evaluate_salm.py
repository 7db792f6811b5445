"""evaluate.py with a real, tiny SALM from a directory that NeMo 3.0.0 wrote."""

import json
from pathlib import Path

import jax
import pytest

from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.evaluation.inputs import read_inputs
from speechlm2_jax.models import SALM as SALM_CLASS
from tests.evaluation.run_case import evaluate_on_one_device

DATA = Path(__file__).parents[1] / "data"
SALM = DATA / "salm" / "llama_adapter_hf"


@pytest.fixture
def golden_text():
    """NeMo's response to `Repeat after me: <audio a0>`."""
    facts = json.loads((DATA / "salm" / "llama_adapter.json").read_text())
    (ids,) = facts["generate"]["single_row0"]
    return Tokenizer(DATA / "llm" / "llama").ids_to_text(ids).strip()


def test_responses_equal_nemos_whatever_else_is_in_the_batch(tmp_path, golden_text):
    audio = DATA / "salm" / "audio"
    manifest, output = tmp_path / "test.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"audio_filepath": str(audio / "a1.wav"), "duration": 0.32, "text": "x"},
        {"audio_filepath": str(tmp_path / "missing.wav"), "duration": 0.4, "text": "x"},
        {"audio_filepath": str(audio / "a0.wav"), "duration": 0.45625, "text": golden_text},
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        f"pretrained_name={SALM}",
        f"inputs={manifest}",
        f"output_manifest={output}",
        "batch_size=4",
        "max_new_tokens=16",
        "user_prompt=Repeat after me:",
        "use_normalizer=none",
        "verbose=false",
        "dtype=float32",
        "device=cpu",
    ]
    try:
        assert evaluate_on_one_device(argv) == 0
    finally:
        jax.config.update("jax_default_device", None)
    *rows, _ = [json.loads(line) for line in output.read_text().splitlines()]
    assert [a["id"] for a in rows] == ["a1", "missing", "a0"]
    assert "no such file" in rows[1]["error"]
    assert rows[2]["pred_text"] == golden_text
    assert rows[0]["pred_text"] not in ("", golden_text)


def turn(role, value, **place):
    kind = "audio" if str(value).endswith(".wav") else "text"
    return {"from": role, "type": kind, "value": str(value), **place}


@pytest.mark.parametrize("mode", ["continuous", "plain"])
def test_the_turns_of_conversations_are_their_prompts(tmp_path, golden_text, mode):
    a0, a1 = (DATA / "salm" / "audio" / name for name in ("a0.wav", "a1.wav"))
    dialogs = {
        "one": [turn("User", "Repeat after me:"), turn("User", a0), turn("Assistant", golden_text)],
        "two": [
            turn("User", a0),
            turn("Assistant", "yes"),
            turn("User", a1, duration=0.3),
            turn("Assistant", "x"),
        ],
        "none": [turn("User", "Say yes."), turn("Assistant", "yes")],
    }
    rows = [{"id": k, "conversations": v, "custom": {"topic": k}} for k, v in dialogs.items()]
    manifest, output = tmp_path / "dialogs.jsonl", tmp_path / "out.jsonl"
    entries = tmp_path / "inputs.yaml"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    more = tmp_path / "texts.jsonl"
    more.write_text(json.dumps(rows[2]) + "\n")
    entries.write_text(f"- type: multimodal_conversation\n  manifest_filepath: {more}\n")
    argv = [
        f"pretrained_name={SALM}",
        f"inputs=[{manifest},{entries}]",
        f"output_manifest={output}",
        f"continuous_batching={'true' if mode == 'continuous' else 'false'}",
        "batch_size=1",
        "max_new_tokens=16",
        "use_normalizer=none",
        "verbose=false",
        "dtype=float32",
        "device=cpu",
    ]
    try:
        assert evaluate_on_one_device(argv) == 0
    finally:
        jax.config.update("jax_default_device", None)
    *found, record = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in found] == ["one", "two", "none"]
    assert found[0]["pred_text"] == golden_text == found[0]["text"]
    assert [row["duration"] for row in found] == [0.45625, 0.75625, 0]
    for row, (name, turns) in zip(found, dialogs.items(), strict=True):
        *before, response = row["conversations"]
        assert response == turn("Assistant", row["pred_text_raw"])
        assert [t["value"] for t in before] == [t["value"] for t in turns[:-1]]
        assert row["custom"] == {"topic": name}
    assert found[1]["pred_text"] not in ("", golden_text)
    assert record["provenance"]["totals"]["scored"] == 3
    assert found[2]["pred_text"] == text_alone()
    again = read_inputs(output_without_record(output, tmp_path))
    assert [u.dialog.turns for u in again] == [
        u.dialog.turns for u in read_inputs([str(manifest), str(entries)])
    ]


def text_alone() -> str:
    """The response to the conversation without audio, from the tokens that NeMo puts after it."""
    model = SALM_CLASS.from_pretrained(SALM, dtype="float32")
    prompt = [{"role": "user", "content": "Say yes."}]
    ids = model.generate([prompt], max_new_tokens=16, eos_token_id=model.text_eos_id)[0]
    ids = ids[len(model.prompt_formatter.encode_dialog(prompt).input_ids) :]
    ends = [i for i, one in enumerate(ids) if one == model.text_eos_id]
    return model.tokenizer.ids_to_text([int(i) for i in ids[: ends[0] if ends else None]]).strip()


def output_without_record(output, folder):
    """The written conversations as a manifest."""
    path = folder / "again.jsonl"
    path.write_text("".join(output.read_text().splitlines(keepends=True)[:-1]))
    return path
