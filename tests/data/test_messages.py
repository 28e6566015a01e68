"""Rows of conversations: what is read, what is refused and how it is named, and on which side of a split it is."""

import gzip
import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dsv3.data import Conversation, check_messages, read_conversations, split_conversations
from tests.real_data import DATA

CALL = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]


def says(*roles, **last):
    """Messages of the given roles; the last one has more fields."""
    messages = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
    messages[-1].update(last)
    return messages


def lines(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_both_kinds_of_rows(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    called = [*says("user"), {"role": "assistant", "content": None, "tool_calls": CALL}, *says("tool", "assistant")]
    rows = [
        {"messages": [m | {"tool_calls": []} for m in says("system", "user", "assistant")], "tools": None, "id": 7},
        {"messages": called, "tools": tools},
        {"instruction": "Add", "input": "1 and 2", "output": "3", "rejected": "4"},
        {"instruction": "Hi", "input": "", "output": "Ho", "system": "Be", "reasoning_content": "why not"},
    ]
    for path in (lines(tmp_path, *rows), lines(tmp_path, json.dumps(rows), name="rows.json")):
        got = read_conversations(path)
        assert [c.messages for c in got] == [
            tuple(says("system", "user", "assistant")),
            tuple(called),
            ({"role": "user", "content": "Add\n\n1 and 2"}, {"role": "assistant", "content": "3"}),
            (
                {"role": "system", "content": "Be"},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho", "reasoning_content": "why not"},
            ),
        ]
        assert [c.tools for c in got] == [None, tuple(tools), None, None]
    assert got[2].name == f"{str(tmp_path / 'rows.json')!r} row 3"
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(lines(tmp_path, *rows).read_bytes()))
    assert [c.messages for c in read_conversations(packed)] == [c.messages for c in got]


def nested(depth):
    """A list in a list, so many of them."""
    return [nested(depth - 1)] if depth else []


def test_empty_lines_are_no_rows(tmp_path):
    rows = read_conversations(lines(tmp_path, GOOD, "", GOOD, " \t", ""))
    assert [row.name.rpartition("' ")[2] for row in rows] == ["line 1", "line 3"]


def test_rows_may_be_nested(tmp_path):
    row = {"messages": says("user", "assistant", more=nested(60))}
    assert len(read_conversations(lines(tmp_path, row))) == 1


GOOD = {"instruction": "a", "output": "b"}


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", r"line 2: not JSON \("),
        ('{"messages": [], "tools": ' + "[" * 900 + "]" * 900 + "}", "line 2: `tools` is nested more than 64 deep"),
        ({"messages": says("user", "assistant", more=nested(64))}, "line 2: message 2 is nested more than 64 deep"),
        ("[" * 200_000, r"line 2: not JSON \("),
        ([], "line 2: a list, want an object"),
        ({"text": "x"}, r"line 2: the fields are \['text'\], want `messages`, or `instruction` and `output`"),
        ({"instruction": "x", "output": 3}, "line 2: `output` is a int, want a string"),
        ({"instruction": "x", "output": "y", "input": []}, "line 2: `input` is a list, want a string"),
        ({"instruction": "x", "output": ""}, "line 2: message 2: `content` is empty, want what the assistant says"),
        ({"messages": {}}, "line 2: `messages` is a dict, want a list"),
        ({"messages": says("user", "assistant"), "tools": 1}, "line 2: `tools` is a int, want a list"),
        ({"messages": []}, "line 2: there are no messages"),
        ({"messages": ["hi"]}, "line 2: message 1 is a str, want an object"),
        ({"messages": says("user", "human")}, "line 2: message 2 has the role 'human', want one of 'system', 'user'"),
        ({"messages": says("assistant")}, "line 2: message 1 is of role 'assistant', want 'user' or 'system' as the first"),
        ({"messages": says("system", "system")}, "message 2 is of role 'system', want 'user' after 'system'"),
        ({"messages": says("user", "user")}, "message 2 is of role 'user', want 'assistant' after 'user'"),
        ({"messages": says("user", "assistant", "system")}, "message 3 is of role 'system', want 'user' after 'assistant'"),
        ({"messages": says("user", "assistant", "user")}, "the last message is of role 'user', want 'assistant'"),
        ({"messages": says("user", "tool")}, "message 2 is of role 'tool', want 'assistant' after 'user'"),
        ({"messages": says("user", "assistant", tool_calls=CALL) + says("user")}, "message 3 is of role 'user', want 'tool"),
        ({"messages": says("user", tool_calls=CALL)}, "message 1 is of role 'user' and has `tool_calls`"),
        ({"messages": says("user", "assistant", content=[{"type": "text"}])}, "message 2: `content` is a list, want a"),
        ({"messages": [{"role": "user"}]}, "message 1: `content` is missing, want a string"),
        ({"messages": says("user", reasoning_content="x")}, "message 1: `reasoning_content` is no string of an assistant's"),
        ({"messages": says("user", "assistant", thinking=3)}, "message 2: `thinking` is no string of an assistant's"),
        ({"messages": says("user", "assistant", tool_calls=CALL, content=[1])}, "message 2: `content` is a list, want a"),
        ('{"messages": [], "tools": ["\\ud800"]}', r"`tools` has a lone surrogate \('\\ud800'\)"),
        ('{"instruction": "a\\ud800", "output": "b"}', r"message 1 has a lone surrogate \('\\ud800'\)"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=f"read_conversations: '.*rows.jsonl' (line 2: )?{message}") as caught:
        read_conversations(lines(tmp_path, GOOD, row, GOOD))
    assert "\n" not in str(caught.value) and "line 2" in str(caught.value)


def test_bad_files_are_named(tmp_path):
    for path, message in [
        (lines(tmp_path, json.dumps(GOOD), name="a.json"), "a.json' holds a dict, want an array of rows"),
        (lines(tmp_path, json.dumps([GOOD, 3]), name="b.json"), "b.json' row 2: a int, want an object"),
        (lines(tmp_path, "[", name="c.json"), r"c.json' not JSON \("),
        (lines(tmp_path, name="d.jsonl"), "d.jsonl' has no row"),
        (lines(tmp_path, GOOD, name="e.csv"), "e.csv' is called .csv, want .json or .jsonl"),
    ]:
        with pytest.raises(ValueError, match=f"read_conversations: '.*{message}"):
            read_conversations(path)
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(b'{"instruction": "a", "output": "b"}\n' * 9)[:-9])
    with pytest.raises(ValueError, match=r"read_conversations: '.*f.jsonl.gz' is not whole"):
        read_conversations(tmp_path / "f.jsonl.gz")
    with pytest.raises(FileNotFoundError, match="read_conversations: '.*nowhere.json' is no file"):
        read_conversations(tmp_path / "nowhere.json")


def test_a_prompt_ends_where_the_assistant_answers():
    for messages in (says("user"), says("system", "user"), [*says("user", "assistant", tool_calls=CALL), *says("tool")]):
        check_messages(messages, prompt=True)
        with pytest.raises(ValueError, match="check_messages: the last message is of role"):
            check_messages(messages)
    with pytest.raises(ValueError, match="the last message is of role 'assistant', want one that the assistant answers"):
        check_messages(says("user", "assistant"), prompt=True)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.floats(0.01, 0.99), st.integers(0, 3))
