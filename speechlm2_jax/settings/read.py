# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
"""Reads YAML as plain data: overrides, `${...}`, `???`; all of it bounded and without objects.

YAML is data here: no tag makes an object, no `_target_` is imported, and work is bounded, so a
hostile file costs no more than a large one. Interpolation follows OmegaConf's references
(`${a.b}`, `${.sibling}`, `${oc.env:NAME,default}`); it is written here because OmegaConf expands
them without a bound.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from speechlm2_jax.bundled import config_roots
from speechlm2_jax.settings.errors import HostileTextError, SettingsError, join, kind, unknown
from speechlm2_jax.settings.text import read_text

Plain = dict[str, Any]
"""Nested dicts, lists, text, numbers, booleans and None."""

MISSING = "???"
MAX_FILE_BYTES = 1 << 20
MAX_NODES = 50_000
_UNREADABLE = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
"""What PyYAML raises for an integer of 10,000 digits, or a value that its tag does not fit."""
_MERGE_TAG = "tag:yaml.org,2002:merge"
_INNERMOST = re.compile(r"\$\{([^${}]*)\}")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without dates, base-60 numbers and merge keys, and with `3e-4` as a number."""

    yaml_implicit_resolvers: dict[object, object] = {}

    def __init__(self, text: str, most: int = MAX_NODES) -> None:
        super().__init__(text)
        self.most = self.nodes_left = most

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Stops reading a file that is too large for settings."""
        self.nodes_left -= 1
        if self.nodes_left < 0:
            raise _too_large(self.most)
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuses merge keys (they expand without a bound) and keys given twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == _MERGE_TAG or key.value == "<<":
                raise SettingsError(
                    "merge keys (<<) are not supported; write the keys, or use ${...}"
                )
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                line = key.start_mark.line + 1
                raise SettingsError(f"line {line}: {key.value!r} is given twice; keep one")
            seen.add(str(key.value))


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF",
     list("yYnNtTfFoO")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))"
              r"(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
     list("-+0123456789.")),
):  # fmt: skip
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first
    )


def load(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    search: Sequence[Path] = (),
    complete: bool = True,
    over: Sequence[str | Path] = (),
) -> Plain:
    """Reads a YAML by path or name, applies overrides, and resolves `${...}`.

    A name is looked up in `search` (by default configs/ and configs/recipes/ of the working folder
    and of the project). The values of the files `over` replace its own, key by key; lists are
    replaced whole. With `complete`, a value still `???` is an error. Raises SettingsError.
    """
    values = _read_file(find(config, search))
    for other in over:
        values = _merged(values, _read_file(find(other, search)))
    values = override(values, overrides)
    if complete:
        require_complete(values)
    return resolve(values)


def _read_file(path: Path) -> Plain:
    """The mapping of a YAML file, as it is written."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise SettingsError(f"{path}: larger than {MAX_FILE_BYTES} bytes; not a settings file")
    text = read_text(path)
    try:
        values = parse_yaml(text)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: expected a mapping of keys, got {kind(values)}")
    return cast(Plain, values)


def _merged(values: Plain, over: Mapping[str, Any]) -> Plain:
    """Mappings joined key by key; any other value of `over` replaces that of `values`."""
    result = dict(values)
    for key, value in over.items():
        old = result.get(key)
        is_joined = isinstance(old, dict) and isinstance(value, dict)
        result[key] = _merged(cast(Plain, old), cast(Plain, value)) if is_joined else value
    return result


