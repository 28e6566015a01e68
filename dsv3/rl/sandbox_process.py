"""The outside of a sandbox: its process is started, listened to, and ended, with everything of it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, BinaryIO

from dsv3.checks import check

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Last on the path, and for these modules alone.
_START = "import sys; sys.path.append(sys.argv[1]); from dsv3.rl import sandbox_child; sys.path.pop(); "
_START += "sandbox_child.main(*map(int, sys.argv[2:]))"
_GRACE = 20.0  # seconds after a limit in which the sandbox itself has to end; long, as the machine may be busy
_MOST_SECONDS = 10**6  # `poll` waits for milliseconds in 31 bits


@dataclass(frozen=True)
class SandboxLimits:
    """What one program may take.

    Args:
      cpu_seconds: CPU time of all its threads, whole seconds.
      wall_seconds: time on the clock.
      memory_bytes: address space.
      folder_bytes: what its folder holds, in memory, with "namespaces"; with "seccomp" nothing can be written.
      file_bytes: a single file.
      open_files: descriptors.
      threads: besides its first one. With "seccomp" only the memory bounds them where no other user can be taken.
      processes: that it may start, with "namespaces"; never other programs.
      output_bytes: of its standard output, and of its standard error; a program that writes more is ended.
    """

    cpu_seconds: int = 4
    wall_seconds: float = 20.0
    memory_bytes: int = 512 << 20
    folder_bytes: int = 16 << 20
    file_bytes: int = 8 << 20
    open_files: int = 32
    threads: int = 8
    processes: int = 0
    output_bytes: int = 1 << 20

    def __post_init__(self):
        least = {"threads": 0, "processes": 0, "open_files": 16, "wall_seconds": 0.01, "memory_bytes": 64 << 20}
        for field in fields(self):
            value, low = getattr(self, field.name), least.get(field.name, 1)
            kinds, want = ((int, float), "a number") if field.name == "wall_seconds" else ((int,), "a whole number")
            good = type(value) in kinds and low <= value < math.inf
            check(good, f"SandboxLimits: `{field.name}` is {value!r}, want {want} of at least {low}")
        most = f"want at most {_MOST_SECONDS}"
        check(self.wall_seconds <= _MOST_SECONDS, f"SandboxLimits: `wall_seconds` is {self.wall_seconds!r}, {most}")


class SandboxProcess:
    """A context in which a job runs in a sandbox; at its end nothing of it is alive.

    Args:
      isolation: "namespaces", "seccomp" or "none".
      limits: what the program may take.
      job: what `sandbox_call` is to run.
      stdin: the program's standard input.
      extra_seconds: added to the limit on the clock.
      keep: what to keep of "stdout" and "stderr"; the rest goes nowhere.
    """

    def __init__(
        self, isolation: str, limits: SandboxLimits, job: Mapping[str, Any], *, stdin: str = "", extra_seconds: float = 0.0,
        keep: Sequence[str] = ("stdout", "stderr"),
    ):  # fmt: skip
        self.limits, self._stdin, self._keep = limits, stdin, keep
        self._job = {**asdict(limits), **job, "isolation": isolation}
        self._job["wall_seconds"] += extra_seconds
        self._job["number"] = secrets.randbelow(1 << 29)
        self.written = {name: bytearray() for name in ("stdout", "stderr", "status")}
        self.pipes: dict[str, int] = {}
        self.flooded = False

    def __enter__(self) -> SandboxProcess:
        with contextlib.ExitStack() as stack:
            self._folder = tempfile.mkdtemp(prefix="dsv3-sandbox-")
            stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
            self._job["folder"] = self._folder
            contents = json.dumps(self._job), self._stdin
            job, stdin = (stack.enter_context(_readable_file(self._folder, content)) for content in contents)
            control, status = _pipe(stack), _pipe(stack)
            descriptors = (job.fileno(), control[0], status[1])
            calls = [self._job[name] for name in ("requests", "replies") if name in self._job]
            out, err = (subprocess.PIPE if name in self._keep else subprocess.DEVNULL for name in ("stdout", "stderr"))
            library = os.environ.get("LD_LIBRARY_PATH")  # which Python itself may need to start; the program gets none
            command = [sys.executable, "-P", "-s", "-S", "-X", "utf8", "-c", _START, _ROOT, *map(str, descriptors)]
            self._process = subprocess.Popen(
                command, stdin=stdin, stdout=out, stderr=err, pass_fds=(*descriptors, *calls), cwd=self._folder,
                env={"PYTHONHASHSEED": "0", **({"LD_LIBRARY_PATH": library} if library else {})}, start_new_session=True,
            )  # fmt: skip
            stack.pop_all()
        job.close()
        stdin.close()
        os.close(control[0])
        os.close(status[1])
        self._control: int | None = control[1]
        self.pipes = {"status": status[0]} | {name: getattr(self._process, name).fileno() for name in self._keep}
        return self

    def stop(self) -> None:
        """Tells the sandbox to end."""
        if self._control is not None:
            os.close(self._control)
            self._control = None

    def take(self, name: str, data: bytes) -> None:
        """Keeps what came from a pipe; too much of it ends the program."""
        room = self.limits.output_bytes - len(self.written[name])
        self.written[name] += data[:room]
        if len(data) > room:
            self.flooded = True
            self.stop()

    def report(self) -> dict[str, Any]:
        """Returns how the program ended, see `sandbox_child.main`; an `OSError` where it was not run."""
        try:
            report = json.loads(bytes(self.written["status"]).split(b"\n")[0])
        except ValueError:
            said = bytes(self.written["stderr"][-200:]).decode("utf-8", "replace").strip().rpartition("\n")[2]
            report = {"error": f"it ended without a word ({said or 'nothing on stderr'})"}
        if "error" in report:
            raise OSError(f"sandbox: {report['error']}")
        return report

    def out_of_time(self) -> bool:
        """Whether a limit of time ended the program."""
        report = self.report()
        used_up = report["cpu_seconds"] > self.limits.cpu_seconds - 0.5
        return report["late"] or (used_up and report["code"] == -signal.SIGKILL)

    def __exit__(self, *_: Any) -> None:
        self.stop()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self.pipes["status"])
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def drain_processes(runs: Sequence[SandboxProcess], seconds: float) -> None:
    """Reads what sandboxes write until all have ended; when the first has, the others are told to end.

    Args:
      runs: entered contexts.
      seconds: limit of the longest; a sandbox that lives on long after it is an `OSError`.
    """
    deadline = time.monotonic() + seconds + _GRACE
    with selectors.DefaultSelector() as selector:
        for run in runs:
            for name, descriptor in run.pipes.items():
                selector.register(descriptor, selectors.EVENT_READ, (run, name))
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise OSError(f"sandbox: it did not end {_GRACE:.0f} s after its limit of {seconds} s")
            for key, _ in selector.select(left):
                run, name = key.data
                data = os.read(key.fd, 1 << 16)
                if data:
                    run.take(name, data)
                    continue
                selector.unregister(key.fd)
                if run is runs[0] and name == "status":
                    for other in runs[1:]:
                        other.stop()


def _readable_file(folder: str, content: str) -> BinaryIO:
    """A file without a name that can be read alone."""
    path = os.path.join(folder, "content")
    with open(path, "wb") as file:
        file.write(content.encode("utf-8", "surrogatepass"))
    opened = open(path, "rb")
    os.unlink(path)
    return opened


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe that is closed where the stack is unwound."""
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    return ends
