"""The bundled parts and the configuration that starts from them."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import soundfile

from speechlm2_jax import experiment
from speechlm2_jax.data.prompts import PromptFormatter
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.evaluation.metrics.wer import word_errors
from speechlm2_jax.models import CTCModel

ROOT = Path(__file__).parents[1]
PARTS, CORPUS = ROOT / "configs" / "parts", ROOT / "corpus"
MEGABYTE = 1e6
REPOSITORY_BYTES = 60 << 20
ENCODER_WER, CAUSAL_WER = 0.2, 0.35
"""Of the encoders' own CTC heads, over every tenth row of the test set."""


def test_parts_are_at_most_25_megabytes():
    size = sum(path.stat().st_size for path in PARTS.rglob("*") if path.is_file())
    assert size <= 25 * MEGABYTE


def test_the_repository_is_at_most_60_mebibytes():
    if not ((ROOT / ".git").exists() and shutil.which("git")):
        pytest.skip("not a git checkout, so nothing tells which files are the repository's")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    paths = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    size = sum(path.lstat().st_size for path in paths if path.is_symlink() or path.is_file())
    assert size <= REPOSITORY_BYTES


def test_the_encoder_transcribes():
    rows = [json.loads(line) for line in (CORPUS / "test.jsonl").read_text().splitlines()][::10]
    waves = [soundfile.read(CORPUS / r["audio_filepath"], dtype="float32")[0] for r in rows]
    texts = CTCModel.from_pretrained(PARTS / "tiny_encoder.nemo").transcribe(waves)
    assert word_errors([row["text"] for row in rows], texts).wer < ENCODER_WER


def test_the_causal_encoder_transcribes_as_the_samples_come():
    rows = [json.loads(line) for line in (CORPUS / "test.jsonl").read_text().splitlines()][::10]
    session, texts = CTCModel.from_pretrained(PARTS / "tiny_encoder_causal.nemo").session(), []
    for row in rows:
        session.reset()
        wave = soundfile.read(CORPUS / row["audio_filepath"], dtype="float32")[0]
        updates = [*session.push(wave[:9999]), *session.push(wave[9999:]), *session.finish()]
        texts.append(" ".join(update.text for update in updates))
    assert word_errors([row["text"] for row in rows], texts).wer < CAUSAL_WER


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    run = tmp_path_factory.mktemp("salm") / "run"
    return experiment.build(ROOT / "configs" / "salm.yaml", [f"exp_manager.explicit_log_dir={run}"])


def test_salm_trains_adapter_projection_and_lora_alone(built):
    trainable = built.model.trainable
    trained = {path for path, is_trained in trainable.items() if is_trained is True}
    for path in trained:
        assert path.startswith(("perception.adapter.", "perception.projection.")) or "lora" in path
    assert any(path.startswith("perception.adapter.") for path in trained)
    assert any("lora" in path for path in trained)


def test_salm_neither_trains_nor_validates_on_the_test_set(built):
    text = json.dumps(built.settings["data"])
    assert "corpus/train.jsonl" in text and "corpus/validation.jsonl" in text
    assert "test.jsonl" not in text


def test_the_chat_template_of_the_llm_is_nemos_format_qwen():
    tokenizer = Tokenizer(PARTS / "tiny_llm")
    auto, qwen = (PromptFormatter(name, tokenizer) for name in ("auto", "qwen"))
    user = {"role": "user", "content": "Transcribe: this"}
    response = {"role": "assistant", "content": "turn off the radio"}
    for dialog in ([user], [user, response], [user, response, user, response]):
        ours, nemos = auto.encode_dialog(dialog), qwen.encode_dialog(dialog)
        assert ours.input_ids.tolist() == nemos.input_ids.tolist()
        assert (ours.mask is None) is (len(dialog) == 1)
        if ours.mask is not None:
            assert ours.mask.tolist() == nemos.mask.tolist()
