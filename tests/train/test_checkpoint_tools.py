"""Checkpoints that are looked at, compared and averaged; also by the program, as its user calls it."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import dsv3
from dsv3 import adamw, load_pretrained, train_init, tree
from dsv3.train.checkpoint import save_checkpoint
from dsv3.train.checkpoint_tools import (
    checkpoint_config,
    checkpoint_diff,
    checkpoint_model,
    checkpoint_numbers,
    open_checkpoint,
)
from dsv3.train.watch import component_of
from tests.small import model_config

CFG = model_config(num_hidden_layers=2, num_nextn_predict_layers=1)
SETTINGS = {"seed": 0, "lr": 0.1, "config": CFG.to_hf()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Checkpoints of steps 1, 2 and 3 of unlike parameters, the last with another learning rate."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (1, 2, 3):
        state = train_init([0, step], CFG, adamw(0.1, moment_dtype="bfloat16"), ema=True)
        router = tree.map_leaves(lambda b, n=step: b + 0.5 * n, state.router)
        settings = {**SETTINGS, "lr": 0.2} if step == 3 else SETTINGS
        cursor = {"data": [step, [4, 2]], "config": CFG.to_hf()}
        save_checkpoint(folder, state._replace(router=router), settings, step=step, cursor=cursor)
    return folder


def params_of(step):
    return train_init([0, step], CFG, adamw(0.1)).params


def test_opening_takes_a_checkpoint_or_the_latest_of_a_folder(run, tmp_path):
    for path in (run, run.parent, run / "step-00000003"):
        assert open_checkpoint(path).path.name == "step-00000003"
    assert open_checkpoint(run / "step-00000002").meta["step"] == 2
    with pytest.raises(ValueError, match="is no checkpoint and holds none"):
        open_checkpoint(tmp_path)


def test_numbers_by_component(run):
    numbers = checkpoint_numbers(open_checkpoint(run))
    params = tree.to_dict(params_of(3))
    for component in ("embed", "experts", "norms", "mtp"):
        leaves = [leaf.numpy() for path, leaf in params.items() if component_of(path) == component]
        for share in ("params", "ema"):
            found = numbers[f"{share}/{component}"]
            assert (found.leaves, found.values) == (len(leaves), sum(leaf.size for leaf in leaves))
            assert found.bytes == 4 * found.values and found.bad == 0
            assert found.norm == pytest.approx(np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in leaves)))
        assert numbers[f"opt/mu/{component}"].bytes == 2 * found.values
    assert numbers["opt/count"].values == numbers["step"].values == 1
    total = sum(item.values for item in numbers.values())
    assert total == sum(np.prod(about["shape"], dtype=int) for about in open_checkpoint(run).meta["leaves"].values())


def test_differences_of_settings_and_leaves(run):
    one, two, three = (open_checkpoint(run / f"step-0000000{n}") for n in (1, 2, 3))
    found = checkpoint_diff(one, three, share="params")
    assert found.settings == {"lr": (0.1, 0.2)} and found.steps == (1, 3) and found.only == []
    a, b = (tree.to_dict(params_of(n)) for n in (1, 3))
    assert [leaf.path for leaf in found.leaves] == [f"params.{path}" for path in a]
    for leaf, (path, x) in zip(found.leaves, a.items()):
        x, y = x.numpy().astype(np.float64), b[path].numpy()
        assert leaf.change == pytest.approx(np.linalg.norm(y - x) / max(np.linalg.norm(x), 1e-30)), path
        assert leaf.largest == pytest.approx(np.abs(y - x).max())
    assert checkpoint_diff(one, two).settings == {} and all(not leaf.change for leaf in checkpoint_diff(two, two).leaves)


def test_what_is_not_finite_and_what_only_one_has(tmp_path):
    save_checkpoint(tmp_path, {"a": tf.constant([1.0, 2.0]), "b": tf.zeros([2])}, {}, step=1)
    save_checkpoint(tmp_path, {"a": tf.constant([1.0, np.nan]), "b": tf.zeros([3]), "c": tf.zeros([])}, {}, step=2)
    old, new = (open_checkpoint(tmp_path / f"step-0000000{n}") for n in (1, 2))
    found = checkpoint_diff(old, new)
    assert found.only == ["b [2]", "b [3]", "c []"]
    assert [(leaf.path, leaf.bad, leaf.change) for leaf in found.leaves] == [("a", 1, float("inf"))]
    for a, b in ((new, old), (new, new)):
        assert [leaf.change for leaf in checkpoint_diff(a, b, share="a").leaves] == [0.0 if a is b else float("inf")]
    assert checkpoint_numbers(new)["a"].bad == 1 and checkpoint_numbers(new)["a"].norm == 1.0


def test_the_mean_of_parameters(run):
    files = [open_checkpoint(run / f"step-0000000{n}") for n in (1, 2, 3)]
    cfg = checkpoint_config(files)
    assert cfg == CFG
    params, router = checkpoint_model(files[:2], cfg, weights=[1, 3])
    want = tree.map_leaves(lambda a, b: 0.25 * a.numpy() + 0.75 * b.numpy(), params_of(1), params_of(2))
    for got, leaf in zip(tree.flatten(params), tree.flatten(want)):
        np.testing.assert_allclose(got, leaf, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(router.moe, 0.25 * 0.5 + 0.75 * 1.0, rtol=1e-6)
    alone, _ = checkpoint_model(files[2:], cfg, share="ema")
    np.testing.assert_array_equal(alone.embed, params_of(3).embed)


def test_wrong_means_are_named(run, tmp_path):
    files = [open_checkpoint(run)]
    save_checkpoint(tmp_path, {"a": tf.zeros([1])}, {}, step=1)
    for arguments, options, message in [
        ([], {}, "no checkpoint is given"),
        (files, {"weights": [1.0, 2.0]}, "2 weights for 1 checkpoints, want as many"),
        (files, {"weights": [0.0]}, r"`weights` are \[0.0\], want some above 0"),
        ([open_checkpoint(tmp_path)], {}, "has no `params.embed`"),
    ]:
        with pytest.raises(ValueError, match=f"checkpoint_model: .*{message}"):
            checkpoint_model(arguments, CFG, **options)
    with pytest.raises(ValueError, match="`params.embed` in .* has shape .*, want"):
        checkpoint_model(files, model_config(num_hidden_layers=2, num_nextn_predict_layers=1, vocab_size=11))
    with pytest.raises(ValueError, match="checkpoint_config: .* has no `config`, want one of pretrain.py"):
        checkpoint_config([open_checkpoint(tmp_path)])
    save_checkpoint(tmp_path, {"a": tf.zeros([1])}, {}, step=2, cursor={"config": CFG.replace(vocab_size=99).to_hf()})
    with pytest.raises(ValueError, match="of stages with unlike configurations, want those of one stage"):
        checkpoint_config([*files, open_checkpoint(tmp_path)])


# The program

# Flags are the process's own, so the program runs in one of its own: one for all cases.
DRIVER = """
import contextlib, io, json, sys
import checkpoint
from absl.testing import flagsaver

