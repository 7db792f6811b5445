"""ASRModel of any NeMo model: texts are NeMo's, whatever the batch."""

import gc
import json
import weakref
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import speechlm2_jax as slm
from speechlm2_jax.conversion.readers import read_nemo
from speechlm2_jax.conversion.writers import write_nemo
from speechlm2_jax.models import asr, transcriber
from speechlm2_jax.settings import SettingsError, ignored_report
from tests.conversion.goldens import tensors

ASR = Path(__file__).parents[1] / "data" / "asr"
HYPOTHESES = json.loads((ASR / "hypotheses.json").read_text())
CASES = [
    ("ctc", None, "transcribe"),
    ("rnnt", None, "transcribe"),
    ("rnnt_2layer", None, "transcribe"),
    ("tdt", None, "transcribe"),
    ("hybrid_streaming", None, "transcribe"),
    ("hybrid_streaming", "ctc", "transcribe_ctc"),
]


def recordings(name):
    """Audio [B, S] and lengths; of the CTC model the second and third recording only."""
    given = load_file(ASR / f"{name}_golden.safetensors")
    lengths, audio = given["audio_len"], given["audio"]
    if audio.ndim == 2:
        return audio, lengths
    padded = np.zeros((len(lengths), lengths.max()), np.float32)
    for row, wave in zip(padded, np.split(audio, np.cumsum(lengths)[:-1]), strict=True):
        row[: len(wave)] = wave
    return padded, lengths


@pytest.fixture(scope="module")
def model():
    return slm.models.ASRModel.from_pretrained(ASR / "rnnt.nemo")


@pytest.mark.parametrize(("name", "decoder", "key"), CASES)
def test_transcripts_equal_nemo(name, decoder, key):
    model = slm.models.ASRModel.from_pretrained(ASR / f"{name}.nemo", decoder=decoder)
    audio, lengths = recordings(name)
    assert model.sampling_rate == 16000
    assert model.transcribe(audio, lengths) == HYPOTHESES[name][key][-len(audio) :]


def test_neighbours_order_and_padding_change_no_text(model):
    audio, lengths = recordings("rnnt")
    together = model.transcribe(audio, lengths)
    wider = np.pad(audio, ((0, 0), (0, 3000)), constant_values=0.3)  # beyond the lengths
    assert model.transcribe(jnp.asarray(wider[::-1]), lengths[::-1]) == together[::-1]
    assert model.transcribe(audio[:1]) == together[:1]


def test_an_empty_recording_has_an_empty_transcript(model):
    audio, lengths = recordings("rnnt")
    alone = model.transcribe(audio[1:2], lengths[1:2])
    assert alone != [""]
    assert model.transcribe(audio[[0, 1, 2]], [0, lengths[1], 0]) == ["", *alone, ""]
    assert model.transcribe(np.zeros((2, 0))) == ["", ""]
    for wrong in ([-1], [audio.shape[1] + 1], [1, 1]):
        with pytest.raises(ValueError, match="audio_lens must be 1 lengths from 0 to"):
            model.transcribe(audio[:1], wrong)


def test_few_shapes_serve_all_batches(model, monkeypatch):
    shapes = set()
    decode = model._decode

    def count(audio, lengths):
        shapes.add(audio.shape)
        return decode(audio, lengths)

    monkeypatch.setattr(model, "_decode", count)
    audio, lengths = recordings("rnnt")
    for cut in (500, 9000, 16000, 20000):
        model.transcribe(audio[:, :cut], np.minimum(lengths, cut))
    assert shapes == {(3, 16000), (3, 32000)}
    assert model.transcribe(np.zeros((0, 0))) == []


def test_what_is_shorter_than_a_second_is_centred_in_silence():
    wave = np.ones(7, np.float32)
    assert transcriber._centred(wave, 12).tolist() == [0, 0, *wave, 0, 0, 0]
    assert transcriber._centred(wave, 7) is not None and len(transcriber._centred(wave, 5)) == 7


def test_the_weights_go_with_the_model():
    model = slm.models.ASRModel.from_pretrained(ASR / "ctc.nemo")
    audio, lengths = recordings("ctc")
    model.transcribe(audio, lengths)
    held = [weakref.ref(array) for array in model._variables.values()]
    del model
    gc.collect()
    assert held and all(ref() is None for ref in held)


