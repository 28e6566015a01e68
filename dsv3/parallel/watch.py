"""A watch over the processes of a run: when one dies or falls silent, all others end, instead of waiting for it for ever.

Beside each client runs this file as a process of its own, since a client that waits for an exchange runs no Python. It is
connected with that of client 0, and both send an empty line each second. A client that has died takes its watch along, which
the others see at once by the end of the connection; one that sends nothing for `silence` seconds has lost its machine or its
network. Client 0's watch tells the others which one it was. Then each says so and ends its client with SIGUSR2.

It reads one JSON object and, at the good end of its client, `bye` from standard input, and answers `{}` when all clients are
there, or `{"refused": why}`. It imports nothing but the standard library, to be there within a moment.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

TICK = 1.0  # seconds between two lines


class Refused(Exception):
    """The clients cannot work together; the message says why."""


class Job:
    """What a watch knows: `client` of `count`, `host` and `port` of client 0's watch, and what all have in `common`.

    `join`: seconds to wait for all clients. `silence`: seconds after which a client that sends nothing is lost.
    """

    def __init__(self, client: int, count: int, host: str, port: int, common: dict, join: float, silence: float):
        self.client, self.count, self.host, self.port, self.common = client, count, host, port, common
        self.join, self.silence = join, silence


def gather(job: Job) -> dict[int, socket.socket]:
    """Client 0: waits for the others and starts them."""
    end, local = time.monotonic() + job.join, job.host == "localhost" or job.host.startswith("127.")
    peers: dict[int, socket.socket] = {}
    try:
        listener = socket.create_server((job.host if local else "", job.port), backlog=job.count)
    except OSError as error:
        raise Refused(f"cannot listen on port {job.port} ({error.strerror}), want DSV3_WATCH_PORT free") from None
    with listener:
        while len(peers) < job.count - 1:
            listener.settimeout(max(0.01, end - time.monotonic()))
            try:
                peer, _ = listener.accept()
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, job.count) if i not in peers)
                raise Refused(f"of {job.count} clients {missing} did not come within {job.join:g} s") from None
            peer.settimeout(10)
            try:
                hello = json.loads(_read_line(peer))
                other, common = int(hello["client"]), dict(hello["common"])
            except (OSError, ValueError, TypeError, KeyError):
                peer.close()  # not one of ours
                continue
            fault = None
            if common != job.common:
                theirs, ours = _differing(common, job.common), _differing(job.common, common)
                fault = f"client {other} has {theirs}, client 0 has {ours}, want the same"
            elif other in peers or not 0 < other < job.count:
                fault = f"client {other} of {job.count} came, want each from 1 once"
            if fault:
                for one in (peer, *peers.values()):
                    _send(one, json.dumps({"refused": fault}).encode() + b"\n")
                raise Refused(fault)
            peers[other] = peer
    for peer in peers.values():
        _send(peer, b"{}\n")
    return peers


def join(job: Job) -> dict[int, socket.socket]:
    """Another client: comes to client 0 and waits until all are there."""
    end, late = time.monotonic() + job.join, f"client 0 did not answer at {job.host}:{job.port} within {job.join:g} s"
    while True:
        try:
            peer = socket.create_connection((job.host, job.port), timeout=max(0.01, end - time.monotonic()))
            break
        except OSError:
            if time.monotonic() > end:
                raise Refused(late) from None
            time.sleep(0.1)
    _send(peer, json.dumps({"client": job.client, "common": job.common}).encode() + b"\n")
    peer.settimeout(max(0.01, end - time.monotonic()) + TICK)
    try:
        answer = json.loads(_read_line(peer))
    except TimeoutError:
        raise Refused(late) from None
    except (OSError, ValueError):
        raise Refused("client 0 has ended before all clients came") from None
    if "refused" in answer:
        raise Refused(answer["refused"])
    return {0: peer}


def watch(job: Job, peers: dict[int, socket.socket], client: int) -> str | None:
    """Watches until this client ends, whose end of standard input is `client`; returns what is lost, if anything is."""
    heard, rest, sent = dict.fromkeys(peers, time.monotonic()), dict.fromkeys(peers, b""), 0.0
    for peer in peers.values():
        peer.settimeout(TICK)
    while True:
        ready = select.select([client, *peers.values()], [], [], TICK / 4)[0]
        now = time.monotonic()
        if client in ready:
            if os.read(client, 64).startswith(b"bye"):
                for peer in peers.values():
                    _send(peer, b"bye\n")
            return None
        for other, peer in list(peers.items()):
            if peer in ready:
                data = _receive(peer)
                heard[other] = now
                *lines, rest[other] = (rest[other] + data).split(b"\n")
                told = [line for line in lines if line.startswith(b"lost ")]
                if b"bye" in lines:
                    del peers[other]
                elif told:
                    return told[0].decode()[5:]
                elif not data:
                    return f"client {other} has died"
            elif now - heard[other] > job.silence:
                return f"nothing has come from client {other} for {job.silence:g} s"
        if now - sent >= TICK:
            sent = now
            for peer in peers.values():
                _send(peer, b"\n")


def _differing(one: dict, other: dict) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in one.items() if other.get(name) != value) or "less"


def _send(peer: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # what that means is seen when something is read
        peer.sendall(data)


def _receive(peer: socket.socket) -> bytes:
    try:
        return peer.recv(4096)
    except OSError:
        return b""


def _read_line(peer: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n") and len(line) < 1 << 20:
        data = peer.recv(1)
        if not data:
            raise ConnectionError("the connection has ended")
        line += data
    return line


def answer(value: dict[str, Any]) -> None:
    """Answers the client."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(value).encode() + b"\n")


def main() -> None:
    """Meets the others, watches, and ends the client when one is lost."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the client, with which this process ends
        signal.signal(number, signal.SIG_IGN)
    parent, line = os.getppid(), b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1) or sys.exit(0)
    job = Job(**json.loads(line))
    try:
        peers = gather(job) if job.client == 0 else join(job)
    except Refused as error:
        return answer({"refused": str(error)})
    answer({})
    lost = watch(job, dict(peers), 0)
    if lost is not None:
        for peer in peers.values():
            _send(peer, f"lost {lost}\n".encode())
        line = f"\n{lost}; client {job.client} ends, too: start all again, from the last checkpoint"
        print(line, file=sys.stderr, flush=True)
        if os.getppid() == parent:
            os.kill(parent, signal.SIGUSR2)


if __name__ == "__main__":
    main()