for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), flagsaver.flagsaver():
        try:
            code = checkpoint.main(checkpoint.parse_flags(["checkpoint.py", *arguments]))
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""
ROOT = pathlib.Path(__file__).resolve().parents[2]
BAD = {
    "no command": ([], "no command, want inspect, diff or average"),
    "unknown": (["look", "{run}"], "unknown command 'look'"),
    "one of two": (["diff", "{run}"], "diff got 1 checkpoints, want 2"),
    "none": (["average"], "average got 0 checkpoints, want at least 1"),
    "no place": (["average", "{run}"], "average wants --out"),
    "a place that is taken": (["average", "{run}", "--out={run}"], "is there already, want a new folder"),
    "moments": (["average", "{run}", "--out={new}", "--share=opt"], "--share is 'opt', want params or ema"),
    "no numbers": (["average", "{run}", "--out={new}", "--weights=a"], "--weights is a, want numbers"),
    "nothing there": (["inspect", "{new}"], "is no checkpoint and holds none"),
    "damage": (["inspect", "{damaged}"], "is damaged (the checksum of state.safetensors is wrong in `a`)"),
}
GOOD = {
    "inspect": ["inspect", "{run}"],
    "diff": ["diff", "{run}/step-00000001", "{run}/step-00000003", "--top=2"],
    "alike": ["diff", "{run}/step-00000001", "{run}/step-00000001", "--share=all"],
    "average": ["average", "{run}/step-00000001", "{run}/step-00000002", "--out={mean}"],
}


@pytest.fixture(scope="module")
def called(run, tmp_path_factory):
    """Exit code, output and errors of each case; and where the averaged model is."""
    folder = tmp_path_factory.mktemp("program")
    save_checkpoint(folder / "damaged", {"a": tf.zeros([5])}, {}, step=1)
    file = folder / "damaged" / "step-00000001" / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    places = {"run": run, "new": folder / "new", "damaged": folder / "damaged", "mean": folder / "mean"}
    cases = {**GOOD, **{name: arguments for name, (arguments, _) in BAD.items()}}
    wanted = [[argument.format(**places) for argument in arguments] for arguments in cases.values()]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'examples'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", DRIVER, json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, map(json.loads, done.stdout.splitlines()))) | {"mean": folder / "mean"}


def test_inspect_prints_everything(called):
    code, printed, _ = called["inspect"]
    assert code == 0
    for line in ("step 3, 1 file(s)", "lr 0.2", "data [3, [4, 2]]", "params/experts", "opt/mu/mtp", "checksum is right"):
        assert re.sub(r" +", " ", line) in re.sub(r" +", " ", printed), line


def test_diff_says_what_differs(called):
    code, printed, _ = called["diff"]
    count = len(tree.flatten(params_of(1)))
    norms = sum(path.endswith("norm") for path in tree.to_dict(params_of(1)))
    assert code == 1 and f"{count - norms} of {count} leaves differ" in printed
    assert f"... and {count - norms - 2} more" in printed and re.search(r"lr +0.1 +0.2\n", printed)
    assert called["alike"][0] == 0


def test_average_writes_a_model(called):
    code, printed, errors = called["average"]
    assert code == 0, errors
    cfg, params, router = load_pretrained(called["mean"], dtype="float32")
    assert cfg == CFG and float(tf.reduce_mean(router.moe)) == pytest.approx(0.75)
    want = 0.5 * (params_of(1).embed.numpy() + params_of(2).embed.numpy())
    np.testing.assert_allclose(params.embed, want, atol=2**-8)  # stored in bfloat16
    assert dsv3.model_apply(params, router, [[1, 2]], cfg=cfg).logits.shape == [1, 2, CFG.vocab_size]
    assert "the mean of 2 checkpoint(s)" in printed


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(called, what):
    code, _, errors = called[what]
    lines = [line for line in errors.splitlines() if line.startswith("checkpoint: ")]
    assert code == 2 and len(lines) == 1 and BAD[what][1] in lines[0], errors
