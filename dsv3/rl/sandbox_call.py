"""What runs inside the sandbox: a program as it is, a program whose function is called, or the tests that call it.

Tests and program are two processes in two sandboxes, joined by two pipes. What goes over is data alone: numbers, texts,
bytes, None, lists, tuples, sets and dicts of them, rebuilt on the other side. So no object of the program, with an equality
or a class of its own, ever comes to the tests, and nothing of the tests but a call's arguments comes to the program.
Standard library only.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

MAX_FRAME = 1 << 24  # bytes of a call or a result
MAX_DETAIL = 400

# What a function may raise in its tests. Not StopIteration, which would end a loop of the tests as if all was well.
_RAISED = frozenset(
    "ArithmeticError AssertionError AttributeError EOFError Exception FloatingPointError ImportError IndexError KeyError "
    "LookupError MemoryError NameError NotImplementedError OSError OverflowError RecursionError RuntimeError SyntaxError "
    "TypeError UnicodeError ValueError ZeroDivisionError".split()
)
_PAIRS: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset}
_SMALL = 1 << 63  # whole numbers below go as JSON's


def encode_value(value: Any) -> Any:
    """Returns a value as what JSON can hold, exactly.

    Raises:
      TypeError: it, or something in it, is no plain data.
    """
    if value is None or isinstance(value, bool | str | float):
        return value if value is None or isinstance(value, bool) else str(value) if isinstance(value, str) else float(value)
    if isinstance(value, int):
        return int(value) if -_SMALL < value < _SMALL else {"t": "int", "v": hex(value)}
    if isinstance(value, complex):
        return {"t": "complex", "v": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {"t": "bytes" if isinstance(value, bytes) else "bytearray", "v": value.hex()}
    if isinstance(value, list):
        return [encode_value(item) for item in value]
    if isinstance(value, dict):
        return {"t": "dict", "v": [[encode_value(key), encode_value(item)] for key, item in value.items()]}
    for name, kind in _PAIRS.items():
        if isinstance(value, kind):
            return {"t": name, "v": [encode_value(item) for item in value]}
    raise TypeError(f"a value of type {type(value).__name__} is no plain data")


def decode_value(value: Any) -> Any:
    """Returns what `encode_value` was given, in plain types; a `ValueError` or `TypeError` where it is not of that form."""
    if isinstance(value, list):
        return [decode_value(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind, inner = value["t"], value["v"]
    if kind == "int":
        return int(inner, 16)
    if kind == "complex":
        return complex(*inner)
    if kind in ("bytes", "bytearray"):
        return getattr(builtins, kind).fromhex(inner)
    if kind == "dict":
        return {decode_value(key): decode_value(item) for key, item in inner}
    return _PAIRS[kind](decode_value(item) for item in inner)


def run_script(job: dict) -> None:
    """Runs `program` as Python runs a file."""
    try:
        _execute([job["program"]], "__main__")
    except Exception as error:
        import traceback

        while error.__traceback__ is not None and error.__traceback__.tb_frame.f_code.co_filename != "<program>":
            error.__traceback__ = error.__traceback__.tb_next
        traceback.print_exception(error)
        sys.exit(1)


def serve_calls(job: dict) -> None:
    """Runs `prompt` and `program`, and answers calls of the function `entry_point` until there are no more."""
    requests, replies = job["requests"], job["replies"]
    name = job["entry_point"]
    try:
        function = _execute(_parts(job["prompt"], job["program"], name), "program").get(name)
        end = None if callable(function) else f"there is no function {name!r}"
    except BaseException as error:  # also SystemExit
        end = _describe(error)
    if end is not None:
        _write_frame(replies, {"end": end})
        os._exit(0)
    random.seed(0)
    while (request := _read_frame(requests)) is not None:
        try:
            arguments, named = decode_value(request)
            reply = {"value": encode_value(function(*arguments, **named))}
        except BaseException as error:
            reply = {"raise": [type(error).__name__, _describe(error)]}
        _write_frame(replies, reply)
    os._exit(0)


def check_calls(job: dict) -> None:
    """Runs `tests` with the function of the other process, and prints the verdict as JSON.

    The tests pass when none of their statements raises, and the function was called. `prompt` gives the names it defines.
    """
    verdict = os.dup(1)
    os.dup2(2, 1)  # what the tests print goes nowhere

    def end(status: str, detail: str = "") -> None:
        os.write(verdict, json.dumps({"status": status, "detail": detail}).encode())
        os._exit(0)

    calls = 0

    def candidate(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        try:
            request = encode_value([list(arguments), named])
        except (TypeError, RecursionError) as error:
            end("error", f"the tests give the function an argument that cannot be carried: {_describe(error)}")
        try:
            _write_frame(job["requests"], request)
            reply = _read_frame(job["replies"])
            if reply is None:
                end("failed", "the program ended before it answered")
            if "end" in reply:
                end("failed", str(reply["end"])[:MAX_DETAIL])
            result = None if "raise" in reply else decode_value(reply["value"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError) as error:
            end("failed", f"the program's answer cannot be read: {_describe(error)}")
        if "raise" in reply:
            name, text = (str(part)[:MAX_DETAIL] for part in reply["raise"])
            raise getattr(builtins, name if name in _RAISED else "RuntimeError")(text)
        return result

    try:
        names = _execute(_compiled(job["prompt"], job["prompt"] + "    pass\n", ""), "tests")
        tests = _compile(job["tests"], "<tests>")
    except BaseException as error:
        end("error", f"the tests are no program: {_describe(error)}")
    names[job["entry_point"]] = candidate
    before = names.get("check")  # a helper of the prompt, or the function itself
    try:
        random.seed(0)
        exec(tests, names)
        checks = names.get("check")
        if checks is not before and callable(checks):
            checks(candidate)
    except BaseException as error:
        end("failed", _describe(error))
    end("passed" if calls else "error", "" if calls else f"the tests never call {job['entry_point']!r}")


RUNS = {"script": run_script, "call": serve_calls, "check": check_calls}


def _execute(parts: list[str | types.CodeType], name: str) -> dict[str, Any]:
    """Runs code, in order, as one module, and returns its names."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    sys.argv = ["program"]
    for part in parts:
        exec(_compile(part, "<program>") if isinstance(part, str) else part, module.__dict__)
    return module.__dict__


