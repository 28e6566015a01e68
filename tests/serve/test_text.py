"""Text from tokens: whole characters, stop strings across tokens, and streams that join to the final text."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data import train_tokenizer
from dsv3.serve import Engine, Request, TextStream
from tests.serve.model import POLICY, model, prompts

VOCAB = 290


@functools.cache
def tokenizer():
    return train_tokenizer(["the cat sat on the mat, the end. naïve 猫 🙂\n"] * 8, VOCAB)


def ids(text):
    return tokenizer().encode(text, add_special_tokens=False).ids


def byte_ids(data: bytes):
    """One token for each byte: byte-level BPE spells bytes as visible characters, the others from 256 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in visible]
    return [tokenizer().token_to_id(chr(b if b in visible else 256 + others.index(b))) for b in data]


def stream(tokens, stops=()):
    """Returns (pieces, text, tokens read, whether a stop string ended it)."""
    text, pieces, read = TextStream(tokenizer(), stops), [], 0
    for token in tokens:
        read += 1
        stopped = text.push(token)
        pieces.append(text.take(last=stopped))
        if stopped:
            break
    else:
        text.finish()
        pieces.append(text.take(last=True))
    return pieces, text.text, read, text.stopped


@pytest.mark.parametrize("text", ["naïve 猫🙂 the end.", "🙂🙂", "plain", "é", "a\ufffdb\ufffd"])
def test_characters_come_whole(text):
    pieces, joined, _, _ = stream(byte_ids(text.encode()))
    assert joined == text == "".join(pieces)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces) and len([p for p in pieces if p]) == len(text)


@settings(max_examples=60)
@given(st.lists(st.integers(3, VOCAB - 1), max_size=30))
def test_any_tokens_join_to_their_decoding(tokens):
    pieces, text, _, _ = stream(tokens)
    assert text == "".join(pieces) == tokenizer().decode(tokens)


@settings(max_examples=100)
@given(st.text("abc", max_size=25), st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3))
def test_stop_strings_end_the_text_at_their_first_byte(text, stops):
    pieces, got, read, stopped = stream(byte_ids(text.encode()), stops)
    # The earliest prefix that holds a stop string; of those that end there, the one that begins first.
    ends = [n for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)]
    want = min(text[: ends[0]].find(stop) for stop in stops if stop in text[: ends[0]]) if ends else len(text)
    assert (stopped, got) == (bool(ends), text[:want])
    assert "".join(pieces) == got
    if ends:
        assert read == ends[0]
    for n in range(len(pieces)):  # nothing is shown that a stop string takes away later
        assert got.startswith("".join(pieces[:n]))


def test_a_token_may_hold_the_stop_string_and_more():
    the = ids(" the")
    assert len(the) == 1
    for stops, want in ((["h"], "cat t"), ([" the"], "cat"), (["e"], "cat th"), (["at t"], "c")):
        _, text, read, stopped = stream([*ids("cat"), *the], stops)
        assert (text, stopped, read) == (want, True, len(ids("cat")) + 1)


def test_held_text_is_shown_when_no_stop_string_comes_of_it():
    pieces, text, _, stopped = stream(byte_ids(b"x<end?<en"), ["<end>"])
    assert pieces[:6] == ["x", "", "", "", "", "<end?"] and pieces[6:] == ["", "", "", "<en"]
    assert text == "x<end?<en" and not stopped


@functools.cache
def engine(depth=0):
    options = {"policy": POLICY, "chunk_sizes": (8,), "smallest_cache": 64, "max_batch": 1}
    return Engine(*model(VOCAB), tokenizer=tokenizer(), speculative=depth, **options)


def request(prompt, **fields):
    return Request(prompt, **({"max_new_tokens": 24, "stop_tokens": (), "temperature": 0.7} | fields))


@pytest.mark.parametrize("depth", [0, 2])
def test_events_join_to_the_completion(depth):
    requests = [request("the cat", seed=1), request("mat, the", seed=2), request("🙂", seed=3, max_new_tokens=3)]
    joined, last = {}, {}
    for event in engine(depth).stream(requests):
        assert event.index not in last, "an event after a request's last"
        tokens, logprobs, text = joined.get(event.index, ((), (), ""))
        joined[event.index] = tokens + event.tokens, logprobs + event.logprobs, text + event.text
        if event.completion:
            last[event.index] = event.completion
    assert sorted(last) == [0, 1, 2]
    for index, done in last.items():
        assert joined[index] == (done.tokens, done.logprobs, done.text)
        assert done.text == tokenizer().decode(list(done.tokens))
    assert engine(depth).generate(requests) == [last[0], last[1], last[2]]


def test_text_prompts_are_encoded_with_the_first_token():
    text, tokens = "the cat", tokenizer().encode("the cat").ids
    assert tokens[0] == 0
    by_text, by_ids = engine().generate([request(text), request(tokens)])
    assert by_text == by_ids and by_text.prompt_tokens == len(tokens)


def test_stop_strings_end_a_row():
    (free,) = engine().generate([request("the cat", seed=5)])
    whole = free.text
    stops = [whole[i : i + n] for n in (1, 2, 3) for i in range(len(whole) - n) if "\ufffd" not in whole[i : i + n]]
    assert {1, 2, 3} == set(map(len, stops))
    for stop in stops[::2]:
        (done,) = engine().generate([request("the cat", seed=5, stop=[stop, "not in there at all"])])
        assert done.finish_reason == "stop_string" and done.text == free.text[: free.text.find(stop)]
        assert done.tokens == free.tokens[: len(done.tokens)] and stop in tokenizer().decode(list(done.tokens))
        assert stop not in tokenizer().decode(list(done.tokens[:-1]))


def test_a_stop_token_is_not_part_of_the_text():
    (free,) = engine().generate([request("the cat", seed=5)])
    stop = free.tokens[6]
    (done,) = engine().generate([request("the cat", seed=5, stop_tokens=[stop])])
    assert done.finish_reason == "stop_token" and done.tokens[-1] == stop
    assert done.text == tokenizer().decode(list(done.tokens[:-1]))


def test_text_needs_a_fitting_tokenizer():
    with pytest.raises(ValueError, match="check_tokenizer: the tokenizer's largest id is 289, want below .* 12"):
        Engine(*model(12), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="Engine: request 0: `prompt` is empty"):
        engine().generate([request("")])
    for bad, name in ((request("a\udcff"), "prompt"), (request("a", stop=["b", "a\udcff"]), "stop")):
        with pytest.raises(ValueError, match=f"Engine: request 0: `{name}` has a lone surrogate at 1, want Unicode text"):
            engine().generate([bad])
    done = Engine(*model(VOCAB), policy=POLICY, chunk_sizes=(8,), smallest_cache=64, max_batch=2).generate(
        [request(prompts(3)[0], max_new_tokens=2)]
    )
    assert done[0].text is None and np.isfinite(done[0].logprobs).all()
