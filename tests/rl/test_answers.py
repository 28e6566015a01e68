"""Where an answer stands in a completion, and how numbers are read."""

import string
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.rl.answers import RULES, after_thinking, code_spans, find_answer, last_boxed, last_code_block, last_tag
from dsv3.rl.quantity import read_quantity

PIECES = ["<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "\\{", "#### ", "answer is ", "```", "~~~python", "猫"]
JUNK = st.lists(st.sampled_from([*PIECES, *"\n 1,./%$x{}\\\ud800"]), max_size=30).map("".join)


@pytest.mark.parametrize(
    "text, found",
    [
        ("4", "4"),
        ("<think>4</think>5", "5"),
        ("<think>4</think>5</think>6", "6"),
        ("4</think>5", "5"),
        ("<think>4", None),
        ("<think>4</think>5<think>6", None),
    ],
)
def test_after_thinking(text, found):
    assert after_thinking(text) == found


@pytest.mark.parametrize(
    "text, found",
    [
        (r"\boxed{1}", "1"),
        (r"\boxed{1} then \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {3}", "3"),
        (r"\fbox{3}", "3"),
        (r"\boxed{\boxed{3} + 1}", r"\boxed{3} + 1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a} \boxed{b", "a"),
        (r"\boxed{b \boxed{a}", "a"),
        (r"}}} \boxed{1}", "1"),
        (r"\boxed1", None),
        ("", None),
    ],
)
def test_last_boxed(text, found):
    assert last_boxed(text) == found


def test_last_tag():
    assert last_tag("<answer>1</answer><answer> 2\n</answer>") == "2"
    assert last_tag("<answer><answer>1</answer>") == "1"
    assert last_tag("</answer>1<answer>") is None and last_tag("<answer>1") is None
    assert last_tag("<solution>1</solution>", "solution") == "1"


@pytest.mark.parametrize(
    "text, found",
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("a\n```\nx\n```\nb\n```py\ny\n```", "y\n"),
        ("```python\nx\n```\n```text\n7\n```", "x\n"),
        ("```python\nx\n", None),
        ("````python\n```\nx\n```\n````", "```\nx\n```\n"),
        ("~~~Python3\nx\n~~~~", "x\n"),
        ("  ```python title=a\n  x\n  ```", "  x\n"),
        ("```python\r\nx\r\n```\r\n", "x\r\n"),
        ("```python\n```", ""),
        ("say `x` or ```y```", None),
        ("```c\nx\n```", None),
    ],
)
def test_last_code_block(text, found):
    assert last_code_block(text) == found


def test_code_spans():
    text = "a `b` c\n```x\n`d`\n```\ne `f`\n~~~\nopen `g`"
    assert [text[start:stop] for start, stop in code_spans(text)] == ["`b`", "```x\n`d`\n```\n", "`f`", "~~~\nopen `g`"]


@pytest.mark.parametrize(
    "rule, text, found",
    [
        ("tag", "<answer>5</answer>", "5"),
        ("tag", r"<answer>so \boxed{5}.</answer>", "5"),
        ("tag", "<answer>so\n#### 5</answer>", "5"),
        ("tag", r"\boxed{5}", None),
        ("hash", "6 * 7 = 42\n#### 42\n", "42"),
        ("hash", "#### 1\n#### 2 apples\nbye", "2 apples"),
        ("hash", "42", None),
        ("phrase", "The answer is **42**. Good.", "42"),
        ("phrase", "Final Answer: 3.5 km", "3.5 km"),
        ("phrase", "The answer is 1. No, the answer is 2", "2"),
        ("phrase", "No answers", None),
        ("number", "so 17 apples and -3.", "-3"),
        ("number", "it is 1,234.50 or 50%", "50%"),
        ("number", "3/4 of it", "3/4"),
        ("number", "a1b2", None),
        ("whole", " x + 1\n", "x + 1"),
        ("whole", " \n", None),
    ],
)
def test_rules(rule, text, found):
    assert find_answer(text, (rule,)) == found


def test_rules_are_tried_in_order():
    text = r"\boxed{1} #### 2"
    assert find_answer(text, ("tag", "boxed", "hash")) == "1" and find_answer(text, ("hash", "boxed")) == "2"
    assert find_answer(text, ("tag",)) is None


@settings(max_examples=200)
@given(JUNK)
def test_nothing_raises(text):
    """Whatever is found stands in the text."""
    for rule in RULES:
        found = find_answer(text, (rule,))
        assert found is None or found in text
    for start, stop in code_spans(text):
        assert 0 <= start < stop <= len(text)
    after_thinking(text), last_code_block(text), read_quantity(text)


@pytest.mark.parametrize(
    "text, value, percent, unit",
    [
        ("42", 42, False, ""),
        ("-5", -5, False, ""),
        ("− 5", -5, False, ""),
        ("+3.", 3, False, ""),
        (".5", "1/2", False, ""),
        ("1,234,567.50", "2469135/2", False, ""),
        (r"10,\!080", 10080, False, ""),
        (r"11,\! 111,\! 111,\! 100", 11111111100, False, ""),
        ("$18", 18, False, "$"),
        ("-$18.50", "-37/2", False, "$"),
        (r"\$32,\!348", 32348, False, "$"),
        ("$18$", 18, False, ""),
        (r"\(18\)", 18, False, ""),
        ("18 dollars", 18, False, "$"),
        ("3/4", "3/4", False, ""),
        ("1 3/4", "7/4", False, ""),
        (r"-\frac{3}{8}", "-3/8", False, ""),
        (r"\dfrac{-3}{8}", "-3/8", False, ""),
        (r"\frac43", "4/3", False, ""),
        (r"\frac 59", "5/9", False, ""),
        (r"137 \frac{1}{2}", "275/2", False, ""),
        (r"3 \times 10^{4}", 30000, False, ""),
        ("3e-2", "3/100", False, ""),
        ("50%", 50, True, ""),
        (r"12.5\%", "25/2", True, ""),
        ("50 percent", 50, True, ""),
        (r"90^\circ", 90, False, "degree"),
        ("90 degrees", 90, False, "degree"),
        (r"5.4 \text{ cents}", "27/5", False, "cent"),
        (r"15\mbox{ cm}^2", 15, False, "cm^2"),
        ("15 cm²", 15, False, "cm^2"),
        ("18 km/h", 18, False, "km/h"),
        ("5km", 5, False, "km"),
        ("12 miles per hour", 12, False, "milesperhour"),
        ("5 million", 5_000_000, False, ""),
        (r"$1.5 \text{ million}", 1_500_000, False, "$"),
        ("3 dozen eggs", 36, False, "egg"),
    ],
)
def test_numbers(text, value, percent, unit):
    assert read_quantity(text) == (Fraction(value), percent, unit)


@pytest.mark.parametrize(
    "text",
    ["", "x", "2k", "5m", "3R^2", "2 x", r"8 \pi", "52_8", "4210_{5}", "1,23", "1, 234", "3,5", "(1,2)", "1,-2", "1/0",
     r"\frac{1}{0}", "2^3", "3!", "1/2/3", "1_000", "0x10", "1e500", "9" * 300, r"\sqrt{2}", "1 + 1", "x = 5",
     "3 apples and 4", "1.2.3", "--1", "5 or six", "5 and a half", r"5 \text{ or six}", "5 squared"],
)  # fmt: skip
def test_what_is_no_plain_number(text):
    assert read_quantity(text) is None


@settings(max_examples=100)
@given(st.integers(-10**12, 10**12), st.integers(0, 3), st.sampled_from(["", " apples", r"\text{ cm}", "%", r"\%"]))
def test_numbers_come_back(number, places, behind):
    value = Fraction(number, 10**places)
    text = f"{number / 10**places:,.{places}f}{behind}"
    found = read_quantity(text)
    assert found.value == value and found.percent == ("%" in behind)
    assert read_quantity(rf"\frac{{{number}}}{{{10**places}}}").value == value


def test_long_texts_take_no_time():
    """Each would take hours if it were quadratic, or worse, in steps of Python."""
    for behind in ("a" * 150 + "!", "a b " * 40 + "!", "1," * 90, "1 " * 90, r"\text{" * 30):
        assert read_quantity("5 " + behind) is None
    for piece in ["\\boxed{", "{", "}", "```\n", "answer is ", "1", "1,", "<answer>", "</answer>", "#### ", "`", "$"]:
        text = piece * (200_000 // len(piece)) + string.ascii_letters
        for rule in RULES:
            find_answer(text, (rule,))
        code_spans(text), last_code_block(text)
