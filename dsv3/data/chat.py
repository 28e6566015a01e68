"""Conversations as tokens, with what the assistant wrote marked: that is what fine-tuning learns.

    tokenizer = load_tokenizer(folder)
    codec = chat_codec(tokenizer, find_chat_template(folder, tokenizer))
    samples = encode_turns(codec, messages)        # [EncodedChat(ids, loss)]
    prompt = encode_prompt(codec, [{"role": "user", "content": "Hi"}])

Who writes decides what becomes a control token (an added token of the tokenizer, such as `<｜User｜>`). The template may
write all of them, an assistant `<think>` and `</think>`. Everything else, what a user has written above all, is text: where
it spells a control token out, it becomes the tokens of that spelling, in names of fields as in values.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from dsv3.checks import check
from dsv3.data.chat_template import REASONING, ChatTemplate, load_chat_template, render_chat
from dsv3.data.messages import check_messages
from dsv3.data.tokenizer import CHAT_TOKENS

# Names that are the format's, not a writer's, wherever they stand in messages and tools.
_NAMES = {*REASONING, *"role content name tool_calls tool_call_id id type function arguments".split()}
_NAMES |= {*"description parameters properties required items enum default".split()}
THINK, END_THINK = "<think>", "</think>"
# Code points that are no characters: one that no message has is put into spellings, so that they are not taken for tokens.
_MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


class EncodedChat(NamedTuple):
    """A sequence to train on.

    Attributes:
      ids: `[N]` int32.
      loss: `[N]` bool, the tokens that are learned: what the assistant wrote and the token that ends its turn.
    """

    ids: np.ndarray
    loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class ChatCodec:
    """A tokenizer and a template, made by `chat_codec`.

    Attributes:
      tokenizer: the tokenizer. template: the chat template.
      plain: the same tokenizer without added tokens, which takes everything for text.
      controls: the added tokens' ids, by their spelling.
      find, find_others: match any of them, and those that an assistant may not write.
      edges: beginnings and ends of the spellings, without the whole ones.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    plain: Tokenizer
    controls: Mapping[str, int]
    find: re.Pattern[str]
    find_others: re.Pattern[str]
    edges: tuple[frozenset[str], frozenset[str]]


class _Turn(NamedTuple):
    """An answer: the text that it is given to, and what is learned of it, the end of the turn included."""

    prompt: str
    said: str


def chat_codec(tokenizer: Tokenizer, template: ChatTemplate) -> ChatCodec:
    """Puts a tokenizer and a chat template together.

    Args:
      tokenizer: see `dsv3.data.load_tokenizer`.
      template: see `load_chat_template`.

    Raises:
      ValueError: the tokenizer lacks the token that ends a turn, or has added tokens that swallow the spaces around them,
        or of one character.
    """
    added = tokenizer.get_added_tokens_decoder()
    odd = [t.content for t in added.values() if t.lstrip or t.rstrip or t.single_word]
    check(not odd, f"chat_codec: the added token {odd[:1]} depends on what stands beside it, want tokens that do not")
    short = [token.content for token in added.values() if len(token.content) < 2]
    check(not short, f"chat_codec: the added token {short[:1]} is too short to be told from text, want 2 characters or more")
    controls = {token.content: number for number, token in added.items()}
    eos, where = template.eos, template.where
    check(eos in controls, f"chat_codec: {where} ends a turn with {eos!r}, which the tokenizer does not have as a token")
    described = json.loads(tokenizer.to_str())
    described |= {"added_tokens": [], "post_processor": None}
    plain = Tokenizer.from_str(json.dumps(described))
    spelled = plain.encode_batch_fast(list(controls), add_special_tokens=False)
    taken = [text for text, code in zip(controls, spelled, strict=True) if set(code.ids) & set(controls.values())]
    check(not taken, f"chat_codec: the tokenizer has {taken[:1]} among the tokens of plain text, too")
    parts = [(t[:i], t[i:]) for t in controls for i in range(1, len(t))]
    edges = tuple(map(frozenset, zip(*parts, strict=True)))
    others = {*controls} - {THINK, END_THINK}
    return ChatCodec(tokenizer, template, plain, controls, _any_of(controls), _any_of(others), edges)


