"""Replacing a directory as one step: whoever looks, and whatever dies, sees the old one or the new one whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pathlib
import shutil
import socket
import uuid
from collections.abc import Iterator

from dsv3.checks import check

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV)


@contextlib.contextmanager
def replace_directory(
    directory: str | os.PathLike[str], *, function: str = "save_pretrained"
) -> Iterator[pathlib.Path]:
    """Yields an empty directory beside `directory`, which takes its place when the block ends without an error.

    Everything in it must have been written with `write_synced` or been synchronised otherwise. The exchange is one
    `renameat2` call. A file system that cannot do that (NFS) gets two renames: a process that dies between them leaves the
    old directory whole under the name `.NAME.replaced-...` beside. What killed processes of this machine left behind is
    removed by the next call.

    Raises:
      ValueError: the place cannot be written to; it is a mount point, which cannot be renamed, or the current directory, as
        this process would stay behind in the old one.
    """
    target = pathlib.Path(os.path.realpath(directory))
    place = f"{function}: cannot write to {directory}"
    check(not os.path.ismount(target), f"{place}: it is a mount point, want a folder below it")
    here = target.exists() and os.path.samefile(target, os.curdir)
    check(not here, f"{place}: it is the current directory, want another one")
    mark = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    fresh = target.with_name(f".{target.name}.saving-{mark}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(target)
        fresh.mkdir()
    except OSError as e:
        reason = "a file is in the way" if isinstance(e, (FileExistsError, NotADirectoryError)) else e.strerror
        raise ValueError(f"{place}: {reason}") from None
    try:
        yield fresh
        _sync_directory(fresh)
        if target.exists():
            _exchange(fresh, target, target.with_name(f".{target.name}.replaced-{mark}"))
        else:
            os.rename(fresh, target)
        _sync_directory(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_synced(path: pathlib.Path, data: bytes) -> None:
    """Writes a small file to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _exchange(fresh: pathlib.Path, target: pathlib.Path, aside: pathlib.Path) -> None:
    """Swaps two directories."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        if libc.renameat2(_AT_FDCWD, os.fsencode(fresh), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code), str(target))
    os.rename(target, aside)
    try:
        os.rename(fresh, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _remove_left_behind(target: pathlib.Path) -> None:
    """Removes what this machine's dead processes left: unfinished directories, and replaced ones that are not needed."""
    kinds = ["saving", "replaced"] if target.exists() else ["saving"]
    for kind in kinds:
        prefix = f".{target.name}.{kind}-{socket.gethostname()}-"
        for path in target.parent.iterdir():
            pid = path.name.removeprefix(prefix).partition("-")[0]
            if path.name.startswith(prefix) and pid.isdigit() and not _alive(int(pid)):
                shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync_directory(path: pathlib.Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
