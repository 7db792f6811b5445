"""evaluate.py with a real, tiny SALM from a directory that NeMo 3.0.0 wrote."""

import json
from pathlib import Path

import jax
import pytest

import evaluate
from speechlm2_jax.data.tokenizer import Tokenizer

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
        assert evaluate.main(argv) == 0
    finally:
        jax.config.update("jax_default_device", None)
    *rows, _ = [json.loads(line) for line in output.read_text().splitlines()]
    assert [a["id"] for a in rows] == ["a1", "missing", "a0"]
    assert "no such file" in rows[1]["error"]
    assert rows[2]["pred_text"] == golden_text
    assert rows[0]["pred_text"] not in ("", golden_text)