def find_chat_template(directory: str | os.PathLike, tokenizer: Tokenizer) -> ChatTemplate:
    """Reads the chat template of a checkpoint's folder; where it has none, dsv3's serves a tokenizer that has its tokens.

    Args:
      directory: the folder.
      tokenizer: the folder's.

    Raises:
      FileNotFoundError, ValueError: as `load_chat_template`, and where there is no template at all.
    """
    found = load_chat_template(directory)
    missing = [token for token in CHAT_TOKENS if tokenizer.token_to_id(token) is None]
    check(
        found is not None or not missing,
        f"find_chat_template: {str(directory)!r} has no chat template, and its tokenizer no {missing[:1]} for dsv3's",
    )
    return found or ChatTemplate()


def encode_chat(
    codec: ChatCodec, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None
) -> EncodedChat:
    """Encodes a conversation as one sequence, of which every answer is learned.

    Args:
      codec: from `chat_codec`.
      messages: see `check_messages`.
      tools: what the template is given as `tools`.

    Raises:
      ValueError: as `encode_turns`; or the template changes an answer once it has been followed by another question, as
        DeepSeek's leaves its reasoning out, so that one sequence cannot hold it both ways. `encode_turns` makes several.
    """
    samples = encode_turns(codec, messages, tools=tools)
    one = len(samples) == 1
    check(one, f"encode_chat: {codec.template.where} changes earlier answers, want `encode_turns`: {len(samples)} sequences")
    return samples[0]


def encode_turns(
    codec: ChatCodec, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None
) -> list[EncodedChat]:
    """Encodes a conversation as the sequences that a model sees and continues when it answers in turns.

    An answer is learned after the prompt that the template makes of what comes before it, and up to the token that ends
    the turn. Answers share a sequence where the later prompt holds the earlier answer as it was given; mostly that is one
    sequence. Where the template leaves an answer's reasoning out, it is put in front of the answer, as
    `<think>\\n...\\n</think>\\n\\n` if it came as `reasoning_content`: a model that reasons writes it there itself.

    Args:
      codec, messages, tools: as of `encode_chat`.

    Returns:
      The sequences, in the order of the last answer in each; every answer is learned in exactly one.

    Raises:
      ValueError: messages that are no conversation; a template that fails, or that does not end a turn with its `eos_token`.
    """
    check_messages(messages)
    mark, messages, tools = _guard(codec, messages, tools)
    left = [_turn(codec, messages, i, tools) for i, message in enumerate(messages) if message["role"] == "assistant"]
    samples = []
    while left:
        text = "".join(left[-1])
        held = [turn for turn in left if text.startswith("".join(turn))]
        samples.append(_encode(codec, text, [(len(t.prompt), len(t.prompt) + len(t.said)) for t in held], mark))
        left = [turn for turn in left if turn not in held]
    return samples[::-1]


def encode_prompt(
    codec: ChatCodec, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any] | None = None
) -> list[int]:
    """Encodes messages that the assistant is to answer, with what the template writes before an answer.

    Args:
      codec, messages, tools: as of `encode_chat`; the last message is a user's or a tool's.

    Returns:
      Token ids, begin of sentence included where the template writes it.

    Raises:
      ValueError: as `encode_turns`.
    """
    check_messages(messages, prompt=True)
    mark, messages, tools = _guard(codec, messages, tools)
    text = render_chat(codec.template, messages, add_generation_prompt=True, tools=tools)
    return _encode(codec, text, [], mark).ids.tolist()


