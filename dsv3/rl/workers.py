"""Who produces rollouts: this process, other processes of this machine, or Ray actors on any machine; one interface.

    worker = LocalWorker(EngineOptions(cfg, speculative=1))                      # the default
    worker = ProcessWorkers(EngineOptions(cfg, speculative=1), count=2)         # other processes, started here
    worker = RayWorkers(EngineOptions(cfg, speculative=1), count=8)             # wants the extra `ray`

A sample follows from seed, step, problem and its number, so it does not matter who draws it (up to rounding, as batches have
other sizes). The parameters travel as NumPy arrays.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tokenizers import Tokenizer

from dsv3 import tree
from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.policy import ComputePolicy
from dsv3.rl.rollout import Prompt, Rollouts, check_prompts, join_rollouts, rollout
from dsv3.serve import Engine
from dsv3.serve.engine import check_engine
from dsv3.typing import Tree


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """What an engine is made of beside the parameters; it can be sent to another process. Attributes as of `Engine`."""

    cfg: ModelConfig
    tokenizer: Tokenizer | None = None
    policy: ComputePolicy | None = None
    speculative: int = 0
    max_batch: int = 8
    max_length: int | None = None
    chunk_sizes: Sequence[int] = (32, 128, 512)
    smallest_cache: int = 256

    def make_engine(self, params: Tree, router: Tree) -> Engine:
        """Returns an engine that keeps a record."""
        how = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "cfg"}
        return Engine(self.cfg, params, router, record=True, **how)

    def check(self) -> None:
        """Raises `ValueError` for what the model cannot do, before anybody is started."""
        length = self.cfg.max_length if self.max_length is None else self.max_length
        check_engine(self.cfg, speculative=self.speculative, max_length=length)


class LocalWorker:
    """Produces rollouts in this process.

    Args:
      options: see `EngineOptions`.
    """

    def __init__(self, options: EngineOptions):
        options.check()
        self._options, self._engine = options, None

    def update(self, params: Tree, router: Tree) -> None:
        """Takes the parameters; the first ones make the engine."""
        if self._engine is None:
            self._engine = self._options.make_engine(params, router)
        else:
            self._engine.update(params, router)

    def rollout(self, prompts: Sequence[Prompt], **how: Any) -> Rollouts:
        """Returns samples of prompts, see `dsv3.rl.rollout.rollout`."""
        check(self._engine is not None, "LocalWorker: `rollout` is called before `update`, want parameters first")
        return rollout(self._engine, prompts, **how)


class _Pool:
    """What workers elsewhere have in common: prompts are shared out in turns of neighbours, and the samples put together.

    `_call(name, arguments)` sends one call to each worker that has an argument, and returns the results in order.
    """

    def __init__(self, options: EngineOptions, count: int):
        check(count > 0, f"{type(self).__name__}: `count` is {count}, want > 0")
        options.check()
        self._options, self._count = options, count

    def update(self, params: Tree, router: Tree) -> None:
        """Sends the parameters to all workers."""
        arrays = tree.map_leaves(lambda leaf: tf.convert_to_tensor(leaf).numpy(), (params, router))
        self._call("update", [arrays] * self._count)

    def rollout(self, prompts: Sequence[Prompt], **how: Any) -> Rollouts:
        """Returns samples of prompts, see `dsv3.rl.rollout.rollout`, in the prompts' order."""
        length = self._options.cfg.max_length if self._options.max_length is None else self._options.max_length
        check_prompts(prompts, max_new_tokens=how["max_new_tokens"], max_length=length)  # by their rows here
        shares = [share for share in np.array_split(np.arange(len(prompts)), self._count) if len(share)]
        return join_rollouts(self._call("rollout", [([prompts[i] for i in share], how) for share in shares]))

    def __enter__(self):
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


class WorkerHost:
    """A worker's own side of a pool: `LocalWorker` with arguments as they were sent."""

    def __init__(self, options: EngineOptions):
        self._worker = LocalWorker(options)

    def update(self, arrays: Tree) -> None:
        """Takes parameters as arrays."""
        self._worker.update(*tree.map_leaves(tf.constant, arrays))

    def rollout(self, job: tuple[Sequence[Prompt], dict[str, Any]]) -> Rollouts:
        """Returns samples of prompts; `job` is prompts and keyword arguments."""
        return self._worker.rollout(job[0], **job[1])


