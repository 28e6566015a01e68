"""`examples/pretrain.py --fp8` as its user runs it."""

import json
import signal
import sys

import pytest

from dsv3.train.records import read_rows
from tests.more import MORE
from tests.train.test_pretrain_example import SMALL, call, corpus, pretrain  # noqa: F401 (fixtures)


@pytest.mark.skipif(not MORE, reason="long")
def test_delayed_scales_are_saved_and_go_on(pretrain, corpus, tmp_path, monkeypatch):  # noqa: F811
    """A run that was stopped has the losses of one that was not: its checkpoint holds the largest values, too."""
    same = [f"--corpus={corpus}", "--fp8=delayed", "--steps=8", *SMALL]
    monkeypatch.setattr(pretrain, "report", lambda *args: None)
    assert call(pretrain, *same, f"--out={tmp_path / 'whole'}") == 0
    with monkeypatch.context() as patch:
        loop, asked = sys.modules["pretrain_train"].train_loop, []

        def stop():
            asked.append(True)
            return signal.SIGTERM if len(asked) == 5 else None

        def stopped(*args, actions, **options):
            return loop(*args, actions=actions._replace(stop=stop), **options)

        patch.setattr("pretrain_train.train_loop", stopped)
        assert call(pretrain, *same, f"--out={tmp_path / 'parts'}") == 128 + signal.SIGTERM
    assert call(pretrain, *same, f"--out={tmp_path / 'parts'}") == 0
    rows = [read_rows(tmp_path / out / "log.jsonl") for out in ("whole", "parts")]
    losses = [[row["loss"] for row in found if row["kind"] == "train"] for found in rows]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    settings = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert (settings["fp8"], settings["dtype"]) == ("delayed", "bfloat16")
