"""The sandbox: hostile programs end within their limits, reach nothing, and leave nothing."""

import ctypes
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from dsv3.rl import sandbox, sandbox_filter, sandbox_process
from dsv3.rl.sandbox import check_calls, run_program, sandbox_isolation
from dsv3.rl.sandbox_process import SandboxLimits
from tests.rl.conftest import read
from tests.rl.isolations import KINDS, trouble

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMITS = SandboxLimits(cpu_seconds=1, memory_bytes=128 << 20, output_bytes=1 << 16, file_bytes=1 << 20, folder_bytes=1 << 21)
ANYHOW = ("ended", "killed", "timeout")
IMPATIENT = SandboxLimits(wall_seconds=0.7)
SPAWN = "import os\nfor _ in range(5):\n    if os.fork() == 0:\n"


# name → (program, status, something that stdout or stderr has to say)
HOSTILE = {
    "fork bomb": ("import os\nwhile True:\n    os.fork()", "ended", "PermissionError"),
    "vfork by number": ("import ctypes\nprint(ctypes.CDLL(None).syscall(58))", "ended", "-1\n"),
    "another program": ("import os\nos.execv('/bin/sh', ['sh'])", "ended", "Error"),
    "subprocess": ("import subprocess\nsubprocess.run(['/bin/true'])", "ended", "Error"),
    "memory at once": ("x = bytearray(1 << 40)", "ended", "MemoryError"),
    "memory in steps": ("x = []\nwhile True:\n    x.append(bytearray(1 << 20))", "ended", "MemoryError"),
    "endless loop of C": ("10 ** 10 ** 10", "timeout", ""),
    "deaf and mute loop": (
        "import os, signal\nfor s in set(signal.Signals) - {9, 19}:\n    signal.signal(s, signal.SIG_IGN)\n"
        "os.closerange(0, 4096)\nwhile True:\n    pass", "timeout", "",
    ),
    "threads": (
        "import threading, time\nstart = lambda: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "while True:\n    start()", "ended", "can't start new thread",
    ),
    "output flood": ("while True:\n    print('x' * 1000)", "output", "xxx"),
    "flood of errors": ("import os\nwhile True:\n    os.write(2, b'y' * 1000)", "output", "yyy"),
    "huge file": ("with open('f', 'wb') as f:\n    while True:\n        f.write(bytes(1 << 16))", "ended", "Error"),
    "many files": ("for i in range(10 ** 6):\n    open(str(i), 'w').close()", "ended", "Error"),
    "full folder": (
        "for i in range(10):\n    with open(str(i), 'wb') as f:\n        f.write(bytes(1 << 19))", "ended", "Error"
    ),
    "descriptors": ("x = []\nwhile True:\n    x.append(open('/dev/null'))", "ended", "OSError"),
    "memory file": ("import os\nos.memfd_create('x')", "ended", "PermissionError"),
    "deep recursion": ("import sys\nsys.setrecursionlimit(10 ** 9)\nf = lambda: f()\nf()", ANYHOW, ""),
    "deep nesting": ("eval('(' * 10 ** 4)", ("ended", "killed"), ""),
    "socket": ("import socket\nsocket.create_connection(('127.0.0.1', 80), 1)", "ended", "PermissionError"),
    "socket by number": ("import ctypes\nprint(ctypes.CDLL(None).syscall(41, 2, 1, 0))", "ended", "-1\n"),
    "socket of the x32 calls": ("import ctypes\nctypes.CDLL(None).syscall(0x40000000 + 41, 2, 1, 0)", "killed", ""),
    "local socket": ("import socket\nsocket.socket(socket.AF_UNIX)", "ended", "PermissionError"),
    "pair of datagrams": ("import socket\nsocket.socketpair(type=socket.SOCK_DGRAM)", "ended", "PermissionError"),
    "pair of packets": ("import socket\nsocket.socketpair(type=socket.SOCK_SEQPACKET)", "ended", "PermissionError"),
    "pair of another family": ("import socket\nsocket.socketpair(socket.AF_INET)", "ended", "PermissionError"),
    "a pair that goes elsewhere": (
        "import socket\na, b = socket.socketpair()\na.send(b'1')\nprint(b.recv(1))\n"
        "for action in (lambda: a.connect('\\0x'), lambda: a.bind('\\0x'), lambda: a.listen(1), lambda: a._accept()):\n"
        "    try:\n        action()\n    except PermissionError:\n        print('no')", "ended", "b'1'\nno\nno\nno\nno\n",
    ),
    "shared memory by number": (
        "import ctypes, errno\ncall = ctypes.CDLL(None, use_errno=True).syscall\n"
        "for number in (30, 31, 65, 66, 69, 70, 71, 220) if __import__('os').uname().machine == 'x86_64' else ():\n"
        "    call(number, 1, 0, 0, 0, 0)\n    assert ctypes.get_errno() == errno.EPERM\nprint('no')", "ended", "no\n",
    ),
    "writing to stdin": ("import os\nos.write(0, b'x')", "ended", "Bad file descriptor"),
    "uring": ("import ctypes\nprint(ctypes.CDLL(None).syscall(425, 8, bytes(120)))", "ended", "-1\n"),
    "killing others": (
        "import os\nfor pid in (os.getppid(), -1, 1, 0):\n    try:\n        os.kill(pid, 9)\n    except OSError:\n"
        "        print('no')", "ended", "no\nno\nno\nno\n",
    ),
    "signal by descriptor": ("import fcntl\nfcntl.fcntl(0, fcntl.F_SETOWN, 1)", "ended", "PermissionError"),
    "tracing": ("import ctypes, os\nprint(ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0))", "ended", "-1\n"),
    "new namespaces": ("import ctypes\nprint(ctypes.CDLL(None).unshare(0x10000000))", "ended", "-1\n"),
    "root again": ("import os\nos.setgroups([])", "ended", "PermissionError"),
    "no environment": ("import os\nprint(dict(os.environ))", "ended", "{}\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_hostile_programs_end_and_leave_nothing(kind, name, nothing_left):
    program, status, said = HOSTILE[name]
    end = run_program(program, limits=LIMITS, isolation=kind)
    assert end.status in ((status,) if isinstance(status, str) else status), end
    assert said in end.stdout + end.stderr
    assert end.cpu_seconds < (0.8 if status == "output" else LIMITS.cpu_seconds + 1)  # a flood is ended before that limit
    assert len(end.stdout) <= LIMITS.output_bytes and len(end.stderr) <= LIMITS.output_bytes


IDLE = {"sleep": "import time\ntime.sleep(60)", "stop": "import os\nos.kill(os.getpid(), 19)"}


@pytest.mark.parametrize("name", IDLE)
@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_idle_programs_end_by_the_clock(kind, name, nothing_left):
    start = time.monotonic()
    assert run_program(IDLE[name], limits=IMPATIENT, isolation=kind).status == "timeout"
    assert time.monotonic() - start < 10  # of 60: the machine may be busy


# Programs that may start processes: the namespaces alone hold them then.
FAMILIES = {
    "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "orphans": SPAWN + "        while True:\n            pass",
    "quiet orphans": SPAWN + "        os.closerange(0, 99)\n        import time\n        time.sleep(60)",
    "killers": SPAWN + "        import time\n        os.kill(-1, 9)\n        time.sleep(60)",
}


@pytest.mark.usefixtures("bound_on_processes")
@pytest.mark.parametrize("name", FAMILIES)
def test_families_die_with_the_program(name, nothing_left):
    limits = SandboxLimits(cpu_seconds=1, wall_seconds=1.5, processes=20)
    start = time.monotonic()
    run_program(FAMILIES[name], limits=limits, isolation="namespaces")
    assert time.monotonic() - start < 20


@pytest.mark.usefixtures("bound_on_processes")
def test_families_make_no_namespaces():
    program = "import ctypes\nprint([ctypes.CDLL(None).syscall(56, 17 | flag, 0, 0, 0, 0) for flag in "
    program += "(1 << 17, *(1 << bit for bit in range(25, 31)))])"
    if os.uname().machine == "x86_64":
        end = run_program(program, limits=SandboxLimits(processes=20), isolation="namespaces")
        assert end.stdout == f"{[-1] * 7}\n", end


@pytest.mark.usefixtures("namespaces")
def test_root_whose_processes_nothing_counts_starts_none(monkeypatch):
    """Root in a user namespace of its own stays root, and the kernel has no limit of processes for it."""
    if os.geteuid():
        pytest.skip("root alone can stay root")
    limits = SandboxLimits(processes=2)
    with monkeypatch.context() as patch:
        patch.setattr(sandbox_process, "_START", sandbox_process._START.replace(
            "sandbox_child.main", "sandbox_child.sandbox_linux.drop_user = lambda user: False; sandbox_child.main"
        ))  # fmt: skip
        with pytest.raises(OSError, match="sandbox: .*the kernel counts no processes of root"):
            sandbox._run("namespaces", "print(1)", "", limits)
        assert sandbox._run("namespaces", "print(1)", "", SandboxLimits()).stdout == "1\n"
    monkeypatch.setitem(sandbox._users, "namespaces", 0)
    with pytest.raises(ValueError, match="run_program: `limits` allow 2 processes, want 0: the kernel counts none of root"):
        run_program("print(1)", limits=limits, isolation="namespaces")


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_files_outside_are_out_of_reach(kind, tmp_path, nothing_left):
    secret = tmp_path / "secret.txt"
    secret.write_text("the answers")
    tmp_path.chmod(0o777)
    secret.chmod(0o666)
    places = [str(tmp_path), "/" + "tmp", "/var/tmp", "/dev/shm", "/", str(ROOT), os.path.expanduser("~")]
    program = f"""
import os
reached = []
for name, flags in [({str(secret)!r}, os.O_WRONLY), ({str(secret)!r}, os.O_RDWR | os.O_TRUNC)]:
    try:
        os.write(os.open(name, flags), b"x")
        reached.append(name)
    except OSError:
        pass
for place in {places!r}:
    for action in (lambda: os.mkdir(place + "/made"), lambda: os.open(place + "/made", os.O_CREAT | os.O_WRONLY),
                   lambda: os.symlink("a", place + "/made"), lambda: os.rename({str(secret)!r}, place + "/made"),
                   lambda: os.chmod({str(secret)!r}, 0), lambda: os.truncate({str(secret)!r}, 0)):
        try:
            action()
            reached.append(place)
        except OSError:
            pass
try:
    print(open({str(secret)!r}).read())
except OSError:
    pass
print(reached)
"""
    end = run_program(program, isolation=kind)
    outcome = "[]\n" if sandbox_isolation(kind).reads else "the answers\n[]\n"
    assert (end.status, end.code, end.stdout) == ("ended", 0, outcome), end.stderr
    assert secret.read_text() == "the answers" and not (tmp_path / "made").exists()
    assert secret.stat().st_mode & 0o777 == 0o666


@pytest.mark.usefixtures("namespaces")
def test_a_program_has_a_folder_of_its_own():
    program = "import os, tempfile\nopen('a', 'w').write('1')\nprint(os.getcwd(), os.listdir('.'), tempfile.gettempdir())"
    for _ in range(2):  # the second finds nothing of the first
        assert run_program(program, isolation="namespaces").stdout == "/box ['a'] /box\n"
    program = "import os\nprint(*(os.statvfs(path).f_flag & os.ST_RDONLY for path in ('/', os.__file__, '.')))"
    assert run_program(program, isolation="namespaces").stdout == "1 1 0\n"


@pytest.mark.usefixtures("bound_on_processes")
def test_threads_are_counted():
    program = "import threading, time\nthreading.stack_size(1 << 16)\ncount = 0\ntry:\n    while count < 100:\n"
    program += "        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n        count += 1\n"
    program += "except RuntimeError:\n    pass\nprint(count, flush=True)\nimport os\nos._exit(0)"
    assert 5 <= int(run_program(program, limits=SandboxLimits(threads=5), isolation="namespaces").stdout) <= 6


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_what_a_program_may_do(kind):
    program = """
import asyncio, collections, decimal, functools, heapq, itertools, json, math, os, random, re, signal, sys, threading
async def wait():
    await asyncio.sleep(0.01)
    return 3
results = []
thread = threading.Thread(target=lambda: results.append(2))
thread.start()
thread.join()
signal.signal(signal.SIGUSR1, lambda *_: results.append(4))
os.kill(os.getpid(), signal.SIGUSR1)
print(sys.stdin.readline().strip(), results, asyncio.run(wait()), __name__, "naïve 猫")
sys.exit(7)
"""
    end = run_program(program, "1\n2\n", isolation=kind)
    assert (end.status, end.code, end.stdout) == ("ended", 7, "1 [2, 4] 3 __main__ naïve 猫\n"), end.stderr


def may_administer():
    """Whether this process is root with CAP_SYS_ADMIN, who needs no user namespace."""
    status = pathlib.Path("/proc/self/status").read_text()
    return os.geteuid() == 0 and int(status.split("CapEff:")[1].split()[0], 16) >> 21 & 1


def test_it_says_what_it_keeps_programs_from():
    for kind in KINDS:
        if trouble(kind) is None:
            found = sandbox_isolation(kind)
            assert found.network and found.processes and found.writes and found.signals
            landlock = ctypes.CDLL(None).syscall(444, None, 0, 1) > 0
            assert found.reads == (kind == "namespaces" or landlock)
            if kind == "namespaces" and may_administer():
                assert found.user >= 1 << 30
    found = sandbox_isolation("none")
    assert not (found.network or found.processes or found.reads)


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_it_ends_when_its_caller_is_killed(kind, nothing_left):
    program = "while True:\n    pass"
    code = f"from dsv3.rl import sandbox, sandbox_process as p\np._START = {sandbox_process._START!r}\n"
    code += f"sandbox._run({kind!r}, {program!r}, '', p.SandboxLimits(cpu_seconds=60, wall_seconds=60))"
    env = {**os.environ, "TMPDIR": tempfile.gettempdir()}  # where `nothing_left` looks
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env)
    deadline = time.monotonic() + 30
    while len(nothing_left()) < (4 if kind == "namespaces" else 3):  # the caller among them
        assert time.monotonic() < deadline, "the program did not start"
        time.sleep(0.02)
    caller.kill()
    caller.wait()
    while nothing_left():
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.02)


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_it_ends_when_its_own_process_is_killed(kind, nothing_left):
    """The program has no watcher then, and the caller hears of that at once."""
    limits = SandboxLimits(cpu_seconds=60, wall_seconds=60)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(sandbox._run, kind, "import time\ntime.sleep(60)", "", limits)
        deadline = time.monotonic() + 30
        while len(nothing_left()) < (3 if kind == "namespaces" else 2) or not parents(nothing_left()):
            assert time.monotonic() < deadline, "the program did not start"
            time.sleep(0.02)
        time.sleep(0.3)  # it is shut in by now
        mine = [pid for pid, parent in parents(nothing_left()).items() if parent == os.getpid()]
        os.kill(int(mine[0]), signal.SIGKILL)
        with pytest.raises(OSError, match="sandbox: it ended without a word"):
            run.result()
        assert time.monotonic() < deadline, "it went on"
        while nothing_left():
            assert time.monotonic() < deadline, "it goes on"
            time.sleep(0.02)