def find(config: str | Path, search: Sequence[Path] = ()) -> Path:
    """The file that a name or path means. Raises SettingsError listing the names there are."""
    if Path(config).is_file():
        return Path(config)
    folders = [f for root in search or config_roots() for f in (root, root / "recipes")]
    for folder in folders:
        for name in (f"{config}.yaml", f"{config}.yml", str(config)):
            if (folder / name).is_file():
                return folder / name
    names = sorted({p.stem for f in folders for p in (*f.glob("*.yaml"), *f.glob("*.yml"))})
    near = difflib.get_close_matches(str(config), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    listing = ", ".join(names) or "(none here)"
    raise SettingsError(
        f"no settings file {str(config)!r}; {hint}give a path, or one of: {listing}"
    )


def parse_yaml(text: str, *, most: int = MAX_NODES, any_key: bool = False) -> Any:
    """Reads YAML as plain data, of at most `most` values; `any_key`: keys may be numbers too.

    Raises SettingsError on anything else; HostileTextError, a kind of it, for objects and for what
    is or expands to more.
    """
    try:
        value = _constructed(text, most)
    except yaml.constructor.ConstructorError as error:
        raise HostileTextError(f"{error.problem}; only plain values are read") from None
    except yaml.YAMLError as error:
        raise SettingsError("invalid YAML: " + " ".join(str(error).split())) from None
    except RecursionError:
        raise SettingsError("nested too deeply") from None
    except SettingsError:
        raise
    except _UNREADABLE as error:
        raise SettingsError(f"invalid YAML: a value cannot be read: {error}") from None
    return _Copy(value, references=False, most=most, any_key=any_key).run()


def _constructed(text: str, most: int) -> Any:
    loader = _Loader(text, most)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def override(values: Mapping[str, object], overrides: Sequence[str]) -> Plain:
    """Applies `key=value` (the key must exist), `+key=value`, `++key=value` and `~key`."""
    result = cast(Plain, _Copy(values, references=False).run())
    for text in overrides:
        match = re.fullmatch(r"(~|\+{0,2})([^=+~\s][^=]*)(?:=(.*))?", text, re.DOTALL)
        if match is None or (match[1] != "~" and match[3] is None):
            raise SettingsError(f"{text!r}: expected key=value, +key=value or ~key")
        parts = re.sub(r"\[(\d+)\]", r".\1", match[2]).split(".")
        if match[1] == "~":
            parent = _descend(result, parts, create=False)
            del parent[_existing(parent, parts)]
        else:
            _assign(result, parts, _scalar(match[3]), create=bool(match[1]))
    return result


def require_complete(values: object) -> None:
    """Raises SettingsError listing every dotted path whose value is still `???`."""
    missing = [path for path, value in _leaves(values) if value == MISSING]
    if missing:
        raise SettingsError(f"fill in {', '.join(missing)}; for instance {missing[0]}=VALUE")


def resolve(values: object) -> Any:
    """Replaces every `${...}` of a mapping or list.

    Raises SettingsError for a cycle or a missing path.
    """
    return _Copy(values, references=True).run()


class _Copy:
    """Copies plain data, bounded in size, following references if asked."""

    def __init__(
        self, root: Any, *, references: bool, most: int = MAX_NODES, any_key: bool = False
    ) -> None:
        self.root, self.references, self.any_key = root, references, any_key
        self.most = self.left = most

    def run(self) -> Any:
        try:
            return self._copy(self.root, "", ())
        except RecursionError:
            raise HostileTextError("the values refer to themselves, or nest too deeply") from None

    def _copy(self, node: Any, path: str, active: tuple[str, ...]) -> Any:
        self._spend(1)
        if isinstance(node, Mapping):
            items = cast(Mapping[Any, Any], node).items()
            return {self._key(k, path): self._copy(v, join(path, k), active) for k, v in items}
        if isinstance(node, list | tuple):
            values = enumerate(cast(Sequence[Any], node))
            return [self._copy(v, join(path, i), active) for i, v in values]
        if self.references and isinstance(node, str) and "${" in node:
            return self._expand(node, path, active)
        if isinstance(node, str | int | float | bool | None):
            return node
        raise SettingsError(f"{path}: {kind(node)} is not plain data")

    def _expand(self, text: str, path: str, active: tuple[str, ...]) -> Any:
        while match := _INNERMOST.search(text):
            value = self._lookup(match[1].strip(), path, active)
            if match[0] == text:
                return value
            if isinstance(value, Mapping | list):
                raise SettingsError(f"{path}: {match[0]} is not a single value; it cannot be text")
            text = text[: match.start()] + str(value) + text[match.end() :]
            self._spend(1 + len(text) // 64)
        return text

    def _lookup(self, reference: str, path: str, active: tuple[str, ...]) -> Any:
        resolver, colon, argument = reference.partition(":")
        if colon:
            name, comma, default = argument.partition(",")
            if resolver != "oc.env":
                raise SettingsError(f"{path}: no resolver {resolver!r}; only oc.env is supported")
            if not comma and name not in os.environ:
                raise SettingsError(f"{path}: environment variable {name} is not set")
            return os.environ.get(name, default)
        dots = len(reference) - len(reference.lstrip("."))
        base = path.split(".")[:-dots] if dots else []
        target = ".".join([*base, re.sub(r"\[(\w+)\]", r".\1", reference[dots:])])
        if target in active:
            raise SettingsError(f"{path}: ${{{reference}}} refers to itself; give it a value")
        node = self.root
        for part in target.split("."):
            try:
                node = node[int(part)] if isinstance(node, list | tuple) else node[part]
            except (KeyError, IndexError, TypeError, ValueError):
                raise SettingsError(f"{path}: ${{{reference}}}: there is no {target!r}") from None
        return self._copy(node, target, (*active, target))

    def _spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise _too_large(self.most)

    def _key(self, key: object, path: str) -> Any:
        if not isinstance(key, str) and not self.any_key:
            raise SettingsError(f"{join(path, key)}: keys are text; write the key in quotes")
        return key


def _scalar(text: str) -> Any:
    """The value of an override: YAML for a [list], {mapping} or "quoted"; else one scalar."""
    if text[:1] in tuple("[{'\""):
        return parse_yaml(text)
    if not text:
        return ""
    loader = _Loader("")
    tag = cast(str, loader.resolve(yaml.ScalarNode, text, (True, False)))
    try:
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except _UNREADABLE as error:
        raise SettingsError(f"{text[:40]}...: cannot be read: {error}") from None


def _descend(values: Any, parts: Sequence[str], *, create: bool) -> Any:
    """The container that holds the last part of a path."""
    node = values
    for depth, part in enumerate(parts[:-1], start=1):
        if create and isinstance(node, dict) and cast(Plain, node).get(part) is None:
            node[part] = {}
        node = node[_existing(node, parts[:depth])]
    if not isinstance(node, dict | list):
        above = ".".join(parts[:-1])
        raise SettingsError(f"{'.'.join(parts)}: {above} is {kind(node)}, which has no keys")
    return cast(Any, node)


def _assign(values: Plain, parts: Sequence[str], value: object, *, create: bool) -> None:
    parent = _descend(values, parts, create=create)
    if isinstance(parent, dict) and create:
        key: Any = parts[-1]
        old: Any = cast(Plain, parent).get(key)
    else:
        key = _existing(parent, parts)
        old = parent[key]
    if isinstance(old, dict) and isinstance(value, dict):
        value = {**cast(Plain, old), **cast(Plain, value)}
    parent[key] = value


def _existing(node: Any, parts: Sequence[str]) -> Any:
    """The last part as a key or index of `node`, which must have it."""
    path, part = ".".join(parts), parts[-1]
    if isinstance(node, list):
        length = len(cast(list[Any], node))
        if not part.isdigit() or int(part) >= length:
            raise SettingsError(f"{path}: expected an index below {length}, got {part!r}")
        return int(part)
    if not isinstance(node, dict) or part not in node:
        keys = list(cast(Plain, node)) if isinstance(node, dict) else []
        raise SettingsError(f"{unknown(path, part, keys)} (+{path}= adds a key)")
    return part


def _leaves(node: object, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        items = list(cast(Mapping[str, Any], node).items())
    elif isinstance(node, list):
        items = [(str(i), v) for i, v in enumerate(cast(list[Any], node))]
    else:
        return [(path, node)]
    return [leaf for key, value in items for leaf in _leaves(value, join(path, key))]


def _too_large(most: int) -> HostileTextError:
    return HostileTextError(f"has or expands to more than {most} values; not a settings file")
