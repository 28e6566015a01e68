"""The inside of the sandbox: a process that shuts itself in, runs a program in a child of it, and watches over that.

`dsv3.rl.sandbox` starts it with three descriptors: the job, as JSON, the control pipe, whose end says that the run is to
end, and the status pipe for what became of the program, which the program does not have. Standard library only.

    caller ─ this process ─ [first process of the namespaces, the watcher] ─ the program

The program is never the first process of its namespaces: when the watcher ends, the kernel kills what the program has left.
Each of them dies with the one before it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import time

from dsv3.rl import sandbox_call, sandbox_linux

_FIRST_USER = 0x40000000  # users without a name: one for each sandbox, so that none may touch another


def main(job_descriptor: int, control: int, status: int) -> None:
    """Runs the job; returns in the program's own process alone, when its code has ended.

    Args:
      job_descriptor: a file with the job, see `dsv3.rl.sandbox`.
      control: a pipe; the run ends when nobody holds its other end any more.
      status: a pipe for one line of JSON: `{"error": ...}` where the program was not run, else how it ended.
    """
    with open(job_descriptor, "rb") as file:
        job = json.load(file)
    folder = os.path.split(job["folder"])
    above = os.open(folder[0], os.O_PATH | os.O_CLOEXEC)  # by no path: the root will be another one
    try:
        if job["isolation"] == "namespaces":
            sandbox_linux.enter_namespaces()
            if first := os.fork():
                os.waitpid(first, 0)
                _leave(folder[1], above)
            os.close(above)
            sandbox_linux.die_with_parent(0)
            sandbox_linux.make_root(job["folder"], size=job["folder_bytes"])
        sandbox_linux.hide_memory()
        watcher, program = os.getpid(), os.fork()
    except OSError as error:
        _report(status, {"error": str(error)})
        os._exit(0)
    if program:
        _watch_safely(program, control, status, job["wall_seconds"])
        _leave(folder[1], above)
    os.close(control)
    try:
        if job["isolation"] != "namespaces":
            os.close(above)
        _shut_in(job, watcher)
    except Exception as error:  # whatever it is, the program must not run
        _report(status, {"error": f"{type(error).__name__}: {error}"})
        os._exit(0)
    os.close(status)
    random.seed(0)
    sandbox_call.RUNS[job["mode"]](job)


def _leave(name: str, above: int) -> None:
    """Ends this process and removes the sandbox's folder, which is empty: the caller may have been killed."""
    with contextlib.suppress(OSError):
        os.rmdir(name, dir_fd=above)
    os._exit(0)


def _shut_in(job: dict, watcher: int) -> None:
    """Gives up all that the program is not to have: its user, its capabilities, files, system calls."""
    os.setsid()
    os.environ.clear()
    namespaces = job["isolation"] == "namespaces"
    user = _FIRST_USER + job["number"]
    dropped = os.geteuid() == 0 and (namespaces or sandbox_linux.readable_by_all(os.path.dirname(os.__file__)))
    if job["isolation"] == "seccomp":
        sandbox_linux.restrict_files(".")
    if dropped:
        with contextlib.suppress(OSError):  # a user namespace that knows no other user
            os.chown(".", user, user)
        dropped = sandbox_linux.drop_user(user)
    if job["processes"] and namespaces and os.geteuid() == 0:
        raise OSError("the kernel counts no processes of root, who can be nobody else here, want `processes` of 0")
    sandbox_linux.drop_capabilities()
    sandbox_linux.die_with_parent(watcher)
    # The limit counts all of a user's processes, so it is of use where the user, or its namespace, is this sandbox's own.
    own = dropped or namespaces
    sandbox_linux.set_limits(
        cpu=job["cpu_seconds"], memory=job["memory_bytes"], file=job["file_bytes"], open_files=job["open_files"],
        tasks=job["threads"] + job["processes"] + 2 if own else None,
    )  # fmt: skip
    if job["isolation"] != "none":
        sandbox_linux.install_filter(forks=namespaces and job["processes"] > 0, writes=namespaces)


def _watch_safely(program: int, control: int, status: int, seconds: float) -> None:
    """As `_watch`; where that fails, the program does not go on without it."""
    try:
        _watch(program, control, status, seconds)
    except Exception as error:
        with contextlib.suppress(OSError):
            os.kill(program, signal.SIGKILL)
        _report(status, {"error": f"{type(error).__name__}: {error}"})


def _watch(program: int, control: int, status: int, seconds: float) -> None:
    """Waits for the program's end, the caller's word or the time limit; kills the program and reports."""
    start = time.monotonic()
    ended, poll = os.pidfd_open(program), select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(control, select.POLLIN)
    ready = [descriptor for descriptor, _ in poll.poll(seconds * 1000)]
    if ended not in ready:
        os.kill(program, signal.SIGKILL)
    with contextlib.suppress(OSError):  # the others of its group
        os.killpg(program, signal.SIGKILL)
    _, code, usage = os.wait4(program, 0)
    _report(status, {
        "code": os.waitstatus_to_exitcode(code), "late": not ready, "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "seconds": time.monotonic() - start,
    })  # fmt: skip


def _report(status: int, report: dict) -> None:
    with contextlib.suppress(OSError):  # the caller is gone
        os.write(status, json.dumps(report).encode() + b"\n")