def encode_next(codec: ChatCodec, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Encodes what a template writes from the end of the last answer to where the next one begins.

    So a conversation can be drawn as one sequence: the prompt of `encode_prompt`, an answer with the token that ends it,
    what this returns, another answer.

    Args:
      codec: from `chat_codec`.
      messages: a conversation up to what is asked after an answer.

    Raises:
      ValueError: as `encode_turns`; or the template changes what came before once another question follows.
    """
    check_messages(messages, prompt=True)
    mark, messages, _ = _guard(codec, messages, None)
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    check(last >= 0, "encode_next: the messages hold no answer, want one before the last question")
    held = "".join(_turn(codec, messages, last, None))
    text = render_chat(codec.template, messages, add_generation_prompt=True)
    changes = f"encode_next: {codec.template.where} changes what came before once another question follows"
    check(text.startswith(held), f"{changes}, so that one sequence cannot hold the conversation")
    return _encode(codec, text[len(held) :], [], mark).ids.tolist()


def _turn(codec: ChatCodec, messages: Sequence[Mapping[str, Any]], index: int, tools: Sequence[Any] | None) -> _Turn:
    """The answer that is message `index`."""
    template, message, before = codec.template, messages[index], messages[:index]
    prompt = render_chat(template, before, add_generation_prompt=True, tools=tools)
    whole = render_chat(template, [*before, message], tools=tools)
    block, answer = _reasoning(message)
    left_out = bool(block) and render_chat(template, [*before, answer], tools=tools) == whole
    stem, opening = prompt, ""  # a template may open the reasoning itself
    if prompt.rstrip().endswith(THINK):
        stem = prompt[: prompt.rindex(THINK)]
        opening = prompt[len(stem) :]
    if whole.startswith(prompt) and not left_out:
        said = whole[len(prompt) :]
    elif whole.startswith(stem):
        block = block or f"{THINK}\n\n{END_THINK}\n\n"
        if not block.startswith(opening):
            block = opening + block.removeprefix(THINK).lstrip("\n")
        said = block[len(opening) :] + whole[len(stem) :].rpartition(END_THINK)[2]
    else:
        raise ValueError(f"encode_turns: {template.where} does not begin message {index + 1} as its own prompt ends")
    end = said.rfind(template.eos)
    check(end >= 0, f"encode_turns: {template.where} does not end message {index + 1} with {template.eos}")
    return _Turn(prompt, said[: end + len(template.eos)])


def _reasoning(message: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What an assistant thought, as it stands before the answer ("": nothing), and the message without it."""
    found = next((message[name] for name in REASONING if message.get(name)), "")
    if found:
        rest = {name: value for name, value in message.items() if name not in REASONING}
        return f"{THINK}\n{found.strip()}\n{END_THINK}\n\n", rest
    head, end, answer = (message.get("content") or "").rpartition(END_THINK)
    if not end:
        return "", dict(message)
    head = head if head.lstrip().startswith(THINK) else THINK + head
    return head.lstrip() + end, message | {"content": answer}


def _guard(
    codec: ChatCodec, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
) -> tuple[str, list[Any], list[Any] | None]:
    """A mark, and messages and tools with it put into the spelling of control tokens that their writers may not write."""
    text = json.dumps([list(messages), list(tools or ()), codec.template.source], ensure_ascii=False)
    mark = next((mark for mark in _MARKS if mark not in text), None)
    check(mark is not None, "encode_turns: the messages hold all code points from U+FDD0 to U+FDEF, which are no text")
    guarded = [_guarded_message(codec, message, mark) for message in messages]
    return mark, guarded, _guarded(codec, list(tools), mark) if tools else None


def _guarded_message(codec: ChatCodec, message: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """A message whose role has been checked; an assistant may think in what it says, nowhere else."""
    own = ("content", *REASONING) if message["role"] == "assistant" else ()
    found = {}
    for name, value in message.items():
        if name in own and isinstance(value, str):
            found[name] = _spelled(codec, value, mark, codec.find_others)
        elif name == "role":
            found[name] = value
        else:
            found |= _guarded(codec, {name: value}, mark)
    return found


def _guarded(codec: ChatCodec, value: Any, mark: str) -> Any:
    if isinstance(value, str):
        return _spelled(codec, value, mark, codec.find)
    if isinstance(value, Mapping):
        names = [name if name in _NAMES else _guarded(codec, name, mark) for name in value]
        return {name: _guarded(codec, item, mark) for name, item in zip(names, value.values(), strict=True)}
    return [_guarded(codec, item, mark) for item in value] if isinstance(value, list | tuple) else value


def _spelled(codec: ChatCodec, text: str, mark: str, find: re.Pattern[str]) -> str:
    """A text with marks in it where it spells a control token, and around it where it ends or begins with a part of one."""
    while find.search(text):
        text = find.sub(lambda found: found[0][0] + mark + found[0][1:], text)
    beginnings, ends = codec.edges
    longest = max(map(len, codec.controls))
    before = mark if any(text[:size] in ends for size in range(1, longest)) else ""
    behind = mark if any(text[-size:] in beginnings for size in range(1, longest)) else ""
    return before + text + behind


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("(" + "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) + ")")


def _encode(codec: ChatCodec, text: str, spans: Sequence[tuple[int, int]], mark: str) -> EncodedChat:
    """Encodes a rendered text; the tokens within the spans are learned. No token reaches across a span's border."""
    ids: list[int] = []
    loss: list[bool] = []
    cuts = [0, *sorted(place for span in spans for place in span), len(text)]
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        before = len(ids)
        for piece in codec.find.split(text[start:stop]):
            if piece in codec.controls:
                ids.append(codec.controls[piece])
            elif piece:
                ids += codec.plain.encode(piece.replace(mark, ""), add_special_tokens=False).ids
        loss += [number % 2 == 1] * (len(ids) - before)
    return EncodedChat(np.array(ids, np.int32), np.array(loss, bool))
