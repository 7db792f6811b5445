"""--help of every program prints its usage, imports nothing slow and starts nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("tools", "benchmarks", "docs", "speechlm2_jax")
SLOW = ("jax", "numpy", "torch", "transformers", "lhotse", "soundfile", "tokenizers", "orbax")


def programs():
    """The files that can be run."""
    found = [ROOT / f"{name}.py" for name in ("train", "evaluate", "convert")]
    for folder in FOLDERS:
        found += sorted((ROOT / folder).rglob("*.py"))
    return [path for path in found if is_program(path)]


def is_program(path):
    tree = ast.parse(path.read_text())
    tests = [node.test for node in tree.body if isinstance(node, ast.If)]
    return any("__name__ == '__main__'" in ast.unparse(test) for test in tests)


def command(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_script = len(parts) == 1 or parts[0] == "docs" or parts[1] in ("corpus", "peers")
    if is_script:
        return [str(path)]
    return ["-m", ".".join(parts).removesuffix(".__main__")]


def check_help(path, folder, flag):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command(path), flag],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    name = path.relative_to(ROOT)
    assert done.returncode == 0, f"{name}: {done.stderr[-400:]}"
    assert "usage" in done.stdout.lower(), name
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & set(SLOW), f"{name} imports {imported & set(SLOW)}"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["train.py", "evaluate.py", "convert.py", "tools/make_tiny_llm.py"]
)
def test_help_is_usage_alone(name, tmp_path):
    check_help(ROOT / name, tmp_path, "-h")


@pytest.mark.slow  # a process for each
def test_help_of_every_program_is_usage_alone(tmp_path):
    paths = programs()
    assert len(paths) > 20
    for path in paths:
        check_help(path, tmp_path, "--help")


def test_every_program_prints_its_help_before_its_imports():
    """The check for --help, or imports of the standard library alone, come first."""
    for path in programs():
        body = ast.parse(path.read_text()).body
        blocks = ast.If | ast.FunctionDef | ast.ClassDef
        first = next(i for i, node in enumerate(body) if isinstance(node, blocks))
        is_first = "print_help_if_asked" in ast.unparse(body[first])
        imports = [n for n in body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {getattr(n, "module", None) or n.names[0].name for n in imports}
        assert is_first or not {name.partition(".")[0] for name in names} & set(SLOW), path


def test_help_lists_the_options_and_keys():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.salm", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "--batch" in done.stdout and "audio per row (default: 4.0)" in done.stdout
    done = subprocess.run(
        [sys.executable, "evaluate.py", "-h"], cwd=ROOT, capture_output=True, text=True
    )
    keys = done.stdout.partition("keys: ")[2]
    assert "pretrained_name" in keys and "what they mean: docs/evaluation.md\n" in keys
