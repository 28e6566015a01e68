"""Right answers are worth 1.0 in whatever way they are written, others and garbage 0.0, in any thread, within a limit."""

import os
import re
import signal
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.rl import math_process, math_worker
from dsv3.rl.math_process import MathComparer
from dsv3.rl.problems import read_gsm8k, read_math
from dsv3.rl.reward_math import make_math_reward, reference_answer
from tests.more import more
from tests.rl.data import GSM8K, MATH

REWARD = make_math_reward()


def boxed(answer, reference, reward=REWARD):
    return reward("", rf"So it is $\boxed{{{answer}}}$.", reference)


def change(text, which):
    """The text with another first or last digit; with another letter where there is no digit."""
    places = list(re.finditer(r"\d", text)) or list(re.finditer("[A-Ya-y]", text))
    place = places[which]
    other = str(int(place[0]) % 9 + 1) if place[0].isdigit() else chr(ord(place[0]) + 1)
    return text[: place.start()] + other + text[place.end() :]


@pytest.mark.parametrize(
    "answer, reference",
    [
        ("42", "42"),
        ("42.0", "42"),
        ("042", "42"),
        ("1080", "1,080"),
        ("1{,}080", "1,080"),
        (r"1\,080", "1,080"),
        ("500000", r"5 \text{ hundred thousand}"),
        ("BCA", r"\text{BCA}"),
        (r"\textit{BCA}", "BCA"),
        ("bca", "BCA"),
        ("yx", "xy"),
        ("$1,080", "6 * 180 = 1080\n#### 1080"),
        ("18 dollars", "$18"),
        ("0.5", r"\frac{1}{2}"),
        ("1/2", r"\dfrac12"),
        (r"1\frac{4}{5}", "1.8"),
        ("50", "50%"),
        ("0.5", r"50\%"),
        ("90", r"90^\circ"),
        (r"\text{Even}", r"\text{even}"),
        ("C", r"\text{(C)}"),
        ("(C)", "C"),
        ("52_8", "52_{8}"),
        ("52", "52_8"),
        ("-2,1", "1,-2"),
        (r"\frac{1}{\sqrt 3}", r"\frac{\sqrt{3}}{3}"),
        ("5", "x=5"),
        ("x = 5", "5"),
        ("(x+1)^2", "x^2 + 2x + 1"),
        (r"\left( 3, \tfrac{\pi}{2} \right)", r"(3, \pi/2)"),
        ("274i + 1", "1 + 274i"),
        (r"\begin{pmatrix} 0.5 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}"),
    ],
)
def test_equal_answers(answer, reference):
    assert boxed(answer, reference) == 1.0


@pytest.mark.parametrize(
    "answer, reference",
    [
        ("41", "42"),
        ("-42", "42"),
        ("0.33", r"\frac{1}{3}"),
        ("1.08", "1,080"),
        ("5%", "50%"),
        ("52_9", "52_8"),
        ("D", r"\text{(C)}"),
        ("2,1", "1,-2"),
        ("(3,4]", "(3,4)"),
        ("2", "2k"),
        ("x^2 + 1", "x^2 + 2x + 1"),
        ("odd", "even"),
        ("ABC", "BCA"),
        ("{ABC}", "BCA"),
        ("seat", r"\text{east}"),
        ("5 hundredths", "5"),
        ("5 million", "5"),
        ("5 below zero", "5"),
        ("", "42"),
        ("5 or six", "5"),
        ("5, 6", "5"),
        (r"5 \text{ million}", "5"),
        ("x" * 3000, "x" * 3000),
        (r"\frac{1}{0}", "42"),
        (r"\frac{a}{b}}}}", "3x"),
        ("\ud800", "x + 1"),
        ("__import__('os').abort()", "x + 1"),
    ],
)
def test_other_answers(answer, reference):
    assert boxed(answer, reference) == 0.0


def test_where_the_answer_stands():
    assert REWARD("", r"<think>\boxed{1}</think> \boxed{2}", "2") == 1.0
    assert REWARD("", r"<think>\boxed{2}</think> \boxed{1}", "2") == 0.0
    assert REWARD("", r"<think>\boxed{2}", "2") == 0.0
    assert REWARD("", r"\boxed{3} <answer>2</answer>", "2") == 1.0
    assert REWARD("", "#### 2", "2") == 1.0
    for loose in ("2", "The answer is 2.", "so it is 2"):
        assert REWARD("", loose, "2") == 0.0
    assert make_math_reward(rules=("whole",))("", "2", "2") == 1.0
    assert make_math_reward(rules=("boxed", "phrase"))("", "The answer is 2.", "2") == 1.0
    assert make_math_reward(rules=("number",))("", "so it is 2 cm", "2") == 1.0
    assert make_math_reward(rules=("number",))("", "so it is 2 million", "2") == 0.0
    assert make_math_reward(skip_thinking=False)("", r"<think>\boxed{2}", "2") == 1.0


