"""The pages tell the truth: their code compiles and runs, their commands and places exist.

A block that the tests cannot run has a reason: ```bash no-test: needs an accelerator.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from speechlm2_jax import cli, settings
from speechlm2_jax.settings import SettingsError

ROOT = Path(__file__).parents[1]
PAGES = (
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "corpus/README.md",
    ROOT / "tests/data/README.md",
)
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "no-test: "
RUN_ELSEWHERE = {"docs/conversion.md": "test_convert.py", "docs/data.md": "test_data_page.py"}
"""Pages whose python blocks another test runs, from the folder that they are written for."""
OF_SETTINGS = "speechlm2_jax/settings/command_line.py"
SOURCES_OF_OPTIONS = {
    "train.py": (OF_SETTINGS,),
    "evaluate.py": (
        "speechlm2_jax/evaluation/arguments.py",
        "speechlm2_jax/evaluation/compare.py",
        OF_SETTINGS,
    ),
    "convert.py": ("speechlm2_jax/commands/convert.py",),
}
SCRIPTS = ("train", "evaluate", "convert")
"""Commands of `speechlm2-jax` that are also scripts of the clone."""
KEYS_OF_EVALUATION = ("evaluation/config.py", "evaluation/duplex/config.py")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    number: int
    info: str
    text: str

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]

    @property
    def is_marked(self) -> bool:
        return self.info.partition(" ")[2].startswith(MARK)

    def __str__(self) -> str:
        return f"{self.page}, block {self.number}"


@cache
def blocks() -> tuple[Block, ...]:
    found = []
    for path in PAGES:
        page = path.relative_to(ROOT).as_posix()
        for number, (info, text) in enumerate(FENCE.findall(path.read_text(encoding="utf-8")), 1):
            found.append(Block(page, number, info.strip(), text))
    return tuple(found)


def commands(block: Block) -> list[list[str]]:
    """The arguments of each call of python in a block, from the program's name on."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # no command
                continue
            while words and ("=" in words[0] or words[0] == "srun"):
                words = words[1:]
            if words and words[0] == "python":
                found.append(words[1:])
            elif words and words[0] == cli.PROGRAM:
                found.append(["-m", "speechlm2_jax", *words[1:]])
    return found


def test_python_blocks_compile():
    own = [block for block in blocks() if block.language == "python"]
    assert len(own) > 15
    for block in own:
        compile(block.text, str(block), "exec")


def test_blocks_say_what_they_are():
    for block in blocks():
        assert block.language in ("", "python", "bash", "yaml", "json", "text"), str(block)
        if block.language == "":
            assert not commands(block), f"{block}: its commands need ```bash"
        reason = block.info.partition(MARK)[2]
        assert not block.is_marked or len(reason.split()) > 1, f"{block}: why can it not run?"


def test_pages_that_another_test_runs():
    for page, name in RUN_ELSEWHERE.items():
        (path,) = (ROOT / "tests").rglob(name)
        assert Path(page).name in path.read_text(encoding="utf-8")


