"""Runs untrusted Python: without network, with limits of time, memory, processes, files and output, and nothing left
behind.

    run_program("print(int(input()) + 1)", "41").stdout                          # '42\\n'
    check_calls("def f(x):\\n    return x + 1", "assert f(41) == 42", "f")        # Verdict(status='passed', detail='')

Two ways to shut a program in; `sandbox_isolation` tries what they are worth on a machine:

  "namespaces"  mounts, processes, network and shared memory of its own (a root with Python's libraries, to be read, and one
                small folder in memory), a user without rights, limits, and a filter of system calls (`sandbox_filter`).
  "seccomp"     where a container allows no namespaces: limits and the filter, which then refuses to write any file, too,
                and Landlock, where the kernel has it, by which Python's libraries alone can be read.
  "none"        limits alone. It has to be asked for by name: such a program has the network and all that the user may
                touch, and what it starts may live on.

Why a pass cannot be made up: tests and program are two processes in two sandboxes (`sandbox_call`). The program gets the
arguments of one call after the other and answers with plain data, which the tests' process compares; the verdict goes from
there through a pipe that the program does not have. Leaving early, printing, changed builtins, odd equalities, looks at
frames or memory reach nothing but the program's own process. What remains:

  - A program may know the answers: by heart, or, with "seccomp" on a kernel without Landlock, from files that it can read.
  - A test that looks at what a function did to its arguments sees its own copies, unchanged.
  - Tests are believed in their verdict; with the machine they are not trusted either, they run shut in.
  - The kernel is trusted: this is no virtual machine.
  - Limits are a program's; n programs side by side take n times as much. Time on the clock goes on while the machine is
    busy: CPU seconds are meant to be the limit that is met first, so that a verdict can be repeated.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
import warnings
from typing import NamedTuple

from dsv3.checks import check, check_choice
from dsv3.rl.sandbox_process import SandboxLimits, SandboxProcess, drain_processes

ISOLATIONS = ("best", "namespaces", "seccomp", "none")
_RETRY_SECONDS = 30.0  # a machine that was too busy for an isolation may have it later
_users: dict[str, int] = {}  # isolation, of which a trial went well → the user that its program has
_troubles: dict[str, tuple[float, str]] = {}  # isolation → when a trial of it failed, and why
_told: set[str] = set()


class ProgramEnd(NamedTuple):
    """How a program ended.

    Args:
      status: "ended" by itself; "timeout": a limit of time; "output": it wrote too much; "killed" by a signal.
      code: what it ended with; minus the signal's number where one ended it.
      stdout, stderr: what it wrote, as far as `output_bytes` go.
      cpu_seconds, seconds: what it took.
    """

    status: str
    code: int
    stdout: str
    stderr: str
    cpu_seconds: float
    seconds: float


class Verdict(NamedTuple):
    """What tests say of a program.

    Args:
      status: "passed"; "failed"; "timeout": a limit of time; "error": the tests themselves are at fault.
      detail: why, in one line.
    """

    status: str
    detail: str


class Isolation(NamedTuple):
    """What a sandbox keeps a program from, as tried by a program in it.

    Args:
      name: "namespaces", "seccomp" or "none".
      network: it can make no socket.
      processes: it can start no process.
      writes: it can write no file outside of its folder.
      reads: it can read no file but Python's libraries.
      signals: it can send no signal to the process that watches it.
      user: the user id that it has.
    """

    name: str
    network: bool
    processes: bool
    writes: bool
    reads: bool
    signals: bool
    user: int


def run_program(
    program: str, stdin: str = "", *, limits: SandboxLimits | None = None, isolation: str = "best"
) -> ProgramEnd:
    """Runs a Python program in a sandbox and waits for its end.

    Args:
      program: its source; it has the standard library, nothing else.
      stdin: its standard input.
      limits: what it may take; None: the defaults.
      isolation: "best" is "namespaces", or else "seccomp"; or one by name.

    Returns:
      How it ended. Whatever it did, nothing of it is alive or on disk any more (but with "none").

    Raises:
      ValueError: a wrong argument; the isolation cannot be had here.
      OSError: the sandbox failed, not the program.
    """
    limits = limits or SandboxLimits()
    kind = settle_isolation("run_program", isolation, limits)
    return _run(kind, program, stdin, limits)


def check_calls(
    program: str, tests: str, entry_point: str, *, prompt: str = "", limits: SandboxLimits | None = None,
    isolation: str = "best",
) -> Verdict:  # fmt: skip
    """Runs tests against a function of a program, in two sandboxes.

    Args:
      program: Python source that defines the function, or goes on where `prompt` ends.
      tests: Python source that calls `entry_point`, or defines `check(candidate)` as HumanEval does. They pass when
        nothing raises and the function was called.
      entry_point: the function's name. Its arguments and results are numbers, texts, bytes, None, and lists, tuples, sets
        and dicts of them.
      prompt: source that comes before both: imports, helpers, the function's head.
      limits, isolation: as in `run_program`; the tests have the same limits.

    Returns:
      The verdict.

    Raises:
      ValueError: a wrong argument; the isolation cannot be had here.
      OSError: a sandbox failed, not the program.
    """
    limits = limits or SandboxLimits()
    check(entry_point.isidentifier(), f"check_calls: `entry_point` is {entry_point!r}, want the name of a function")
    kind = settle_isolation("check_calls", isolation, limits)
    job = {"entry_point": entry_point, "prompt": prompt}
    with contextlib.ExitStack() as runs:
        with contextlib.ExitStack() as pipes:
            requests, replies = os.pipe(), os.pipe()
            for descriptor in (*requests, *replies):
                pipes.callback(os.close, descriptor)
            tested = {**job, "mode": "call", "program": program, "requests": requests[0], "replies": replies[1]}
            testing = {**job, "mode": "check", "tests": tests, "requests": requests[1], "replies": replies[0]}
            tests_run = runs.enter_context(SandboxProcess(kind, limits, testing, extra_seconds=2.0, keep=["stdout"]))
            program_run = runs.enter_context(SandboxProcess(kind, limits, tested, keep=[]))
        drain_processes([tests_run, program_run], limits.wall_seconds + 2.0)
        return _judge(tests_run, program_run)


def sandbox_isolation(isolation: str = "best") -> Isolation:
    """Tries what a program in the sandbox can do on this machine, and returns what it cannot.

    Args:
      isolation: as in `run_program`.

    Raises:
      ValueError: the isolation cannot be had here.
    """
    kind = settle_isolation("sandbox_isolation", isolation, SandboxLimits())
    folders = [tempfile.gettempdir(), os.path.expanduser("~"), "/var/tmp", "/dev/shm"]
    end = _run(kind, _PROBE, json.dumps([folders, os.getpid(), os.path.abspath(__file__)]), SandboxLimits())
    if end.status != "ended" or end.code:
        raise OSError(f"sandbox_isolation: the trial ended with {end.code} ({end.stderr.strip()[-200:]})")
    return Isolation(kind, **json.loads(end.stdout))


def settle_isolation(function: str, isolation: str, limits: SandboxLimits) -> str:
    """Returns the isolation that a run will have, "namespaces", "seccomp" or "none", or refuses, in the name of `function`.

    Args:
      function: who asks.
      isolation: as in `run_program`.
      limits: what is to be limited.

    Raises:
      ValueError: it cannot be had here.
    """
    check_choice(function, "isolation", isolation, ISOLATIONS)
    check(sys.platform == "linux", f"{function}: the system is {sys.platform}, want Linux for a sandbox")
    if isolation == "none":
        return isolation
    tried = {name: _trouble(name) for name in (("namespaces", "seccomp") if isolation == "best" else (isolation,))}
    kind = next((name for name, trouble in tried.items() if trouble is None), None)
    why = "; ".join(f"{name}: {trouble}" for name, trouble in tried.items() if trouble)
    want = "want isolation='none' where that is accepted"
    check(kind is not None, f"{function}: a program cannot be kept from the network here ({why}), {want}")
    many = f"{function}: `limits` allow {limits.processes} processes, want 0"
    check(kind == "namespaces" or limits.processes == 0, f"{many} with {kind!r}")
    bound = limits.processes == 0 or _users.get(kind) != 0
    check(bound, f"{many}: the kernel counts none of root, who can be nobody else here")
    if isolation == "best" and kind != "namespaces" and kind not in _told:
        _told.add(kind)
        warnings.warn(f"{function}: programs run with {kind!r}, {why}", stacklevel=3)
    return kind


def _trouble(kind: str) -> str | None:
    """Why an isolation cannot be had here; None: it can. A failure is tried again after a while."""
    if kind in _users:
        return None
    tried, why = _troubles.get(kind, (0.0, ""))
    if why and time.monotonic() < tried + _RETRY_SECONDS:
        return why
    try:
        end = _run(kind, "import os\nprint('here', os.getuid())", "", SandboxLimits())
        why = f"a trial ended with {end.code}: {end.stderr.strip()[-200:]}"
        here, _, user = end.stdout.partition(" ")
        if here == "here":
            _users[kind] = int(user)
            return None
    except OSError as error:
        why = str(error).removeprefix("sandbox: ")
    _troubles[kind] = time.monotonic(), why
    return why


def _run(kind: str, program: str, stdin: str, limits: SandboxLimits) -> ProgramEnd:
    with SandboxProcess(kind, limits, {"mode": "script", "program": program}, stdin=stdin) as run:
        drain_processes([run], limits.wall_seconds)
        report = run.report()
        status = "output" if run.flooded else "timeout" if run.out_of_time() else "killed" if report["code"] < 0 else "ended"
        stdout, stderr = (bytes(run.written[name]).decode("utf-8", "replace") for name in ("stdout", "stderr"))
        return ProgramEnd(status, report["code"], stdout, stderr, report["cpu_seconds"], report["seconds"])


def _judge(tests_run: SandboxProcess, program_run: SandboxProcess) -> Verdict:
    """The verdict of the process of the tests; a limit that the program has met is the better reason."""
    late, report = program_run.out_of_time(), tests_run.report()
    try:
        verdict = Verdict(**json.loads(bytes(tests_run.written["stdout"])))
        good = verdict.status in ("passed", "failed", "error") and isinstance(verdict.detail, str)
        check(good, "check_calls: the tests' process has written something else")
    except (ValueError, TypeError, RecursionError):
        late = late or tests_run.out_of_time()
        verdict = Verdict("failed", f"the tests' process ended with {report['code']}")
    return Verdict("timeout", "a limit of time") if late and verdict.status == "failed" else verdict


_PROBE = """
import json, os, socket, sys
folders, caller, source = json.loads(sys.stdin.read())

def fails(action):
    try:
        action()
    except OSError:
        return True
    return False

def fork():
    if os.fork() == 0:
        os._exit(0)

def write(folder):
    name = os.path.join(folder, f"dsv3-trial-{os.getpid()}")
    open(name, "x").close()
    os.unlink(name)

print(json.dumps({
    "network": all(map(fails, [lambda: socket.socket().close(), lambda: socket.socketpair(type=socket.SOCK_DGRAM)])),
    "processes": fails(fork),
    "writes": all(fails(lambda: write(folder)) for folder in folders),
    "reads": all(fails(lambda: open(name).close()) for name in ("/etc/passwd", source, f"/proc/{caller}/environ")),
    "signals": fails(lambda: os.kill(os.getppid(), 0)),
    "user": os.getuid(),
}))
"""
