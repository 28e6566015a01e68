"""Code that passes its tests is worth 1.0; what tests are and what is at fault with them."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from dsv3.rl import sandbox
from dsv3.rl.problems import read_humaneval
from dsv3.rl.reward_code import CallTests, OutputTests, check_outputs, make_code_reward, read_tests
from dsv3.rl.sandbox import check_calls
from dsv3.rl.sandbox_process import SandboxLimits
from tests.more import more
from tests.rl.data import HUMANEVAL

ADDS = {"test": "def check(candidate):\n    assert candidate(41) == 42", "entry_point": "f"}
PRINTS = {"inputs": ["41", "1", "-1"], "outputs": ["42\n", "2\n", "0\n"]}


def fenced(code):
    return f"<think>hm\n```python\nraise ValueError\n```\n</think> Here:\n```python\n{code}\n```\nDone."


@pytest.mark.usefixtures("sandboxed")
def test_functions():
    reward = make_code_reward()
    assert reward("", fenced("def f(x):\n    return x + 1"), ADDS) == 1.0
    assert reward("", fenced("def f(x):\n    return x"), ADDS) == 0.0
    assert reward("", "def f(x):\n    return x + 1", ADDS) == 0.0
    assert reward("", "<think>```\ndef f(x):\n    return x + 1\n```", ADDS) == 0.0
    assert make_code_reward(whole=True)("", "def f(x):\n    return x + 1", ADDS) == 1.0


@pytest.mark.usefixtures("sandboxed")
def test_outputs():
    reward, share = make_code_reward(), make_code_reward(partial=True)
    good, bad = fenced("print(int(input()) + 1)"), fenced("print(abs(int(input())) + 1)")
    assert reward("", good, PRINTS) == share("", good, PRINTS) == 1.0
    assert reward("", bad, PRINTS) == 0.0 and share("", bad, PRINTS) == pytest.approx(2 / 3)
    assert share("", fenced("print(int(input()) + 1)\nraise SystemExit(3)"), PRINTS) == 0.0


@pytest.mark.usefixtures("sandboxed")
@pytest.mark.parametrize(
    "printed, lines, words, exact",
    [("1 2\n3\n", 1, 1, 1), ("1 2\n3", 1, 1, 0), ("1 2 \n3\n\n", 1, 1, 0), ("1 2 3", 0, 1, 0), ("1 2\n4\n", 0, 0, 0)],
)
def test_comparisons(printed, lines, words, exact):
    tests = OutputTests(("",), ("1 2\n3\n",))
    for compare, passes in (("lines", lines), ("words", words), ("exact", exact)):
        (verdict,) = check_outputs(f"print({printed!r}, end='')", tests, compare=compare)
        assert verdict.status == ("passed" if passes else "failed")


@pytest.mark.usefixtures("sandboxed")
def test_verdicts_of_outputs():
    tests = OutputTests(("1", "0", "2"), ("1", "0", "2"))
    verdicts = check_outputs("print(1 // int(input()))", tests)
    assert [verdict.status for verdict in verdicts] == ["passed", "failed", "failed"]
    assert verdicts[1].detail == "the program has ended with 1: ZeroDivisionError: integer division or modulo by zero"
    assert verdicts[2].detail == "another output"
    assert check_outputs("print(1 // int(input()))", tests, stop=True)[2] == verdicts[1]
    slow = check_outputs("while True:\n    pass", OutputTests(("",), ("",)), limits=SandboxLimits(wall_seconds=0.5))
    assert slow[0].status == "timeout"


@pytest.mark.usefixtures("sandboxed")
@pytest.mark.parametrize(
    "reference, message",
    [
        (None, "code_reward: `reference` is of type NoneType, want a dict of tests"),
        ("assert f(1)", "code_reward: `reference` is of type str"),
        ({}, "code_reward: `reference` has 'test' None, want a text"),
        ({"test": "assert f(1)"}, "code_reward: `reference` has 'entry_point' None"),
        ({"test": " ", "entry_point": "f"}, "code_reward: `reference` has 'test' ' '"),
        ({"inputs": [], "outputs": []}, r"code_reward: `reference` has 'inputs' \[\], want a list of texts"),
        ({"inputs": ["1"], "outputs": [1]}, r"code_reward: `reference` has 'outputs' \[1\]"),
        ({"inputs": ["1"], "outputs": ["1", "2"]}, "code_reward: `reference` has 1 inputs and 2 outputs"),
        ({"test": "f(print)", "entry_point": "f"}, "code_reward: `reference` cannot be used: the tests give the function"),
        ({"test": "x = 1", "entry_point": "f"}, "code_reward: `reference` cannot be used: the tests never call 'f'"),
    ],
)
def test_references_at_fault(reference, message):
    with pytest.raises(ValueError, match=message):
        make_code_reward()("", fenced("def f(x):\n    return x"), reference)


def test_tests_as_they_are():
    for tests in (CallTests("assert f(1)", "f"), OutputTests(("1",), ("1",))):
        assert read_tests(tests) is tests


def test_it_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(sandbox, "_trouble", lambda kind: "refused")
    with pytest.raises(ValueError, match="make_code_reward: a program cannot be kept from the network here"):
        make_code_reward()
    with pytest.raises(ValueError, match="make_code_reward: `compare` is 'loose'"):
        make_code_reward(compare="loose")


@pytest.mark.usefixtures("sandboxed")
def test_all_that_one_reward_judges_has_the_same_isolation(monkeypatch):
    """Whatever the machine's trials say later."""
    monkeypatch.setattr(sandbox, "_told", {"seccomp"})
    reward, tried = make_code_reward(), []
    trouble = sandbox._trouble
    monkeypatch.setattr(sandbox, "_trouble", lambda kind: tried.append(kind) or trouble(kind))
    assert reward("", fenced("def f(x):\n    return x + 1"), ADDS) == 1.0
    assert reward("", fenced("print(int(input()) + 1)"), PRINTS) == 1.0
    assert len(set(tried)) == 1 and len(tried) == 4


@pytest.mark.skipif(not HUMANEVAL.is_file(), reason="no humaneval in the data folder")
@pytest.mark.usefixtures("sandboxed")
@pytest.mark.parametrize("step", [12, *more(1)])
def test_humaneval(step):
    """Each solution passes its tests, an empty body none; the tests of 32, 38 and 50 use helpers of the prompt."""
    problems = read_humaneval(HUMANEVAL)
    assert len(problems) == 164
    chosen = sorted({*range(0, 164, step), 32, 38, 50})

    def run(number):
        tests = problems[number].reference
        bodies = problems[number].solution, "    pass\n"
        return number, [check_calls(body, tests.tests, tests.entry_point, prompt=tests.prompt).status for body in bodies]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, chosen)) == [(number, ["passed", "failed"]) for number in chosen]
