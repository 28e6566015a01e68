"""Batches ahead of the step: the same as without, with the state after each, and a clean end."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from streams import source_of

from dsv3.data import input_init, input_state, make_mixture, prefetch_batches, read_batches

SOURCES = {"a": source_of("a", [7] * 40, 50), "b": source_of("b", [3, 9] * 30, 50)}
MIXTURE = make_mixture(SOURCES, group_tokens=64)


def shape(tokens):
    """Larger batches, then longer rows."""
    return (4, 8) if tokens < 100 else (8, 8) if tokens < 300 else (4, 16)


def batches(state=None, **options):
    return read_batches(SOURCES, MIXTURE, state or input_init(MIXTURE), shape, **options)


def ahead(source, depth=2):
    return contextlib.closing(prefetch_batches(source, depth))


def same(got, want):
    assert (got.state, got.tokens) == (want.state, want.tokens)
    np.testing.assert_array_equal(got.batch.tokens, want.batch.tokens)
    np.testing.assert_array_equal(got.batch.weights, want.batch.weights)


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetched_batches_are_the_same(depth):
    want = list(batches(total_tokens=600))
    with ahead(batches(total_tokens=600), depth) as found:
        got = list(found)
    assert len(got) == len(want) == 4 + 3 + 5
    assert [item.batch.tokens.shape[:2] for item in got] == [(4, 9)] * 4 + [(8, 9)] * 3 + [(4, 17)] * 5
    assert [item.tokens for item in got][-2:] == [576, 640]
    assert isinstance(got[0].batch.tokens, tf.Tensor) and got[0].batch.tokens.dtype == tf.int32
    for one, other in zip(got, want, strict=True):
        same(one, other)


def test_the_state_is_that_of_the_batch_that_was_taken():
    """What was read ahead is not lost: a run that goes on from the last batch's state gets the next one."""
    want = list(batches(total_tokens=600))
    with ahead(batches(), depth=4) as found:
        first = [next(found) for _ in range(5)]
    state = input_state(json.loads(json.dumps(first[-1].state._asdict())), MIXTURE)
    with ahead(batches(state, tokens=first[-1].tokens, total_tokens=600), depth=1) as found:
        rest = list(found)
    for got, expected in zip([*first, *rest], want, strict=True):
        same(got, expected)


def test_hosts_read_their_rows():
    whole = list(batches(total_tokens=600))
    parts = [list(batches(total_tokens=600, host=host, hosts=4)) for host in range(4)]
    for step, want in enumerate(whole):
        joined = np.concatenate([part[step].batch.tokens for part in parts])
        np.testing.assert_array_equal(joined, want.batch.tokens)
        assert {(part[step].state, part[step].tokens) for part in parts} == {(want.state, want.tokens)}


def test_it_reads_ahead_before_it_is_asked():
    made = []

    def counted():
        for item in batches():
            made.append(item.tokens)
            yield item

    with ahead(counted(), depth=3) as found:
        deadline = time.monotonic() + 20
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(made) >= 3
        time.sleep(0.1)
        assert len(made) <= 5  # three ready, one in the pipeline's hand
        next(found)


def waits(make, step, count=9):
    """Seconds that steps of `step` seconds wait for their batches, the first two left out: nothing is ahead of them yet."""
    found = []
    with contextlib.closing(make()) as source:
        for _ in range(count + 2):
            begin = time.perf_counter()
            next(source)
            found.append(time.perf_counter() - begin)
            time.sleep(step)
    return np.array(found[2:])


def test_reading_ahead_takes_the_wait_away():
    """Each batch takes a known time to read, less than a step: between the steps all of it is waited for, ahead none."""
    delay, step = 0.06, 0.12

    def slow():
        for item in batches():
            time.sleep(delay)
            yield item

    between, read_ahead = waits(slow, step), waits(lambda: prefetch_batches(slow(), 2), step)
    assert between.min() >= delay
    assert np.median(read_ahead) < delay / 6  # what is there is taken in a millisecond; other work may be in the way


@pytest.mark.parametrize(
    "limits, message",
    [({"epochs": {"a": 1}}, "next_rows: source 'a' runs dry: it has 280 tokens"), ({"host": 3}, "host_rows: `host` is 3")],
)
def test_an_error_comes_as_itself_after_the_batches_before_it(limits, message):
    mixture = make_mixture(SOURCES, group_tokens=64, epochs=limits.get("epochs"))
    hosts = {"host": limits.get("host", 0), "hosts": 3 if "host" in limits else 1}
    source = read_batches(SOURCES, mixture, input_init(mixture), shape, **hosts)
    taken = []
    with pytest.raises(ValueError, match=f"^{message}") as caught, ahead(source) as found:
        for item in found:
            taken.append(item)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    assert bool(taken) == ("epochs" in limits)


def test_closing_ends_the_reading():
    made, ended, threads = [], [], threading.active_count()

    def slow():
        try:
            for item in batches():
                made.append(item.tokens)
                time.sleep(0.05)
                yield item
        finally:
            ended.append(True)

    with ahead(slow(), depth=2) as found:
        next(found)
    count = len(made)
    assert ended == [True]
    time.sleep(0.3)
    assert len(made) == count
    assert threading.active_count() <= threads + 1  # TensorFlow's threads come and go; none of ours is left waiting


def watched(begun, ended):
    try:
        begun.set()
        yield from batches()
    finally:
        ended.append(True)


@pytest.mark.parametrize("taken", [0, 1, 5])
@pytest.mark.parametrize("drop", [False, True])
def test_dropping_it_ends_the_reading(taken, drop):
    begun, ended = threading.Event(), []
    found = prefetch_batches(watched(begun, ended))
    for _ in range(taken):
        next(found)
    assert begun.wait(20)
    if drop:
        del found
    else:
        found.close()
    assert ended == [True]


def test_bad_depth():
    with pytest.raises(ValueError, match="prefetch_batches: `depth` is 0, want at least 1"):
        prefetch_batches(batches(), depth=0)


PROGRAM = """
import sys
from test_prefetch import batches, prefetch_batches
found = prefetch_batches(batches(), 4)
next(found)
sys.exit(7)
"""


def test_a_process_ends_while_it_reads_ahead():
    here = Path(__file__).resolve()
    environment = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here.parents[2]}"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 7, done.stderr
    assert "Traceback" not in done.stderr
