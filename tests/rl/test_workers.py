"""Workers in this process and in others: the same interface, the same samples; errors and deaths are told."""

import os
import signal

import numpy as np
import pytest

from dsv3.policy import ComputePolicy
from dsv3.rl.rollout import Prompt
from dsv3.rl.workers import EngineOptions, LocalWorker, ProcessWorkers, RayWorkers
from tests.more import MORE
from tests.rl.model import model, prompts

HOW = {"group_size": 2, "max_new_tokens": 3, "temperature": 0.9, "bucket": 16, "stop_tokens": (), "seed": 1, "step": 2}
ASKED = [Prompt(ids, 10 + i) for i, ids in enumerate(prompts(3, 5, 4))]


def options(**fields):
    policy = ComputePolicy(fuse=False, max_rows=0)
    few = {"policy": policy, "max_batch": 4, "chunk_sizes": (8,), "smallest_cache": 16}
    return EngineOptions(small()[0], **(few | fields))


def small():
    """A model of one mixture: three processes trace it."""
    return model(0, num_hidden_layers=1, first_k_dense_replace=0)


@pytest.fixture(scope="module")
def local():
    worker = LocalWorker(options())
    worker.update(*small()[1:])
    return worker


def assert_same(got, want):
    """Other processes may add up with another number of threads."""
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=2e-5)
    np.testing.assert_array_equal(got.experts, want.experts)
    assert (got.numbers.tolist(), got.finish, got.texts) == (want.numbers.tolist(), want.finish, want.texts)


def check_pool(pool, local):
    """What every pool has to do, with workers that may have raised before."""
    _, params, router = small()
    pool.update(params, router)
    want = local.rollout(ASKED, **HOW)
    assert_same(pool.rollout(ASKED, **HOW), want)
    assert_same(pool.rollout(ASKED[:1], **HOW), local.rollout(ASKED[:1], **HOW))  # fewer prompts than workers
    with pytest.raises(ValueError, match="worker 0: Engine: request 0: `temperature` is -1.0, want at least 0") as caught:
        pool.rollout(ASKED, **HOW | {"temperature": -1.0})
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"rollout: prompt 2 \(problem 5\) has 70 tokens"):
        pool.rollout([*ASKED[:2], Prompt([3] * 70, 5)], **HOW)
    pool.update(params._replace(head=-params.head), router)
    assert pool.rollout(ASKED, **HOW).tokens.tolist() != want.tokens.tolist(), "the parameters are the new ones"


def test_processes_give_the_samples_of_this_process_and_a_death_is_told(local):
    with ProcessWorkers(options(), 2) as pool:
        check_pool(pool, local)
        processes = list(pool._processes)
        before = pool.rollout(ASKED, **HOW)
        os.kill(processes[0].pid, signal.SIGTERM)  # which is for the whole group: the first process decides what to do
        assert_same(pool.rollout(ASKED, **HOW), before)
        os.kill(processes[1].pid, signal.SIGKILL)
        with pytest.raises(OSError, match="worker 1 is gone, exit code -9"):
            pool.rollout(ASKED, **HOW)
    assert not any(process.is_alive() for process in processes)


@pytest.mark.skipif(not MORE, reason="a long case")
def test_ray_actors_give_the_samples_of_this_process_and_a_death_is_told(local):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    with RayWorkers(options(), 2) as pool:
        check_pool(pool, local)
        pool._ray.kill(pool._actors[1])
        with pytest.raises(OSError, match="worker 1 is gone") as caught:
            pool.rollout(ASKED, **HOW)
        assert "\n" not in str(caught.value)


def test_without_ray_a_clear_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ValueError, match=r"RayWorkers: Ray is not installed, want the extra: pip install 'dsv3\[ray\]'"):
        RayWorkers(options(), 1)


def test_what_cannot_be_is_refused_before_a_worker_starts():
    for make, message in [
        (lambda: ProcessWorkers(options(), 0), "ProcessWorkers: `count` is 0, want > 0"),
        (lambda: ProcessWorkers(options(speculative=1), 1), "`speculative` is 1, but the model has no MTP module"),
        (lambda: LocalWorker(options(max_length=65)), "`max_length` is 65, want at most the model's, which is 64"),
        (lambda: LocalWorker(options()).rollout(ASKED, **HOW), "LocalWorker: `rollout` is called before `update`"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
