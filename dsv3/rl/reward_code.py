"""The reward of code that passes its tests, run in a sandbox (`dsv3.rl.sandbox`).

    reward = make_code_reward()
    adds = {"test": "assert f(41) == 42", "entry_point": "f"}
    reward(prompt, "```python\\ndef f(x):\\n    return x + 1\\n```", adds)                                            # 1.0
    reward(prompt, "```python\\nprint(int(input()) + 1)\\n```", {"inputs": ["41"], "outputs": ["42"]})              # 1.0

References:
  Chen et al., "Evaluating Large Language Models Trained on Code", arXiv:2107.03374: HumanEval, and why a sandbox.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv3.checks import check, check_choice
from dsv3.rl.answers import after_thinking, last_code_block
from dsv3.rl.reward import RewardFn
from dsv3.rl.sandbox import Verdict, check_calls, run_program, settle_isolation
from dsv3.rl.sandbox_process import SandboxLimits

COMPARISONS = ("lines", "words", "exact")


@dataclass(frozen=True)
class CallTests:
    """Tests that call a function, see `sandbox.check_calls`.

    Args:
      tests: source; `test` in HumanEval.
      entry_point: the function's name.
      prompt: source that comes before the program; "" for none.
    """

    tests: str
    entry_point: str
    prompt: str = ""


@dataclass(frozen=True)
class OutputTests:
    """Tests that run a program with an input and look at its output.

    Args:
      inputs: standard input of each run.
      outputs: what the run is to print.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def make_code_reward(
    *, limits: SandboxLimits | None = None, isolation: str = "best", compare: str = "lines", partial: bool = False,
    whole: bool = False, skip_thinking: bool = True,
) -> RewardFn:  # fmt: skip
    """Returns a reward of (prompt, completion, reference): 1.0 where the completion's code passes all tests, else 0.0.

    The code is the last closed fenced block, of Python or without a language. The reference says what to test, see
    `read_tests`.

    Args:
      limits: what a program may take; None: the defaults.
      isolation: see `sandbox.run_program`. Where no isolation from the network can be had, this is refused at once.
      compare: how outputs are compared: "lines": but for blanks at the ends of lines and empty lines at the end; "words":
        but for all blanks; "exact".
      partial: the share of inputs with the right output, instead of 0.0; function tests pass or fail as one.
      whole: whether a completion without a fenced block is code as it is.
      skip_thinking: whether to look behind `</think>` alone.

    Returns:
      The reward. A `ValueError` where the reference is at fault, an `OSError` where the sandbox is.

    Raises:
      ValueError: a wrong argument; the isolation cannot be had here.
    """
    limits = limits or SandboxLimits()
    check_choice("make_code_reward", "compare", compare, COMPARISONS)
    isolation = settle_isolation("make_code_reward", isolation, limits)  # the same for all that it judges

    def code_reward(prompt: str, completion: str, reference: Any) -> float:
        """Returns 0.0 to 1.0; `prompt` is not looked at."""
        tests = read_tests(reference)
        text = after_thinking(completion) if skip_thinking else completion
        program = None if text is None else last_code_block(text)
        if program is None and whole and text is not None:
            program = text
        if program is None or not program.strip():
            return 0.0
        if isinstance(tests, CallTests):
            verdict = check_calls(
                program, tests.tests, tests.entry_point, prompt=tests.prompt, limits=limits, isolation=isolation
            )
            check(verdict.status != "error", f"code_reward: `reference` cannot be used: {verdict.detail}")
            return float(verdict.status == "passed")
        verdicts = check_outputs(program, tests, compare=compare, stop=not partial, limits=limits, isolation=isolation)
        passed = sum(verdict.status == "passed" for verdict in verdicts)
        return passed / len(verdicts) if partial else float(passed == len(verdicts))

    return code_reward


def check_outputs(
    program: str, tests: OutputTests, *, compare: str = "lines", stop: bool = False, limits: SandboxLimits | None = None,
    isolation: str = "best",
) -> list[Verdict]:  # fmt: skip
    """Runs a program with each input, in a sandbox of its own, and compares what it prints.

    Args:
      program: Python source.
      tests: inputs and outputs. The outputs never come near the program.
      compare: see `make_code_reward`.
      stop: whether the first failure stands for all that come after it.
      limits, isolation: see `sandbox.run_program`; the limits are those of one run.

    Returns:
      A verdict for each input. A program that ends with another code than 0 has failed.

    Raises:
      ValueError, OSError: as `sandbox.run_program`.
    """
    check_choice("check_outputs", "compare", compare, COMPARISONS)
    verdicts: list[Verdict] = []
    for stdin, want in zip(tests.inputs, tests.outputs):
        if stop and verdicts and verdicts[-1].status != "passed":
            verdicts.append(verdicts[-1])
            continue
        end = run_program(program, stdin, limits=limits, isolation=isolation)
        if end.status == "timeout":
            verdicts.append(Verdict("timeout", "a limit of time"))
        elif end.status != "ended" or end.code:
            last = end.stderr.strip().rpartition("\n")[2][:200]
            verdicts.append(Verdict("failed", f"the program has {end.status} with {end.code}: {last}"))
        elif _comparable(end.stdout, compare) != _comparable(want, compare):
            verdicts.append(Verdict("failed", "another output"))
        else:
            verdicts.append(Verdict("passed", ""))
    return verdicts


def read_tests(reference: Any) -> CallTests | OutputTests:
    """Returns the tests that a dataset's reference holds.

    Args:
      reference: tests as they are; or a dict with "test" and "entry_point", and "prompt" if need be (a row of HumanEval is
        one); or with "inputs" and "outputs", lists of texts.

    Raises:
      ValueError: it is neither.

    >>> read_tests({"inputs": ["1"], "outputs": ["2"]})
    OutputTests(inputs=('1',), outputs=('2',))
    """
    if isinstance(reference, CallTests | OutputTests):
        return reference
    kind = type(reference).__name__
    check(isinstance(reference, Mapping), f"code_reward: `reference` is of type {kind}, want a dict of tests")
    if "inputs" in reference and "outputs" in reference:
        inputs, outputs = (reference[name] for name in ("inputs", "outputs"))
        for name, texts in (("inputs", inputs), ("outputs", outputs)):
            good = isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts)
            check(bool(good), f"code_reward: `reference` has {name!r} {texts!r:.60}, want a list of texts")
        sizes = f"{len(inputs)} inputs and {len(outputs)} outputs"
        check(len(inputs) == len(outputs), f"code_reward: `reference` has {sizes}, want as many")
        return OutputTests(tuple(inputs), tuple(outputs))
    found = {name: reference.get(name, "" if name == "prompt" else None) for name in ("test", "entry_point", "prompt")}
    for name, text in found.items():
        good = isinstance(text, str) and (name == "prompt" or text.strip())
        want = "want a text (or lists 'inputs' and 'outputs')"
        check(bool(good), f"code_reward: `reference` has {name!r} {text!r:.60}, {want}")
    return CallTests(found["test"], found["entry_point"], found["prompt"])


def _comparable(text: str, compare: str) -> Any:
    if compare == "exact":
        return text
    return text.split() if compare == "words" else [line.rstrip() for line in text.rstrip().split("\n")]
