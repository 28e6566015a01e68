"""Chat templates: Jinja programs that come with a checkpoint and turn messages into text, run in `chat_sandbox`.

A template gets what transformers gives it, so that the same file renders the same text: `messages`, `tools`,
`add_generation_prompt`, the special tokens as `bos_token` and so on, `raise_exception`, `strftime_now`, `tojson` that leaves
characters as they are, loop controls, and `{% generation %}`, which changes nothing here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import SecurityError

from dsv3.checks import check
from dsv3.data.chat_sandbox import Sandbox, bounded_filter, format_time
from dsv3.data.default_template import DEFAULT_CHAT_TEMPLATE
from dsv3.data.tokenizer import BOS, EOS

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which messages have it


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it names.

    Attributes:
      source: the Jinja program.
      tokens: such as `{"bos_token": "<｜begin▁of▁sentence｜>"}`; `eos_token` ends what an assistant says.
      where: what it is called in messages.
      time: what `strftime_now` tells. None: the present.
    """

    source: str = DEFAULT_CHAT_TEMPLATE
    tokens: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"bos_token": BOS, "eos_token": EOS})
    where: str = "dsv3's chat template"
    time: datetime | None = None

    @property
    def eos(self) -> str:
        """The token that ends a turn."""
        return self.tokens["eos_token"]


def load_chat_template(directory: str | os.PathLike) -> ChatTemplate | None:
    """Reads the chat template of a checkpoint's folder.

    `chat_template.jinja` comes before `chat_template` of `tokenizer_config.json`; if that has several, the one named
    "default" is taken. Special tokens are those of `tokenizer_config.json`.

    Args:
      directory: the folder.

    Returns:
      The template, or `None` where the folder has none.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: a file that cannot be understood, or a template that does not parse.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"load_chat_template: {str(folder)!r} is no folder, want a checkpoint's")
    config = _read_config(folder / CONFIG_FILE)
    file, where = folder / TEMPLATE_FILE, f"the chat template of {str(folder)!r}"
    source = config.get("chat_template")
    if file.is_file():
        try:
            source = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"load_chat_template: {str(file)!r} is not UTF-8 (byte {error.start})") from None
    if isinstance(source, list):
        found = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        names = ", ".join(map(repr, found))
        check("default" in found, f"load_chat_template: {where} has the names {names}, want one named 'default'")
        source = found["default"]
    if source is None:
        return None
    check(isinstance(source, str), f"load_chat_template: {where} is a {type(source).__name__}, want a string")
    template = ChatTemplate(source, {"bos_token": BOS, "eos_token": EOS} | _special_tokens(config), where)
    _compiled(source, where)
    return template


def render_chat(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False,
    tools: Sequence[Any] | None = None,
) -> str:  # fmt: skip
    """Renders messages as the template says.

    Args:
      template: the template.
      messages: JSON values with `role` and `content`. Reasoning of a message is handed on as `reasoning_content` and
        `thinking`, whichever of `REASONING` it is called; fields that are null are left out, but for `content`, for which
        DeepSeek's template asks.
      add_generation_prompt: end with what stands before an assistant's answer.
      tools: JSON values that describe functions.

    Returns:
      The text.

    Raises:
      ValueError: the template does not parse, fails, refuses the messages, or tries what its sandbox forbids; one line.

    >>> render_chat(ChatTemplate(), [{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    '<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>'
    """
    given = {"messages": [_tidy(message) for message in _plain(messages)], "tools": _plain(tools)}
    compiled = _compiled(template.source, template.where)
    given |= {"add_generation_prompt": add_generation_prompt, "strftime_now": functools.partial(format_time, template.time)}
    return _run(template.where, lambda: compiled.render(**template.tokens, **given))


class _Refused(jinja2.TemplateError):
    """What a template's `raise_exception` raises."""


class _Generation(Extension):
    """`{% generation %}`, which marks what an assistant has said: its body is rendered as it stands."""

    tags = frozenset(("generation",))

    def parse(self, parser: Any) -> nodes.Node:
        """Reads the body as that of a macro which is called on the spot."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


@functools.lru_cache(maxsize=16)
def _compiled(source: str, where: str) -> jinja2.Template:
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = bounded_filter("tojson", _to_json)
    sandbox.globals["raise_exception"] = _refuse
    return _run(where, lambda: sandbox.from_string(source))


def _run(where: str, fn: Callable[[], Any]) -> Any:
    """Calls Jinja; whatever a template does wrong becomes one line."""
    try:
        return fn()
    except jinja2.TemplateSyntaxError as error:
        what = f"does not parse (line {error.lineno}: {error.message})"
    except SecurityError as error:
        what = f"tries what its sandbox forbids{_line(error)}: {error}"
    except _Refused as error:
        what = f"refuses the messages: {error}"
    except Exception as error:  # a template can raise whatever Python can
        what = f"fails{_line(error)}: {type(error).__name__}: {error}"
    raise ValueError(f"render_chat: {where} {' '.join(what.split())}") from None


def _line(error: Exception) -> str:
    """The line of the template in which an error came up."""
    lines, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f" (line {lines[-1]})" if lines else ""


def _refuse(message: str) -> None:
    raise _Refused(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    how = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, **how)


def _plain(value: Any) -> Any:
    """A copy of JSON values in Python's own types: no object with methods gets into the sandbox."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    known = value is None or type(value) in (str, int, float, bool)
    check(known, f"render_chat: `messages` hold a {type(value).__name__}, want JSON values")
    return value


def _tidy(message: dict[str, Any]) -> dict[str, Any]:
    message = {name: value for name, value in message.items() if value is not None or name == "content"}
    found = [message[name] for name in REASONING if name in message]
    return {"thinking": found[0], **message, "reasoning_content": found[0]} if found else message


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"load_chat_template: {str(file)!r} is not JSON ({error})") from None
    check(isinstance(config, dict), f"load_chat_template: {str(file)!r} holds a {type(config).__name__}, want an object")
    return config


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The entries `bos_token` and the like, as strings or as objects with a `content`."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
