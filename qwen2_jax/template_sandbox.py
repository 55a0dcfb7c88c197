# SPDX-License-Identifier: Apache-2.0
"""Jinja's sandbox with bounds: an untrusted template ends within SECONDS and writes a bounded text.

Jinja's own sandbox keeps a template from files, modules and Python's internals, but not from nested loops or from
doubling a text forty times. Here every loop iteration, call and filter compares the thread's processor time with a
deadline, and every operation that makes a larger value than it was given is checked before it runs. This works in any
thread and needs no signal.
"""

import contextlib
import functools
import re
import threading
import time
from collections.abc import Iterable, Iterator
from types import BuiltinMethodType
from typing import Any

from jinja2 import nodes, runtime
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import TemplateRuntimeError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SECONDS = 2.0  # processor time of the thread; a conversation takes milliseconds
TEXT, TIMES = 1 << 20, 16  # characters of a value: at most TEXT, and TIMES those of messages and tools
TICKS = 100  # loop iterations, calls and filters between two looks at the clock, which are slow on some systems
ITEMS = 200_000  # of a nested value, all levels together; also the largest number that is given to a text's method

# Filters that neither print nor compare the items of their input; counting the items would cost more than the filter.
SHALLOW = {
    "length", "count", "first", "last", "list", "map", "select", "reject", "selectattr", "rejectattr", "items",
    "default", "d", "reverse", "attr", "abs", "int", "float", "round",
}  # fmt: skip
GROWING = {
    "center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "tojson", "translate", "batch", "slice",
}  # fmt: skip
WIDE = re.compile(r"\d{6}|\*")  # a field width in a format string
NESTED = re.compile(r":[^}]*\{")  # a field width that is one of the values

_render = threading.local()  # deadline: thread time at which this thread's template must have ended; most: characters


@contextlib.contextmanager
def bounds(given: int) -> Iterator[None]:
    """Templates compiled and rendered inside must end within SECONDS. given: characters of messages and tools."""
    _render.deadline = None  # until there were enough ticks: most templates end before
    _render.ticks = 0
    _render.most = TEXT + TIMES * given
    try:
        yield
    finally:
        del _render.deadline, _render.ticks, _render.most


def _refuse(what: str) -> Any:
    raise TemplateRuntimeError(what)


def _tick(value: Any = None) -> None:
    """Compares the time with the deadline, every TICKS calls. value: the operand; a large one counts more."""
    _render.ticks += 1 + (len(value) // 100 if isinstance(value, str | list | tuple | dict | range) else 0)
    if _render.ticks > TICKS:
        _render.ticks = 0
        if _render.deadline is None:
            _render.deadline = time.thread_time() + SECONDS
        elif time.thread_time() > _render.deadline:
            _refuse(f"it takes more than {SECONDS:g} seconds")


def _characters(count: int) -> None:
    if count > _render.most:
        _refuse(f"it makes a text of more than {_render.most:,} characters")


def _size(value: Any) -> int:
    """Characters and items of a value, all levels together."""
    if isinstance(value, str):
        return len(value)
    count, items, left = 0, 0, [value]
    while left:
        item = left.pop()
        count += len(item) if isinstance(item, str) else 1
        items += 1
        if isinstance(item, Namespace):
            item = item._Namespace__attrs
        if isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list | tuple | set):
            left += item
        if items + len(left) > ITEMS:
            _refuse(f"it makes a value of more than {ITEMS:,} items")
        _characters(count)
    return count


