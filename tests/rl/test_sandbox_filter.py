"""The filter of system calls, run by a BPF machine in Python: also for the processors that this machine has not."""

import struct

import pytest

from dsv3.rl import sandbox_filter


@pytest.mark.parametrize("machine", sandbox_filter.MACHINES)
@pytest.mark.parametrize("forks", [False, True])
@pytest.mark.parametrize("writes", [False, True])
def test_the_filter_decides_as_written(machine, forks, writes):
    """The instructions, run one by one, refuse what the tables name and nothing that a program needs."""
    code = sandbox_filter.make_filter(machine, 77, forks=forks, writes=writes)
    architecture, column = sandbox_filter.MACHINES[machine]
    refused, absent, allowed, killed = 0x50001, 0x50026, 0x7FFF0000, 0x80000000
    decide = lambda number, *arguments, arch=architecture: interpret(code, number, arch, arguments)  # noqa: E731
    calls = {"read": (0, 63), "socket": (41, 198), "clone": (56, 220), "openat": (257, 56), "kill": (62, 129)}
    calls |= {"socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202)}
    calls |= {"accept4": (288, 242), "sendmmsg": (307, 269), "shmat": (30, 196), "msgrcv": (70, 188), "semctl": (66, 191)}
    number = {name: numbers[column] for name, numbers in calls.items()} | {"fcntl": (72, 25)[column]}
    assert decide(number["read"]) == allowed
    assert decide(number["socket"]) == refused
    assert decide(number["read"], arch=0x40000003) == killed
    assert decide(0x40000000) == killed
    assert decide(435) == decide(437) == decide(463) == decide(600) == absent
    assert decide(number["clone"], 0x10F00) == allowed
    assert decide(number["clone"], 17) == (allowed if forks else refused)
    for flags in (1 << 17, *(1 << bit for bit in range(25, 31))):  # a namespace of its own
        assert decide(number["clone"], 17 | flags) == decide(number["clone"], 0x10F00 | flags) == refused
    assert decide(number["socketpair"], 1, 1) == decide(number["socketpair"], 1, 0x80801) == allowed
    for family, kind in ((1, 2), (1, 5), (1, 0x80002), (2, 1), (30, 1), (1, 0x4001)):
        assert decide(number["socketpair"], family, kind) == refused
    for name in ("connect", "bind", "listen", "accept", "accept4", "sendmmsg", "shmat", "msgrcv", "semctl"):
        assert decide(number[name]) == refused
    assert decide(number["kill"], 77) == allowed
    assert decide(number["kill"], 1) == (allowed if forks else refused)
    assert decide(number["openat"], 0, 0, 0o2000000) == allowed
    assert decide(number["openat"], 0, 0, 0o102) == (allowed if writes else refused)
    assert [decide(number["fcntl"], 0, command) for command in (8, 10, 15, 3)] == [refused, refused, refused, allowed]


def interpret(code, number, architecture, arguments):
    """The kernel's BPF machine, as far as the filter needs it."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *(*arguments, *(0,) * 6)[:6])
    instructions = list(struct.iter_unpack("=HBBI", code))
    accumulator = place = 0
    while True:
        operation, yes, no, constant = instructions[place]
        place += 1
        if operation == 0x20:
            accumulator = struct.unpack_from("=I", data, constant)[0]
        elif operation == 0x06:
            return constant
        else:
            tests = {0x15: accumulator == constant, 0x35: accumulator >= constant, 0x45: bool(accumulator & constant)}
            place += yes if tests[operation] else no