def parents(pids):
    stats = {pid: read(f"/proc/{pid}/stat").rpartition(b")")[2].split() for pid in pids}
    return {pid: int(stat[1]) for pid, stat in stats.items() if stat}


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_a_program_that_cannot_be_watched_is_ended(kind, monkeypatch, nothing_left):
    monkeypatch.setattr(sandbox_process, "_START", sandbox_process._START.replace(
        "sandbox_child.main", "del sandbox_child.os.pidfd_open; sandbox_child.main"
    ))  # fmt: skip
    start = time.monotonic()
    with pytest.raises(OSError, match="sandbox: AttributeError: .*pidfd_open"):
        sandbox._run(kind, "import time\ntime.sleep(60)", "", SandboxLimits(wall_seconds=60))
    assert time.monotonic() - start < 15  # of 60


def test_without_isolation_nothing_runs(monkeypatch):
    monkeypatch.setattr(sandbox, "_trouble", lambda kind: "refused")
    for isolation in ("best", "namespaces", "seccomp"):
        with pytest.raises(ValueError, match=r"run_program: a program cannot be kept from the network here .*refused"):
            run_program("print(1)", isolation=isolation)
    assert run_program("print(1)", isolation="none").stdout == "1\n"


@pytest.mark.parametrize("kind", ["seccomp"], indirect=True)
def test_a_failed_trial_is_made_again(kind, monkeypatch):
    """A machine may have been too busy. Meanwhile it is said that programs have less than the best."""
    run, asked, works = sandbox._run, [], False

    def run_sometimes(tried, *rest):
        asked.append(tried)
        if tried == "namespaces" and not works:
            raise OSError("sandbox: unshare: Resource temporarily unavailable")
        return run(kind, *rest)

    for name, value in (("_run", run_sometimes), ("_users", {}), ("_troubles", {}), ("_told", set())):
        monkeypatch.setattr(sandbox, name, value)
    settle = lambda: sandbox.settle_isolation("run_program", "best", SandboxLimits())  # noqa: E731
    with pytest.warns(UserWarning, match="run_program: programs run with 'seccomp', namespaces: unshare: Resource temp"):
        assert settle() == "seccomp"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert settle() == "seccomp"
    assert asked == ["namespaces", "seccomp"]
    monkeypatch.setattr(sandbox, "_RETRY_SECONDS", 0.0)
    assert settle() == "seccomp" and asked[2:] == ["namespaces"]
    works = True
    assert settle() == settle() == "namespaces" and len(asked) == 4


