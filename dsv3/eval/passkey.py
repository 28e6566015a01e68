"""Passkey retrieval by length and depth: how far back a model finds a key that it was told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.data.passkey import DIGITS, PasskeyForm, PasskeyProblem, passkey_problem
from dsv3.nn.model import ModelParams, RouterState
from dsv3.policy import ComputePolicy
from dsv3.serve.engine import Engine
from dsv3.serve.request import Request


class PasskeyGrid(NamedTuple):
    """What was found.

    Attributes:
      lengths: [L] tokens of the prompts. depths: [D], 0 at the beginning to 1 at the end. trials: problems of each.
      found: [L][D] share of the problems whose key came out whole.
      tokens: [L][D] share of the keys' tokens that came out in their places.
    """

    lengths: list[int]
    depths: list[float]
    trials: int
    found: list[list[float]]
    tokens: list[list[float]]


def passkey_grid(
    cfg: ModelConfig,
    params: ModelParams,
    router: RouterState,
    form: PasskeyForm,
    filler: np.ndarray,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int = 8,
    seed: int = 0,
    policy: ComputePolicy | None = None,
    progress: Callable[[int], None] | None = None,
) -> PasskeyGrid:
    """Asks for keys told at every depth of prompts of every length; answers are decoded greedily, from the latent cache.

    All grids of a seed have the same problems, so that models can be compared.

    Args:
      cfg, params, router: the model; its `max_length` must hold the longest prompt and the answer.
      form: of its tokenizer.
      filler: [N] token ids of text that the model was not trained on; each problem takes a random part.
      lengths: tokens of the prompts.
      depths: where the key is told.
      trials: problems for each length and depth.
      seed: decides the keys and the filler.
      policy: how to compute; default: the device's.
      progress: is called after each length with the tokens read.

    Returns:
      `PasskeyGrid`.

    Raises:
      ValueError: a prompt longer than the model's context or the filler, or too short; no length, depth or trial.

    References: DeepSeek-V3 section 4.3, figure 8.
    """
    check(trials >= 1, f"passkey_grid: `trials` is {trials}, want at least 1")
    for name, values in (("lengths", lengths), ("depths", depths)):
        check(len(values) > 0, f"passkey_grid: `{name}` is empty, want at least one")
    growing = list(lengths) == sorted(set(lengths))
    check(growing, f"passkey_grid: `lengths` is {tuple(lengths)}, want each longer than the one before it")
    longest, room = max(lengths), 2 * DIGITS
    fits = longest + room <= cfg.max_length
    check(fits, f"passkey_grid: `lengths` has {longest}, want at most {cfg.max_length - room}, max_length={cfg.max_length}")
    check(longest <= len(filler), f"passkey_grid: `filler` has {len(filler)} tokens, want at least {longest}")
    engine = Engine(cfg, params, router, policy=policy, max_batch=8, max_length=longest + room, chunk_sizes=(128, 1024))
    found, tokens = [], []
    for length in lengths:
        problems = [passkey_problems(form, filler, length=length, depth=depth, trials=trials, seed=seed) for depth in depths]
        flat = [problem for row in problems for problem in row]
        requests = [Request(p.prompt.tolist(), max_new_tokens=len(p.answer)) for p in flat]
        scores = [_score(done.tokens, problem) for done, problem in zip(engine.generate(requests), flat)]
        shares = np.array(scores, np.float64).reshape(len(depths), trials, 2).mean(1)
        found.append(shares[:, 0].tolist())
        tokens.append(shares[:, 1].tolist())
        if progress is not None:
            progress(length * len(flat))
    return PasskeyGrid([int(n) for n in lengths], [float(d) for d in depths], trials, found, tokens)


def passkey_problems(
    form: PasskeyForm, filler: np.ndarray, *, length: int, depth: float, trials: int, seed: int = 0
) -> list[PasskeyProblem]:
    """Draws problems of one length and depth; see `passkey_grid`."""
    draw = np.random.default_rng([seed, length, round(depth * 10**6)])
    problems = []
    for _ in range(trials):
        start, number = int(draw.integers(len(filler) - length + 1)), int(draw.integers(form.count))
        part = filler[start : start + length]
        problems.append(passkey_problem(form, part, length=length, depth=depth, number=number))
    return problems


def _score(tokens: Sequence[int], problem: PasskeyProblem) -> tuple[float, float]:
    """Whether the answer came out whole, and the share of its tokens."""
    answer = problem.answer.tolist()
    hits = [a == b for a, b in zip(tokens, answer)]
    return float(list(tokens) == answer), sum(hits) / len(answer)


def save_grid(path: str | os.PathLike, grid: PasskeyGrid) -> None:
    """Writes a grid as JSON, atomically."""
    target = Path(path)
    part = target.with_name(f".{target.name}.part")
    part.write_text(json.dumps(grid._asdict()) + "\n", encoding="utf-8")
    os.replace(part, target)


def load_grid(path: str | os.PathLike) -> PasskeyGrid:
    """Reads what `save_grid` wrote.

    Raises:
      ValueError: the file holds something else.
    """
    try:
        return PasskeyGrid(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_grid: {str(path)!r} holds no grid ({error})") from None


def plot_grids(path: str | os.PathLike, grids: Mapping[str, PasskeyGrid], trained: Mapping[str, int] | None = None) -> Path:
    """Draws grids beside each other: length across, depth downwards, the share found as colour and number.

    Args:
      path: a PNG file.
      grids: title → grid.
      trained: title → longest sequence that the model was trained with, which is marked.

    Returns:
      The path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check(len(grids) > 0, "plot_grids: `grids` is empty, want at least one")
    figure = Figure(figsize=(4.2 * len(grids) + 0.6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, grid) in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids.items()):
        values = np.array(grid.found).T
        image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(grid.lengths)), [f"{n:,}" for n in grid.lengths], rotation=45, fontsize=8)
        axes.set_yticks(range(len(grid.depths)), [f"{100 * d:.0f}%" for d in grid.depths], fontsize=8)
        axes.set(title=title, xlabel="tokens of the prompt", ylabel="depth of the key")
        for (row, column), value in np.ndenumerate(values):
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7)
        within = sum(n <= (trained or {}).get(title, 0) for n in grid.lengths)
        if within:
            axes.axvline(within - 0.5, color="black", linewidth=2)
    figure.colorbar(image, ax=figure.axes, label="keys found", shrink=0.8)
    figure.savefig(path, dpi=100)
    return Path(path)
