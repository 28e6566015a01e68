"""Several processes: what the environment says, the watch over all, and what happens when one is killed."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dsv3 import tree
from dsv3.parallel import watch
from dsv3.parallel.clients import Clients, read_clients, start_clients
from dsv3.parallel.mesh import layout_of, make_layout, make_mesh, whole
from dsv3.train.checkpoint import restore_checkpoint
from tests.more import LONG
from tests.parallel.run_clients import DIMS, example

ROOT = pathlib.Path(__file__).resolve().parents[2]
TWO = {"DTENSOR_JOBS": "a:70,b:70", "DTENSOR_CLIENT_ID": "1"}


def test_the_environment_of_a_client():
    assert read_clients({}) is None and read_clients({"JOB_COMPLETION_INDEX": "3"}) is None
    assert read_clients({"DTENSOR_NUM_CLIENTS": "1"}) is None and read_clients({"DTENSOR_JOBS": "a:70"}) is None
    assert read_clients(TWO) == (1, ("a:70", "b:70"), "worker", 71, 15.0, 300.0)
    more = {"DSV3_WATCH_PORT": "9", "DSV3_WATCH_SECONDS": "3", "DSV3_JOIN_SECONDS": "60", "DTENSOR_JOB_NAME": "x"}
    assert read_clients(TWO | more)[2:] == ("x", 9, 3.0, 60.0)
    pattern = {"DTENSOR_JOBS": "w-0-{}.s:70", "DTENSOR_NUM_CLIENTS": "3", "JOB_COMPLETION_INDEX": "2"}
    assert read_clients(pattern)[:2] == (2, ("w-0-0.s:70", "w-0-1.s:70", "w-0-2.s:70"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"DTENSOR_JOBS": "", "DTENSOR_NUM_CLIENTS": "2"}, "DTENSOR_NUM_CLIENTS is 2, but DTENSOR_JOBS is not set"),
        ({"DTENSOR_NUM_CLIENTS": "3"}, "DTENSOR_JOBS names 2 clients, DTENSOR_NUM_CLIENTS is 3, want the same"),
        ({"DTENSOR_NUM_CLIENTS": "two"}, "DTENSOR_NUM_CLIENTS is 'two', want a number from 1"),
        ({"DTENSOR_JOBS": "a-{}:70"}, "DTENSOR_JOBS is the pattern 'a-{}:70', but DTENSOR_NUM_CLIENTS is not set"),
        ({"DTENSOR_JOBS": "a-{}:70,b", "DTENSOR_NUM_CLIENTS": "2"}, "DTENSOR_JOBS is 'a-{}:70,b', want one pattern"),
        ({"DTENSOR_JOBS": "a:70,b"}, "DTENSOR_JOBS is 'a:70,b', want host:port of each client, not 'b'"),
        ({"DTENSOR_JOBS": "a:70,a:70"}, "want another host or port for each client"),
        ({"DTENSOR_CLIENT_ID": ""}, "neither DTENSOR_CLIENT_ID nor JOB_COMPLETION_INDEX is set"),
        ({"DTENSOR_CLIENT_ID": "2"}, "DTENSOR_CLIENT_ID is '2', want a number from 0 to 1"),
        ({"DSV3_WATCH_PORT": "70"}, "DSV3_WATCH_PORT is '70', want a port of client 0's host that no client has"),
        ({"DSV3_WATCH_PORT": "x"}, "DSV3_WATCH_PORT is 'x', want a port"),
        ({"DSV3_WATCH_SECONDS": "1"}, "DSV3_WATCH_SECONDS is '1', want whole seconds, at least 3"),
    ],
)
def test_an_environment_that_cannot_be_is_one_line(change, message):
    with pytest.raises(ValueError) as error:
        read_clients(TWO | change)
    assert str(error.value).startswith("start_clients: ") and message in str(error.value)


def test_alone_there_is_nothing_to_wait_for(monkeypatch):
    for name in ("DTENSOR_JOBS", "DTENSOR_NUM_CLIENTS"):
        monkeypatch.delenv(name, raising=False)
    with start_clients(8) as clients:
        assert (clients.index, clients.count) == (0, 1)
    Clients().wait_for_watch()


def free_port():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def start_watch(client, port, count=3, join=20.0, silence=15.0, **common):
    """A watch whose client is a shell."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = ["sh", "-c", '"$0" -I "$1"; exit 7', sys.executable, watch.__file__]
    process = subprocess.Popen(command, bufsize=0, **pipes)
    job = {"client": client, "count": count, "host": "127.0.0.1", "port": port, "common": common}
    process.stdin.write(json.dumps(job | {"join": join, "silence": silence}).encode() + b"\n")
    return process


def ended(process, what, client):
    """The client was ended by SIGUSR2, after one line."""
    assert process.wait(10) == -signal.SIGUSR2
    line = f"{what}; client {client} ends, too: start all again, from the last checkpoint"
    assert process.stderr.read().decode().strip() == line