class ProcessWorkers(_Pool):
    """Produces rollouts in other processes of this machine; a context manager that ends them.

    Args:
      options: see `EngineOptions`.
      count: how many processes. Each starts anew (`spawn`), so a program that makes them wants `if __name__ == "__main__":`.

    Raises:
      ValueError: what a worker has raised, with its number.
      OSError: a worker that is gone.
    """

    def __init__(self, options: EngineOptions, count: int = 1):
        super().__init__(options, count)
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, options), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        atexit.register(self.close)  # before multiprocessing waits for those that SIGTERM does not end

    def _call(self, name: str, arguments: Sequence[Any]) -> list[Any]:
        used = list(enumerate(self._pipes[: len(arguments)]))
        for (number, pipe), argument in zip(used, arguments):
            self._gone_if(number, lambda pipe=pipe, argument=argument: pipe.send((name, argument)))
        answers = [self._gone_if(number, pipe.recv) for number, pipe in used]
        for number, (good, answer) in enumerate(answers):
            if not good:
                kind, text, trace = answer
                if kind == "ValueError":
                    raise ValueError(f"worker {number}: {text}")
                raise RuntimeError(f"worker {number} has failed with {kind}: {text}\n{trace}")
        return [answer for _, answer in answers]

    def _gone_if(self, number: int, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._processes[number].join(5)
            raise OSError(f"worker {number} is gone, exit code {self._processes[number].exitcode}") from None

    def close(self) -> None:
        """Ends all workers."""
        atexit.unregister(self.close)
        for pipe, process in zip(self._pipes, self._processes):
            with contextlib.suppress(OSError):
                pipe.send(None)
            pipe.close()
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._pipes, self._processes = [], []


def _serve(pipe: Any, options: EngineOptions) -> None:
    """A worker process: answers calls until there are no more. Signals are for whoever has started it."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a group gets them all, and the exploration is still to be finished
        signal.signal(number, signal.SIG_IGN)
    host = None
    while True:
        try:
            call = pipe.recv()
        except EOFError:  # whoever has started this is gone
            return
        if call is None:
            return
        try:
            host = host or WorkerHost(options)
            answer = True, getattr(host, call[0])(call[1])
        except Exception as error:  # told to whoever has asked
            answer = False, (type(error).__name__, str(error), traceback.format_exc())
        pipe.send(answer)


class RayWorkers(_Pool):
    """Produces rollouts in Ray actors, on whatever machines the cluster has; a context manager that ends them.

    Args:
      options: see `EngineOptions`.
      count: how many actors.
      address: of a running cluster, as `"auto"`; `None`: one on this machine alone, if none is connected yet.
      resources: what an actor takes, as of `ray.remote`: `{"num_cpus": 4, "num_gpus": 1}`.

    Raises:
      ValueError: Ray is not installed; what a worker has raised.
    """

    def __init__(
        self, options: EngineOptions, count: int = 1, *, address: str | None = None, resources: dict[str, Any] | None = None
    ):
        super().__init__(options, count)
        try:
            import ray
        except ImportError:
            raise ValueError("RayWorkers: Ray is not installed, want the extra: pip install 'dsv3[ray]'") from None
        self._ray, self._started = ray, not ray.is_initialized()
        if self._started:
            ray.init(address=address or "local", include_dashboard=False, log_to_driver=False, configure_logging=False)
        actor = ray.remote(**({"num_cpus": 1} | (resources or {})))(WorkerHost)
        self._actors = [actor.remote(options) for _ in range(count)]

    def _call(self, name: str, arguments: Sequence[Any]) -> list[Any]:
        different = {id(argument): argument for argument in arguments}  # what goes to all is put into the store once
        stored = {key: self._ray.put(argument) for key, argument in different.items()}
        futures = [getattr(a, name).remote(stored[id(argument)]) for a, argument in zip(self._actors, arguments)]
        found = []
        for number, future in enumerate(futures):
            try:
                found.append(self._ray.get(future))
            except self._ray.exceptions.RayTaskError as error:
                cause = error.cause
                if isinstance(cause, ValueError):
                    raise ValueError(f"worker {number}: {cause}") from None
                raise
            except self._ray.exceptions.RayActorError as error:
                raise OSError(f"worker {number} is gone ({' '.join(str(error).split())})") from None
        return found

    def close(self) -> None:
        """Ends all actors, and the cluster if it was started here."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._started:
            self._ray.shutdown()
