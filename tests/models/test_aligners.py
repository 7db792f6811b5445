"""Which ASR model aligns: named ones, a SALM's own CTC head, and the default of the hub."""

import json
import logging
from pathlib import Path

import pytest

from speechlm2_jax.inference.timestamps import DEFAULT_ALIGNER
from speechlm2_jax.inference.timestamps.ctc_aligner import CtcAligner
from speechlm2_jax.inference.timestamps.transducer_aligner import TransducerAligner
from speechlm2_jax.models.aligners import open_aligner, usual_aligner
from speechlm2_jax.settings import SettingsError

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ctc", CtcAligner), ("hybrid_streaming", CtcAligner), ("tdt", TransducerAligner)],
)
def test_a_ctc_head_is_taken_where_there_is_one(name, kind):
    found = open_aligner(DATA / "asr" / f"{name}.nemo")
    assert isinstance(found, kind) and found.sampling_rate == 16000
    assert found.frame_s == pytest.approx(found.frame_samples / 16000)


def test_other_models_are_refused_by_name():
    with pytest.raises(SettingsError, match=r"--aligner: .*hf is a full-duplex model; open it"):
        open_aligner(DATA / "duplex" / "duplex_s2s" / "hf", key="--aligner")
    with pytest.raises(SettingsError, match=r"aligner: no such file or directory: 'no\.nemo'"):
        open_aligner("no.nemo")


def test_a_salm_takes_the_head_of_its_encoder(tmp_path):
    assert isinstance(usual_aligner("parts/tiny_encoder.nemo"), CtcAligner)
    (tmp_path / "own.nemo").symlink_to(DATA / "asr" / "ctc.nemo")
    assert isinstance(usual_aligner("own.nemo", (tmp_path,)), CtcAligner)


def test_a_named_salm_is_the_head_of_its_encoder(tmp_path):
    config = json.loads((DATA / "salm" / "llama_adapter_hf" / "config.json").read_text())
    for asr_name in ("ctc.nemo", "tdt.nemo"):
        (tmp_path / asr_name).symlink_to(DATA / "asr" / asr_name)
        (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_asr": asr_name}))
        if asr_name == "ctc.nemo":  # the weights of the SALM are not read: there are none
            assert isinstance(open_aligner(tmp_path), CtcAligner)
            continue
        with pytest.raises(SettingsError, match=r"is a SALM, and its .* \(tdt\.nemo\) .* no CTC"):
            open_aligner(tmp_path)


def test_a_bundled_aligner_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_aligner("configs/parts/tiny_encoder.nemo"), CtcAligner)


@pytest.mark.parametrize("asr_name", [None, "nvidia/canary-1b-flash", str(DATA / "asr/tdt.nemo")])
def test_without_a_head_and_a_network_there_is_one_warning(asr_name, caplog):
    caplog.set_level(logging.INFO, logger="speechlm2_jax")
    assert usual_aligner(asr_name) is None
    told = [record for record in caplog.records if DEFAULT_ALIGNER in record.getMessage()]
    assert [record.levelname for record in told] == ["INFO", "WARNING"]
    assert "no word times" in told[1].getMessage()
