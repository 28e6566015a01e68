"""Which system calls a program in the sandbox may make: a seccomp filter, as the kernel's BPF instructions.

Refused are new sockets, new processes and programs, signals and looks at other processes, namespaces and mounts, shared
memory that outlives a process, and, where the files are not those of a mount namespace, every way to write one. A pair of
local stream sockets, which nothing can connect to anything else, is allowed: `asyncio` needs one. What the filter does not
know, a newer call of the kernel, does not exist for the program. Standard library only.

References:
  Linux, Documentation/userspace-api/seccomp_filter.rst; include/uapi/linux/{seccomp,filter,audit}.h; the tables of calls.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable

# What `platform.machine` says → the kernel's AUDIT_ARCH and the column of the tables below.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# Name, number on x86_64, number on aarch64 (0: there is none).
_REFUSED = """
socket 41 198, connect 42 203, bind 49 200, listen 50 201, accept 43 202, accept4 288 242, sendmmsg 307 269, execve 59 221,
execveat 322 281, ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440,
process_mrelease 448 448, kcmp 312 272, pidfd_open 434 434, pidfd_send_signal 424 424,
pidfd_getfd 438 438, tkill 200 130, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, unshare 272 97, setns 308 268,
mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, open_tree 428 428, move_mount 429 429, fsopen 430 430,
fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442, io_uring_setup 425 425, io_uring_enter 426 426,
io_uring_register 427 427, bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, keyctl 250 219, add_key 248 217,
request_key 249 218, shmget 29 194, shmat 30 196, shmctl 31 195, msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187,
semget 64 190, semop 65 193, semctl 66 191, semtimedop 220 192, mq_open 240 180, mq_unlink 241 181, memfd_create 319 279,
memfd_secret 447 447, setsid 112 157, setpgid 109 154, setpriority 141 140, sched_setaffinity 203 122,
sched_setscheduler 144 119, sched_setparam 142 118, sched_setattr 314 274, ioprio_set 251 30, prctl 157 167,
personality 135 92, migrate_pages 256 238, move_pages 279 239, syslog 103 116, fanotify_init 300 262
"""
_FORKS = "fork 57 0, vfork 58 0"
_WRITES = """
creat 85 0, mkdir 83 0, mkdirat 258 34, mknod 133 0, mknodat 259 33, unlink 87 0, unlinkat 263 35, rmdir 84 0, rename 82 0,
renameat 264 38, renameat2 316 276, link 86 0, linkat 265 37, symlink 88 0, symlinkat 266 36, chmod 90 0, fchmod 91 52,
fchmodat 268 53, fchmodat2 452 452, chown 92 0, fchown 93 55, lchown 94 0, fchownat 260 54, truncate 76 45, utime 132 0,
utimes 235 0, futimesat 261 0, utimensat 280 88, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14,
lremovexattr 198 15, fremovexattr 199 16
"""
_NEWEST = 463  # this number and higher ones: calls that came after mseal (Linux 6.10)
_CLONE, _KILL, _TGKILL, _PRLIMIT, _FCNTL, _IOCTL = (56, 220), (62, 129), (234, 131), (302, 261), (72, 25), (16, 29)
_SOCKETPAIR = (53, 199)
_OPEN, _OPENAT, _OPENAT2, _CLONE3 = (2, 0), (257, 56), (437, 437), (435, 435)

_CLONE_THREAD, _CLONE_NEW = 0x10000, 0x7E020000  # the latter: any new namespace
_LOCAL, _STREAMS = 1, (0x1, 0x801, 0x80001, 0x80801)  # AF_UNIX; SOCK_STREAM, with or without NONBLOCK and CLOEXEC
_WRITE_FLAGS = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
_SET_OWNER = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals to others through a descriptor
_OWNER_IOCTLS = (0x8901, 0x8902, 0x5412)  # FIOSETOWN, SIOCSPGRP, TIOCSTI

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_REFUSE, _ABSENT = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
_Instruction = tuple[int, int, int, int]  # code, instructions to jump over where the test holds and where not, constant
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in the kernel's `seccomp_data`


def make_filter(machine: str, process: int, *, forks: bool, writes: bool) -> bytes:
    """Returns the filter as packed `sock_filter` instructions, 8 bytes each.

    Args:
      machine: what `platform.machine` says.
      process: the program's process id, to which alone it may send signals; 0 with `forks`: to those it can see.
      forks: whether it may start processes.
      writes: whether it may write files.

    Raises:
      ValueError: the machine's system calls are not known.

    >>> len(make_filter("x86_64", 1, forks=False, writes=True)) % 8
    0
    """
    if machine not in MACHINES:
        raise ValueError(f"make_filter: `machine` is {machine!r}, want one of {', '.join(MACHINES)}")
    architecture, column = MACHINES[machine]
    code = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL_PROCESS)]
    code += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL_PROCESS)]  # the x32 calls
    code += [(_AT_LEAST, 0, 1, _NEWEST), (_RETURN, 0, 0, _ABSENT)]
    refused = _numbers(_REFUSED, column) + ([] if forks else _numbers(_FORKS, column))
    for number in refused + ([] if writes else _numbers(_WRITES, column)):
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE)]
    for call in (_CLONE3, _OPENAT2):  # their arguments lie in memory, where no filter can look; libraries use the older ones
        code += [(_EQUAL, 0, 1, call[column]), (_RETURN, 0, 0, _ABSENT)]
    code += _when(_SOCKETPAIR[column], 0, _stream_pair(), _REFUSE)
    if forks:
        code += _when(_CLONE[column], 0, [(_ANY_BIT, 0, 1, _CLONE_NEW)], _REFUSE)
    else:
        code += _when(_CLONE[column], 0, [(_ANY_BIT, 1, 0, _CLONE_NEW), (_ANY_BIT, 1, 0, _CLONE_THREAD)], _REFUSE)
        for call in (_KILL, _TGKILL):
            code += _when(call[column], 0, [(_EQUAL, 1, 0, process)], _REFUSE)
        code += _when(_PRLIMIT[column], 0, [(_EQUAL, 2, 0, 0), (_EQUAL, 1, 0, process)], _REFUSE)
    for call, values in ((_FCNTL, _SET_OWNER), (_IOCTL, _OWNER_IOCTLS)):
        code += _when(call[column], 1, _none_of(values), _REFUSE)
    if not writes:
        for call, argument in ((_OPEN, 1), (_OPENAT, 2)):
            if call[column]:
                code += _when(call[column], argument, [(_ANY_BIT, 0, 1, _WRITE_FLAGS)], _REFUSE)
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _numbers(table: str, column: int) -> list[int]:
    """The calls' numbers on a machine."""
    found = (int(row.split()[1 + column]) for row in table.split(","))
    return [number for number in found if number]


def _none_of(values: Iterable[int]) -> list[_Instruction]:
    """Comparisons that fall through to the refusal for one of the values, and jump over it for any other."""
    values = list(values)
    last = len(values) - 1
    return [(_EQUAL, last - i, 0 if i < last else 1, value) for i, value in enumerate(values)]


def _stream_pair() -> list[_Instruction]:
    """Comparisons of `socketpair` that jump over the refusal for local streams, and fall into it for anything else."""
    last = len(_STREAMS)
    types = [(_EQUAL, last - i, 0, value) for i, value in enumerate(_STREAMS)]
    return [(_EQUAL, 0, last + 1, _LOCAL), (_LOAD, 0, 0, _ARGUMENTS + 8), *types]


def _when(number: int, argument: int, tests: list[_Instruction], refusal: int) -> list[_Instruction]:
    """For one call: looks at the lower half of an argument; the tests jump over the refusal, or fall into it."""
    body = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument), *tests, (_RETURN, 0, 0, refusal), (_RETURN, 0, 0, _ALLOW)]
    return [(_EQUAL, 0, len(body), number), *body]
