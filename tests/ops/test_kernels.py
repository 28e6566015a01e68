"""What XLA makes of the element-wise chains: nothing that may end the process (see dsv3/ops/reduce.py)."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.more import more

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = pathlib.Path(__file__).with_name("compile_kernels.py")
PLAIN = ["train bfloat16", "logprobs", "distill"]
LONG = ["train", "train fp8", "train in tiles", "logprobs bfloat16", "distill bfloat16", "serve int8", "serve fp8"]


@pytest.mark.parametrize("parts", [PLAIN, *more(LONG)], ids=["plain", *more("long")])
def test_no_kernel_has_a_reduction_that_two_operations_may_not_run_at_a_time(parts):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, PROGRAM, *parts], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    of_parts = json.loads(done.stdout)
    counts = [seen for seen, _ in of_parts.values()]
    assert sum(counts) > 100 and all(counts)
    assert {part: found for part, (_, found) in of_parts.items() if found} == {}
