"""Comparison of mathematical answers in processes of their own, so that threads may ask and nothing can hang.

math-verify's own time limit is a signal, which works in a process's main thread alone, and which no long computation of C
code (`9^{9^{9}}`) lets through. Here each comparison has a limit of CPU time, so that its verdict is the same on a busy
machine.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
import warnings

from dsv3.checks import check

_START_SECONDS, _WAIT = 300.0, 100  # the longest start; a limit on the clock, in limits of CPU time: a last resort
_OWN_DEATHS = (-signal.SIGXCPU, -signal.SIGSEGV, -signal.SIGABRT)  # what a comparison can bring on itself
_MEMORY = 2 << 30
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# First on the path, before another version that may be installed, and for this module alone.
_START = "import sys; sys.path.insert(0, sys.argv[1]); from dsv3.rl import math_worker; sys.path.pop(0); "
_START += "math_worker.main(*map(int, sys.argv[2:]))"
_KNOWN = ("x + 1", "1 + x")  # equal, for sure
_numbers = itertools.count()
_settling = threading.Lock()


def _renew_lock() -> None:
    global _settling
    _settling = threading.Lock()  # the old one may be held by a thread that a forked process has not


os.register_at_fork(after_in_child=_renew_lock)


class MathComparer:
    """Says whether two answers in LaTeX are equal, by math-verify; threads may share it.

    Args:
      workers: processes at most; each begins when it is first needed, and ends with this process.
      cpu_seconds: limit of one comparison; the answer to a longer one is that they differ.

    Raises:
      ValueError: a wrong argument; math-verify is not installed.
    """

    def __init__(self, *, workers: int = 1, cpu_seconds: int = 3):
        check(type(workers) is int and workers >= 1, f"MathComparer: `workers` is {workers!r}, want at least 1")
        whole = type(cpu_seconds) is int and cpu_seconds >= 1
        check(whole, f"MathComparer: `cpu_seconds` is {cpu_seconds!r}, want a whole number of at least 1")
        installed = importlib.util.find_spec("math_verify") is not None
        check(installed, "MathComparer: 'math_verify' is not installed, want `pip install dsv3[rl]`")
        self._workers, self._seconds = workers, cpu_seconds
        self._owner: int | None = None
        self._settle()
        self.equal = functools.lru_cache(maxsize=1 << 14)(self._compare)

    def _settle(self) -> None:
        """Places for processes of this process, not of the one it was forked from."""
        with _settling:
            if self._owner != os.getpid():
                idle: queue.LifoQueue[subprocess.Popen | None] = queue.LifoQueue()
                for _ in range(self._workers):
                    idle.put(None)
                self._idle, self._owner = idle, os.getpid()

    def _compare(self, reference: str, answer: str) -> bool:
        """Whether they are equal; an `OSError` where no process can be had."""
        self._settle()
        idle = self._idle
        worker = idle.get()
        try:
            for _ in range(2):  # once more, where somebody else may have ended the process
                worker, equal = self._try(worker, reference, answer)
                if equal is not None:
                    return equal
                code = _end(worker)
                if code in _OWN_DEATHS:
                    return False
            worker, equal = self._try(worker, *_KNOWN)
            if equal is None:
                raise OSError(f"MathComparer: its processes are ended, the last one with {_end(worker)}")
            warnings.warn(f"MathComparer: {answer[:80]!r} has ended its process twice, with {code}: no answer", stacklevel=4)
            return False
        finally:
            idle.put(worker)

    def _try(self, worker: subprocess.Popen | None, reference: str, answer: str) -> tuple[subprocess.Popen, bool | None]:
        """The process that was asked, and what it said; None where it ended, took too long or answered something else."""
        if worker is None or worker.poll() is not None:
            worker = self._start()
        number = next(_numbers)
        line = json.dumps([number, reference, answer]).encode() + b"\n"
        answers = {f"[{number}, true]\n".encode(): True, f"[{number}, false]\n".encode(): False}
        reply = b""
        try:
            reply = self._ask(worker, line, self._seconds * _WAIT)
        finally:
            if reply is not None and reply not in answers:  # Ctrl-C: what comes late must not answer another question
                _end(worker, 0.0)
        return worker, answers.get(reply)

    def _start(self) -> subprocess.Popen:
        command = [sys.executable, "-P", "-c", _START, _ROOT, str(self._seconds), str(_MEMORY)]
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            env={**os.environ, "PYTHONHASHSEED": "0"}, start_new_session=True,  # Ctrl-C is not for it
        )  # fmt: skip
        try:
            ready = self._ask(worker, b"", _START_SECONDS) == b"ready\n"
        except BaseException:
            _end(worker, 0.0)
            raise
        if not ready:
            raise OSError(f"MathComparer: its process ended with {_end(worker)} before it was ready")
        return worker

    def _ask(self, worker: subprocess.Popen, line: bytes, seconds: float) -> bytes | None:
        """The worker's next line; None where it ended or took too long."""
        deadline = time.monotonic() + seconds
        reply = b""
        with selectors.DefaultSelector() as selector:
            selector.register(worker.stdout, selectors.EVENT_READ)
            try:
                worker.stdin.write(line)
            except OSError:
                return None
            while not reply.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                more = worker.stdout.read(1 << 12)
                if not more:
                    return None
                reply += more
        return reply


def _end(worker: subprocess.Popen, seconds: float = 1.0) -> int:
    """Ends a process, now or soon, and returns its code, or that of a limit where it still ran."""
    try:
        code = worker.wait(seconds)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
        code = -signal.SIGXCPU
    for stream in (worker.stdin, worker.stdout):
        stream.close()
    return code
