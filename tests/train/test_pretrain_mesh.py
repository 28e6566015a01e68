"""`examples/pretrain.py` on a mesh: the curve of one device, also by two processes of which one is killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dsv3.pretrained import load_pretrained
from dsv3.train.checkpoint import checkpoint_step, list_checkpoints
from tests.more import MORE
from tests.small import model_config
from tests.train.test_pretrain_example import EXAMPLES, call, environment, pretrain, read_rows, refused, train_rows
from tests.train.test_pretrain_plan import data

__all__ = ["data", "pretrain"]

STEPS = 12
MESH = "--mesh=data:2,expert:2"


@pytest.fixture(scope="module")
def same(data, tmp_path_factory):  # noqa: F811
    """The flags of every run here: a mixture of two sources; a small model, of which one process compiles little."""
    fields = {"num_hidden_layers": 2, "num_nextn_predict_layers": 0, "vocab_size": 300, "n_routed_experts": 4, "n_group": 2}
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(model_config(**fields, topk_group=1, max_position_embeddings=64).to_hf()))
    sizes = f"--steps={STEPS} --batch_size=8 --accumulate=2 --seq_len=16 --eval_every=6 --save_every=3"
    return [f"--data={data}", f"--config={path}", *sizes.split()]


@pytest.fixture(scope="module")
def straight(pretrain, same, tmp_path_factory):
    """The run of one device."""
    out = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "report", lambda *arguments: None)
        assert call(pretrain, *same, f"--out={out}") == 0
    return out


def assert_same_curve(out, straight, steps=STEPS):
    # Rounding of sums in another order, 6e-8 a sum, grows over the steps of Adam (see test_mesh_step.py); measured: 1.2e-7.
    want, got = train_rows(straight), train_rows(out)
    assert [row["step"] for row in got] == list(range(1, steps + 1))
    for name in ("loss", "nll", "balance", "learning_rate", "tokens"):
        np.testing.assert_allclose([row[name] for row in got], [row[name] for row in want[:steps]], rtol=1e-6, err_msg=name)
    held = [[row for row in read_rows(run / "log.jsonl") if row["kind"] == "heldout"] for run in (straight, out)]
    for a, b in zip(*held):
        np.testing.assert_allclose(b["nll"], a["nll"], rtol=1e-6)
    assert [row["step"] for row in held[1]] == [step for step in (0, 6, 12) if step <= steps]


def launched(folder, clients, arguments):
    """Starts the program, as several processes by the launcher, as one without it; what they print is in a file."""
    launcher = [str(EXAMPLES / "launch.py"), f"--num_clients={clients}"] if clients > 1 else []
    command = [sys.executable, *launcher, str(EXAMPLES / "pretrain.py"), *arguments]
    env = environment() | {"DSV3_JOIN_SECONDS": "120"}
    with open(folder / "printed", "w") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)


def wait(process, seconds):
    """Its exit code; what hangs is ended first, by the launcher, which alone knows the clients."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        return process.wait(60)


