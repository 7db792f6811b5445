"""The Jinja of chat templates as transformers has it, in a sandbox whose every step is paid for.

Same syntax, filters and functions as `apply_chat_template` of transformers. What can make something
large of something small (loops, calls, operators, filters, lists) pays from the budget of
`template_limits`; filters and methods that no bound is known for do not exist.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from speechlm2_jax.data.prompts import template_limits as limits

FILTERS = (
    "abs attr batch capitalize center count d default dictsort e escape first float format groupby "
    "indent int items join last length list lower map max min reject rejectattr replace reverse "
    "round safe select selectattr slice sort string sum title trim truncate unique upper urlencode "
    "wordcount"
).split()
"""Jinja's filters. Without those that draw at random, print Python, or take HTML apart."""
METHODS: Mapping[type[Any], frozenset[str]] = {
    str: frozenset(
        "capitalize casefold center count endswith find format format_map index isalnum isalpha "
        "isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle "
        "isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex "
        "rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper "
        "zfill".split()
    ),
    dict: frozenset("copy get items keys values".split()),
    list: frozenset("copy count index".split()),
    tuple: frozenset("count index".split()),
}
"""The methods of values that a template may call."""
NOW: ContextVar[datetime | None] = ContextVar("the time that strftime_now formats", default=None)
_SPANS: ContextVar[list[tuple[int, int]] | None] = ContextVar("generation spans", default=None)
_WRITTEN: ContextVar[list[str]] = ContextVar("what a template has written so far")
_PAY, _JOIN = "_pay", "_join"


class Refusal(TemplateError):
    """What a template raises with `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, the tags around what the model writes."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.CallBlock:
        """Makes a call of what is between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_note")
        return nodes.CallBlock(call, [], [], body, lineno=line)

    def _note(self, caller: Callable[[], str]) -> str:
        text = caller()
        spans = _SPANS.get()
        if spans is not None:
            start = sum(map(len, _WRITTEN.get()))
            spans.append((start, start + len(text)))
        return text


class _Payments(NodeTransformer):
    """Adds a payment to each round of a loop, and to what makes lists and joins texts."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - the visitor's name
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(None), _PAY), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _JOIN)

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return node if _is_constant(node) else _filtered(node, _PAY)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return node if node.ctx != "load" or _is_constant(node) else _filtered(node, _PAY)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, _PAY)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, _PAY) if isinstance(node.arg, nodes.Slice) else node


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _is_constant(node: nodes.List | nodes.Tuple) -> bool:
    return all(isinstance(item, nodes.Const) for item in node.items)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compiles chat templates."""

    intercepted_binops = frozenset(limits.OPERATORS)
    concat = staticmethod(limits.concatenated)  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,
        )
        self.binop_table |= limits.OPERATORS
        self.filters = {name: _bounded(name, self.filters[name]) for name in FILTERS}
        self.filters |= {"tojson": _tojson, _PAY: _pay, _JOIN: _join}
        self.globals = {
            "range": self.globals["range"],
            "dict": _Dict(),
            "namespace": _Namespace,
            "cycler": Cycler,
            "joiner": Joiner,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self._known = frozenset(map(id, self.globals.values()))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Payments().visit(super()._parse(source, name, filename))

    def is_safe_callable(self, obj: Any) -> bool:
        """Whether a template may call it: its own macros, our functions, methods without effect."""
        if isinstance(obj, Macro | BlockReference | LoopContext | Undefined | Cycler | Joiner):
            return True
        if id(obj) in self._known:
            return True
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, _Generation):
            return name == "_note"
        if isinstance(owner, LoopContext | Cycler | _Dict):
            return name in ("cycle", "changed", "next", "reset", "fromkeys")
        if owner is None:  # the sandbox's own wrapper of a text's `format`
            return isinstance(getattr(obj, "__wrapped__", None), type("".format))
        return any(name in names for kind, names in METHODS.items() if isinstance(owner, kind))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        """Calls something of the template's, after a check of how large the result may be."""
        limits.spend()
        args, bound = _check_method(__obj, args, kwargs)
        limits.spend(bound)
        result = super().call(__context, __obj, *args, **kwargs)
        return result if isinstance(result, Undefined | Namespace) else limits.paid(result)


