"""Extends a model's context in the paper's two stages, and shows what it is worth: keys found by length and depth.

YaRN stretches the context 40 times; the model then trains at 8 and at 32 times its length (the paper: 4K, 32K, 128K).
Before, between and after, a grid of passkey problems tells how far back the model finds a key that it was told.

Without flags it first trains a narrow model at 128 tokens on text with passkey problems in it, then extends it to 1,024
and 4,096, and leaves everything in runs/context. It is `pretrain.py --plan=context`, whose flags it has and whose folder it
writes, with these besides:

  passkey/*.json      a grid for each point: the model as it was, with YaRN before any training, after each stage
  plots/passkey.png   all of them; report.html begins with it

With --init a model that comes trained is extended; --seq_len says for which length, if its config.json does not.

Examples:

  python examples/extend_context.py
  python examples/extend_context.py --steps 40 --context_steps 4 --grid_trials 2 --out runs/short
  python examples/extend_context.py --init runs/mine/export --seq_len 256 --corpus texts --context_steps 50 --out runs/long
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import time
from pathlib import Path

import pretrain
from absl import app, flags
from command import aligned, flag_parser
from pretrain_plan import stage_of
from pretrain_setup import Setup, agreed, on_host, say
from pretrain_train import Stop

import dsv3
from dsv3.checks import check
from dsv3.data.passkey import passkey_form
from dsv3.eval.passkey import PasskeyGrid, load_grid, passkey_grid, plot_grids, save_grid
from dsv3.page import Table
from dsv3.policy import ComputePolicy
from dsv3.train.state import TrainState

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(pretrain)

flags.DEFINE_list("grid_lengths", None, "Tokens of the prompts. Default: half a stage's length and all of it, for each.")
flags.DEFINE_list("grid_depths", ["0", "0.25", "0.5", "0.75", "1"], "Where the key is told, 0: first, 1: last.")
flags.DEFINE_integer("grid_trials", 16, "Problems for each length and depth.", 1)

FLAGS.set_default("plan", "context")
FLAGS.set_default("out", "runs/context")
# For the narrow model that is trained where none is given.
NARROW = {
    "preset": "narrow", "steps": 5000, "batch_size": 16, "seq_len": 128, "passkey": 1.0, "passkey_keys": "words",
    "context_steps": 200, "context_lr": 2e-3, "save_every": 500,
}  # fmt: skip

ROOM = 10  # tokens of an answer, at most


def main(argv: list[str]) -> int:
    """Runs everything; see `pretrain.main`."""
    if FLAGS.init is None:
        for name, value in NARROW.items():
            if not FLAGS[name].present:
                FLAGS.set_default(name, value)
    return pretrain.main(argv, pretrain.Extension("extend_context", check_setup, measure, sections))


def check_setup(setup: Setup) -> None:
    """Looks at the flags of the grid."""
    check(FLAGS.plan != "cosine", "--plan is cosine, which has no stages of longer contexts; want context or paper")
    reach, filler = max(stage.seq_len for stage in setup.schedule.stages), len(setup.data.heldout.tokens)
    form = passkey_form(setup.data.tokenizer, FLAGS.passkey_keys)
    for length in grid_lengths(setup):
        fits = form.least <= length <= reach - ROOM
        check(fits, f"--grid_lengths has {length}, want {form.least} to {reach - ROOM}, what the last stage has room for")
        check(length <= filler, f"--grid_lengths has {length}, but the held-out text only {filler} tokens")
    check(bool(grid_depths()), "--grid_depths is empty, want at least one")
    check(bool(grid_lengths(setup)), f"no stage has sequences of {form.least} tokens, which a problem takes")
    for depth in grid_depths():
        check(0 <= depth <= 1, f"--grid_depths has {depth}, want 0 to 1")
    wanted = (grid_lengths(setup), grid_depths(), FLAGS.grid_trials)
    for name, grid in grids_there(setup).items():
        check(
            FLAGS.fresh or (grid.lengths, grid.depths, grid.trials) == wanted,
            f"the grid {name!r} in {str(setup.out)!r} has lengths, depths and trials {grid.lengths}, {grid.depths}, "
            f"{grid.trials}; want the same by --grid_lengths, --grid_depths, --grid_trials",
        )


def grid_lengths(setup: Setup) -> list[int]:
    """Lengths of the prompts; by default prompt and answer fill a stage's sequences, or half of them."""
    try:
        given = [int(length) for length in FLAGS.grid_lengths or ()]
    except ValueError:
        raise ValueError(f"--grid_lengths is {FLAGS.grid_lengths}, want whole numbers") from None
    least = passkey_form(setup.data.tokenizer, FLAGS.passkey_keys).least
    lengths = {n for stage in setup.schedule.stages for n in (stage.seq_len // 2, stage.seq_len - ROOM)}
    return sorted(given or {length for length in lengths if length >= least})


def grid_depths() -> list[float]:
    """Depths of the numbers."""
    try:
        return [float(depth) for depth in FLAGS.grid_depths]
    except ValueError:
        raise ValueError(f"--grid_depths is {FLAGS.grid_depths}, want numbers") from None


def points(setup: Setup, done: int) -> dict[str, dsv3.ModelConfig]:
    """What is measured when so many stages are done: name → architecture."""
    base = 0 if FLAGS.init else 1
    if done < base:
        return {}
    if done > base:
        return {setup.schedule.stages[done - 1].name: stage_of(setup.cfg, setup.schedule, done - 1)}
    longest = max(grid_lengths(setup)) + ROOM
    plain = setup.cfg.replace(max_length=max(longest, setup.cfg.max_length))  # the same rotary frequencies, further on
    return {"before": plain, "YaRN, untrained": stage_of(setup.cfg, setup.schedule, done)}


class Interrupted(Exception):
    """A signal came in the middle of a grid."""


def measure(setup: Setup, policy: ComputePolicy, done: int, state: TrainState, stop: Stop) -> None:
    """Makes the grids that are due and not there yet; a signal ends it, and a grid that is not complete is not kept."""

    def go_on(read: int) -> None:
        if stop():
            raise Interrupted

    for name, cfg in points(setup, done).items():
        target = grid_file(setup, name)
        if agreed(stop() or 0, setup.mesh):
            return
        if not agreed(int(setup.leads and not target.exists()), setup.mesh):
            continue
        params, router = on_host(setup, (state.params, state.router))
        if not setup.leads:
            continue
        target.parent.mkdir(exist_ok=True)
        begin, form = time.monotonic(), passkey_form(setup.data.tokenizer, FLAGS.passkey_keys)
        lengths, depths = grid_lengths(setup), grid_depths()
        count = len(lengths) * len(depths) * FLAGS.grid_trials
        say(f"passkey problems, {name}: {count} prompts of up to {lengths[-1]:,} tokens")
        try:
            grid = passkey_grid(
                cfg, params, router, form, setup.data.heldout.tokens, lengths=lengths, depths=depths, seed=FLAGS.seed,
                trials=FLAGS.grid_trials, policy=policy, progress=go_on,
            )  # fmt: skip
        except Interrupted:
            continue
        save_grid(target, grid)
        say(aligned(grid_rows({name: grid})) + f"\n{time.monotonic() - begin:.0f} s")


def grid_file(setup: Setup, name: str) -> Path:
    """Where a grid is kept."""
    return setup.out / "passkey" / f"{name.replace(',', '').replace(' ', '_')}.json"


def grids_there(setup: Setup) -> dict[str, PasskeyGrid]:
    """All grids of the run, in the order in which they were made."""
    names = [name for done in range(len(setup.schedule.stages) + 1) for name in points(setup, done)]
    return {name: load_grid(grid_file(setup, name)) for name in names if grid_file(setup, name).exists()}


def grid_rows(grids: dict[str, PasskeyGrid]) -> list[tuple[str, ...]]:
    """Keys found by length, over all depths; in brackets at the depth where fewest are found."""
    first = next(iter(grids.values()))
    rows = [(f"keys found of {first.trials} (at the worst depth)", *(f"{length:,}" for length in first.lengths))]
    for name, grid in grids.items():
        rows.append((name, *(f"{sum(row) / len(row):.0%} ({min(row):.0%})" for row in grid.found)))
    return rows


def sections(setup: Setup) -> list:
    """What the report begins with, printed as well."""
    grids = grids_there(setup)
    if not grids or not setup.leads:
        return []
    stages = setup.schedule.stages
    lengths = {stage.name: stage.seq_len for stage in stages}
    known = FLAGS.seq_len
    plot = setup.out / "plots" / "passkey.png"
    plot.parent.mkdir(exist_ok=True)
    plot_grids(plot, grids, {name: lengths.get(name, known) for name in grids})
    rows = grid_rows(grids)
    trials = FLAGS.grid_trials
    chance = f"Problems in a cell: {trials}; its standard error is up to {50 / trials**0.5:.0f} points."
    say("\n" + aligned(rows) + f"\n{chance}\n{plot}")
    note = f"Right of the black line prompts are longer than any sequence that the model was trained with. {chance}"
    return [("Passkey retrieval", [Table(rows), plot, note])]


if __name__ == "__main__":
    app.run(main, flags_parser=flag_parser("extend_context"))