@pytest.mark.parametrize(
    "percent, of_fifty, of_half", [("unit", 1.0, 0.0), ("value", 0.0, 1.0), ("either", 1.0, 1.0)]
)  # fmt: skip
def test_percent(percent, of_fifty, of_half):
    reward = make_math_reward(percent=percent)
    assert boxed("50%", "50", reward) == boxed("50", r"50\%", reward) == of_fifty
    assert boxed("50%", "0.5", reward) == boxed("0.5", r"50\%", reward) == of_half
    assert boxed(r"50\%", "50 percent", reward) == 1.0 and boxed("50%", "5%", reward) == 0.0


def test_units():
    match = make_math_reward(units="match")
    assert boxed("5 cm", "5 m") == 1.0 and boxed("5 cm", "5 m", match) == 0.0
    for answer, reference in (("5", r"5\text{ cm}"), (r"5 \text{cm}", "5 cm"), ("$5", "5 dollars")):
        assert boxed(answer, reference, match) == 1.0


def test_tolerance():
    near = make_math_reward(tolerance=0.01)
    assert boxed("0.333", r"\frac{1}{3}", near) == boxed("-99", "-100", near) == 1.0
    assert boxed("0.32", r"\frac{1}{3}", near) == boxed("1", "0", near) == boxed("100", "-100", near) == 0.0


def test_references():
    assert reference_answer("5 + 5 = <<5+5=10>>10\n#### 10") == "10"
    assert reference_answer(r"so \boxed{x}") == "x" and reference_answer(0.5) == "0.5"
    for reference in (float("nan"), float("inf"), "", "  ", None, True, ["4"], "####", "no answer\n#### \n"):
        with pytest.raises(ValueError, match="math_reward: `reference` is"):
            REWARD("", r"\boxed{4}", reference)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rules": ()}, r"make_math_reward: `rules` is \(\), want a tuple of tag, boxed"),
        ({"rules": ("box",)}, r"`rules` is \('box',\)"),
        ({"percent": "ignore"}, "`percent` is 'ignore', want one of 'either'"),
        ({"units": "same"}, "`units` is 'same', want one of"),
        ({"tolerance": -1}, "`tolerance` is -1, want one in"),
        ({"workers": 0}, "MathComparer: `workers` is 0, want at least 1"),
        ({"cpu_seconds": 0.5}, "MathComparer: `cpu_seconds` is 0.5, want a whole number"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_math_reward(**settings)


def test_math_verify_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(math_process.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"MathComparer: 'math_verify' is not installed, want `pip install dsv3\[rl\]`"):
        make_math_reward()


def test_comparisons_that_never_end_are_no_answers():
    """Python's loops are ended by an exception, C's with the process; the next comparison goes on."""
    reward = make_math_reward(cpu_seconds=1)
    start = time.monotonic()
    assert boxed("9^{9^{9^{9}}} + x", "12 + x", reward) == 0.0
    assert time.monotonic() - start < 60  # of 10 CPU seconds on the clock; the machine may be busy
    assert boxed("x + 12", "12 + x", reward) == 1.0


def test_threads_may_ask():
    """A signal, math-verify's own limit, works in the main thread alone. Here threads share two processes."""
    reward = make_math_reward(workers=2)
    found = {}

    def ask(number):
        found[number] = boxed(f"x + {number}", f"{number} + x", reward), boxed(f"y + {number}", f"{number} + x", reward)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: (1.0, 0.0) for number in range(6)}


def test_a_process_that_is_killed_is_replaced():
    comparer = MathComparer()
    assert comparer.equal("x + 1", "1 + x")
    worker = comparer._idle.get()
    comparer._idle.put(worker)
    assert os.getsid(worker.pid) == worker.pid  # Ctrl-C, for this process, does not end a comparison
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert comparer.equal("x + 2", "2 + x")


