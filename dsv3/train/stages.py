"""How a model is cut into pipeline stages, and which layers each pipeline rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.pipeline import Schedule


class StackRows(NamedTuple):
    """The layers of one stack (`dense` or `moe`) on each pipeline rank, for one direction of a schedule.

    Attributes:
      ranks: for each rank its layers' indices in the stack, in order.
      room: rows that each rank has, the most that one needs.
    """

    ranks: tuple[tuple[int, ...], ...]
    room: int

    @property
    def flat(self) -> list[int]:
        """The layer in each row, rank by rank; rows without one repeat layer 0."""
        return [layer for rows in self.ranks for layer in (*rows, *([0] * (self.room - len(rows))))]

    def places(self, layers: int) -> list[int]:
        """Returns the row of each of the stack's layers."""
        found = {layer: rank * self.room + i for rank, rows in enumerate(self.ranks) for i, layer in enumerate(rows)}
        return [found[layer] for layer in range(layers)]


class StageCut(NamedTuple):
    """A model's layers by stage: stage s has the layers `starts[s]` to `starts[s + 1] − 1`, dense ones first.

    The first stage has the embedding too, the last one the final norm, the head and the MTP modules.
    """

    starts: tuple[int, ...]

    def layers(self, stage: int) -> range:
        """Returns a stage's layers, counted over both stacks."""
        return range(self.starts[stage], self.starts[stage + 1])

    def rows(self, cfg: ModelConfig, schedule: Schedule, direction: int) -> dict[str, StackRows]:
        """Returns the layers of the stacks `dense` and `moe` on each rank."""
        split, total, found = cfg.num_dense_layers, cfg.num_layers, {}
        for name, low, high in (("dense", 0, split), ("moe", split, total)):
            ranks: list[list[int]] = [[] for _ in range(schedule.ranks)]
            for stage, rank in enumerate(schedule.placement[direction]):
                ranks[rank] += [layer - low for layer in self.layers(stage) if low <= layer < high]
            found[name] = StackRows(tuple(map(tuple, ranks)), max(map(len, ranks)))
        return found


def cut_stages(cfg: ModelConfig, stages: int, layers: Sequence[int] | None = None) -> StageCut:
    """Cuts a model's layers into stages.

    Args:
      cfg: the model's configuration.
      stages: how many.
      layers: of each stage; default: as even as possible, the first stages have one more.

    Returns:
      `StageCut`. A stage may be without layers.

    >>> import dsv3
    >>> cut_stages(dsv3.preset("deepseek-v3"), 16).layers(15)
    range(58, 61)
    """
    total = cfg.num_layers
    if layers is None:
        layers = [total // stages + (s < total % stages) for s in range(stages)]
    check(
        len(layers) == stages and sum(layers) == total and min(layers) >= 0,
        f"cut_stages: `layers` is {list(layers)}, want {stages} numbers that add up to {total}",
    )
    starts = [0]
    for count in layers:
        starts.append(starts[-1] + count)
    return StageCut(tuple(starts))
