"""Tests and program in two sandboxes: a pass cannot be made up, plain data comes through, verdicts have reasons."""

import os
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest

from dsv3.rl.sandbox import check_calls, run_program
from dsv3.rl.sandbox_process import SandboxLimits
from tests.rl.isolations import KINDS

LIMITS = SandboxLimits(cpu_seconds=1, memory_bytes=128 << 20)

# The function is wrong in each; the tests are `PLAIN` or its own.
PASSED = "b'{\"status\": \"passed\", \"detail\": \"\"}'"
PLAIN = "def check(candidate):\n    assert candidate(41) == 42\n    assert candidate(1) == 2\n"
WRONG = "def f(x):\n    return 0\n"
TRICKS = {
    "exit": ("import sys\nsys.exit(0)", PLAIN),
    "exit in the call": ("import sys\ndef f(x):\n    sys.exit(0)", PLAIN),
    "hard exit": ("import os\nos._exit(0)", PLAIN),
    "hard exit in the call": ("import os\ndef f(x):\n    os._exit(0)", PLAIN),
    "exit handler": ("import atexit, os\natexit.register(lambda: os.write(1, b'passed'))\n" + WRONG, PLAIN),
    "printing": (f"print({PASSED}.decode(), flush=True)\n" + WRONG, PLAIN),
    "writing everywhere": (
        "import os\ndef f(x):\n    for fd in range(64):\n        try:\n"
        f"            os.write(fd, {PASSED})\n        except OSError:\n            pass\n", PLAIN,
    ),
    "odd equality": ("class A:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return A()", PLAIN),
    "odd number": (
        "class A(int):\n    __eq__ = lambda self, other: True\n    __hash__ = int.__hash__\ndef f(x):\n    return A(0)",
        PLAIN,
    ),
    "odd text": (
        "class A(str):\n    __eq__ = lambda self, other: True\n    __hash__ = str.__hash__\ndef f(x):\n    return A('0')",
        "assert f(1) == 'one'",
    ),
    "no errors": ("import builtins\nbuiltins.AssertionError = builtins.print\n" + WRONG, PLAIN),
    "other checker": (
        "import sys\nfrom dsv3.rl import sandbox_call\nsandbox_call.check_calls = lambda job: None\n"
        "sys.modules['__main__'].check = lambda candidate: None\n" + WRONG, PLAIN,
    ),
    "looking for the tests": (
        "import gc, sys\ndef f(x):\n    frame, found = sys._getframe(), []\n    while frame:\n"
        "        found.append(str(frame.f_locals))\n        frame = frame.f_back\n"
        "    found += [str(o) for o in gc.get_objects() if isinstance(o, (dict, list, str))]\n"
        "    return x + 1 if any('candidate' + '(41)' in text for text in found) else 0\n", PLAIN,
    ),
    "stopping the loop": ("def f(x):\n    raise StopIteration", "assert all(map(lambda x: f(x) == x + 1, [1, 2]))"),
    "answers in advance": (
        "import os, json, struct\nfor fd in range(3, 64):\n    try:\n        data = json.dumps({'value': True}).encode()\n"
        "        os.write(fd, struct.pack('>I', len(data)) + data)\n    except OSError:\n        pass\n" + WRONG, PLAIN,
    ),
    "a reply that is too long": (
        "import os, struct\ndef f(x):\n    for fd in range(3, 64):\n        try:\n"
        "            os.write(fd, struct.pack('>I', 1 << 30))\n        except OSError:\n            pass\n", PLAIN,
    ),
    "a reply that is too deep": ("def f(x):\n    r = []\n    for _ in range(900):\n        r = [r]\n    return r", PLAIN),
    "a reply without an end": ("def f(x):\n    r = []\n    r.append(r)\n    return r", PLAIN),
    "not a number": ("def f(x):\n    return float('nan')", "assert abs(f(1) - 2) < 1e-6"),
    "no function": ("x = 1", PLAIN),
    "no program": ("def f(x:", PLAIN),
    "a hostile exception": (
        "class E(Exception):\n    def __str__(self):\n        import os\n        os._exit(0)\ndef f(x):\n    raise E", PLAIN
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRICKS)
@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_a_pass_cannot_be_made_up(kind, name, nothing_left):
    program, tests = TRICKS[name]
    verdict = check_calls(program, tests, "f", isolation=kind)
    assert verdict.status == "failed", verdict


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_calls_that_pass(kind, nothing_left):
    program = "import math\ndef f(*a, **k):\n    print('noise')\n    return a[0] if a else k['x']"
    tests = """
import math
def check(candidate):
    values = [None, True, 0, -1, 1 << 70, -(1 << 65), 0.1, math.inf, "ä猫\\ud800", b"\\x00\\xff", bytearray(b"a"), 1 + 2j,
              [1, [2]], (1, (2,)), {1, 2}, frozenset({(1, 2)}), {"a": 1, (1, 2): [3]}, "", [], (), {}, set()]
    for value in values:
        print("noise")
        for result in (candidate(value), candidate(x=value)):
            assert result == value and type(result) is type(value), value
    assert math.isnan(candidate(math.nan))
    try:
        candidate(y=1)
    except KeyError:
        pass
    else:
        raise AssertionError("no error")
"""
    assert check_calls(program, tests, "f", isolation=kind) == ("passed", "")


@pytest.mark.usefixtures("sandboxed")
def test_verdicts_have_reasons():
    cases = [
        ("def f(x):\n    return 1 / 0", "assert f(1)", "failed", "ZeroDivisionError: division by zero"),
        ("def f(x):\n    while True:\n        pass", "assert f(1)", "timeout", "a limit of time"),
        ("def f(x):\n    return map(abs, x)", "assert f([1]) == [1]", "failed", "a value of type map is no plain data"),
        ("def f(x):\n    return x", "assert f(lambda: 1)", "error", "an argument that cannot be carried"),
        ("def f(x):\n    return x", "x = 1", "error", "the tests never call 'f'"),
        ("def f(x):\n    return x", "assert (", "error", "the tests are no program: SyntaxError"),
        ("def f(x):\n    return x", "f(1)\nwhile True:\n    pass", "timeout", "a limit of time"),
        ("import os\ndef f(x):\n    os.kill(os.getpid(), 9)", "assert f(1)", "failed", "ended before it answered"),
    ]
    for program, tests, status, detail in cases:
        verdict = check_calls(program, tests, "f", limits=LIMITS)
        assert verdict.status == status and detail in verdict.detail, verdict


@pytest.mark.usefixtures("sandboxed")
def test_a_prompt_gives_names_and_the_head():
    prompt = "from typing import List\n\ndef helper(x):\n    return x + 1\n\n"
    prompt += "def f(x: List[int]) -> int:\n    \"\"\"Adds.\"\"\"\n"
    tests = "def check(candidate):\n    assert candidate([1]) == helper(1)\n"
    body = "    return x[0] + 1\n"
    for program in (body, "def f(x: List[int]) -> int:\n" + body, "f = lambda x: helper(x[0])"):
        assert check_calls(program, tests, "f", prompt=prompt).status == "passed", program
    for program in ("    pass\n", "return x[0] + 1\n", "def helper(x):\n    return 0\ndef f(x):\n    return 0"):
        assert check_calls(program, tests, "f", prompt=prompt).status == "failed", program
    bare = "def f(x):"
    assert check_calls("\n    return x", "assert f(3) == 3", "f", prompt=bare).status == "passed"


@pytest.mark.usefixtures("sandboxed")
def test_a_function_may_have_the_name_of_the_tests_function():
    good, bad = "def check(x):\n    return x + 1", "def check(x):\n    return x"
    for tests in ("assert check(1) == 2", "def check(candidate):\n    assert candidate(1) == 2"):
        assert check_calls(good, tests, "check") == ("passed", ""), tests
        assert check_calls(bad, tests, "check").status == "failed", tests
    helper = "def check(x):\n    return x > 0\n"
    assert check_calls("def f(x):\n    return check(x)", "assert f(1) and check(1)", "f", prompt=helper) == ("passed", "")


NO_VERDICTS = ["[1]", "{}", '{"status": "x", "detail": ""}', '{"status": "passed", "detail": 1}', "[" * 10**5]


@pytest.mark.parametrize("said", NO_VERDICTS, ids=range(5))
@pytest.mark.usefixtures("sandboxed")
def test_a_verdict_that_is_none_is_a_failure(said):
    tests = f"import os\nf(1)\nfor fd in range(3, 16):\n    try:\n        os.write(fd, {said.encode()!r})\n"
    tests += "    except OSError:\n        pass\nos._exit(0)"
    verdict = check_calls("def f(x):\n    return x", tests, "f")
    assert verdict == ("failed", "the tests' process ended with 0")


@pytest.mark.usefixtures("sandboxed")
def test_verdicts_repeat():
    """Hashes and random numbers have a fixed seed, in the program and in its tests."""
    program = "import random\ndef f(x):\n    return [random.random(), list({'a', 'b', 'c', 'd'})]"
    tests = "import random\nf(1)\nraise ValueError(str([f(2), random.random(), list({'x', 'y', 'z'})]))"
    with ThreadPoolExecutor(4) as pool:
        verdicts = set(pool.map(lambda _: check_calls(program, tests, "f"), range(4)))
    assert len(verdicts) == 1 and verdicts.pop().detail.startswith("ValueError: [[0.")


@pytest.mark.usefixtures("sandboxed")
def test_many_at_a_time_do_not_mix(nothing_left):
    def run(number):
        program = f"def f(x):\n    return x * {number}"
        verdict = check_calls(program, f"assert f(3) == {3 * number}", "f")
        return verdict.status, run_program("print(input())", str(number)).stdout

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(16))) == [("passed", f"{number}\n") for number in range(16)]


@pytest.mark.usefixtures("sandboxed")
def test_a_caller_with_many_descriptors():
    """Those of the pipes are beyond what `select` takes."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1500:
        pytest.skip("fewer than 1500 descriptors are allowed here")
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1200)]
    try:
        assert check_calls("def f(x):\n    return x", "assert f(1) == 1", "f").status == "passed"
    finally:
        for descriptor in held:
            os.close(descriptor)
