"""What the tests of the sandbox share: a sandbox leaves nothing."""

import os
import tempfile
import uuid

import pytest

from dsv3.rl import sandbox_process
from tests.rl import isolations


@pytest.fixture
def kind(request):
    """An isolation that this machine allows."""
    isolations.need(request.param)
    return request.param


@pytest.fixture
def namespaces():
    isolations.need("namespaces")


@pytest.fixture
def sandboxed():
    isolations.need(*isolations.KINDS)


@pytest.fixture
def bound_on_processes():
    isolations.need_a_bound_on_processes()


@pytest.fixture
def nothing_left(monkeypatch, tmp_path_factory):
    """Fails where a process of this test's sandboxes is alive, a child waits to be reaped, or a folder is there."""
    marker = f"# {uuid.uuid4()}"
    monkeypatch.setattr(sandbox_process, "_START", f"{sandbox_process._START}  {marker}")
    folder = tmp_path_factory.mktemp("folders")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))

    def alive():
        return [pid for pid in processes() if marker.encode() in read(f"/proc/{pid}/cmdline")]

    yield alive
    assert alive() == []
    mine = str(os.getpid()).encode()
    stats = [read(f"/proc/{pid}/stat").rpartition(b")")[2].split() for pid in processes()]
    assert [stat for stat in stats if stat and stat[1] == mine and stat[0] == b"Z"] == []
    assert list(folder.iterdir()) == []


def processes():
    return [name for name in os.listdir("/proc") if name.isdigit()]


def read(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:  # it has ended meanwhile
        return b""