def test_equal_questions_are_on_one_side(questions, heldout, seed):
    assume(len(set(questions)) > 1)
    rows = [
        Conversation(str(i), ({"role": "user", "content": f"q{q}"}, {"role": "assistant", "content": str(i)}))
        for i, q in enumerate(questions)
    ]
    train, held = split_conversations(rows, heldout, seed)
    assert train and held and sorted([*train, *held], key=lambda c: int(c.name)) == rows
    sides = [{c.messages[0]["content"] for c in side} for side in (train, held)]
    assert not sides[0] & sides[1]
    alone = split_conversations(rows[::-1], heldout, seed)
    assert [c.name for c in alone[1]] == [c.name for c in held[::-1]]


def test_splitting_refuses():
    row = Conversation("a", tuple(says("user", "assistant")))
    with pytest.raises(ValueError, match="split_conversations: 1 different questions, want at least 2"):
        split_conversations([row, row], 0.1)
    with pytest.raises(ValueError, match="split_conversations: `heldout` is 1.0, want a share above 0 and below 1"):
        split_conversations([row, row], 1.0)


@pytest.mark.skipif(not (DATA / "sft_rasbt").is_dir(), reason="no data folder (DSV3_DATA)")
def test_real_rows():
    plain, preferred = (
        read_conversations(DATA / "sft_rasbt" / f"instruction-data{more}.json") for more in ("", "-with-preference")
    )
    assert len(plain) == 1100 and [c.messages for c in plain] == [c.messages for c in preferred]
    train, held = split_conversations(plain, 0.1)
    assert len(train) + len(held) == 1100 and 70 < len(held) < 150
