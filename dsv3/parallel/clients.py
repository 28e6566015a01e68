"""Several processes that work as one: each has some of the mesh's devices, DTensor connects them.

What a process must know stands in its environment, under DTensor's own names where there are some:

  DTENSOR_JOBS         host:port of every client, with commas; or a pattern as dsv3-worker-0-{}.dsv3:7070, {} for the client
  DTENSOR_NUM_CLIENTS  how many there are; may be left out where DTENSOR_JOBS names them all
  DTENSOR_CLIENT_ID    which one this is, from 0; default: JOB_COMPLETION_INDEX, which Kubernetes sets in an indexed job
  DTENSOR_JOB_NAME     TensorFlow's name of the job; default: worker
  DSV3_WATCH_PORT      a port of client 0's host for the watch over all; default: its port in DTENSOR_JOBS + 1
  DSV3_WATCH_SECONDS   how long a client may be silent; default: 15
  DSV3_JOIN_SECONDS    how long to wait for all clients at the start; default: 300
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.experimental import dtensor

from dsv3.checks import check
from dsv3.parallel import watch
from dsv3.parallel.mesh import start_devices


class ClientEnvironment(NamedTuple):
    """What the environment says: this `client`, `jobs` (host:port of each), `name`, the watch's `port`, and its seconds."""

    client: int
    jobs: tuple[str, ...]
    name: str
    port: int
    silence: float
    join: float


class Clients:
    """Who this process is among `count`: `index`; a context manager that tells the others that it ends in good order.

    Where the block is left by an exception, the others are told nothing, and end as when this process had died. Where an
    exchange has failed, most often since another client has died, the watch is given the time to find that.
    """

    def __init__(self, index: int = 0, count: int = 1, watcher: subprocess.Popen | None = None, silence: float = 0.0):
        self.index, self.count, self._watcher, self._silence = index, count, watcher, silence

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if self._watcher is not None and kind is None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._watcher.communicate(b"bye\n", timeout=5)
        elif kind is not None and issubclass(kind, tf.errors.OpError):
            self.wait_for_watch()

    def wait_for_watch(self) -> None:
        """Waits until the watch would have found that another client is lost, which ends this process."""
        if self._watcher is not None:
            time.sleep(self._silence + 2 * watch.TICK)


def read_clients(environ: Mapping[str, str] = os.environ) -> ClientEnvironment | None:
    """Reads the variables above; `None` where they say nothing of other processes.

    Raises:
      ValueError: a variable is missing, malformed or contradicts another one.
    """
    text, number = environ.get("DTENSOR_JOBS", ""), environ.get("DTENSOR_NUM_CLIENTS", "")
    check(number == "" or (number.isdigit() and int(number) > 0), _is("DTENSOR_NUM_CLIENTS", number, "a number from 1"))
    if not text:
        check(number in ("", "1"), f"start_clients: DTENSOR_NUM_CLIENTS is {number}, but DTENSOR_JOBS is not set")
        return None
    if "{}" in text:
        check(number != "", f"start_clients: DTENSOR_JOBS is the pattern {text!r}, but DTENSOR_NUM_CLIENTS is not set")
        check("," not in text, _is("DTENSOR_JOBS", text, "one pattern"))
        text = ",".join(text.replace("{}", str(i)) for i in range(int(number)))
    jobs = tuple(part.strip() for part in text.split(","))
    for job in jobs:
        host, _, port = job.rpartition(":")
        check(host != "" and _is_port(port), _is("DTENSOR_JOBS", text, f"host:port of each client, not {job!r}"))
    check(len(set(jobs)) == len(jobs), _is("DTENSOR_JOBS", text, "another host or port for each client"))
    check(
        number in ("", str(len(jobs))),
        f"start_clients: DTENSOR_JOBS names {len(jobs)} clients, DTENSOR_NUM_CLIENTS is {number}, want the same",
    )
    if len(jobs) == 1:
        return None
    client = environ.get("DTENSOR_CLIENT_ID") or environ.get("JOB_COMPLETION_INDEX", "")
    check(client != "", "start_clients: neither DTENSOR_CLIENT_ID nor JOB_COMPLETION_INDEX is set, want the client's number")
    known = client.isdigit() and int(client) < len(jobs)
    check(known, _is("DTENSOR_CLIENT_ID", client, f"a number from 0 to {len(jobs) - 1}"))
    host, _, first = jobs[0].rpartition(":")
    port = environ.get("DSV3_WATCH_PORT") or str(int(first) + 1)
    check(_is_port(port), _is("DSV3_WATCH_PORT", port, "a port"))
    check(f"{host}:{port}" not in jobs, _is("DSV3_WATCH_PORT", port, "a port of client 0's host that no client has"))
    seconds = []
    for name, default in (("DSV3_WATCH_SECONDS", "15"), ("DSV3_JOIN_SECONDS", "300")):
        value = environ.get(name) or default
        check(value.isdigit() and int(value) >= 3, _is(name, value, "whole seconds, at least 3"))
        seconds.append(float(value))
    return ClientEnvironment(int(client), jobs, environ.get("DTENSOR_JOB_NAME") or "worker", int(port), *seconds)


def _is(name: str, value: str, want: str) -> str:
    return f"start_clients: {name} is {value!r}, want {want}"


def _is_port(text: str) -> bool:
    return text.isdigit() and 0 < int(text) < 65536


def start_clients(devices: int, *, common: Mapping[str, Any] | None = None) -> Clients:
    """Gives this process its devices and connects it with the others that its environment names, if any.

    Call it before anything is computed. `make_mesh` then makes a mesh over the devices of all processes. From here on, when
    one process dies, the others end by SIGUSR2 after one line: at once, or after DSV3_WATCH_SECONDS where the machine or the
    network is lost.

    Args:
      devices: devices of this process, see `start_devices`; the same on all.
      common: further values that must be the same on all processes, such as the command; JSON values.

    Returns:
      `Clients`, a context manager.

    Raises:
      ValueError: an environment that is incomplete or contradicts itself, clients that do not come, too few devices,
        TensorFlow has already started.
    """
    found = read_clients()
    start_devices(devices)
    if found is None:
        return Clients()
    count = len(found.jobs)
    watcher = _start_watch(found, {"devices": devices, "jobs": found.jobs} | dict(common or {}))
    os.environ |= {
        "DTENSOR_JOBS": ",".join(found.jobs), "DTENSOR_NUM_CLIENTS": str(count),
        "DTENSOR_CLIENT_ID": str(found.client), "DTENSOR_JOB_NAME": found.name,
    }  # fmt: skip
    try:
        dtensor.initialize_accelerator_system(dtensor.preferred_device_type())
    except ValueError as error:
        raise ValueError(f"start_clients: {' '.join(str(error).split())}") from None
    return Clients(found.client, count, watcher, found.silence)


def _start_watch(found: ClientEnvironment, common: dict[str, Any]) -> subprocess.Popen:
    """Starts this client's watch and waits until all clients are there."""
    host = found.jobs[0].rpartition(":")[0]
    job = {"client": found.client, "count": len(found.jobs), "host": host, "port": found.port}
    job |= {"common": common, "join": found.join, "silence": found.silence}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    watcher = subprocess.Popen([sys.executable, "-I", watch.__file__], bufsize=0, **pipes)
    watcher.stdin.write(json.dumps(job).encode() + b"\n")
    answer = json.loads(watcher.stdout.readline() or b'{"refused": "the watch has ended"}')
    check("refused" not in answer, f"start_clients: {answer.get('refused')}")
    return watcher
