"""Tests that CONTRIBUTING.md runs on the JAX stack alone import nothing else."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_THERE = {"torch", "lhotse", "grain", "soundfile", "av", "jiwer", "sacrebleu", "tensorboardX"}


def folders():
    """What the command of CONTRIBUTING.md tests."""
    command = re.search(r"pytest (tests/layers .*)", (ROOT / "CONTRIBUTING.md").read_text())
    assert command is not None
    return [ROOT / folder for folder in command[1].split()]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        yield from (name.partition(".")[0] for name in names)


def test_tests_of_the_model_half_need_the_jax_stack_alone():
    paths = [path for folder in folders() for path in folder.rglob("*.py")]
    assert all(folder.is_dir() for folder in folders()) and len(paths) >= 30
    needed = {path.name: sorted(NOT_THERE & set(imported(path))) for path in paths}
    assert {name: found for name, found in needed.items() if found} == {}
