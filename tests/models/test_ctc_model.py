"""CTCModel: NeMo's files in and out, batches of SALM's kind."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from speechlm2_jax.batches import BatchShape, SalmExample, assemble_salm_batch
from speechlm2_jax.conversion.readers import read_nemo
from speechlm2_jax.layers.module import merge
from speechlm2_jax.models import CTCModel
from speechlm2_jax.pretrained.locate import nemo_tokenizer
from speechlm2_jax.settings import SettingsError

ASR = Path(__file__).parents[1] / "data" / "asr"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model():
    return CTCModel.from_pretrained(ASR / "ctc.nemo")


@pytest.fixture(scope="module")
def golden():
    return load_file(ASR / "ctc_golden.safetensors")


def waves_of(golden):
    return [wave[:n] for wave, n in zip(golden["audio"], golden["audio_len"].tolist(), strict=True)]


def batch_of(model, waves, order, rows=4):
    """One group of conversations, each a recording and its transcript's ids."""
    placeholder = model.tokenizer.token_to_id("<|audioplaceholder|>")
    examples = []
    for i in order:
        tokens = np.array([placeholder, 3 + i, 5, 7 + i], np.int32)
        scored = np.array([False, True, True, True])
        examples.append(SalmExample(id=str(i), tokens=tokens, loss_mask=scored, audio=(waves[i],)))
    samples = -(-max(map(len, waves)) // 1280) * 1280
    return assemble_salm_batch(
        [examples],
        BatchShape(sequences=rows, tokens=48, clips=rows, samples=samples),
        frame_count=model.frame_count,
        placeholder_id=placeholder,
    )


@pytest.fixture(scope="module")
def loss_of(model):
    """Sums of losses of a batch, compiled."""
    run = jax.jit(lambda variables, batch: model.losses(variables, batch, key=None, train=False))
    return lambda batch: run(model.variables, jax.tree.map(jnp.asarray, batch))


def test_log_probabilities_equal_nemo(model, golden):
    @jax.jit
    def scores(variables, audio, lengths):
        network = merge(model._graphdef, variables)
        output = network(audio, lengths)
        return jax.nn.log_softmax(network.logits(output.frames), axis=-1), output.lengths

    lengths = jnp.asarray(golden["audio_len"], jnp.int32)
    log_probs, counts = scores(model.variables, jnp.asarray(golden["audio"]), lengths)
    expected = golden["log_probs"]
    for row, frames in enumerate(counts.tolist()):
        np.testing.assert_allclose(log_probs[row, :frames], expected[row, :frames], atol=TOLERANCE)


def test_a_recording_is_transcribed_the_same_in_any_batch(model, golden):
    waves = waves_of(golden)
    together = model.transcribe(waves)
    assert together == [model.transcribe([wave])[0] for wave in waves]
    assert together == model.transcribe(waves[::-1])[::-1]


def test_an_unknown_piece_stays_visible_as_in_nemo(model, monkeypatch):
    unknown = model.tokenizer.unk_id
    monkeypatch.setattr(model, "_decode", lambda audio, lengths: [[5, unknown, 7]])
    assert "⁇" in model.transcribe([np.zeros(16000, np.float32)])[0]


def test_a_saved_archive_loads_to_the_same_weights_and_tokenizer(model, golden, tmp_path):
    model.save_to(tmp_path / "again.nemo")
    again = CTCModel.from_pretrained(tmp_path / "again.nemo")
    for path, value in model.variables.items():
        np.testing.assert_array_equal(value, again.variables[path], err_msg=path)
    assert again.transcribe(waves_of(golden)) == model.transcribe(waves_of(golden))


def test_loss_is_the_sum_over_conversations_in_any_order(model, golden, loss_of):
    waves = waves_of(golden)
    alone = [loss_of(batch_of(model, waves, [i])) for i in range(len(waves))]
    for order in ([0, 1], [1, 0]):
        both = loss_of(batch_of(model, waves, order))
        assert float(both.loss.count) == 2
        expected = sum(float(one.loss.total) for one in alone)
        assert float(both.loss.total) == pytest.approx(expected, rel=1e-5)


def test_a_conversation_without_a_usable_recording_counts_nothing(model, golden, loss_of):
    waves = waves_of(golden)
    batch = batch_of(model, waves, [0])
    empty = SalmExample(id="", tokens=np.zeros(0, np.int32), loss_mask=np.zeros(0, bool))
    placeholder = model.tokenizer.token_to_id("<|audioplaceholder|>")
    tokens = np.array([placeholder, 3, 5, 7], np.int32)
    row = SalmExample(id="0", tokens=tokens, loss_mask=tokens != placeholder, audio=(waves[0],))
    with_hole = assemble_salm_batch(
        [[empty, row]],
        BatchShape(sequences=4, tokens=48, clips=4, samples=batch.audio.shape[-1]),
        frame_count=model.frame_count,
        placeholder_id=placeholder,
    )
    assert float(loss_of(with_hole).loss.total) == pytest.approx(
        float(loss_of(batch).loss.total), rel=1e-6
    )


def test_every_parameter_gets_a_gradient(model, golden):
    batch = jax.tree.map(jnp.asarray, batch_of(model, waves_of(golden), [0, 1]))
    trained = {p: v for p, v in model.variables.items() if model.trainable[p]}
    rest = {p: v for p, v in model.variables.items() if p not in trained}

    def total(values):
        key = jax.random.key(0)
        return model.losses({**rest, **values}, batch, key=key, train=True).loss.total

    gradients = jax.jit(jax.grad(total))(jax.tree.map(jnp.asarray, trained))
    silent = [p for p, g in gradients.items() if not np.any(np.asarray(g))]
    assert silent == []


def test_a_folder_without_tokenizer_is_an_error_that_names_the_key(model):
    cfg = {**model.cfg, "tokenizer": {"type": "bpe"}}
    with pytest.raises(SettingsError, match="model.tokenizer.dir"):
        CTCModel(cfg)


def start_from_file(model, **changed):
    """A model that starts from the golden file, with some blocks of its configuration changed."""
    cfg = {**model.cfg, "init_from_checkpoint": str(ASR / "ctc.nemo"), **changed}
    return CTCModel(cfg, tokenizer=nemo_tokenizer(read_nemo(ASR / "ctc.nemo")))


def test_training_starts_from_a_trained_model(model, monkeypatch, caplog):
    start = start_from_file(model)
    start.check_weights()
    for path, value in model.variables.items():
        np.testing.assert_array_equal(start.variables[path], value)
    assert "start from" in start.notes[0] and not caplog.text
    monkeypatch.setattr(type(model.tokenizer), "contents", property(lambda self: id(self)))
    other = start_from_file(model).variables
    unlike = {path for path, v in model.variables.items() if not np.array_equal(other[path], v)}
    assert unlike and all(path.startswith("head.") for path in unlike)
    assert "another tokenizer; the head starts at random" in caplog.text


def test_a_start_of_other_sizes_is_refused(model):
    encoder = {**model.cfg["encoder"], "d_model": 2 * model.cfg["encoder"]["d_model"]}
    with pytest.raises(SettingsError, match=r"init_from_checkpoint: .* does not fit: "):
        start_from_file(model, encoder=encoder).check_weights()
