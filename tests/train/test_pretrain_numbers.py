"""`examples/pretrain.py`: how moments are stored, and how fast it says that it is."""

import sys

import numpy as np
import pytest
from absl.testing import flagsaver

from dsv3 import tree
from dsv3.train.records import row_scalars
from tests.train.test_loop import toy_step
from tests.train.test_pretrain_example import SMALL, call, corpus, pretrain, refused, train_rows

__all__ = ["corpus", "pretrain"]


def test_moments_are_stored_as_the_flag_says(pretrain, corpus, tmp_path):
    same, module = [f"--corpus={corpus}", f"--out={tmp_path / 'run'}", *SMALL], sys.modules["pretrain_train"]
    for flags, want in [
        ([], "float32"), (["--moment_dtype=bfloat16"], "bfloat16"),
        (["--fp8=paper"], "bfloat16"), (["--fp8=paper", "--moment_dtype=float32"], "float32"),
    ]:  # fmt: skip
        with flagsaver.flagsaver():
            setup = pretrain.prepare(pretrain.parse_flags(["pretrain.py", *same, "--fresh", *flags]))
            specs = module.train_specs(setup.cfg, module.make_optimizer(setup))
        assert {leaf.dtype.name for part in (specs.opt.mu, specs.opt.nu) for leaf in tree.flatten(part)} == {want}
        assert {leaf.dtype.name for leaf in tree.flatten(specs.params)} == {"float32"}
    code, lines = refused(pretrain, [*same, "--fp8=paper", "--moment_dtype=bfloat16"])
    assert code == 2 and "`moment_dtype` is 'bfloat16' here, 'float32' there" in lines[0], lines


# small.json by hand, scalars that a token is multiplied with: q_a, q_b, kv_a, kv_b, o of an attention; router, two of four
# experts and the shared one of a mixture; head; MTP projection.
ATTENTION = 16 * 8 + 8 * 2 * 8 + 16 * (8 + 4) + 8 * 2 * (4 + 4) + 2 * 4 * 16
MIXTURE = 16 * 4 + 2 * 3 * 16 * 8 + 3 * 16 * 8
HEAD = 16 * 300
MODEL = (ATTENTION + 3 * 16 * 24) + (ATTENTION + MIXTURE) + HEAD + (2 * 16 * 16 + ATTENTION + MIXTURE + HEAD)


def hand_flops(length):
    """Forward, and twice that backward; a token sees (T + 1)/2 keys on average, in three attentions of two heads."""
    return 3 * (2 * MODEL + 3 * 2 * 2 * (8 + 4) * (length + 1) / 2)


def test_utilisation_is_what_a_count_by_hand_gives(pretrain, corpus, tmp_path, monkeypatch):
    """In each row and in the results, whatever the yardstick is; nothing is computed here."""

    def step(state, tokens, weights, limits):
        return toy_step(state, np.float32(3.0), None, limits)

    done = []
    monkeypatch.setattr("pretrain_train.make_train_step", lambda *arguments, **options: step)
    monkeypatch.setattr(pretrain, "product_rate", lambda dtype: 1e9)
    monkeypatch.setattr(pretrain, "report", lambda setup, *arguments: done.append(setup))
    same = [f"--corpus={corpus}", f"--out={tmp_path}", *SMALL, "--steps=5", "--eval_every=0", "--watch_every=0"]
    assert call(pretrain, *same) == 0
    rows, (setup,) = train_rows(tmp_path), done
    assert len(rows) == 5
    for row in rows:  # four digits
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * hand_flops(16) / 1e9, rel=5e-4)
        assert row_scalars(row)["train/mfu"] == row["mfu"], "TensorBoard has it"
    speed = sys.modules["pretrain_speed"]
    at = [{"kind": "train", "tokens": 64 * (i + 1), "tokens_per_second": float(i)} for i in range(5)]
    assert speed.training_flops(setup, at) == pytest.approx(2 * hand_flops(16), rel=1e-12), "of the median step"
    assert speed.product_rate("float32") > 1e8
