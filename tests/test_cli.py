"""`speechlm2-jax`: help at once, commands from a table, and what `pip install` puts beside them."""

import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from speechlm2_jax import bundled, cli, settings
from speechlm2_jax.commands import convert, train
from speechlm2_jax.data import plan
from speechlm2_jax.data.paths import plain_path
from tests.cases.test_help import SLOW

ROOT = Path(__file__).parents[1]
NAMES = [command.name for group in cli.COMMANDS.values() for command in group]


def test_help_lists_every_command_with_an_example(capsys):
    for argv in ([], ["--help"], ["help"]):
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {name} " in out and f"$ speechlm2-jax {name}" in out for name in NAMES)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("speechlm2-jax ")


def test_an_unknown_command_is_one_line(capsys):
    assert cli.main(["evalute"]) == 2
    assert capsys.readouterr().err == (
        "speechlm2-jax: no command 'evalute'; did you mean 'evaluate'?\n"
    )
    assert cli.main(["?"]) == 2
    assert capsys.readouterr().err.endswith(f"there are: {', '.join(NAMES)}\n")


def test_every_command_of_the_table_exists():
    for group in cli.COMMANDS.values():
        for command in group:
            module, _, name = command.function.partition(":")
            assert callable(getattr(importlib.import_module(module), name))


NOT_BEFORE_A_MODEL = ("jax", "orbax.checkpoint", "torch", "transformers", "lhotse", "scipy.signal")
AFTER_HELP = {
    "transcribe": "import speechlm2_jax.transcription.run, speechlm2_jax.transcription.outputs\n"
    "try: cli.main(['transcribe', 'a.wav'])\n"
    "except SystemExit as end: assert end.code == 2  # there is no model\n"
    f"print('imported then:', set({NOT_BEFORE_A_MODEL}) & set(sys.modules))"
}
"""Command -> what runs in the process of its help: all of the command but its model."""


@pytest.mark.parametrize("name", ["", *NAMES])
def test_help_imports_nothing_slow(name, tmp_path):
    code = (
        "import sys, speechlm2_jax.cli as cli\n"
        f"try: cli.main([*{[name] if name else []}, '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        f"print('imported:', set({SLOW}) & set(sys.modules))\n" + AFTER_HELP.get(name, "")
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"usage: speechlm2-jax {name}".rstrip() in done.stdout
    found = [line for line in done.stdout.splitlines() if line.startswith("imported")]
    assert found == ["imported: set()", *["imported then: set()"] * (name in AFTER_HELP)]
    assert list(tmp_path.iterdir()) == []


def test_messages_name_the_command(capsys):
    assert convert.main(["nowhere.ckpt", "--inspect"], program="speechlm2-jax convert") == 2
    assert capsys.readouterr().err.startswith("speechlm2-jax convert: nowhere.ckpt")
    with pytest.raises(SystemExit, match="2"):
        train.main(["--config", "slam"], program="speechlm2-jax train")
    line = capsys.readouterr().err
    assert line.startswith("speechlm2-jax train: ") and "did you mean 'salm'?" in line
    with pytest.raises(SystemExit, match="2"):
        plan.main(["slam"], program="speechlm2-jax plan")
    assert capsys.readouterr().err.startswith("speechlm2-jax plan: ")


@pytest.mark.parametrize("name", ["evaluate", "plan", "convert"])
def test_the_help_of_a_command_names_no_script_of_a_clone(name, capsys):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    out = capsys.readouterr().out
    assert f"speechlm2-jax {name}" in out
    assert not [line for line in out.splitlines() if "python " in line and ".py" in line]


def test_bundled_files_are_found_from_any_folder(tmp_path, monkeypatch):
    assert bundled.page("generation.md") == "docs/generation.md"
    monkeypatch.chdir(tmp_path)
    assert Path(bundled.page("generation.md")).is_file()
    assert plain_path("corpus/train.jsonl") == str(bundled.ROOT / "corpus/train.jsonl")
    assert settings.find("salm") == bundled.CONFIGS / "salm.yaml"
    assert plain_path("corpus/nothing.jsonl") == "corpus/nothing.jsonl"
    Path("corpus").mkdir()
    Path("corpus/train.jsonl").touch()
    assert plain_path("corpus/train.jsonl") == "corpus/train.jsonl"


@pytest.mark.slow  # builds the wheel
def test_the_wheel_has_everything_that_the_configs_name(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    empty = tmp_path / "empty"
    empty.mkdir()
    for config in ("salm", "s2s_duplex"):
        done = subprocess.run(
            [sys.executable, "-m", "speechlm2_jax", "train", "--config", config, "--dry-run"],
            cwd=empty,
            env={**os.environ, "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "batch" in done.stdout, done.stderr[-800:]