def _compile(source: str, name: str) -> types.CodeType:
    """A program as it is, without this file's own `from __future__`."""
    return compile(source, name, "exec", dont_inherit=True)


def _parts(prompt: str, program: str, name: str) -> list[str | types.CodeType]:
    """The prompt, then the program where that defines the function; else the program as the prompt's continuation."""
    try:
        code = _compile(program, "<program>")
    except (SyntaxError, ValueError):
        return [prompt + program]
    inner = {constant.co_name for constant in code.co_consts if isinstance(constant, types.CodeType)}
    if name in inner or name in code.co_names:
        return [*_compiled(prompt, prompt + "    pass\n", ""), code]
    return [prompt + program]


def _compiled(*choices: str) -> list[str | types.CodeType]:
    """The first of the texts that is a program: a prompt may end where a function's body is to begin."""
    for text in choices:
        try:
            return [_compile(text, "<prompt>")]
        except SyntaxError:
            continue
    return []


def _describe(error: BaseException) -> str:
    """An exception in one line; a hostile one may raise again."""
    try:
        return f"{type(error).__name__}: {error}".strip().rstrip(":")[:MAX_DETAIL]
    except BaseException:
        return "an exception without a text"


def _write_frame(descriptor: int, content: Any) -> None:
    data = json.dumps(content).encode()
    if len(data) > MAX_FRAME:
        data = json.dumps({"raise": ["ValueError", f"a result of {len(data)} bytes, want at most {MAX_FRAME}"]}).encode()
    data = struct.pack(">I", len(data)) + data
    while data:
        data = data[os.write(descriptor, data):]  # fmt: skip


def _read_frame(descriptor: int) -> Any:
    """The next frame's content; None where the other side has ended."""
    header = _read(descriptor, 4)
    if len(header) < 4:
        return None
    size = struct.unpack(">I", header)[0]
    if size > MAX_FRAME:
        raise ValueError(f"a frame of {size} bytes, want at most {MAX_FRAME}")
    data = _read(descriptor, size)
    return json.loads(data) if len(data) == size else None


def _read(descriptor: int, size: int) -> bytes:
    """So many bytes, or fewer at the end."""
    data = bytearray()
    while len(data) < size and (more := os.read(descriptor, min(size - len(data), 1 << 16))):
        data += more
    return bytes(data)
