# pyright: basic
"""Reads pickles as data: a stack machine that builds containers and calls nothing of the file's.

Python's own unpickler imports what the file names and calls it. Here a name is looked up in a
closed table; a name in no table ends the reading, and a name known to be harmless becomes an
`Opaque` record of what was asked for. The opcodes are decoded by the standard library's
disassembler (`pickletools`), which executes nothing.
"""

import io
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from speechlm2_jax.conversion.errors import ConversionError, UnsafeFileError


class Opaque:
    """An object that was in the pickle and was not built: its class, arguments, state, items."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: object = ()):
        self.name = name
        self.args = args
        self.state: Any = None
        self.items: list[Any] = []


@dataclass(frozen=True)
class OpaqueType:
    """A class whose objects become `Opaque` records."""

    name: str


@dataclass(frozen=True)
class Builder:
    """One of our own functions, which stands for a name in the pickle."""

    call: Callable[..., object]


@dataclass(frozen=True)
class Names:
    """What the names in a pickle mean; any other name is refused."""

    values: Mapping[str, object]
    opaque_roots: tuple[str, ...] = ()
    """Packages whose classes (names in CamelCase) become records."""

    def find(self, module: str, name: str) -> Any:
        """Looks a name up. Raises UnsafeFileError, naming it, if it is in no table."""
        full = f"{module}.{name}"
        if full in self.values:
            return self.values[full]
        if module.split(".")[0] in self.opaque_roots and name[:1].isupper() and name.isidentifier():
            return OpaqueType(full)
        raise UnsafeFileError(
            f"the pickle asks for {full[:200]}, which weights never need; nothing was executed. "
            "Save the tensors alone (a state_dict, or safetensors)"
        )


class _Mark:
    """The place on the stack where a group of operands begins."""


MARK = _Mark()
SIMPLE_KEYS = (str, int, float, bool, bytes, type(None), Opaque)


def read_pickle(
    stream: io.IOBase, names: Names, persistent: Callable[[object], object] | None = None
) -> Any:
    """Reads one pickle and leaves `stream` after it.

    `persistent` turns a persistent id (torch keeps storages outside the pickle) into a value.
    Raises UnsafeFileError for a forbidden name or operation, ConversionError for a damaged pickle.
    """
    machine = _Machine(names, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(cast(Any, stream)):
            if opcode.name == "STOP":
                return machine.stack[-1]
            machine.step(opcode.name, argument)
    except ConversionError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ConversionError(f"the pickle is damaged: {error}") from error
    raise ConversionError("the pickle is damaged: it ends before its end mark")


class _Machine:
    def __init__(self, names: Names, persistent: Callable[[object], object] | None):
        self.names = names
        self.persistent = persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: object) -> None:
        if opcode in PUSH_ARGUMENT:
            self.stack.append(argument)
        elif opcode in PUSH_CONSTANT:
            self.stack.append(PUSH_CONSTANT[opcode]())
        elif opcode in HANDLERS:
            HANDLERS[opcode](self, argument)
        elif opcode not in ("PROTO", "FRAME"):
            raise UnsafeFileError(f"the pickle uses {opcode}, which weights never need")

    def pop_group(self) -> list[Any]:
        """Takes everything above the last mark off the stack, and the mark."""
        at = len(self.stack) - 1
        while self.stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise ValueError("a group without its mark")
        group = self.stack[at + 1 :]
        del self.stack[at:]
        return group

    def find(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(self.names.find(module, name))

    def find_on_stack(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(module, str) and isinstance(name, str)):
            raise UnsafeFileError("the pickle names a global by something that is not text")
        self.stack.append(self.names.find(module, name))

    def make(self, _: object) -> None:
        """REDUCE and NEWOBJ: one of our builders, or a record; never a call of the file's."""
        arguments, maker = self.stack.pop(), self.stack.pop()
        if isinstance(maker, Builder) and isinstance(arguments, tuple):
            self.stack.append(maker.call(*arguments))
        elif isinstance(maker, OpaqueType):
            self.stack.append(Opaque(maker.name, arguments))
        else:
            raise UnsafeFileError("the pickle calls something that is not a known class")

    def make_with_keywords(self, _: object) -> None:
        keywords = self.stack.pop()
        self.make(None)
        if not isinstance(self.stack[-1], Opaque):
            raise UnsafeFileError("the pickle calls a known class in an unknown way")
        self.stack[-1].args = (self.stack[-1].args, keywords)

    def set_state(self, _: object) -> None:
        """BUILD: recorded on a record; an OrderedDict's attributes (torch's _metadata) dropped."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Opaque):
            target.state = state
        elif not isinstance(target, OrderedDict):
            raise UnsafeFileError("the pickle sets attributes of something that has none")

    def extend(self, values: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, Opaque):
            target.items.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            for value in values:
                target.add(_key(value))
        else:
            raise UnsafeFileError("the pickle appends to something that is no list")

    def update(self, pairs: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, Opaque):
            target.items.append(pairs)
        elif isinstance(target, dict):
            for key, value in zip(pairs[::2], pairs[1::2], strict=True):
                target[_key(key)] = value
        else:
            raise UnsafeFileError("the pickle sets items of something that is no dictionary")

    def push_dict(self, _: object) -> None:
        pairs = self.pop_group()
        self.stack.append({})
        self.update(pairs)

    def push_tuple(self, count: int) -> None:
        values = tuple(self.stack[-count:])
        if len(values) < count:
            raise ValueError("a tuple of too few values")
        del self.stack[-count:]
        self.stack.append(values)

    def load_persistent(self, _: object) -> None:
        if self.persistent is None:
            raise UnsafeFileError("the pickle refers to something outside it")
        self.stack.append(self.persistent(self.stack.pop()))

    def memoize(self, key: int | str | None) -> None:
        self.memo[len(self.memo) if key is None else int(key)] = self.stack[-1]


def _key(value: object) -> Any:
    """Lets plain keys through: hashing a deeply nested tuple would overflow the C stack."""
    parts = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, SIMPLE_KEYS) for part in parts):
        raise UnsafeFileError("the pickle has a dictionary key that is not plain")
    return value


PUSH_ARGUMENT = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8".split()
)
PUSH_CONSTANT: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple[Any, ...],
    "EMPTY_LIST": list[Any],
    "EMPTY_DICT": dict[Any, Any],
    "EMPTY_SET": set[Any],
    "MARK": lambda: MARK,
}
HANDLERS: dict[str, Callable[[_Machine, Any], Any]] = {
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.pop_group(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "GLOBAL": _Machine.find,
    "STACK_GLOBAL": _Machine.find_on_stack,
    "REDUCE": _Machine.make,
    "NEWOBJ": _Machine.make,
    "NEWOBJ_EX": _Machine.make_with_keywords,
    "BUILD": _Machine.set_state,
    "APPEND": lambda m, _: m.extend([m.stack.pop()]),
    "APPENDS": lambda m, _: m.extend(m.pop_group()),
    "ADDITEMS": lambda m, _: m.extend(m.pop_group()),
    "SETITEM": lambda m, _: m.update([m.stack.pop(), m.stack.pop()][::-1]),
    "SETITEMS": lambda m, _: m.update(m.pop_group()),
    "LIST": lambda m, _: m.stack.append(m.pop_group()),
    "DICT": _Machine.push_dict,
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_group())),
    "TUPLE1": lambda m, _: m.push_tuple(1),
    "TUPLE2": lambda m, _: m.push_tuple(2),
    "TUPLE3": lambda m, _: m.push_tuple(3),
    "FROZENSET": lambda m, _: m.stack.append(frozenset(map(_key, m.pop_group()))),
    "BINPERSID": _Machine.load_persistent,
    "PUT": _Machine.memoize,
    "BINPUT": _Machine.memoize,
    "LONG_BINPUT": _Machine.memoize,
    "MEMOIZE": _Machine.memoize,
    "GET": lambda m, key: m.stack.append(m.memo[int(key)]),
    "BINGET": lambda m, key: m.stack.append(m.memo[key]),
    "LONG_BINGET": lambda m, key: m.stack.append(m.memo[key]),
}
