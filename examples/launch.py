"""Starts a program as several processes of this machine that work as one.

  python examples/launch.py --num_clients=2 examples/pretrain.py --mesh=data:2,expert:2 --out runs/two

Each process learns of the others from its environment (see dsv3/parallel/clients.py; on several machines set those
variables there instead). What the first one prints is shown as it is, what the others print with their number before it.
Ctrl-C and SIGTERM go to all. When one ends with an error, or is killed, the others are ended, too, within seconds.

The exit code is that of the client that failed first, 128 + n if signal n killed it.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

FOLLOWER = -signal.SIGUSR2  # of a client that ends because another one has, see dsv3/parallel/watch.py
GRACE = 4.0  # seconds in which the others may end by themselves, and again after SIGTERM


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody uses now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start(command: Sequence[str], count: int) -> Iterator[subprocess.Popen]:
    """Starts the clients one by one, each in a group of its own, so that signals come from here alone."""
    *ports, watch = free_ports(count + 1)
    common = {"DTENSOR_JOBS": ",".join(f"127.0.0.1:{port}" for port in ports), "DTENSOR_NUM_CLIENTS": str(count)}
    for client in range(count):
        env = os.environ | common | {"DTENSOR_CLIENT_ID": str(client), "DSV3_WATCH_PORT": str(watch)}
        pipes = {} if client == 0 else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, process_group=0, **pipes)
        if client:
            threading.Thread(target=show, args=(client, process), daemon=True).start()
        yield process


def show(client: int, process: subprocess.Popen) -> None:
    """Prints a client's lines with its number."""
    for line in process.stdout:
        sys.stderr.write(f"[{client}] {line.decode(errors='replace')}")
        sys.stderr.flush()


def wait_for_failure(clients: Sequence[subprocess.Popen]) -> bool:
    """Waits until all have ended, or one has failed; returns whether one has."""
    while True:
        codes = [process.poll() for process in clients]
        if any(codes):
            return True
        if all(code is not None for code in codes):
            return False
        time.sleep(0.05)


def end_all(clients: Sequence[subprocess.Popen]) -> None:
    """Waits a little for all to end by themselves, then asks them to, then makes them."""
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + GRACE
        if number is not None:
            send(clients, number)
        while time.monotonic() < end and any(process.poll() is None for process in clients):
            time.sleep(0.05)


def send(clients: Sequence[subprocess.Popen], number: int) -> None:
    """Sends a signal to all that live."""
    for process in clients:
        if process.poll() is None:
            process.send_signal(number)


def verdict(clients: Sequence[subprocess.Popen]) -> tuple[int, str]:
    """Exit code, and who failed how: the client that did not merely follow another one."""
    codes = {client: process.returncode for client, process in enumerate(clients) if process.returncode}
    client, code = next(((i, code) for i, code in codes.items() if code != FOLLOWER), next(iter(codes.items())))
    if code < 0:
        return 128 - code, f"client {client} was killed by {signal.Signals(-code).name}"
    return code, f"client {client} ended with exit code {code}"


def main(argv: Sequence[str] | None = None) -> int:
    """Starts, waits, and returns the exit code."""
    parser = argparse.ArgumentParser(description="Starts a program as several processes of this machine that work as one.")
    parser.add_argument("--num_clients", type=int, required=True, help="how many processes")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a Python file and its arguments")
    args = parser.parse_args(argv)
    if args.num_clients < 1 or not args.command:
        print(f"launch: --num_clients is {args.num_clients}, the program {args.command[:1]}, want both", file=sys.stderr)
        return 2
    asked: list[int] = []
    clients: list[subprocess.Popen] = []

    def forward(number: int, frame: object) -> None:
        asked.append(number)
        send(clients, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    for client in start([sys.executable, *args.command], args.num_clients):
        clients.append(client)
        for number in asked:  # it was not there yet
            send([client], number)
    failed = wait_for_failure(clients)
    if asked:  # they end in order, which may take a while: the checkpoint is written
        for process in clients:
            process.wait()
        return 128 + asked[0] if failed else 0
    if not failed:
        return 0
    end_all(clients)
    code, what = verdict(clients)
    print(f"launch: {what}; all {args.num_clients} have ended", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
