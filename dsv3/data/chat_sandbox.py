"""The sandbox of chat templates: Jinja's, which says at once what it forbids, and bounds what one operation can make.

Jinja's keeps a template from files and from Python's insides. This one also refuses a single operation whose result would be
far larger than what it is made of, before it is computed: products, powers, sums, `~`, formats and their widths, filters and
methods of strings that fill up or repeat, and a text as a whole. It does not bound what loops do, neither their time nor the
memory of all that they keep.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, ValuesView
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.filters import make_attrgetter
from jinja2.runtime import markup_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace, pass_eval_context

MAX_OPERAND, MAX_EXPONENT = 1 << 20, 64  # of `*` and `**`; the first also of what `*` makes
MAX_TEXT = 1 << 24  # characters of a text that an operation makes, and of all that is rendered
MAX_WIDTH = 4096  # to which something is filled up
_NUMBER = 32  # characters that are allowed for, for what is neither text nor a container
_CONTAINERS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)
_PERCENT = re.compile(r"%(\([^)]*\))?[-#0 +]*(\*|\d{5}|\d*\.(\*|\d{5}))")  # large, or given apart
_BRACES = re.compile(r"\{[^{}]*:[^{}]*(\{|\d{5})")
# Filters and methods of strings, of which a number says how far something is filled up or how often.
_WIDE = frozenset("center ljust rjust zfill expandtabs indent batch slice round".split())
# And those that may put a text beside many parts of another one.
_LONG = frozenset("wordwrap urlize".split())


def measure(value: Any) -> int:
    """Returns about how many characters a value is as text; refuses one that is more than `MAX_TEXT`.

    The same list may be in another one many times, and is counted each time, as it would be written.
    """
    size, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, Mapping):
            size += _NUMBER
            left += [*one.keys(), *one.values()]
        elif isinstance(one, _CONTAINERS):
            size += _NUMBER
            left += one
        else:
            size += _NUMBER
        bound("text", size + len(left))
    return size


def bound(what: str, size: int, most: int = MAX_TEXT) -> None:
    """Refuses a size."""
    if size > most:
        raise SecurityError(f"{what} as large as {size}")


def join(values: Iterable[Any], between: str = "") -> str:
    """Joins values as text."""
    parts, size = [], 0
    for value in values:
        size += len(between) + (len(value) if isinstance(value, str) else measure(value))
        bound("text", size)
        parts.append(value if isinstance(value, str) else str(value))
    return markup_join(parts) if not between and any(hasattr(part, "__html__") for part in parts) else between.join(parts)


def format_time(time: datetime | None, form: str) -> str:
    """A moment, or the present, by `strftime`."""
    bound("`strftime_now` of a form", len(form), MAX_WIDTH)
    if re.search(r"%[^a-zA-Z%]*\d{4}", form):
        raise SecurityError("`strftime_now` with a large width")
    return (time or datetime.now()).strftime(form)


class _Generator(CodeGenerator):
    """Jinja's compiler, with a `~` that is bounded."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concat((")
        for value in node.nodes:
            self.visit(value, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment in which templates run."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(("*", "**", "+", "%"))
    concat = staticmethod(join)  # of blocks, of macros and of everything

    def __init__(self, **options: Any):
        super().__init__(**options, finalize=_measured)
        self.filters = {name: bounded_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {"join": _join, "format": _format}
        self.globals = {name: value for name, value in self.globals.items() if name != "lipsum"} | {"namespace": _Namespace}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes, unless the result might be huge."""
        sized = [len(value) if hasattr(value, "__len__") else None for value in (left, right)]
        if operator in ("*", "**"):
            for value, size, most in ((left, sized[0], MAX_OPERAND), (right, sized[1], MAX_OPERAND)):
                found = size if size is not None else abs(value) if isinstance(value, int) else 0
                bound(f"`{operator}` of something", found, MAX_EXPONENT if operator == "**" and value is right else most)
            if sized != [None, None]:
                times = [size if size is not None else value for value, size in zip((left, right), sized, strict=True)]
                bound("the result of `*`", times[0] * times[1], MAX_OPERAND)
        elif operator == "+" and None not in sized:
            bound("the result of `+`", sum(sized), MAX_TEXT if isinstance(left, str) else MAX_OPERAND)
        elif operator == "%" and isinstance(left, str):
            _check_percent(left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function; of methods of strings those that can make much of little are looked at first."""
        method = getattr(function, "__wrapped__", function)
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(text, str) and name == "join":
            return join(*args, between=text)
        if isinstance(text, str):
            _check_call(name, text, args, kwargs)
        return super().call(context, function, *args, **kwargs)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Raises: the sandbox of Jinja goes on until the value is used."""
        raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__}")


class _Namespace(Namespace):
    """Jinja's `namespace`, without names that begin with an underscore."""

    def __init__(self, /, *args: Any, **kwargs: Any):
        for name in dict(*args, **kwargs):
            _check_name(name)
        super().__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # without what is in it, which may hold namespaces, too


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"name {name!r} of a namespace")


def _measured(value: Any) -> Any:
    """The value; one that would be a huge text is refused."""
    measure(value)
    return value


def _check_percent(form: str, values: Any) -> None:
    if _PERCENT.search(form):
        raise SecurityError("`%` with a large width")
    bound("the result of `%`", len(form) + form.count("%") * measure(values))


def _check_call(name: str, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Looks at a filter or a method of a string, and at what it is called with."""
    what, given = f"`{name}` with something", [*args, *kwargs.values()]
    texts = [value for value in given if isinstance(value, str)]
    if name in ("translate", "maketrans"):
        raise SecurityError(f"`{name}`")
    if name in ("format", "format_map"):
        if _BRACES.search(text):
            raise SecurityError(f"`{name}` with a large width")
        bound(f"the result of `{name}`", len(text) + text.count("{") * measure(given))
    if name in _WIDE:
        for value in given:
            bound(what, abs(value) if isinstance(value, int) else len(value) if isinstance(value, str) else 0, MAX_WIDTH)
        width = max([8, *(abs(value) for value in given if isinstance(value, int)), *map(len, texts)])
        lines = text.count("\t" if name == "expandtabs" else "\n") + 1
        bound(f"the result of `{name}`", len(text) + lines * width)
    if name == "replace" and texts:
        old, new = (*texts, "")[:2]
        old, new = kwargs.get("old", old), kwargs.get("new", new)
        bound("the result of `replace`", len(text) + text.count(old) * len(new))
    if name in _LONG:
        bound(f"the result of `{name}`", (len(text) + 1) * max([1, *map(len, texts)]))


def bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses what would be huge."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if hasattr(function, "jinja_pass_arg") else args
        measure([value for value in (*given, *kwargs.values()) if isinstance(value, (str, Mapping, *_CONTAINERS))])
        if given:
            _check_call(name, given[0] if isinstance(given[0], str) else "", given[1:], kwargs)
            if name == "tojson":  # an indent or separators for each part
                more = [*given[1:], *kwargs.values()]
                wide = sum(abs(value) if isinstance(value, int) else _letters(value) for value in more)
                bound("the result of `tojson`", measure(given[0]) * (1 + wide))
            starts = [*given[2:3], *([kwargs["start"]] if "start" in kwargs else [])] if name == "sum" else []
            if any(not isinstance(start, (int, float)) for start in starts):
                raise SecurityError("`sum` of what is no number")
        return function(*args, **kwargs)

    return run


def _letters(value: Any) -> int:
    """The characters of a text, or of several."""
    return len(value) if isinstance(value, str) else sum(map(_letters, value)) if isinstance(value, (list, tuple)) else 0


@pass_eval_context
def _join(context: Any, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """Jinja's filter `join`, bounded."""
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    return join(value, str(d))


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    """Jinja's filter `format`, bounded."""
    if args and kwargs:
        raise TypeError("can't handle positional and keyword arguments at the same time")
    form = str(_measured(value))
    _check_percent(form, kwargs or args)
    return form % (kwargs or args)
