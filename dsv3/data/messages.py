"""Conversations: messages as OpenAI's interface has them, read from JSON, checked, and split.

A row is one of

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools": [...]}
    {"instruction": "...", "input": "...", "output": "...", "system": "..."}

of which `tools`, `input` and `system` may be missing. An assistant's reasoning is in its content, as `<think>...</think>`
before the answer, or in a field `reasoning_content` of the message, or of the second kind of row. Further fields of a
message are handed to the template, those of a row are not looked at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.checks import check
from dsv3.data.chat_template import REASONING
from dsv3.data.corpus import heldout_place
from dsv3.data.decompress import open_binary, plain_suffix

Message = dict[str, Any]
MAX_DEPTH = 64  # of a message's lists and objects: what reads them calls itself
# By role, those that may come next; after an assistant that calls tools only they may.
_FOLLOWS = {
    None: ("user", "system"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool": ("tool", "assistant"),
}


class Conversation(NamedTuple):
    """One row.

    Attributes:
      name: where it is from, for messages to people.
      messages: see `check_messages`.
      tools: descriptions of the functions that the assistant may call, or `None`.
    """

    name: str
    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None = None


def read_conversations(path: str | os.PathLike) -> list[Conversation]:
    """Reads the conversations of a JSON file (an array) or a JSON-lines file, perhaps compressed; empty lines are none.

    Args:
      path: a file called `.json` or `.jsonl`, or so with `.gz`, `.bz2`, `.xz` or `.zst` behind.

    Returns:
      The conversations, in order, each checked.

    Raises:
      FileNotFoundError, OSError: the file cannot be read.
      ValueError: another kind of file, no row, or a bad row, named by its place.
    """
    file, found = Path(path), []
    if not file.is_file():
        raise FileNotFoundError(f"read_conversations: {str(file)!r} is no file, want JSON or JSON lines")
    for place, row in _rows(file):
        try:
            messages, tools = _row_messages(row)
            _check("", messages)
        except ValueError as error:
            raise ValueError(f"read_conversations: {str(file)!r} {place}: {error}") from None
        found.append(Conversation(f"{str(file)!r} {place}", messages, tools))
    check(bool(found), f"read_conversations: {str(file)!r} has no row")
    return found


def check_messages(messages: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> None:
    """Refuses what is no conversation.

    A system message may come first. Then user and assistant take turns; an assistant's message with `tool_calls` is followed
    by one or more of the role tool, and these by the assistant. It ends with the assistant, a prompt just before it.

    Args:
      messages: each with `role` and `content`.
      prompt: whether it is one that the assistant has to answer.

    Raises:
      ValueError: the first thing that is wrong, with the message's number, from 1.

    >>> check_messages([{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi?"}], prompt=True)
    Traceback (most recent call last):
    ValueError: check_messages: message 2 is of role 'user', want 'assistant' after 'user'
    """
    _check("check_messages: ", messages, prompt=prompt)


def split_conversations(
    conversations: Sequence[Conversation], heldout: float, seed: int = 0
) -> tuple[list[Conversation], list[Conversation]]:
    """Splits conversations into training and held-out ones by a hash of what comes before the first answer.

    So equal questions are on the same side. If a side is empty, the group of equal questions nearest to the border changes
    sides.

    Args:
      conversations: the rows.
      heldout: expected share that is held out, above 0 and below 1.
      seed: another seed, another split.

    Returns:
      (for training, held out), each in the given order.

    Raises:
      ValueError: `heldout` is not within (0, 1), or all rows ask the same.
    """
    check(0.0 < heldout < 1.0, f"split_conversations: `heldout` is {heldout}, want a share above 0 and below 1")
    places = [heldout_place(_question(conversation), seed) for conversation in conversations]
    known = sorted(set(places))
    check(len(known) > 1, f"split_conversations: {len(known)} different questions, want at least 2 to hold one out")
    border = min(max(heldout, known[1]), known[-1])
    sides = list(zip(places, conversations, strict=True))
    return [c for place, c in sides if place >= border], [c for place, c in sides if place < border]


def _question(conversation: Conversation) -> str:
    """What comes before the first answer, as text."""
    asked = []
    for message in conversation.messages:
        if message["role"] == "assistant":
            break
        asked.append(message)
    return json.dumps([asked, conversation.tools], ensure_ascii=False, sort_keys=True)


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place, row)."""
    suffix = plain_suffix(file.name)
    check(
        suffix in (".json", ".jsonl"),
        f"read_conversations: {str(file)!r} is called {suffix or 'without suffix'}, want .json or .jsonl",
    )
    try:
        with open_binary(file, "read_conversations") as stream:
            if suffix == ".jsonl":
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield f"line {number}", _parse(file, f"line {number}", line)
                return
            rows = _parse(file, "", stream.read())
    except EOFError as error:
        raise ValueError(f"read_conversations: {str(file)!r} is not whole ({error})") from None
    kind = type(rows).__name__
    check(isinstance(rows, list), f"read_conversations: {str(file)!r} holds a {kind}, want an array of rows")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _parse(file: Path, place: str, data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"read_conversations: {str(file)!r} {place + ': ' if place else ''}not JSON ({error})") from None


def _row_messages(row: Any) -> tuple[tuple[Message, ...], tuple[Any, ...] | None]:
    """The messages and tools of either kind of row."""
    check(isinstance(row, dict), f"a {type(row).__name__}, want an object")
    if "messages" in row:
        messages, tools = row["messages"], row.get("tools")
        check(isinstance(messages, list), f"`messages` is a {type(messages).__name__}, want a list")
        check(tools is None or isinstance(tools, list), f"`tools` is a {type(tools).__name__}, want a list")
        _check_text("`tools`", tools)
        return tuple(map(_tidy, messages)), tuple(tools) if tools else None
    check(
        "instruction" in row and "output" in row,
        f"the fields are {sorted(row)}, want `messages`, or `instruction` and `output`",
    )
    for name in ("instruction", "input", "output", "system", "reasoning_content"):
        value = row.get(name)
        fits = isinstance(value, str) or (value is None and name not in ("instruction", "output"))
        check(fits, f"`{name}` is a {type(value).__name__}, want a string")
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    asked = row["instruction"] + ("\n\n" + row["input"] if row.get("input") else "")
    said = {"role": "assistant", "content": row["output"]}
    if row.get("reasoning_content"):
        said["reasoning_content"] = row["reasoning_content"]
    return (*system, {"role": "user", "content": asked}, said), None


def _tidy(message: Any) -> Any:
    """A message without the fields that are null; a message that calls tools may be without content."""
    if not isinstance(message, dict):
        return message
    kept = {name: value for name, value in message.items() if value is not None}
    if not kept.get("tool_calls"):
        kept.pop("tool_calls", None)
    return kept if "content" in kept or "tool_calls" not in kept else kept | {"content": None}


def _check(before: str, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> None:
    """`check_messages`, whose complaints begin with `before`."""
    check(len(messages) > 0, f"{before}there are no messages")
    role, wanted = None, _FOLLOWS[None]
    for number, message in enumerate(messages, 1):
        where, last = f"{before}message {number}", role
        role = _check_message(where, message)
        behind = f"after {last!r}" if last else "as the first"
        check(role in wanted, f"{where} is of role {role!r}, want {' or '.join(map(repr, wanted))} {behind}")
        wanted = ("tool",) if message.get("tool_calls") else _FOLLOWS[role]
    if prompt:
        check("assistant" in wanted, f"{before}the last message is of role {role!r}, want one that the assistant answers")
    else:
        check(role == "assistant", f"{before}the last message is of role {role!r}, want 'assistant'")


def _check_message(where: str, message: Any) -> str:
    """Checks one message by itself; returns its role."""
    check(isinstance(message, Mapping), f"{where} is a {type(message).__name__}, want an object")
    role, content = message.get("role"), message.get("content")
    roles = [known for known in _FOLLOWS if known]
    check(role in roles, f"{where} has the role {role!r}, want one of {', '.join(map(repr, roles))}")
    calls = message.get("tool_calls")
    check(not calls or role == "assistant", f"{where} is of role {role!r} and has `tool_calls`")
    if not calls or content is not None:
        kind = f"a {type(content).__name__}" if "content" in message else "missing"
        check(isinstance(content, str), f"{where}: `content` is {kind}, want a string")
        said = calls or role in ("system", "tool") or content != ""
        check(said, f"{where}: `content` is empty, want what the {role} says")
    for name in REASONING:
        value = message.get(name)
        fits = value is None or (isinstance(value, str) and role == "assistant")
        check(fits, f"{where}: `{name}` is no string of an assistant's message")
    _check_text(where, message)
    return role


def _deep(value: Any, left: int = MAX_DEPTH) -> bool:
    """Whether lists and objects are within each other more than so many times."""
    if not isinstance(value, (Mapping, list, tuple)):
        return False
    return left == 0 or any(_deep(item, left - 1) for item in (value.values() if isinstance(value, Mapping) else value))


def _check_text(where: str, value: Any) -> None:
    check(not _deep(value), f"{where} is nested more than {MAX_DEPTH} deep")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has a lone surrogate ({error.object[error.start:error.end]!a})") from None
