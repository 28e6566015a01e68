"""Pictures of schedules: the same bytes each time, small, with what they should show."""

import pathlib
import re

import pytest

from dsv3.pipeline import PieceTimes, Times, draw, dualpipe, expand_pieces, interleaved, simulate, simulate_pieces, zb1p

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_bytes_are_the_same_again(tmp_path, ending):
    first, second = (draw(dualpipe(4, 8), tmp_path / f"{name}.{ending}") for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith({"svg": b"<?xml", "png": b"\x89PNG"}[ending])


def test_published_example_is_small_and_complete(tmp_path):
    """Each task's number is drawn, and stands in the file as a comment above its outline."""
    path = draw(dualpipe(8, 20), tmp_path / "dualpipe.svg")
    text = path.read_text()
    assert len(text) < 300_000
    numbers = [int(n) for n in re.findall(r"<!-- (\d+) -->", text)]
    schedule = dualpipe(8, 20)
    tasks = [task for row in schedule.rows for slot in row for task in slot]
    ticks = 7  # 0, 10, ..., 60
    assert len(numbers) == len(tasks) + ticks
    assert numbers.count(19) == sum(task.micro_batch == 19 for task in tasks)
    words = ["overlapped pair", "forward, direction 1", "backward for the weights", "rank 7"]
    assert all(f"<!-- {word} -->" in text for word in words)


def test_documented_picture_is_of_this_table():
    """The file that docs/pipeline.md shows; its numbers in their order are those of a fresh one."""
    numbers = re.findall(r"<!-- (\d+) -->", (DOCS / "dualpipe_8x20.svg").read_text())
    row = [str(task.micro_batch) for slot in dualpipe(8, 20).rows[0] for task in slot]
    assert ",".join(row) in ",".join(numbers)
    assert (DOCS / "dualpipe_8x20.svg").stat().st_size < 300_000


def test_simulations_and_pieces(tmp_path):
    slow = simulate(interleaved(2, 4), Times(1, 3, 1, send=0.5))
    assert "not the rank's first stage" in draw(slow, tmp_path / "slow.svg").read_text()
    found = simulate_pieces(expand_pieces(dualpipe(2, 4)), PieceTimes(1, 1, 1, 1))
    text = draw(found, tmp_path / "pieces.svg").read_text()
    assert all(f"<!-- {part}0 -->" in text for part in "ADEC")


def test_what_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="draw: `path` is '.pdf', want one of '.svg', '.png'"):
        draw(zb1p(2, 2), tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="draw: `what` is of type int, want a Schedule or a simulation of one"):
        draw(3, tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())