@pytest.mark.usefixtures("sandboxed")
def test_programs_are_compiled_as_they_are():
    """Not with the `from __future__` of the file that compiles them."""
    assert run_program("def f(x: int): pass\nprint(f.__annotations__)").stdout == "{'x': <class 'int'>}\n"
    source = "def {}(x: int):\n    return {}.__annotations__['x'] is int\n"
    tests = source.format("here", "here") + "assert here(1) and f(1) and g(1)"
    assert check_calls(source.format("f", "f"), tests, "f", prompt=source.format("g", "g")).status == "passed"
    head = source.format("f", "f").partition("    ")
    assert check_calls("    " + head[2], "assert f(1)", "f", prompt=head[0]).status == "passed"


@pytest.mark.usefixtures("sandboxed")
def test_random_numbers_repeat():
    program = "import random\nprint(random.random())"
    assert run_program(program).stdout == run_program(program).stdout


@pytest.mark.usefixtures("sandboxed")
def test_a_sandbox_that_cannot_be_made_runs_nothing(monkeypatch):
    """As the kernel might refuse it: the program does not run with less instead."""
    monkeypatch.setattr(sandbox_process, "_START", sandbox_process._START.replace(
        "sandbox_child.main", "from dsv3.rl import sandbox_filter; sandbox_filter.MACHINES.clear(); sandbox_child.main"
    ))  # fmt: skip
    with pytest.raises(OSError, match="sandbox: .*make_filter: `machine` is"):
        sandbox._run("seccomp", "print(1)", "", SandboxLimits())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SandboxLimits(cpu_seconds=0), "SandboxLimits: `cpu_seconds` is 0, want a whole number of at least 1"),
        (lambda: SandboxLimits(cpu_seconds=1.5), "`cpu_seconds` is 1.5, want a whole number"),
        (lambda: SandboxLimits(wall_seconds=float("nan")), "`wall_seconds` is nan, want a number of at least 0.01"),
        (lambda: SandboxLimits(wall_seconds=1e7), "`wall_seconds` is 10000000.0, want at most 1000000"),
        (lambda: SandboxLimits(open_files=3), "`open_files` is 3, want a whole number of at least 16"),
        (lambda: run_program("", isolation="docker"), "run_program: `isolation` is 'docker', want one of 'best'"),
        (lambda: check_calls("", "", "f(x)"), r"check_calls: `entry_point` is 'f\(x\)', want the name of a function"),
        (lambda: sandbox_filter.make_filter("z80", 1, forks=False, writes=False), "make_filter: `machine` is 'z80'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", ["seccomp"], indirect=True)
def test_families_need_namespaces(kind):
    with pytest.raises(ValueError, match="`limits` allow 2 processes, want 0 with 'seccomp'"):
        run_program("", limits=SandboxLimits(processes=2), isolation=kind)


@pytest.mark.usefixtures("sandboxed")
def test_signals_are_the_callers_business(nothing_left):
    """An exception in the caller ends the sandbox."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            run_program("while True:\n    pass", limits=SandboxLimits(cpu_seconds=60, wall_seconds=60))
        assert time.monotonic() - start < sandbox_process._GRACE / 2  # by the sandbox itself, not as a last resort
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert json.loads(run_program("print([1])").stdout) == [1]
