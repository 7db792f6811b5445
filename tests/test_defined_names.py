"""Every name that code reads is bound somewhere in its file.

Linters cannot tell: jaxtyping's shapes are texts in annotations, which they take for names.
"""

import ast
import builtins
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("speechlm2_jax", "benchmarks", "tools", "tests")
ALWAYS = {*dir(builtins), "__file__"}
NAMED = {
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef),
    *(ast.ExceptHandler, ast.MatchAs, ast.MatchStar),
}
"""Nodes that bind their `name`."""


def undefined(tree):
    """Names that a file reads and binds nowhere, whatever the scope. One pass: files are many."""
    bound, read = set(ALWAYS), []
    for node in ast.walk(tree):
        kind = type(node)
        if kind is ast.Name:
            if type(node.ctx) is ast.Load:
                read.append(node)
            else:
                bound.add(node.id)
        elif kind is ast.arg:
            bound.add(node.arg)
        elif kind is ast.Import or kind is ast.ImportFrom:
            bound |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        elif kind in NAMED:
            bound.add(node.name)
    return [node for node in read if node.id not in bound]


def test_every_name_is_bound():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.id}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in undefined(ast.parse(path.read_text()))
    ]
    assert not found


def test_a_name_that_nothing_binds_is_found():
    text = """
import a.b as c
def f(x, *y):
    try:
        z = c
    except E as e:
        g(z, e, x, y)
"""
    assert [node.id for node in undefined(ast.parse(text))] == ["E", "g"]