def _check_growth(name: str, subject: Any, given: list[Any]) -> None:
    """Raises where a text's method, or the filter of the same name, would make much more than it was given."""
    numbers = [abs(value) for value in given if isinstance(value, int)]
    if max(numbers, default=0) > ITEMS:
        _refuse(f"{name} is given a number above {ITEMS:,}")
    texts = [value for value in given if isinstance(value, str)]
    match name:
        case "replace" if isinstance(subject, str) and len(texts) >= 2:
            _characters(len(subject) + subject.count(texts[0]) * len(texts[1]))
        case "join":
            parts, between = (given[:1] or [()], subject) if isinstance(subject, str) and given else ([subject], "")
            count = len(parts[0]) if hasattr(parts[0], "__len__") else ITEMS
            _characters(_size(parts[0]) + count * max([len(between), *map(len, texts)]) if count else 0)
        case "format" | "format_map" | "%":
            form = str(subject)
            widths = [form, *(texts if NESTED.search(form) else ())] if name == "%" or ":" in form else []
            if any(map(WIDE.search, widths)):
                _refuse("a format has a width of six digits or more")
            _characters(len(form) * (1 + max(map(_size, given), default=0)))
        case _ if name in GROWING:
            most = max([1, *numbers, *map(_size, (value for value in given if not isinstance(value, int)))])
            _characters(_size(subject) * most)


class _Generator(CodeGenerator):
    """Checks what concatenation and literals make."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self._wrapped("concatenated((", "))", node.nodes, frame)

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        self._wrapped("built([", "])", node.items, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        if node.ctx == "load":
            self._wrapped("built((", "))", node.items, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self.write("environment.built(")
        super().visit_Dict(node, frame)
        self.write(")")

    def _wrapped(self, start: str, end: str, inside: list[nodes.Expr], frame: Any) -> None:
        self.write(f"environment.{start}")
        for node in inside:
            self.visit(node, frame)
            self.write(", ")
        self.write(end)


class Sandbox(ImmutableSandboxedEnvironment):
    """Use it within `bounds`; what a template must not do raises TemplateError."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any):
        super().__init__(finalize=self.built, **options)
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)

    def add_filter(self, name: str, function: Any) -> None:
        own = hasattr(function, "jinja_pass_arg")  # the first argument is then the context or the environment

        @functools.wraps(function)
        def bounded(*args: Any, **named: Any) -> Any:
            subject, *given = args[own:] or (None,)
            _tick(subject)
            if name not in SHALLOW:
                _size(subject)
            _check_growth(name, subject, [*given, *named.values()])
            return self.made(function(*args, **named))

        self.filters[name] = bounded

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        for loop in source.find_all(nodes.For):
            position = {"lineno": loop.lineno, "environment": self}
            tick = nodes.Call(nodes.EnvironmentAttribute("tick", **position), [], [], None, None, **position)
            loop.body.insert(0, nodes.ExprStmt(tick, **position))
        return super()._generate(source, *args, **options)

    def tick(self) -> None:
        _tick()

    def made(self, value: Any) -> Any:
        if isinstance(value, str):
            _characters(len(value))
        return value

    def built(self, value: Any) -> Any:
        """A value that is written, or made of others."""
        if isinstance(value, dict | list | tuple | set | Namespace):
            _size(value)
        return value

    def concat(self, pieces: Iterable[str]) -> str:
        kept, count = [], 0
        for piece in pieces:
            count += len(piece)
            _characters(count)
            kept.append(piece)
        return "".join(kept)

    def concatenated(self, values: Iterable[Any]) -> str:
        return self.concat(str(self.built(value)) for value in values)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            _characters(len(left) + len(right))
            return left + right
        sized = [value for value in (left, right) if isinstance(value, str | list | tuple)]
        if operator == "%" and isinstance(left, str):
            _check_growth("%", left, [right])
        elif operator == "*" and sized:
            _characters(len(sized[0]) * max((v for v in (left, right) if isinstance(v, int)), default=0))
        elif operator == "+" and sized:
            _characters(sum(map(len, sized)))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > 4096:
                _refuse("it makes a number of more than 4,096 bits")
        return self.built(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **named: Any) -> Any:
        wrapped = getattr(__obj, "__wrapped__", __obj)  # of str.format
        subject = getattr(wrapped, "__self__", None)
        _tick(subject)
        if isinstance(wrapped, BuiltinMethodType) and isinstance(subject, str):
            _check_growth(wrapped.__name__, subject, [*args, *named.values()])
        elif not isinstance(__obj, runtime.Macro) and __obj is not range:
            _check_growth("a function", None, [*args, *named.values()])
        result = __self.made(super().call(__context, __obj, *args, **named))
        return __self.built(result) if __obj in (dict, Namespace) else result
