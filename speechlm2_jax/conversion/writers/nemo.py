"""Writes a .nemo file: settings, weights and the files that the settings name, in one tar."""

import gzip
import re
import tarfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml

from speechlm2_jax.conversion.errors import ConversionError, listed
from speechlm2_jax.conversion.readers.nemo import ARTIFACT_PREFIX, CONFIG, WEIGHTS
from speechlm2_jax.conversion.writers.files import replacing
from speechlm2_jax.conversion.writers.torch_files import write_torch_file


def write_nemo(
    path: Path,
    config: Mapping[str, object],
    state: Mapping[str, np.ndarray],
    artifacts: Mapping[str, bytes],
    *,
    compressed: bool = False,
) -> None:
    """Writes what NeMo's `restore_from` reads; the file appears whole or not at all.

    `config` holds plain values; NeMo makes the class that its `target` names. `artifacts` are
    files by name; the config refers to them as `nemo:NAME`. With `compressed` the tar is in gzip,
    which NeMo reads too: bfloat16 weights take a fifth less, and loading some 5 ms more per
    megabyte. Equal input gives equal bytes. Raises ConversionError for a reference without its
    file, a name that is no plain file name, values that YAML's plain types cannot hold, and dtypes
    that torch files cannot hold.
    """
    _check(config, artifacts)
    text = _yaml(config)
    with replacing(path) as unfinished:
        weights = unfinished.with_suffix(".ckpt")  # the tar's header needs its size
        try:
            write_torch_file(weights, state)
            with _tar(unfinished, compressed) as archive, weights.open("rb") as content:
                for name in sorted(artifacts):
                    _add(archive, name, BytesIO(artifacts[name]), len(artifacts[name]))
                _add(archive, CONFIG, BytesIO(text), len(text))
                _add(archive, WEIGHTS, content, weights.stat().st_size)
        finally:
            weights.unlink(missing_ok=True)


@contextmanager
def _tar(path: Path, compressed: bool) -> Generator[tarfile.TarFile, None, None]:
    """A tar to write into; in gzip without a name and a date, so that equal input stays equal."""
    with ExitStack() as stack:
        file = stack.enter_context(path.open("wb"))
        if compressed:
            file = stack.enter_context(gzip.GzipFile("", "wb", 9, file, mtime=0))
        yield stack.enter_context(tarfile.open(fileobj=file, mode="w"))


def _add(archive: tarfile.TarFile, name: str, content: BufferedIOBase, size: int) -> None:
    """Adds a file that belongs to root and has no date."""
    member = tarfile.TarInfo(f"./{name}")
    member.size = size
    member.mode = 0o644
    member.uname = member.gname = "root"
    archive.addfile(member, content)


def _check(config: Mapping[str, object], artifacts: Mapping[str, bytes]) -> None:
    wrong = {n for n in artifacts if Path(n).name != n or n in ("", "..", CONFIG, WEIGHTS)}
    if wrong:
        raise ConversionError(f"not names of files beside {CONFIG}: {listed(wrong)}")
    missing = set(references(config)) - set(artifacts)
    if missing:
        raise ConversionError(
            f"the config refers to files that are not given: {listed(missing, artifacts)}"
        )


def references(value: object) -> Iterator[str]:
    """The names of all files that a config refers to as `nemo:NAME`."""
    if isinstance(value, str) and value.startswith(ARTIFACT_PREFIX):
        yield value.removeprefix(ARTIFACT_PREFIX)
    elif isinstance(value, Mapping):
        yield from references(list(cast(Mapping[str, Any], value).values()))
    elif isinstance(value, list | tuple):
        for part in cast(Sequence[Any], value):
            yield from references(part)


def _yaml(config: Mapping[str, object]) -> bytes:
    try:
        return yaml.dump(  # pyright: ignore[reportUnknownMemberType]
            dict(config), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, encoding="utf-8"
        )
    except yaml.representer.RepresenterError as error:
        raise ConversionError(f"the config holds a value that is not plain: {error}") from error


class _PlainDumper(yaml.SafeDumper):
    """Writes equal containers in full, for a reader that counts aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


# readers of NeMo's configs (OmegaConf, and this project's) take 1e-5 for a number, PyYAML does not:
# a text that looks like one is written in quotes
_PlainDumper.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
