"""A process that compares answers with math-verify: JSON lines `[number, reference, answer]` come in, `[number, equal]` go out.

A comparison that needs too much CPU time is ended by an exception, and where that cannot be raised, inside one long
computation of C code, the process ends; `dsv3.rl.math_process` starts another one.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import time


class OutOfTimeError(BaseException):
    """A comparison takes too long; no `except Exception` of a library is to catch it."""


def compare_answers(reference: str, answer: str) -> bool:
    r"""Whether math-verify has two answers in LaTeX for equal.

    Args:
      reference, answer: without `$` or a box around them. The order matters: `x=5` and `5` agree where the first is the
        reference.

    Returns:
      Whether they agree; what cannot be parsed agrees with nothing but the same text.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    rules = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    parsed = [parse(rf"\boxed{{{text}}}", rules, parsing_timeout=None) for text in (reference, answer)]
    return bool(all(parsed) and verify(*parsed, timeout_seconds=None))


def main(cpu_seconds: int, memory_bytes: int) -> None:
    """Answers lines until there are no more; prints a line at first, when all is loaded."""
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    compare_answers(r"\frac{1}{2}", "0.5")  # loads what is loaded late
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    asked = False

    def stop(*_):
        if asked:  # else the answer is there
            raise OutOfTimeError

    signal.signal(signal.SIGPROF, stop)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        last = int(time.process_time()) + cpu_seconds + 1
        last = last if most == resource.RLIM_INFINITY else min(last, most)
        resource.setrlimit(resource.RLIMIT_CPU, (last, most))  # ends the process
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # raises `OutOfTimeError`
        number, *answers = json.loads(line)
        try:
            asked = True
            try:
                equal = compare_answers(*answers)
            finally:
                asked = False
        except (Exception, OutOfTimeError, SystemExit):
            equal = asked = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps([number, equal]), file=replies, flush=True)