@pytest.fixture(scope="module")
def begun(pretrain, same, tmp_path_factory):
    """A run by one process on a mesh, which a signal has stopped after a step."""
    out, train_loop = tmp_path_factory.mktemp("begun") / "run", sys.modules["pretrain_train"].train_loop

    def stopped(*args, actions, **options):
        return train_loop(*args, actions=actions._replace(stop=lambda: signal.SIGTERM), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain_train.train_loop", stopped)
        assert call(pretrain, *same, MESH, f"--out={out}") == 128 + signal.SIGTERM
    assert len(train_rows(out)) == 1
    return out


@pytest.fixture(scope="module")
def killed(same, begun, tmp_path_factory):
    """The same run, gone on with by two processes of which the second was killed after some steps."""
    folder = tmp_path_factory.mktemp("killed")
    shutil.copytree(begun, folder / "run")
    arguments = [*same, MESH, "--read_ahead=2", f"--out={folder / 'run'}"]  # how rows are read does not matter
    process, log = launched(folder, 2, arguments), folder / "run" / "log.jsonl"
    end = time.monotonic() + 200
    while not log.exists() or log.read_bytes().count(b'"train"') < 5:
        assert process.poll() is None and time.monotonic() < end, (folder / "printed").read_text()
        time.sleep(0.01)
    children = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    os.kill(int(children[1]), signal.SIGKILL)
    begin = time.monotonic()
    assert process.wait(60) == 128 + signal.SIGKILL
    seconds = time.monotonic() - begin
    text = (folder / "printed").read_text()
    assert "going on from step 1 of" in text, "two processes took up what one had left"
    assert "client 1 has died; client 0 ends, too: start all again, from the last checkpoint" in text
    assert text.splitlines()[-1] == "launch: client 1 was killed by SIGKILL; all 2 have ended"
    assert seconds < 10, seconds
    assert len(train_rows(folder / "run")) < STEPS, "it was killed too late to show anything"
    return folder / "run"


@pytest.mark.skipif(not MORE, reason="a long case")
def test_begun_by_one_process_and_gone_on_with_by_two_on_the_same_mesh(straight, killed):
    rows = train_rows(killed)
    assert len(rows) >= 5
    assert_same_curve(killed, straight, len(rows))


@pytest.mark.skipif(not MORE, reason="a long case")
def test_killed_and_gone_on_with_by_one_device(pretrain, same, straight, killed, tmp_path, monkeypatch):
    out, done = shutil.copytree(killed, tmp_path / "run"), len(train_rows(killed))
    assert_same_curve(killed, straight, done)
    step = checkpoint_step(list_checkpoints(out / "checkpoints")[-1])
    assert 3 <= step <= done <= step + 4
    monkeypatch.setattr(pretrain, "report", lambda *arguments: None)
    assert call(pretrain, *same, f"--out={out}") == 0
    assert_same_curve(out, straight)


@pytest.mark.skipif(not MORE, reason="a long case")
def test_gone_on_with_by_two_processes_on_another_mesh(pretrain, same, straight, killed, tmp_path):
    """They do all that one does, and the second says nothing."""
    out = shutil.copytree(killed, tmp_path / "run")
    process = launched(tmp_path, 2, [*same, "--mesh=pipe:2,expert:2", "--expert_nodes=2", "--nozero", f"--out={out}"])
    code = wait(process, 300)
    printed = (tmp_path / "printed").read_text()
    assert code == 0 and "going on from step" in printed and "byte, this model" in printed, printed
    said = [line for line in printed.splitlines() if line.startswith("[1] ")]
    assert not [line for line in said if not re.search(r"[IWE]0000|WARNING", line)], "but for TensorFlow's own lines"
    assert_same_curve(out, straight)
    results = json.loads((out / "results.json").read_text())
    held = [row for row in read_rows(out / "log.jsonl") if row["kind"] == "heldout"]
    assert results["training"]["steps"] == STEPS and results["heldout"]["nll"] < held[0]["nll"]
    assert (out / "plots" / "loss.png").exists() and (out / "samples.txt").exists()
    latest = list_checkpoints(out / "checkpoints")[-1]
    assert checkpoint_step(latest) == STEPS and len(list(latest.glob("state-*-of-00002.safetensors"))) == 2
    assert load_pretrained(out / "export", dtype="float32")[0].vocab_size == 300


@pytest.mark.skipif(not MORE, reason="a long case")
def test_gone_on_with_by_one_process_on_the_same_mesh(pretrain, same, straight, killed, tmp_path, monkeypatch):
    """Its devices read what two processes have read; so a mesh of one process gives the curve of one device, too."""
    out = shutil.copytree(killed, tmp_path / "run")
    monkeypatch.setattr(pretrain, "report", lambda *arguments: None)
    assert call(pretrain, *same, MESH, f"--out={out}") == 0
    assert_same_curve(out, straight)
    rows = train_rows(out)
    assert all(row["dispatch_bytes"] > 0 and 0 < row["dispatch_padding"] < 1 for row in rows), "experts are on two devices"
    assert not any("dispatch_bytes" in row for row in train_rows(straight))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh=data"], "parse_axes: 'data' in 'data', want axis:size"),
        (["--mesh=data:16", "--batch_size=32"], "make_mesh: 'data:16' has 16 devices|16 devices are wanted"),
        (["--mesh=pipe:2", "--schedule=dualpipe"], "dualpipe: `micro_batches` is 2"),
        (["--schedule=gpipe"], "--schedule is given, but no --mesh"),
        (["--mesh=data:3"], "--batch_size 8 with --accumulate 2 has 4 rows in a micro-batch, want a multiple of 3"),
        (["--mesh=expert:3", "--batch_size=12"], "the model has 4 experts, want a multiple of the 3 devices on expert"),
        (["--zero"], "--zero is given, but no --mesh"),
        (["--expert_nodes=2"], "--expert_nodes is given, but no --mesh"),
        (["--mesh=expert:2", "--expert_nodes=4"], "--expert_nodes is 4, want a divisor of 2, the devices on expert"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(pretrain, same, tmp_path, arguments, message):
    code, lines = refused(pretrain, [*same, f"--out={tmp_path / 'run'}", *arguments])
    assert code == 2 and len(lines) == 1 and re.search(message, lines[0]), lines
    assert not (tmp_path / "run" / "run.json").exists()


def test_processes_and_mesh_must_agree(pretrain, same, tmp_path, monkeypatch):
    monkeypatch.setenv("DTENSOR_JOBS", "a:70,b:70,c:70")
    monkeypatch.setenv("DTENSOR_CLIENT_ID", "0")
    for arguments, message in (
        ([], "3 processes run this, but there is no --mesh; want one, such as data:3"),
        ([MESH], "--mesh data:2,expert:2 has 4 devices, want a multiple of the 3 processes"),
    ):
        code, lines = refused(pretrain, [*same, f"--out={tmp_path}", *arguments])
        assert code == 2 and len(lines) == 1 and message in lines[0], lines
