"""Peak memory of loading and saving about 200 MB of parameters, in a process of its own.

Bound: the parameters, plus 48 MiB of buffers (rows of one tensor in float32, and what TensorFlow allocates for them).
Nothing grows with the size of a tensor or a file: the largest tensor here has 64 MiB in bfloat16 and 128 MiB in float32.
"""

from __future__ import annotations

import json
import math
import os
import pathlib

import pytest

import dsv3
from dsv3.io.names import expected_tensors
from dsv3.io.safetensors_files import encode_header
from dsv3.pretrained import save_pretrained
from tests.io.checkpoints import random_model
from tests.io.test_checkpoint_atomic import run_script
from tests.small import model_config

MIB = 1 << 20
SLACK = 48 * MIB


def write_zeros(directory: pathlib.Path, cfg: dsv3.ModelConfig, form: str) -> None:
    """A checkpoint of zeros, in a file that takes no room on the disk."""
    entries = [(name, *t[::-1]) for name, t in expected_tensors(dsv3.model_specs(cfg), cfg, form).items()]
    header, _ = encode_header(entries)
    total = sum({"F32": 4, "BF16": 2, "F8_E4M3": 1}[dtype] * math.prod(shape) for _, dtype, shape in entries)
    directory.mkdir()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + total)
    (directory / "config.json").write_text(json.dumps(cfg.to_hf()))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc/self/clear_refs")
def test_memory_is_the_parameters_and_a_constant(tmp_path):
    cfg = model_config(
        vocab_size=32768, hidden_size=1024, num_hidden_layers=2, moe_intermediate_size=1024, n_routed_experts=6,
        intermediate_size=2048, num_nextn_predict_layers=0,
    )  # fmt: skip
    for form in ("float32", "float8"):
        save_pretrained(tmp_path / f"small-{form}", *random_model(model_config()), dtype=form)
        write_zeros(tmp_path / f"large-{form}", cfg, form)
    found = run_script("measure_memory.py", tmp_path)
    shown = {name: f"{value / MIB:.0f} MiB" for name, value in found.items()}
    print(shown)
    assert 180 * MIB < found["params"] < 220 * MIB
    for form in ("float32", "float8"):
        assert 0.95 * found["params"] < found[f"loaded {form}"], f"the parameters are not in memory: {shown}"
        assert found[f"load {form}"] < found["params"] + SLACK, shown
    assert found["save float8"] < SLACK and found["save bfloat16"] < SLACK, shown
    assert found["sum"] == 0
