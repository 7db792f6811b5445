"""Every name that code reads is bound somewhere in its file.

Linters cannot tell: jaxtyping's shapes are texts in annotations, which they take for names.
"""

import ast
import builtins
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("speechlm2_jax", "benchmarks", "tools", "tests")
ALWAYS = {*dir(builtins), "__file__"}


def bound(tree):
    """Names that a file binds anywhere, whatever the scope."""
    for node in ast.walk(tree):
        match node:
            case ast.Import() | ast.ImportFrom():
                yield from ((a.asname or a.name).partition(".")[0] for a in node.names)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Name(ctx=ast.Store() | ast.Del()):
                yield node.id
            case ast.arg():
                yield node.arg
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                yield name
            case ast.MatchStar(name=str(name)):
                yield name


def test_every_name_is_bound():
    undefined = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            known = ALWAYS | set(bound(tree))
            undefined += [
                f"{path.relative_to(ROOT)}:{node.lineno}: {node.id}"
                for node in ast.walk(tree)
                if isinstance(node, ast.Name) and node.id not in known
            ]
    assert not undefined