def test_opened_again_it_compiles_nothing(model):
    audio, lengths = recordings("rnnt")
    texts = model.transcribe(audio, lengths)
    programs = asr._hypotheses._cache_size()
    again = slm.models.ASRModel.from_pretrained(ASR / "rnnt.nemo")
    assert again.transcribe(audio, lengths) == texts
    assert asr._hypotheses._cache_size() == programs


def copy_with(name, path, change, more=None):
    """The archive with a changed config, and more files."""
    archive = read_nemo(ASR / f"{name}.nemo")
    files = {n: archive.artifact(n) for n in archive.members if not n.startswith("model_")}
    write_nemo(path, change(archive.config), tensors(archive.weights), {**files, **(more or {})})
    return path


class Numbers:
    """Spells each label as its number."""

    def __len__(self):
        return 40

    def __call__(self, labels):
        return " ".join(map(str, labels))


def labels_of(name, decoder, audio, lengths):
    """The labels that an archive's own model transcribes in each recording."""
    model = slm.models.ASRModel.from_pretrained(ASR / f"{name}.nemo", decoder=decoder)
    model._to_text = Numbers()
    return [[int(n) for n in text.split()] for text in model.transcribe(audio, lengths)]


CHARACTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKL", " ", "."]
OTHERS = ["x"] * 40


def without_tokenizer(target, **changes):
    """Makes a character model's config of one with a tokenizer."""

    def change(config):
        kept = {k: v for k, v in config.items() if k not in ("tokenizer", "labels")}
        return {**kept, "target": f"nemo.collections.asr.models.{target}", **changes}

    return change


@pytest.mark.parametrize(
    ("name", "decoder", "target", "places"),
    [
        ("ctc", None, "EncDecCTCModel", ("decoder",)),
        ("rnnt", None, "EncDecRNNTModel", ("labels",)),
        ("tdt", None, "EncDecRNNTModel", ("joint",)),
        ("hybrid_streaming", None, "EncDecHybridRNNTCTCModel", ("joint",)),
        ("hybrid_streaming", "ctc", "EncDecHybridRNNTCTCModel", ("aux_ctc", "decoder")),
    ],
)
def test_characters_are_written_one_after_another(name, decoder, target, places, tmp_path):
    def change(config):
        given = json.loads(json.dumps(without_tokenizer(target)(config)))
        if places == ("labels",):
            given["joint"].pop("vocabulary")
            return {**given, "labels": CHARACTERS}
        block = given
        for place in places:
            block = block[place]
        block["vocabulary"] = CHARACTERS
        return {**given, "labels": OTHERS}

    audio, lengths = recordings(name)
    path = copy_with(name, tmp_path / "characters.nemo", change)
    texts = slm.models.ASRModel.from_pretrained(path, decoder=decoder).transcribe(audio, lengths)
    found = labels_of(name, decoder, audio, lengths)
    expected = ["".join(CHARACTERS[i] for i in labels).replace(" .", ".") for labels in found]
    assert texts == expected and any(expected)


def test_word_pieces_are_joined_as_bert_joins_them(tmp_path):
    from transformers import BertTokenizer

    pieces = ["[UNK]", *(f"##{c}" for c in "abcdefghijklmnopqrs"), *"abcdefghijklmnopqrs", "."]
    words = "".join(f"{piece}\n" for piece in pieces)
    (tmp_path / "vocab.txt").write_text(words)
    tokenizer = {"type": "wpe", "dir": "x", "vocab_path": "nemo:1_vocab.txt"}
    path = copy_with(
        "tdt",
        tmp_path / "words.nemo",
        lambda c: {**c, "tokenizer": tokenizer},
        {"1_vocab.txt": words.encode()},
    )
    audio, lengths = recordings("tdt")
    texts = slm.models.ASRModel.from_pretrained(path).transcribe(audio, lengths)
    bert = BertTokenizer(str(tmp_path / "vocab.txt"))
    subwords = [[pieces[i] for i in row] for row in labels_of("tdt", None, audio, lengths)]
    assert texts == [bert.convert_tokens_to_string(row) for row in subwords]
    assert any("##" in piece for row in subwords for piece in row)


