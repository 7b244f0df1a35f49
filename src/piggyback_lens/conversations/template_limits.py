"""What a chat template may cost: it is somebody's program, so it runs under limits before it is rendered."""

import json
import re
import time
from collections.abc import Callable, ItemsView, KeysView, Mapping, Sequence, ValuesView
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer, NodeVisitor

SECONDS = 5.0
STEPS = 1_000_000
"""Loop bodies, calls, operators and outputs."""
CHARACTERS = 1_000_000
"""Of one value, beyond a hundred times the text of the messages; of all values together a hundred times as many."""


class TooCostly(Exception):
    """A template went past a limit; the message says which."""


def run_metered(source: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> None:
    """Render a template only for what it costs; what an operation would make is estimated before it is made.

    Raises:
        TooCostly: more than `SECONDS`, `STEPS` or `CHARACTERS`.
        Exception: what the template itself raises, of any type.
    """
    token = _METER.set(_Meter(sum(_size(value, CHARACTERS) for message in messages for value in message.values())))
    try:
        for _ in _metered(source).generate(messages=list(messages), tools=None, documents=None, **variables):
            pass
    finally:
        _METER.reset(token)


@lru_cache(maxsize=32)
def variables_of(source: str) -> frozenset[str]:
    """Names that a template reads from outside, found without computing any of its constants."""
    return frozenset(find_undeclared_variables(_environment().parse(source)))


@lru_cache(maxsize=32)
def settable_in(source: str) -> frozenset[str]:
    """Names that a template reads before it sets them itself: those that a caller's value reaches."""
    uses = _Uses()
    uses.visit(_environment().parse(source))
    while uses.macros:
        uses.generic_visit(uses.macros.pop(0))
    return frozenset(uses.read) & variables_of(source)


class _Uses(NodeVisitor):
    """Walks a template in the order in which it runs; macros come last, since they run when they are called."""

    def __init__(self) -> None:
        self.read: set[str] = set()
        self.given: set[str] = set()
        self.macros: list[nodes.Node] = []

    def visit_Name(self, node: nodes.Name) -> None:
        if node.ctx != "load":
            self.given.add(node.name)
        elif node.name not in self.given:
            self.read.add(node.name)

    def visit_Assign(self, node: Any) -> None:
        self.visit(node.node)
        self.visit(node.target)

    def visit_For(self, node: nodes.For) -> None:
        self.visit(node.iter)
        for child in node.iter_child_nodes(exclude=("iter",)):
            self.visit(child)

    def visit_Macro(self, node: nodes.Macro) -> None:
        self.given.add(node.name)
        self.macros.append(node)


class _Meter:
    """What one run has used, and what it may."""

    def __init__(self, given: int) -> None:
        self.steps, self.made = 0, 0
        self.most = CHARACTERS + 100 * given
        self.end = time.monotonic() + SECONDS

    def count(self, operation: str, *values: Any) -> None:
        """One step, which makes a value of these."""
        makes = _growth(operation, values, self.most)
        self.steps, self.made = self.steps + 1, self.made + makes
        if makes > self.most or self.made > 100 * self.most:
            raise TooCostly(f"makes a text or list of more than {self.most:,} characters")
        if self.steps > STEPS:
            raise TooCostly(f"takes more than {STEPS:,} steps")
        if self.steps % 16 == 0 and time.monotonic() > self.end:
            raise TooCostly(f"takes more than {SECONDS:g} seconds")


_METER: ContextVar[_Meter] = ContextVar("meter")


# ---------------------------------------------------------------- how large a value becomes

_BY_NUMBER = ("*", "center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "tojson")
_BY_FORMAT = ("%", "format", "format_map", "strftime", "strftime_now")
_BY_TEXT = ("join", "translate", "wordwrap", "xmlattr", "urlize")
_GROWING = {"**", "replace", *_BY_NUMBER, *_BY_FORMAT, *_BY_TEXT}
_WIDE = re.compile(r"\d{5,}|\*")


def _growth(operation: str, values: Sequence[Any], most: int) -> int:
    """At most how large the result is, by the name of the operator, filter, test or function."""
    total = sum(len(value) if isinstance(value, str) else _size(value, most) for value in values)
    if operation not in _GROWING:
        return total
    texts = [value for value in values if isinstance(value, str)]
    numbers = [abs(value) for value in values if isinstance(value, int)]
    if operation == "**" or (operation in _BY_NUMBER and len(numbers) < len(values)):  # two numbers make a number
        return total * (1 + max(numbers, default=0))
    if operation in _BY_FORMAT and texts:
        return most + 1 if _WIDE.search(texts[0]) else total * (1 + texts[0].count("%") + texts[0].count("{"))
    if operation == "replace" and len(texts) > 2:
        return total + texts[0].count(texts[1]) * len(texts[2])
    if operation in _BY_TEXT:
        return total * max(1, min(map(len, texts), default=1))
    return total


def _size(value: Any, most: int) -> int:
    """Characters of a value written out, roughly, and no further than `most`; a list may hold one list many times."""
    total, waiting = 0, [value]
    while waiting and total <= most:
        node = waiting.pop()
        total += 8  # what surrounds it, and the memory of one more object
        if isinstance(node, str | bytes):
            total += len(node)
        elif isinstance(node, int):
            total += node.bit_length() // 3
        elif isinstance(node, range):
            total += 8 * len(node)
        elif isinstance(node, Namespace):
            waiting += [getattr(node, "_Namespace__attrs", None)]
        elif isinstance(node, Mapping):
            waiting += [*node.keys(), *node.values()]
        elif isinstance(node, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
            waiting += node
    return total


# ---------------------------------------------------------------- an environment that counts


class _Counting(ImmutableSandboxedEnvironment):
    """Every operator, call, filter, test and output tells the meter what it is about to make."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Rewriter().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _METER.get().count(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        of = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # the sandbox wraps str.format
        known = () if of is __self else (of,)
        _METER.get().count(getattr(__obj, "__name__", ""), *known, *args, *kwargs.values())
        return super().call(__context, __obj, *args, **kwargs)

    def same(self, value: Any) -> Any:
        return value

    def joined(self, *values: Any) -> str:
        return "".join(map(str, values))


class _Rewriter(NodeTransformer):
    """Outputs, comparisons, ~ and the beginnings of bodies become calls, which the environment counts."""

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        parts = [nodes.Const(part.data) if isinstance(part, nodes.TemplateData) else part for part in node.nodes]
        node.nodes = [_call("joined", part) for part in parts]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        for operand in node.ops:
            operand.expr = _call("same", operand.expr)
        return node

    def visit_For(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("same", nodes.Const(None))))
        return node  # type: ignore[no-any-return]

    visit_Macro = visit_CallBlock = visit_For


def _call(method: str, *values: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(values), [], None, None)


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # with jinja's marks of what is passed first
    def counted(*args: Any, **kwargs: Any) -> Any:
        _METER.get().count(name, *args, *kwargs.values())
        return function(*args, **kwargs)

    return counted


class _Generation(Extension):
    """transformers' tag around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@lru_cache(maxsize=32)
def _metered(source: str) -> Template:
    return _environment().from_string(source)


def _environment() -> _Counting:
    """The environment that transformers gives to chat templates, but counting."""
    env = _Counting(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = _tojson
    del env.globals["lipsum"]  # makes text without end, and means nothing in a chat
    env.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    tables: list[dict[str, Any]] = [env.filters, env.tests]
    for known in tables:
        known.update({name: _counted(name, function) for name, function in known.items()})
    return env


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
