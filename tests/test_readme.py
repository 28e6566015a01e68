"""The README's first program runs as printed, and every file that the README names exists."""

import pathlib
import re

import tensorflow as tf

import dsv3

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_first_program_runs(capsys):
    program = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    exec(compile(program, "README.md", "exec"), {})  # noqa: S102
    loss, shape = capsys.readouterr().out.split(" ", 1)
    assert 0 < float(loss) < 7.5  # uniform guessing over 256 tokens: ln 256 · (1 + 0.3)
    assert shape.startswith("(8, 64, 256)")
    # Each of the two mixture layers sent 8·64 tokens to 2 experts.
    assert "[1024. 1024.]" in shape


def test_layers_compose_as_printed():
    (program,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "mla_rope" in block]
    names = {"tf": tf, "dsv3": dsv3}
    exec(compile(program, "README.md", "exec"), names)  # noqa: S102
    assert names["y"].shape == names["m"].out.shape == names["x"].shape
    assert float(tf.reduce_sum(names["m"].stats.load)) == 2 * 16 * names["cfg"].moe.router.top_k


def test_files_that_are_named_exist():
    named = re.findall(r"\b(?:examples|docs|dsv3|tests|benchmarks)/[\w./]+\.(?:py|md|png|txt)\b", README)
    missing = sorted({name for name in named if not (ROOT / name).exists()})
    assert named and not missing, missing