@cache
def strings_of(path: Path) -> set[str]:
    """Every text constant of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    return {value for value in constants if isinstance(value, str)}


@cache
def fields_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    fields = [n.target for n in ast.walk(tree) if isinstance(n, ast.AnnAssign)]
    return {target.id for target in fields if isinstance(target, ast.Name)}


def program_of(words: list[str]) -> tuple[Path | None, list[str]]:
    """The file that a command runs and its arguments; None if it is not of this project."""
    if words[:2] == ["-m", "speechlm2_jax"]:
        name, rest = words[2] if words[2:] else "", words[3:]
        listed = {command.name: command for group in cli.COMMANDS.values() for command in group}
        if name in SCRIPTS:
            return ROOT / f"{name}.py", rest
        module = listed[name].function.partition(":")[0] if name in listed else f"no.command.{name}"
        return (ROOT / module.replace(".", "/")).with_suffix(".py"), rest
    if words[0] == "-m":
        name, rest = words[1], words[2:]
        base = ROOT / name.replace(".", "/")
        if not (ROOT / name.partition(".")[0]).is_dir():
            return None, rest
        return (base / "__main__.py" if base.is_dir() else base.with_suffix(".py")), rest
    if not words[0].endswith(".py"):
        return None, words[1:]
    return ROOT / words[0].removeprefix("../../../"), words[1:]


def problems(words: list[str]) -> list[str]:
    """What is wrong with a command."""
    program, arguments = program_of(words)
    inside = [
        n for n, word in enumerate(arguments) if (ROOT / word).is_file() and word[-3:] == ".py"
    ]
    if inside:  # a launcher of another program
        return problems(words[: -len(arguments) + inside[0]]) + problems(arguments[inside[0] :])
    if program is None:
        return []
    if not program.is_file():
        return [f"no program {program}"]
    beside = [program, *program.parent.glob("*.py")] if program.parent != ROOT else [program]
    beside += [ROOT / path for path in SOURCES_OF_OPTIONS.get(program.name, ())]
    known = set().union(*map(strings_of, beside))
    flags = [word.partition("=")[0] for word in arguments if re.match(r"--?[a-zA-Z]", word)]
    found = [f"no option {flag}" for flag in flags if flag not in known]
    if program.name == "train.py":
        found += problems_of_settings(arguments)
    if program.name == "evaluate.py":
        keys = set().union(*(fields_of(ROOT / "speechlm2_jax" / p) for p in KEYS_OF_EVALUATION))
        given = [re.match(r"\+?(\w+)[.=]", word) for word in arguments]
        found += [f"no key {m[1]}" for m in given if m and m[1] not in keys]
    return found


def problems_of_settings(arguments: list[str]) -> list[str]:
    """What `train.py` would say of `--config NAME key=value ...`, if NAME is ours."""
    name = arguments[arguments.index("--config") + 1] if "--config" in arguments else ""
    overrides = [word for word in arguments if re.match(r"\+*\w[\w.]*=", word)]
    try:
        path = settings.find(name, search=(ROOT / "configs",))
    except SettingsError as error:
        is_theirs = not name or name.isupper() or "/" in name or name.endswith(".yaml")
        return [] if is_theirs else [str(error)]
    try:
        settings.load(path, overrides, complete=False)
    except SettingsError as error:
        return [str(error)]
    return []


def test_commands_exist():
    count = 0
    for block in blocks():
        for words in commands(block):
            count += 1
            assert not problems(words), f"{block}: python {shlex.join(words)}: {problems(words)}"
    assert count > 30


def test_a_wrong_command_is_found():
    assert problems(["train.py", "--config", "slam"])
    assert problems(["train.py", "--config", "salm", "trainer.max_step=3"])
    assert problems(["train.py", "--config", "salm", "--dry-rum"])
    assert problems(["evaluate.py", "pretrained=runs/salm"])
    assert problems(["-m", "benchmarks.nothing"])
    assert problems(["-m", "speechlm2_jax", "transcrib"])
    assert problems(["-m", "speechlm2_jax", "inspect", "salm", "--pages", "3"])
    assert not problems(["-m", "speechlm2_jax", "inspect", "salm", "--count", "3"])


def test_places_that_pages_name_exist():
    """`layers/cpu.py` is a file, here or in the package; `layers/cpu.py: NAME` is a name in it."""
    wanted = re.compile(r"`((?:[a-z_]+/)+[a-z_]+\.py)(?:: (\w+))?`")
    for path in PAGES:
        if path.name == "CHANGELOG.md":  # tells of the past
            continue
        for place, name in wanted.findall(path.read_text(encoding="utf-8")):
            files = [f for f in (ROOT / place, ROOT / "speechlm2_jax" / place) if f.is_file()]
            assert files, f"{path.name}: {place} is not there"
            source = files[0].read_text(encoding="utf-8")
            assert not name or re.search(rf"\b(def|class) {name}\b|^{name}\b", source, re.M), (
                f"{path.name}: {place} has no {name}"
            )


def anchors_of(path: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings}


def test_links_between_pages_lead_somewhere():
    for path in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
            if link.startswith("http"):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file) if file else path
            assert target.exists(), f"{path.name}: {link} leads nowhere"
            assert not anchor or anchor in anchors_of(target), (
                f"{path.name}: {link}: no such heading"
            )


def runnable_pages() -> list[str]:
    is_run = [b.page for b in blocks() if b.language == "python" and not b.is_marked]
    return [page for page in dict.fromkeys(is_run) if page not in RUN_ELSEWHERE]


@pytest.mark.slow  # compiles the bundled models
@pytest.mark.parametrize("page", runnable_pages())
def test_python_blocks_run(page, tmp_path, monkeypatch):
    for name in ("configs", "corpus", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks():
        if block.page == page and block.language == "python" and not block.is_marked:
            exec(compile(block.text, str(block), "exec"), names)


@pytest.mark.slow  # each is a process that trains, evaluates or describes
def test_bash_blocks_run(tmp_path):
    for name in ("configs", "corpus", "tests", "train.py", "evaluate.py", "convert.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    own = [b for b in blocks() if b.language == "bash" and not b.is_marked]
    for block in own:
        if block.page in RUN_ELSEWHERE:
            continue
        for words in commands(block):
            command = [sys.executable, *words]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
            assert done.returncode == 0, f"{block}: {done.stderr.decode()[-800:]}"
