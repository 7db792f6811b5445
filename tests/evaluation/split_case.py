"""An evaluation of a SALM or a duplex model, run by any number of processes and devices."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from tests.evaluation.test_evaluate_duplex import DATA, ROLES, write_cuts

ROOT = Path(__file__).parents[2]
SALM = ROOT / "tests" / "data" / "salm"
KINDS = ("salm", "duplex")
EQUAL_NEARLY = {"audio": None, "nll": None}
CONVERSATIONS = ("multiturn", "bargein", "beyond")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is evaluated."""

    files: Path
    """Where its inputs are."""
    folder: Path
    """The working folder: the tiny duplex models name their components relative to it."""
    arguments: tuple[str, ...]
    plain_batches: tuple[str, ...] = ()
    inputs: int
    counted: str
    """The total that counts the inputs."""

    @staticmethod
    def make(kind: str, folder: Path) -> "Case":
        """Writes the inputs of a kind of model."""
        return _salm(folder) if kind == "salm" else _duplex(folder)

    def command(self, output: Path, processes: int, *more: str) -> list[str]:
        """evaluate.py, writing to a folder."""
        launch = ["-m", "speechlm2_jax.launch", "-n", str(processes)] if processes > 1 else []
        own = [a.format(output=output) for a in self.arguments]
        script = str(ROOT / "evaluate.py")
        return [sys.executable, *launch, script, *own, "batch_size=1", "dtype=float32",
                "verbose=false", f"output_manifest={output / 'out.jsonl'}", *more]  # fmt: skip

    def environment(self, devices: int = 1) -> dict[str, str]:
        """Of a process with some CPU devices; every run of a case shares its programs."""
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(self.files / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    @cached_property
    def expected(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows and totals of one process with one device."""
        (output := self.files / "one").mkdir()
        rows, totals, _ = self.run(output, 1)
        assert len({row.get("pred_text_raw", row["pred_text"]) for row in rows}) > 1
        return rows, totals

    def run(
        self, output: Path, processes: int, *more: str, devices: int = 1
    ) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
        """Runs evaluate.py: its rows, its totals, and what it printed."""
        done = subprocess.run(
            self.command(output, processes, *more),
            cwd=self.folder,
            env=self.environment(devices),
            capture_output=True,
            text=True,
            timeout=3600,  # tensor parallelism over processes waits for the slowest at each layer
        )
        assert done.returncode == 0, done.stderr
        manifest = output / "out.jsonl"
        *rows, last = [json.loads(line) for line in manifest.read_text().splitlines()]
        assert not list(output.glob("out.jsonl.*")), "nothing is left beside the manifest"
        totals = last["provenance"]["totals"]
        assert totals[self.counted] == self.inputs
        return rows, totals, done.stdout

    def check(self, output: Path, processes: int, *more: str, devices: int = 1) -> str:
        """Asserts that rows, speech and scores are those of one device; what was printed."""
        expected, expected_totals = self.expected
        rows, totals, printed = self.run(output, processes, *more, devices=devices)
        assert totals.get("scores") == expected_totals.get("scores")
        for row, one in zip(rows, expected, strict=True):
            speech = row.get("audio")
            assert row.keys() == one.keys()
            assert row.get("nll", 0) == pytest.approx(one.get("nll", 0), rel=1e-5)
            assert {**row, **EQUAL_NEARLY} == {**one, **EQUAL_NEARLY}
            assert (speech is None) == ("audio" not in one)
            if speech is not None:
                found, wanted = soundfile.read(speech)[0], soundfile.read(one["audio"])[0]
                np.testing.assert_allclose(found, wanted, atol=1e-4)
                assert Path(speech).relative_to(output).parts == _place(one, self.files / "one")
        return printed


def _place(row: dict[str, Any], folder: Path) -> tuple[str, ...]:
    return Path(row["audio"]).relative_to(folder).parts


def _salm(folder: Path) -> Case:
    """Thirteen recordings, and one that is missing."""
    wave = soundfile.read(SALM / "audio" / "a0.wav", dtype="float32")[0]
    rows = []
    for n in range(13):
        samples = np.roll(wave, 997 * n)[: 7300 - 300 * n]
        soundfile.write(folder / f"{n}.wav", samples, 16_000)
        rows.append({"audio_filepath": f"{n}.wav", "duration": len(samples) / 16_000, "text": "a"})
    rows.append({"audio_filepath": "missing.wav", "duration": 0.3, "text": "b"})
    path = folder / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = f"pretrained_name={SALM / 'llama_adapter_hf'}"
    return Case(
        files=folder,
        folder=ROOT,
        arguments=(model, f"inputs={path}", "max_new_tokens=8", "metrics=[wer,perplexity]"),
        plain_batches=("continuous_batching=false",),
        inputs=14,
        counted="utterances",
    )


def _duplex(folder: Path) -> Case:
    """Two sets of three conversations, each with one more whose user cannot be read."""
    sets = [str(write_cuts(folder / f"{name}.jsonl", CONVERSATIONS)) for name in ("one", "two")]
    return Case(
        files=folder,
        folder=DATA,
        arguments=(
            f"pretrained_name={DATA / 'duplex_s2s' / 'hf'}",
            f"inputs=[{','.join(sets)}]",
            "audio_folder={output}/speech",
            "report={output}/report.html",
            f"scoring_asr={DATA / 'assets' / 'asr_scoring.nemo'}",
            *ROLES,
        ),
        inputs=8,
        counted="conversations",
    )
