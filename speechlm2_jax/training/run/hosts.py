"""What the processes of a run must share: settings, code, data, and the run directory.

Processes that differ would train on other batches, or wait for each other for ever. So they compare
hashes before the first step, and the run ends with one line that names what differs and where.
With one process these functions do nothing.
"""

import hashlib
import json
import platform
import re
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import speechlm2_jax
from speechlm2_jax import processes
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.protocol import BatchIterator, DataSource, HasFingerprints
from speechlm2_jax.training.run.directory import PACKAGES

FREE = re.compile(
    r"exp_manager\.(explicit_log_dir|exp_dir|name|version|wandb_logger_kwargs)(\..*)?"
    r"|trainer\.(compilation_cache_dir|default_root_dir)|name"
)
"""Settings that may differ: names (the first process chooses for all) and local folders."""
SEEN_S = 20.0
"""How long a network file system may take to show a file that another process has written."""
POLL_S = 0.2
MAX_NAMED = 3
_IS_SHARED = "yes"
_REMEDY = "set exp_manager.explicit_log_dir to a folder"


def check_start(settings: Mapping[str, object]) -> None:
    """Raises SettingsError, on all processes, if their settings or their code differ."""
    if jax.process_count() > 1:
        check_same({**setting_facts(settings), **code_facts()})


def check_data(datamodule: DataSource, batches: BatchIterator) -> None:
    """Raises SettingsError, on all processes, if they plan different data."""
    if jax.process_count() == 1:
        return
    state = batches.get_state()
    marks = state if isinstance(state, Mapping) else {}
    facts = {"training data": _digest([marks.get("data"), marks.get("contents")])}
    if isinstance(datamodule, HasFingerprints):
        facts |= {f"data of {name}": mark for name, mark in datamodule.fingerprints().items()}
    facts["shapes of batches"] = _digest(list(datamodule.training_shapes()))
    check_same(facts)


def check_same(facts: Mapping[str, str]) -> None:
    """Compares facts, by name, over all processes, which all must call it.

    Raises SettingsError, on all of them, naming the facts that differ and the processes.
    """
    digests = processes.gather_texts(_digest(facts))
    if len(set(digests)) == 1:
        return
    own = json.dumps({"host": socket.gethostname(), "facts": dict(facts)})
    raise SettingsError(differences([json.loads(text) for text in processes.gather_texts(own)]))


def differences(found: Sequence[Mapping[str, Any]]) -> str:
    """One line on what differs; `found` has `host` and `facts` of each process, in order."""
    names = dict.fromkeys(name for one in found for name in one["facts"])
    lines: list[str] = []
    for name in names:
        values = [one["facts"].get(name, "not set") for one in found]
        counts = Counter(values)
        if len(counts) == 1:
            continue
        most = max(counts, key=lambda value: (counts[value], value == values[0]))
        others = [index for index, value in enumerate(values) if value != most]
        named = ", ".join(
            f"{values[index]} on process {index} ({found[index]['host']})"
            for index in others[:MAX_NAMED]
        )
        more = f" and {len(others) - MAX_NAMED} more processes" if others[MAX_NAMED:] else ""
        lines.append(f"{name}: {most} on {counts[most]} of {len(found)} processes, {named}{more}")
    more = f"; and {len(lines) - MAX_NAMED} more" if lines[MAX_NAMED:] else ""
    return (
        f"the processes of this run differ in {'; '.join(lines[:MAX_NAMED])}{more}. Start all of "
        "them with the same settings, code and data"
    )


def setting_facts(settings: Mapping[str, object]) -> dict[str, str]:
    """The settings that must be the same everywhere, by dotted key."""
    return {key: text for key, text in _leaves(settings, "") if not FREE.fullmatch(key)}


@cache
def code_facts() -> dict[str, str]:
    """Versions of Python and packages, and a hash of the files of this package."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    digest = hashlib.blake2b(digest_size=8)
    root = Path(speechlm2_jax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    code = f"{speechlm2_jax.__version__} (files {digest.hexdigest()})"
    return {"code of speechlm2_jax": code, **versions}


def check_shared(run_dir: Path, remedy: str = _REMEDY) -> None:
    """Raises SettingsError, on all processes, unless all see what the first writes in `run_dir`.

    `remedy` begins what the message advises.
    """
    if jax.process_count() == 1:
        return
    is_first = jax.process_index() == 0
    name = processes.broadcast_text(f".shared_{uuid.uuid4().hex}" if is_first else "")
    mark = run_dir / name
    if is_first:
        mark.write_text("seen by all processes of a run")
    processes.barrier("run directory marked")
    is_seen = is_first or _appears(mark)
    found = processes.gather_texts(_IS_SHARED if is_seen else socket.gethostname())
    if is_first:
        mark.unlink(missing_ok=True)
    missing = [index for index, one in enumerate(found) if one != _IS_SHARED]
    if missing:
        first = missing[0]
        raise SettingsError(
            f"the run directory {run_dir} is not shared: process {first} on {found[first]} does "
            f"not see what process 0 writes there ({len(missing)} of {len(found)} processes do "
            f"not); {remedy} of a file system that all hosts mount at the same path"
        )


def together(action: Callable[[], object]) -> None:
    """Calls `action` on all processes; a SettingsError of any of them is raised on all."""
    problem = ""
    try:
        action()
    except SettingsError as error:
        if jax.process_count() == 1:
            raise
        problem = str(error)
    problems = [found for found in processes.gather_texts(problem) if found]
    if problems:
        raise SettingsError(problems[0])


def of_first(action: Callable[[], object]) -> None:
    """Calls `action` on the first process alone; its SettingsError is raised on all."""
    together(lambda: action() if jax.process_index() == 0 else None)


def chosen_by_first(choose: Callable[[], int | None]) -> int | None:
    """The number that `choose` returns on the first process, on all; a SettingsError likewise."""
    chosen: list[int | None] = [None]

    def call() -> None:
        chosen[0] = choose()

    of_first(call)
    return json.loads(processes.broadcast_text(json.dumps(chosen[0])))


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SEEN_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _leaves(value: object, key: str) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        pairs = [(str(name), part) for name, part in value.items()]
    elif isinstance(value, list | tuple) and value:
        pairs = [(str(index), part) for index, part in enumerate(value)]
    else:
        return [(key, str(value))]
    return [
        leaf for name, part in pairs for leaf in _leaves(part, f"{key}.{name}" if key else name)
    ]


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
