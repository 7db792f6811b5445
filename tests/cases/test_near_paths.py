"""Paths that are nearly right get the right one."""

import pytest

import evaluate
import speechlm2_jax as slm
from speechlm2_jax.pretrained.near_paths import nearest_path
from speechlm2_jax.settings import SettingsError


def test_a_misspelt_part_of_a_path_is_named(tmp_path, monkeypatch):
    (tmp_path / "runs" / "salm" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert nearest_path("runs/slam") == "runs/salm"
    assert nearest_path("run/salm/checkpoints") == "runs/salm/checkpoints"
    assert nearest_path(f"{tmp_path}/runs/slam") == f"{tmp_path}/runs/salm"
    assert nearest_path("runs/whisper") is None and nearest_path("runs/salm") is None
    for name in ("runs/slam", "./runs/slam"):
        with pytest.raises(SettingsError, match="did you mean 'runs/salm'"):
            slm.models.SALM.from_pretrained(name)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretrained_name=runs/slam"],
         "pretrained_name: no such run: 'runs/slam'; did you mean 'runs/salm'?"),
        (["pretrained_name=m", "inputs=corpus/tset.jsonl"],
         "inputs: no such file or folder: 'corpus/tset.jsonl'; did you mean 'corpus/test.jsonl'?"),
    ],
)  # fmt: skip
def test_evaluate_names_the_nearest_run_and_input(
    arguments, expected, tmp_path, monkeypatch, capsys
):
    (tmp_path / "runs" / "salm" / "checkpoints").mkdir(parents=True)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "test.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(arguments) == 2
    assert capsys.readouterr().err == f"evaluate.py: {expected}\n"
