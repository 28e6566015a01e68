"""Linux's own means to shut a process in: namespaces, a new root of its own, Landlock, seccomp, limits, dropped privileges.

Standard library only: the processes in a sandbox have nothing else. Each function raises `OSError` where the kernel refuses.

References:
  Linux man-pages: namespaces(7), user_namespaces(7), pivot_root(2), mount_setattr(2), landlock(7), seccomp(2), capset(2).
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys

from dsv3.rl import sandbox_filter

_NEW = {"mount": 0x20000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000, "process": 0x20000000, "net": 0x40000000}
_NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_DETACH, _ATTR_RDONLY, _AT_FDCWD, _AT_RECURSIVE = 2, 1, -100, 0x8000
_PIVOT_ROOT, _CAPSET = {"x86_64": (155, 126), "aarch64": (41, 91)}.get(platform.machine(), (-1, -1))
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
_SET_DEATH_SIGNAL, _SET_DUMPABLE, _SET_SECCOMP, _NO_NEW_PRIVILEGES = 1, 4, 22, 38
_LANDLOCK_ALL, _LANDLOCK_READ_FILE, _LANDLOCK_READ_DIR = 0x1FFF, 1 << 2, 1 << 3

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

BOX = "/box"


def library_paths() -> list[str]:
    """Returns the folders and files that Python and its modules are loaded from, and the two harmless devices."""
    prefixes = [os.path.join(sys.base_prefix, name) for name in ("lib", "lib64")]
    found = [*prefixes, "/lib", "/lib64", "/usr/lib", "/usr/lib64", os.path.dirname(os.path.realpath(os.__file__))]
    found += ["/etc/ld.so.cache", "/dev/null", "/dev/urandom"]
    kept: list[str] = []
    for path in found:
        if os.path.lexists(path) and not any(path == other or path.startswith(other + "/") for other in kept):
            kept.append(path)
    return kept


def readable_by_all(path: str) -> bool:
    """Whether any user may read a folder: it and those above it."""
    path = os.path.realpath(path)
    above = [path]
    while above[-1] != os.path.dirname(above[-1]):
        above.append(os.path.dirname(above[-1]))
    return all(os.stat(folder).st_mode & 0o001 for folder in above) and bool(os.stat(path).st_mode & 0o004)


def enter_namespaces() -> None:
    """Gives this process mounts, network, host name and shared memory of its own, and its next child the process id 1.

    Root does without a user namespace where it may, so that the program can be another user; anybody else gets one, in
    which they are themselves.
    """
    flags = sum(value for name, value in _NEW.items() if name != "user")
    user, group = os.geteuid(), os.getegid()
    if user == 0 and _libc.unshare(flags) == 0:
        return
    _call("unshare", _libc.unshare(flags | _NEW["user"]))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def make_root(root: str, *, size: int) -> None:
    """Makes a new root at the folder `root`: what `library_paths` names, to be read, and `BOX`, to be written, in memory.

    Args:
      root: an empty folder; in this process's mount namespace it becomes `/`.
      size: bytes that `BOX` may hold.
    """
    os.umask(0o022)
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID, "size=256k,nr_inodes=256,mode=755")
    for path in library_paths():
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            open(target, "w").close()
        _mount(path, target, None, _BIND | _REC)
        _set_read_only(target, _AT_RECURSIVE)
    os.mkdir(root + BOX)
    _mount("tmpfs", root + BOX, "tmpfs", _NOSUID | _NODEV | _NOEXEC, f"size={size},nr_inodes=128,mode=1777")
    os.chdir(root)
    _call("pivot_root", _libc.syscall(ctypes.c_long(_PIVOT_ROOT), b".", b"."))
    _call("umount2", _libc.umount2(b".", _DETACH))
    _set_read_only("/", 0)
    os.chdir(BOX)


def restrict_files(folder: str) -> bool:
    """Lets this process read `library_paths` and `folder` alone, by Landlock; returns False where the kernel has none."""
    handled = struct.pack("=Q", _LANDLOCK_ALL)
    ruleset = _libc.syscall(ctypes.c_long(_LANDLOCK_CREATE), handled, ctypes.c_size_t(len(handled)), ctypes.c_long(0))
    if ruleset < 0:
        return False
    for path in [*library_paths(), folder]:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = _LANDLOCK_READ_FILE | (_LANDLOCK_READ_DIR if os.path.isdir(path) else 0)
        rule = struct.pack("=Qi", rights, opened)
        done = _libc.syscall(ctypes.c_long(_LANDLOCK_ADD), ctypes.c_long(ruleset), ctypes.c_long(1), rule, ctypes.c_long(0))
        _call("landlock_add_rule", done)
        os.close(opened)
    refuse_privileges()
    done = _libc.syscall(ctypes.c_long(_LANDLOCK_RESTRICT), ctypes.c_long(ruleset), ctypes.c_long(0))
    _call("landlock_restrict_self", done)
    os.close(ruleset)
    return True


def set_limits(*, cpu: int, memory: int, file: int, open_files: int, tasks: int | None) -> None:
    """Sets this process's hard limits.

    Args:
      cpu: seconds. memory: bytes of address space. file: bytes of a file. open_files: descriptors.
      tasks: processes and threads of this user; None: no limit.
    """
    limits = {
        resource.RLIMIT_CPU: cpu, resource.RLIMIT_AS: memory, resource.RLIMIT_FSIZE: file,
        resource.RLIMIT_NOFILE: open_files, resource.RLIMIT_CORE: 0, resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0, resource.RLIMIT_NICE: 0,
    }  # fmt: skip
    if tasks is not None:
        limits[resource.RLIMIT_NPROC] = tasks
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def drop_user(user: int) -> bool:
    """Makes root an unprivileged user, if it can be: not where its user namespace knows no other one."""
    try:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except OSError:
        return False
    return True


def drop_capabilities() -> None:
    """Gives up every capability of this process, and that any program could give it one again."""
    header = struct.pack("=Ii", 0x20080522, 0)
    _call("capset", _libc.syscall(ctypes.c_long(_CAPSET), header, struct.pack("=6I", *(0,) * 6)))
    refuse_privileges()


def refuse_privileges() -> None:
    """From now on no program that this process runs has more rights than itself."""
    _call("prctl", _libc.prctl(_NO_NEW_PRIVILEGES, ctypes.c_ulong(1), *(ctypes.c_ulong(0),) * 3))


def die_with_parent(parent: int) -> None:
    """Lets the kernel kill this process when its parent ends; a later change of user would undo that.

    Args:
      parent: the parent's process id; where it has another one by now, this process ends. 0: not looked at.
    """
    _call("prctl", _libc.prctl(_SET_DEATH_SIGNAL, ctypes.c_ulong(signal.SIGKILL), *(ctypes.c_ulong(0),) * 3))
    if parent and os.getppid() != parent:
        os._exit(0)


def hide_memory() -> None:
    """Lets no other process of this user look into this one's memory and descriptors."""
    _call("prctl", _libc.prctl(_SET_DUMPABLE, ctypes.c_ulong(0), *(ctypes.c_ulong(0),) * 3))


def install_filter(*, forks: bool, writes: bool) -> None:
    """Lets this process make the system calls of `sandbox_filter.make_filter` alone."""
    try:
        code = sandbox_filter.make_filter(platform.machine(), 0 if forks else os.getpid(), forks=forks, writes=writes)
    except ValueError as error:
        raise OSError(str(error)) from None
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    refuse_privileges()
    done = _libc.prctl(_SET_SECCOMP, ctypes.c_ulong(2), program, ctypes.c_ulong(0), ctypes.c_ulong(0))
    _call("seccomp", done)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    done = _libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    _call(f"mount {target}", done)


def _set_read_only(path: str, flags: int) -> None:
    change = struct.pack("=4Q", _ATTR_RDONLY, 0, 0, 0)
    done = _libc.syscall(
        ctypes.c_long(_MOUNT_SETATTR), ctypes.c_long(_AT_FDCWD), os.fsencode(path), ctypes.c_ulong(flags), change,
        ctypes.c_size_t(len(change)),
    )  # fmt: skip
    _call(f"mount_setattr {path}", done)


def _call(name: str, result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
