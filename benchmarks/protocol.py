"""The driving process and its workers: requests and answers as JSON lines over pipes, one run at a time.

TensorFlow and torch live in different processes, so that their threads do not meet, and the driver asks one at a time, so
that they never compute together. A worker builds contenders, runs them on request and answers with milliseconds.

Requests: `build`, `run`, `drop`, `memory`, `call`. An answer is the result, or `{"error": "..."}` when the worker raised.
"""

from __future__ import annotations

import gc
import json
import os
import pathlib
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dsv3.resident import peak_bytes, reset_peak, resident_bytes

ROOT = pathlib.Path(__file__).resolve().parent.parent
ANSWERS = "DSV3_BENCHMARK_ANSWERS"  # environment variable: the file descriptor that a worker writes its answers to


class Prepared(NamedTuple):
    """A contender that is ready to run.

    Attributes:
      draw: `draw(seed) -> inputs`: fresh inputs, not timed.
      run: `run(inputs)`: the timed work; returns only when it is done.
    """

    draw: Callable[[int], Any]
    run: Callable[[Any], Any]


class WorkerError(RuntimeError):
    """A request failed in the worker; the worker lives on."""


class WorkerDied(RuntimeError):
    """The worker ended, or was ended because it took longer than allowed."""


# The worker's side.


def serve(
    builders: Mapping[str, Callable[..., Prepared]],
    calls: Mapping[str, Callable[..., Any]],
    versions: Mapping[str, str],
) -> None:
    """Answers requests from stdin until it closes. Answers have a pipe of their own: libraries may print what they like.

    Args:
      builders: name → `builder(**options) -> Prepared`.
      calls: name → `call(**arguments) -> ` anything that JSON holds.
      versions: what the worker runs with, for the report.
    """
    pipe = int(os.environ[ANSWERS])
    os.set_inheritable(pipe, False)
    answers = os.fdopen(pipe, "w")
    prepared: dict[str, Prepared] = {}

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        do = request.pop("do")
        if do == "build":
            start = time.perf_counter()
            made = builders[request["build"]](**request["options"])
            _warm_up(made, request["warmup"])
            prepared[request["id"]] = made
            return {"seconds": time.perf_counter() - start}
        if do == "run":
            return {"ms": _timed(prepared[request["id"]], **{k: request[k] for k in ("seed", "burst", "skip")})}
        if do == "drop":
            prepared.clear()
            gc.collect()
            return {}
        if do == "memory":
            return memory(reset=request["reset"])
        if do == "call":
            return {"result": calls[request["name"]](**request["arguments"])}
        raise ValueError(f"serve: unknown request {do!r}")

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    answer({"versions": dict(versions), **memory()})
    for line in sys.stdin:
        try:
            answer(handle(json.loads(line)))
        except Exception as error:  # whatever a framework raises is an answer: the driver takes the next mode
            answer({"error": f"{type(error).__name__}: {one_line(str(error))}"})


def one_line(text: str) -> str:
    """Returns a message's first line, cut to 200 characters and without the paths of a machine."""
    first = next(iter(text.strip().splitlines()), "")
    return re.sub(r"(/[\w.+-]+){2,}", "...", first)[:200]


def _warm_up(made: Prepared, runs: int) -> None:
    for seed in range(runs):
        made.run(made.draw(1_000_000 + seed))


def _timed(made: Prepared, seed: int, burst: int, skip: int) -> list[float]:
    times = []
    for i in range(burst):
        inputs = made.draw(seed * burst + i)
        start = time.perf_counter()
        made.run(inputs)
        times.append(1e3 * (time.perf_counter() - start))
    return times[skip:]


def memory(*, reset: bool = False) -> dict[str, float]:
    """Returns this process's resident memory now and at its highest, in megabytes; `reset` makes the highest be now."""
    if reset:
        reset_peak()
    return {"resident": resident_bytes() / 1e6, "peak": peak_bytes() / 1e6}


# The driver's side.


class Worker:
    """A worker process.

    Attributes:
      versions: what it runs with.
      baseline: its resident memory after its imports, in megabytes.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float = 300):
        self._log = tempfile.TemporaryFile()
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._answers, theirs = os.pipe()
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, cwd=ROOT, pass_fds=[theirs],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), ANSWERS: str(theirs), **(env or {})},
        )  # fmt: skip
        os.close(theirs)
        self._buffer = b""
        hello = self._answer(timeout)
        self.versions: dict[str, str] = hello["versions"]
        self.baseline: float = hello["resident"]

    def build(self, key: str, build: str, options: Mapping[str, Any], *, warmup: int, timeout: float) -> float:
        """Builds a contender under `key` and runs it `warmup` times; returns the seconds that it took."""
        request = {"do": "build", "id": key, "build": build, "options": dict(options), "warmup": warmup}
        return self._request(request, timeout)["seconds"]

    def run(self, key: str, seed: int, *, burst: int = 1, skip: int = 0, timeout: float = 300) -> list[float]:
        """Runs a contender `burst` times on fresh inputs; returns the milliseconds of all but the first `skip`."""
        return self._request({"do": "run", "id": key, "seed": seed, "burst": burst, "skip": skip}, timeout)["ms"]

    def drop(self) -> None:
        """Forgets all contenders."""
        self._request({"do": "drop"}, 60)

    def memory(self, *, reset: bool = False) -> dict[str, float]:
        """See the function `memory`."""
        return self._request({"do": "memory", "reset": reset}, 60)

    def call(self, name: str, *, timeout: float = 300, **arguments: Any) -> Any:
        """Calls one of the worker's functions."""
        return self._request({"do": "call", "name": name, "arguments": arguments}, timeout)["result"]

    def close(self) -> None:
        """Ends the process."""
        try:
            self._process.stdin.close()
        except BrokenPipeError:  # it died with a request on its way
            pass
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if not self._log.closed:
            os.close(self._answers)
            self._log.close()

    def _request(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise WorkerDied(self._last_words()) from error
        answer = self._answer(timeout)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _answer(self, timeout: float) -> dict[str, Any]:
        stop = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], 1.0)  # its children may keep the pipe open: look at it too
            data = os.read(self._answers, 1 << 16) if ready else b""
            self._buffer += data
            if not data and (ready or self._process.poll() is not None):
                raise WorkerDied(self._last_words())
            if time.monotonic() > stop:
                self._process.kill()
                raise WorkerDied(f"took longer than {timeout:.0f} s")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _last_words(self) -> str:
        if self._log.closed:
            return "the worker is closed"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            status = None
        return f"the worker ended with status {status}: {one_line(lines[-1]) if lines else 'no message'}"