def test_fewer_labels_per_frame_as_asked(tmp_path):
    asked = {"greedy": {"max_symbols": 1}}
    audio, lengths = recordings("rnnt")
    expected = HYPOTHESES["rnnt"]["decoding"]["max1"]["hyps"][1]["text"]
    model = slm.models.ASRModel.from_pretrained(ASR / "rnnt.nemo", decoding=asked)
    assert model.transcribe(audio[1:2], lengths[1:2]) == [expected]
    older = copy_with(
        "rnnt",
        tmp_path / "older.nemo",
        lambda c: {**c, "decoding": {"strategy": "greedy", "greedy": {"max_symbols_per_step": 1}}},
    )
    assert slm.models.ASRModel.from_pretrained(older)._limits["max_symbols"] == 1


def test_what_only_training_reads_is_accepted_and_reported(tmp_path):
    def change(config):
        config = json.loads(json.dumps(config))
        config["preprocessor"]["nb_augmentation_prob"] = 0.2
        config["encoder"]["stochastic_depth_drop_prob"] = 0.1
        if "joint" in config:
            config["joint"]["jointnet"]["dropout"] = None
        return config

    audio, lengths = recordings("rnnt")
    path = copy_with("rnnt", tmp_path / "trained.nemo", change)
    with ignored_report() as report:
        texts = slm.models.ASRModel.from_pretrained(path).transcribe(audio, lengths)
    assert texts == HYPOTHESES["rnnt"]["transcribe"]
    keys = ("model.encoder.stochastic_depth_drop_prob", "model.preprocessor.nb_augmentation_prob")
    assert all("only read in training" in report[key] for key in keys)
    with ignored_report() as report:
        slm.models.ASRModel.from_pretrained(ASR / "rnnt.nemo")
    assert not report.keys() & set(keys)  # there they are 0
    trainable = slm.models.CTCModel.from_pretrained(copy_with("ctc", tmp_path / "c.nemo", change))
    assert trainable.has_variables


@pytest.mark.parametrize(
    ("name", "change", "options", "message"),
    [
        ("rnnt", {}, {"decoder": "ctc"}, "EncDecRNNTBPEModel has only rnnt"),
        ("ctc", {"target": "x.EncDecMultiTaskModel"}, {}, "class EncDecMultiTaskModel; no class"),
        ("rnnt", {}, {"decoding": {"strategy": "beam"}}, "strategy='beam'.*greedy_batch"),
        ("rnnt", {}, {"decoding": {"big_blank_durations": [2]}}, "big_blank_durations"),
        ("rnnt", {}, {"decoding": {"greedy": {"max_symbols": -1}}}, "max_symbols=-1"),
        ("ctc", {"tokenizer": {"type": "agg", "langs": {}}}, {}, "no SentencePiece"),
        ("ctc", {"tokenizer": {"type": "wpe", "vocab_path": None}}, {}, "no file of word pieces"),
        (
            "rnnt",
            {"target": "EncDecRNNTModel", "labels": None, "joint": None},
            {},
            "lists no labels",
        ),
    ],
)
def test_what_is_not_done_is_refused_by_name(name, change, options, message, tmp_path):
    path = ASR / f"{name}.nemo"
    if change:
        path = copy_with(name, tmp_path / "changed.nemo", lambda c: {**c, **change})
    with pytest.raises(SettingsError, match=message):
        slm.models.ASRModel.from_pretrained(path, **options)


def test_the_strategy_greedy_is_that_of_nemo_for_tdt():
    runs, (audio, lengths) = HYPOTHESES["tdt"]["decoding"], recordings("tdt")
    long = lengths >= 16000  # or silence would be put around it
    found = {}
    for strategy, run in (("greedy", "greedy_single_max1"), ("greedy_batch", "max1")):
        asked = {"strategy": strategy, "greedy": {"max_symbols": 1}}
        model = slm.models.ASRModel.from_pretrained(ASR / "tdt.nemo", decoding=asked)
        found[strategy] = model.transcribe(audio[long], lengths[long])
        texts = [hypothesis["text"] for hypothesis in runs[run]["hyps"]]
        assert found[strategy] == [t for t, is_long in zip(texts, long, strict=True) if is_long]
    assert found["greedy"] != found["greedy_batch"]