def test_a_death_ends_all_and_a_good_bye_does_not():
    port = free_port()
    clients = [start_watch(i, port) for i in (2, 0, 1)]
    clients = [clients[1], clients[2], clients[0]]
    assert [json.loads(p.stdout.readline()) for p in clients] == [{}] * 3
    begin = time.monotonic()
    clients[1].kill()
    clients[1].stdin.close()
    ended(clients[0], "client 1 has died", 0)
    ended(clients[2], "client 1 has died", 2)
    assert time.monotonic() - begin < 3
    port = free_port()
    clients = [start_watch(i, port) for i in range(3)]
    assert [json.loads(p.stdout.readline()) for p in clients] == [{}] * 3
    for i in (0, 2):
        clients[i].stdin.write(b"bye\n")
        assert clients[i].wait(5) == 7
    assert clients[1].poll() is None
    clients[1].stdin.close()
    assert clients[1].wait(5) == 7, "it ends with its client, however that ends"


def test_silence_ends_all():
    port = free_port()
    clients = [start_watch(i, port, count=2, silence=2.0) for i in range(2)]
    assert [json.loads(p.stdout.readline()) for p in clients] == [{}] * 2
    children = pathlib.Path(f"/proc/{clients[1].pid}/task/{clients[1].pid}/children").read_text().split()
    begin = time.monotonic()
    os.kill(int(children[0]), signal.SIGSTOP)
    ended(clients[0], "nothing has come from client 1 for 2 s", 0)
    assert 1 < time.monotonic() - begin < 6
    os.kill(int(children[0]), signal.SIGCONT)
    ended(clients[1], "nothing has come from client 1 for 2 s", 1)


def test_clients_that_cannot_work_together_are_refused():
    def answers(clients):
        return [json.loads(p.stdout.readline()).get("refused") for p in clients]

    port = free_port()
    different = [start_watch(i, port, count=2, devices=2 + i) for i in range(2)]
    assert answers(different) == ["client 1 has devices 3, client 0 has devices 2, want the same"] * 2
    port = free_port()
    twice = [start_watch(0, port), start_watch(1, port), start_watch(1, port)]
    assert answers(twice) == ["client 1 of 3 came, want each from 1 once"] * 3
    assert answers([start_watch(0, free_port(), join=0.5)]) == ["of 3 clients 1, 2 did not come within 0.5 s"]
    port = free_port()
    assert answers([start_watch(1, port, join=0.5)]) == [f"client 0 did not answer at 127.0.0.1:{port} within 0.5 s"]


def launch(folder, clients, *arguments):
    command = [sys.executable, str(ROOT / "examples" / "launch.py"), f"--num_clients={clients}", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "2"}
    log = open(folder / "log", "w")  # noqa: SIM115
    return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)


@LONG
def test_one_of_four_is_killed_and_the_others_end(tmp_path):
    """They end in a moment, with a line that names it; what they have saved is restored by one process in other layouts."""
    process = launch(tmp_path, 4, ROOT / "tests" / "parallel" / "run_clients.py", tmp_path, 300, 2)
    end = time.monotonic() + 120
    while len(list(tmp_path.glob("*.pid"))) < 4:
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.05)
    begin = time.monotonic()
    os.kill(int((tmp_path / "client-2.pid").read_text()), signal.SIGKILL)
    assert process.wait(30) == 128 + signal.SIGKILL
    assert time.monotonic() - begin < 10
    text = (tmp_path / "log").read_text()
    for client in (0, 1, 3):
        assert f"client 2 has died; client {client} ends, too: start all again, from the last checkpoint" in text
        assert not alive(int((tmp_path / f"client-{client}.pid").read_text()))
    assert text.splitlines()[-1] == "launch: client 2 was killed by SIGKILL; all 4 have ended"
    for axes in (None, "data:2,expert:2", "expert:8"):
        layouts = axes and {name: make_layout(make_mesh(axes), dims) for name, dims in DIMS.items()}
        found = restore_checkpoint(tmp_path / "checkpoints", example(), layouts=layouts, settings={"clients": 4})
        assert found.path.name == "step-00000005" and len(list(found.path.glob("*"))) == 5
        for (path, got), want in zip(tree.items(found.state), tree.flatten(example())):
            assert layout_of(got) == (layouts and layouts[path])
            assert whole(got).numpy().tobytes() == want.numpy().tobytes(), path


def alive(process):
    return pathlib.Path(f"/proc/{process}").exists()


def test_bad_calls_of_the_launcher_are_one_line(tmp_path):
    (tmp_path / "fails.py").write_text("import os, sys; sys.exit(int(os.environ['DTENSOR_CLIENT_ID']) and 3)")
    for arguments, code, line in (
        ((2, tmp_path / "fails.py"), 3, "launch: client 1 ended with exit code 3; all 2 have ended"),
        ((2,), 2, "launch: --num_clients is 2, the program [], want both"),
    ):
        assert launch(tmp_path, *arguments).wait(30) == code
        assert (tmp_path / "log").read_text().splitlines() == [line]
