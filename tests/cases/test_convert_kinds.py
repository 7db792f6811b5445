"""convert.py writes what the library's own `save_pretrained` writes, whatever the model's class."""

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import speechlm2_jax as slm
from convert import main
from speechlm2_jax.conversion.casting import DTYPES, cast
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers import open_weights
from tests.parity.duplex_golden import hf

DATA = Path(__file__).resolve().parents[1] / "data"
SPEECH = [
    ("salm", "llama_adapter_hf", "SALM"),
    ("salm", "qwen3_lora.ckpt", "SALM"),
    ("duplex", "duplex_s2s/hf", "DuplexS2SModel"),
    ("duplex", "duplex_s2s/step2_weights_only.ckpt", "DuplexS2SModel"),
    ("duplex", "duplex_s2s_speech_decoder/hf", "DuplexS2SSpeechDecoderModel"),
]

QUICK = "--no-self-test"  # tests/conversion/test_self_test.py has it


def tensors(path: Path) -> dict[str, np.ndarray]:
    source = open_weights(path)
    return {name: source.read(name) for name in source.infos}


@pytest.mark.parametrize(("folder", "source", "name"), SPEECH)
def test_a_speech_model_is_written_as_the_library_writes_it(
    folder, source, name, tmp_path, monkeypatch
):
    monkeypatch.chdir(DATA / folder)
    if name == "DuplexS2SSpeechDecoderModel":
        source = str(hf("duplex_s2s_speech_decoder"))
    getattr(slm.models, name).from_pretrained(source).save_pretrained(tmp_path / "library")
    assert main([source, str(tmp_path / "script"), QUICK]) == 0
    written = sorted(p.relative_to(tmp_path / "library") for p in (tmp_path / "library").rglob("*"))
    assert written
    for part in written:
        ours, theirs = tmp_path / "script" / part, tmp_path / "library" / part
        assert ours.is_dir() or ours.read_bytes() == theirs.read_bytes(), part


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "path", ["salm/qwen3_lora.ckpt", "duplex/duplex_s2s/hf", "asr/ctc.nemo", "llm/llama"]
)
def test_every_floating_tensor_is_written_in_the_dtype(path, dtype, tmp_path, monkeypatch):
    folder, _, source = path.partition("/")
    monkeypatch.chdir(DATA / folder)
    assert main([source, str(tmp_path / "plain"), QUICK]) == 0
    assert main([source, str(tmp_path / "cast"), "--dtype", dtype, QUICK]) == 0
    plain, made = tensors(tmp_path / "plain"), tensors(tmp_path / "cast")
    assert plain.keys() == made.keys()
    for name, value in plain.items():
        is_float = value.dtype.kind not in "biu"
        assert made[name].dtype == (DTYPES[dtype] if is_float else value.dtype), name
        np.testing.assert_array_equal(made[name], value.astype(made[name].dtype), err_msg=name)


def test_a_duplex_model_in_bfloat16_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(DATA / "duplex")
    assert main(["duplex_s2s/hf", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    model = slm.models.DuplexS2SModel.from_pretrained(tmp_path / "half")
    floats = [np.asarray(v) for v in model.variables.values()]
    assert any(value.dtype == ml_dtypes.bfloat16 for value in floats)
    result = model.offline_inference(np.zeros((1, 4000), np.float32), np.array([4000]))
    assert np.isfinite(result["audio"]).all()


def test_a_codec_in_bfloat16_loads(tmp_path):
    source = DATA / "codec/lfr22_tiny.nemo"
    assert main([str(source), str(tmp_path / "half.nemo"), "--dtype", "bfloat16"]) == 0
    assert slm.models.AudioCodec.from_pretrained(tmp_path / "half.nemo").variables


def test_a_run_of_a_ctc_model_becomes_a_nemo_file(tmp_path, capsys):
    from speechlm2_jax.checkpointing import Checkpointer, Retention, write_checksums

    model = slm.models.CTCModel.from_pretrained(DATA / "asr/ctc.nemo")
    run = tmp_path / "run"
    checkpointer = Checkpointer(run / "checkpoints", Retention())
    arrays = {"params": dict(model.variables), "buffers": {}, "opt": {}}
    checkpointer.save(1, arrays, progress={"step": 1}, settings=model.settings)
    checkpointer.close()
    model.save_definition(run / "model")
    write_checksums(run / "model", {})
    assert main([str(run), "--inspect"]) == 0
    first, *rows, last = capsys.readouterr().out.splitlines()
    assert first == f"{run}: step 1" and last.startswith(f"{len(model.variables)} tensors, ")
    assert {row.split()[0] for row in rows} == set(model.variables)
    assert main([str(run), str(tmp_path / "folder")]) == 2
    assert "name one" in capsys.readouterr().err
    assert main([str(run), str(tmp_path / "ctc.nemo")]) == 0
    model.save_to(tmp_path / "library.nemo", dtype=None)
    assert (tmp_path / "ctc.nemo").read_bytes() == (tmp_path / "library.nemo").read_bytes()


def test_values_that_a_dtype_cannot_hold_are_refused_by_name(tmp_path, capsys):
    tensor = {"a.weight": np.array([1.0, 1e6, np.inf, np.nan], np.float32)}
    with pytest.raises(ConversionError, match=r"a\.weight.*float16.*1e\+06.*bfloat16"):
        cast(tensor, "float16")
    assert cast(tensor, "bfloat16")["a.weight"].dtype == ml_dtypes.bfloat16
    with pytest.raises(ConversionError, match="float8"):
        cast(tensor, "float8")


def test_an_unknown_dtype_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path), str(tmp_path / "out"), "--dtype", "int4"])
    assert error.value.code == 2
    shutil.rmtree(tmp_path)