def test_a_comparison_whose_process_somebody_ends_is_made_again(monkeypatch):
    """Wrong and not looked at are not the same: once more, and then an error."""
    comparer, asked = MathComparer(), []
    ask = comparer._ask

    def end_first(worker, line, seconds):
        if line:
            asked.append(line)
            if len(asked) in deaths:
                os.kill(worker.pid, signal.SIGTERM)
                worker.wait()
        return ask(worker, line, seconds)

    monkeypatch.setattr(comparer, "_ask", end_first)
    deaths = [1]
    assert comparer.equal("x + 1", "1 + x") and len(asked) == 2
    deaths = [3, 4]  # it may be the answer's own doing, so that the run goes on: other comparisons can be made
    with pytest.warns(UserWarning, match=r"MathComparer: '2 \+ x' has ended its process twice, with -15: no answer"):
        assert not comparer.equal("x + 2", "2 + x")
    assert len(asked) == 5
    deaths = [6, 7, 8]
    with pytest.raises(OSError, match="MathComparer: its processes are ended, the last one with -15"):
        comparer.equal("x + 3", "3 + x")


def test_an_interrupted_comparison_answers_no_other_one():
    comparer = MathComparer(cpu_seconds=3)
    assert comparer.equal("x + 1", "1 + x")

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            comparer.equal("9^{9^{9^{9}}} + x", "12 + x")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert comparer.equal("x + 2", "2 + x")


def test_an_answer_to_another_question_is_none(monkeypatch):
    comparer, ask, late = MathComparer(), MathComparer._ask, [b"[0, false]\n"]

    def ask_late(worker, line, seconds):
        return late.pop() if line and late else ask(comparer, worker, line, seconds)

    monkeypatch.setattr(comparer, "_ask", ask_late)
    assert comparer.equal("x + 1", "1 + x") and not late


def test_threads_of_a_forked_process_have_the_same_places(monkeypatch):
    comparer, made, old = MathComparer(), threading.Event(), math_process.queue.LifoQueue

    def make_slowly():
        made.set()
        time.sleep(0.2)
        return old()

    monkeypatch.setattr(math_process.queue, "LifoQueue", make_slowly)
    comparer._owner, inherited = -1, comparer._idle
    first = threading.Thread(target=comparer._settle)
    first.start()
    made.wait()
    comparer._settle()
    assert comparer._idle is not inherited
    first.join()


def test_a_process_may_be_forked_while_places_are_made():
    comparer = MathComparer()
    with math_process._settling:
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            comparer._settle()
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_the_process_has_this_version(monkeypatch, tmp_path):
    """Not another one on Python's path."""
    (tmp_path / "dsv3").mkdir()
    (tmp_path / "dsv3" / "__init__.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert MathComparer().equal("x + 1", "1 + x")


def test_a_process_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr(math_process.sys, "executable", "/bin/false")
    with pytest.raises(OSError, match="MathComparer: its process ended with"):
        MathComparer().equal("x", "y")


@settings(max_examples=40)
@given(st.text(st.sampled_from("\\{}[]()^_+-*/=<>,.$&%|~ 019xyfrac!sqrtπ猫\ud800\x00"), max_size=40))
def test_garbage_raises_nothing(text):
    assert boxed(text, "3 + x") in (0.0, 1.0)


def test_the_worker_compares_as_it_is_asked():
    assert math_worker.compare_answers("x=5", "5") and not math_worker.compare_answers("x=5", "6")


@pytest.mark.skipif(not all(path.is_file() for path in GSM8K), reason="no gsm8k in the data folder")
def test_gsm8k_answers_themselves():
    problems = [problem for path in GSM8K for problem in read_gsm8k(path)]
    assert len(problems) == 8792
    for problem in problems:
        assert boxed(problem.reference, problem.reference) == 1.0, problem
        assert REWARD("", f"#### {change(problem.reference, 0)}", problem.reference) == 0.0, problem


@pytest.mark.skipif(not MATH.is_file(), reason="no math500 in the data folder")
@pytest.mark.parametrize("step", [16, *more(1)])
def test_math_answers_themselves(step):
    """Also by math-verify alone, which most of them do not come to; and not when a digit is another one."""
    problems = read_math(MATH)
    assert len(problems) == 500
    comparer, match = MathComparer(), make_math_reward(units="match")
    for problem in problems[::step]:
        reference = problem.reference
        assert boxed(reference, reference) == 1.0, problem
        assert comparer.equal(reference, reference), problem
        for which in (0, -1):
            assert boxed(change(reference, which), reference, match) == 0.0, (problem, which)
