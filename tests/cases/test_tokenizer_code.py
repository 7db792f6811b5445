"""Code that lies beside a tokenizer never runs, and nobody is asked whether it may."""

import ast
import builtins
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from speechlm2_jax.data.tokenizer import Tokenizer, TokenizerError

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    *ROOT.glob("*.py"),
    *(
        path
        for folder in ("speechlm2_jax", "tools", "corpus", "benchmarks", "docs")
        for path in (ROOT / folder).rglob("*.py")
    ),
]
LOADERS = ("from_pretrained", "from_config", "pipeline")
SWITCH = "trust_remote_code"


def calls_without_the_switch(text: str) -> Iterator[int]:
    """Lines that let a class of transformers load something without `trust_remote_code=False`."""
    tree = ast.parse(text)
    names = {"transformers"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
            names |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {
                a.asname for a in node.names if a.asname and a.name.startswith("transformers")
            }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        *_, root = [n.id for n in ast.walk(node.func) if isinstance(n, ast.Name)] or [""]
        called = node.func.attr if isinstance(node.func, ast.Attribute) else root
        switches = [k.value for k in node.keywords if k.arg == SWITCH]
        is_off = [isinstance(v, ast.Constant) and v.value is False for v in switches]
        if not all(is_off) or (root in names and called in LOADERS and not is_off):
            yield node.lineno


@pytest.mark.parametrize(
    "text",
    [
        "from transformers import AutoTokenizer\nAutoTokenizer.from_pretrained('x')",
        "def f():\n    from transformers import AutoConfig as C\n    C.from_pretrained('x')",
        "import transformers\ntransformers.AutoModel.from_config(c)",
        "import transformers as tr\ntr.pipeline('asr')",
        "Reader.from_pretrained('x', trust_remote_code=True)",
        "Reader.from_pretrained('x', trust_remote_code=asked)",
    ],
)
def test_a_call_that_would_ask_is_found(text):
    assert list(calls_without_the_switch(text))


def test_no_call_into_transformers_runs_code_of_a_directory():
    assert any("from_pretrained(" in path.read_text() for path in SOURCES)
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        for line in calls_without_the_switch(path.read_text())
    ]
    assert not found, f"{SWITCH}=False is missing at {', '.join(found)}"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "tests/data/llm/llama", tmp_path / "llama"))


def changed(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch):
    def ask(*_: object) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(builtins, "input", ask)


@pytest.mark.parametrize(
    "auto_map",
    [
        {"AutoTokenizer": ["odd.Odd", "odd.Odd"]},
        {"AutoTokenizer": ["odd.Odd", None]},
        ["odd.Odd", None],
    ],
)
def test_own_class_is_refused_in_one_line_with_the_remedy(llama, auto_map):
    mark = llama / "ran"
    (llama / "odd.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Odd: pass\n")
    changed(llama / "tokenizer_config.json", tokenizer_class="Odd", auto_map=auto_map)
    with pytest.raises(TokenizerError, match=r"odd\.Odd.*never run.*remove auto_map") as error:
        Tokenizer(llama)
    assert "\n" not in str(error.value) and not mark.exists()


def test_own_class_of_the_model_does_not_run_either(llama):
    mark = llama / "ran"
    (llama / "odd.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Odd: pass\n")
    changed(llama / "config.json", model_type="odd", auto_map={"AutoConfig": "odd.Odd"})
    plain = Tokenizer(ROOT / "tests/data/llm/llama").text_to_ids("plain words")
    assert Tokenizer(llama).text_to_ids("plain words") == plain
    assert not mark.exists()


@pytest.mark.parametrize("auto_map", [5, "odd.Odd", {"AutoTokenizer": 7}, []])
def test_a_malformed_auto_map_is_the_projects_own_error_or_means_nothing(llama, auto_map):
    changed(llama / "tokenizer_config.json", tokenizer_class="Odd", auto_map=auto_map)
    try:
        assert len(Tokenizer(llama)) > 0
    except TokenizerError as error:
        assert "\n" not in str(error)


def test_a_directory_that_transformers_knows_needs_none_of_its_own_code(llama):
    changed(
        llama / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        auto_map={"AutoTokenizer": [None, "odd.Odd"]},
    )
    assert Tokenizer(llama).text_to_ids("plain words")


def test_a_file_of_an_unknown_kind_is_the_projects_own_error(llama):
    changed(llama / "tokenizer.json", model={"type": "Unheard"})
    with pytest.raises(TokenizerError, match="llama"):
        Tokenizer(llama)
