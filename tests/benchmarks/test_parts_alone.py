"""Benchmarks of the parts: perception, the loader, fresh processes."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import loader, startup
from benchmarks.perception import PerceptionWork
from benchmarks.presets import PRESETS


def test_perception_is_timed_on_real_work():
    preset = replace(
        PRESETS["tiny"], encoder_layers=1, encoder_width=16, encoder_heads=2, mel_bins=8
    )
    results = {
        name: call() for name, call in PerceptionWork(preset, 2, 0.4, "float32").calls().items()
    }
    assert results["mel"].lengths.tolist() == [40, 40]
    assert results["encoder"].shape == (2, 6, 16)  # the padded frames over 8
    trained = [g for g in results["gradient"].values() if g.dtype == np.float32]
    assert trained and all(np.isfinite(g).all() for g in trained)
    assert any(np.abs(g).max() > 0 for g in trained)


def test_the_loader_alone_gives_a_run_its_batches(monkeypatch, capsys):
    asked = ["loader", "--config", "salm", "--batches", "2", "data.train_ds.batch_size=4"]
    monkeypatch.setattr(sys, "argv", asked)
    loader.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["rows_of_first_batch"] == 4 and result["rows_per_s"] > 0


def test_a_process_is_timed_until_it_prints_the_awaited_line(tmp_path):
    code = "import time; print('noise'); print('done at last', flush=True); time.sleep(60)"
    assert 0 < startup._seconds([sys.executable, "-c", code], "done", tmp_path) < 30
    with pytest.raises(SystemExit, match="noise"):
        startup._seconds([sys.executable, "-c", "print('noise')"], "done", tmp_path)