def _check_method(obj: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """(the arguments, the size of the result) of a text's method that can make a long text."""
    method = getattr(obj, "__wrapped__", obj)
    text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(text, str):
        return args, 0
    limits.check_integers((*args, *kwargs.values()))
    if name in ("format", "format_map"):
        limits.check_format(text, [*args, *kwargs.values()], "{")
    if name == "join":
        values = limits.listed(*args)
        return (values,), limits.joined_size(text, values)
    if name == "replace" and len(args) > 1:
        return args, limits.replaced_size(text, *map(str, args[:2]))
    return args, 0


def _bounded(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja's that checks how large its result may be, and pays for it."""
    first = int(hasattr(plain, "jinja_pass_arg"))

    @functools.wraps(plain)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        value, others = args[first], args[first + 1 :]
        limits.check_integers((*others, *kwargs.values()))
        if isinstance(value, Iterator):
            value = limits.listed(value)
        if name in _SIZES:
            limits.spend(_SIZES[name](value, *others, **kwargs))
        return limits.paid(plain(*args[:first], value, *others, **kwargs))

    return bounded


def _indented(s: Any, width: Any = 4, first: bool = False, blank: bool = False) -> int:
    characters = len(width) if isinstance(width, str) else int(width)
    return limits.size_of(s) + (str(s).count("\n") + 1) * characters


def _replaced(s: Any, old: Any, new: Any, count: Any = None) -> int:
    return limits.replaced_size(str(s), str(old), str(new))


def _joined(value: Any, d: Any = "", attribute: Any = None) -> int:
    items = value if isinstance(value, str | list | tuple) else list(value)
    return limits.size_of(items) + len(str(d)) * len(items)


def _formatted(value: Any, *args: Any, **kwargs: Any) -> int:
    limits.check_format(str(value), [*args, *kwargs.values()], "%")
    return 0


def _summed(iterable: Any, attribute: Any = None, start: Any = 0) -> int:
    if not isinstance(start, int | float):
        raise SecurityError("sums what are no numbers")
    return 0


_SIZES: Mapping[str, Callable[..., int]] = {
    "indent": _indented,
    "replace": _replaced,
    "join": _joined,
    "format": _formatted,
    "sum": _summed,
}
"""Filters whose result may be much longer than what they take, and its size. The arguments have
Jinja's names."""


@pass_context  # so that no step is taken while a template is compiled
def _pay(_: Context, value: Any) -> Any:
    return limits.paid(value)


@pass_context
def _join(_: Context, values: list[Any]) -> str:
    return limits.concatenated(map(str, values))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: nothing is escaped for HTML."""
    spaces = 0 if indent is None else len(indent) if isinstance(indent, str) else int(indent)
    limits.spend(limits.size_of(value) * (1 + spaces * 8))
    return limits.paid(
        json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
    )


def _raise_exception(message: str) -> None:
    raise Refusal(str(message))


def _strftime_now(format: str) -> str:  # noqa: A002 - transformers' name
    if len(format) > 100 or re.search(r"%\D?\d{3}", format):
        raise SecurityError("formats the time with a width that is too large")
    return (NOW.get() or datetime.now()).strftime(format)


class _Dict:
    """`dict` of templates, as transformers offers it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` of templates, as transformers offers it: without names that begin with `_`."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N805 - `namespace(self=...)` is right
        Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _check_attribute(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # not what is in it, which may be itself


def _check_attribute(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"stores {name!r}, which begins with an underscore, in a namespace")


@functools.cache
def environment() -> TemplateEnvironment:
    """The one environment of this process."""
    return TemplateEnvironment()


def write(template: Any, variables: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """Renders a compiled template: (text, the spans between its generation tags)."""
    written: list[str] = []
    spans: list[tuple[int, int]] = []
    tokens = (_WRITTEN.set(written), _SPANS.set(spans))
    try:
        for piece in template.generate(**variables):
            limits.spend(len(piece))
            written.append(piece)
    finally:
        _WRITTEN.reset(tokens[0])
        _SPANS.reset(tokens[1])
    return limits.concatenated(written), spans
