"""How functions are computed."""

import dataclasses

import pytest
import tensorflow as tf

from dsv3 import ComputePolicy, default_policy


def test_defaults_of_devices():
    cpu, gpu = default_policy("CPU"), default_policy("GPU")
    assert not cpu.jit and cpu.fuse and cpu.experts == "sorted"
    assert gpu.jit and not gpu.fuse and gpu.experts == "blocks" and gpu.max_rows == 0
    assert default_policy("TPU") == gpu and default_policy() == cpu
    with pytest.raises(ValueError, match="default_policy: `device` is 'cpu', want one of 'CPU', 'GPU', 'TPU'"):
        default_policy("cpu")


def test_bad_policies_are_refused():
    for fields, message in [
        ({"dtype": "float16"}, "ComputePolicy: `dtype` is 'float16', want one of None, 'float32', 'bfloat16'"),
        ({"experts": "rows"}, "ComputePolicy: `experts` is 'rows'"),
        ({"remat": "layer"}, "ComputePolicy: `remat` is 'layer'"),
        ({"loop": "while"}, "ComputePolicy: `loop` is 'while'"),
        ({"attention_block": 0}, "ComputePolicy: `attention_block` is 0, want > 0"),
        ({"loss_chunk": 0}, "ComputePolicy: `loss_chunk` is 0, want > 0"),
        ({"loss_keep": -1}, "ComputePolicy: `loss_keep` is -1, want >= 0 logits"),
        ({"jit": True}, "ComputePolicy: jit=True wants experts='blocks'"),
    ]:
        with pytest.raises(ValueError, match=message):
            ComputePolicy(**fields)


def test_replace_and_dtype():
    policy = ComputePolicy().replace(dtype="bfloat16")
    assert policy.compute_dtype == tf.bfloat16 and ComputePolicy().compute_dtype is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.dtype = None
    with pytest.raises(ValueError, match="`loop` is 'x'"):
        policy.replace(loop="x")


def test_short_sequences_get_smaller_blocks_of_queries():
    policy = ComputePolicy()
    assert [policy.query_block(length) for length in (1, 512, 513, 800, 1024, 4096)] == [128, 128, 160, 224, 256, 256]
    assert policy.replace(attention_block=64).query_block(512) == 64
    # Never more blocks than attention unrolls, unless there were more with the largest.
    assert policy.replace(attention_unroll=1).query_block(250) == 250
    assert policy.replace(attention_unroll=2).query_block(512) == 256


@pytest.mark.parametrize("experts", ["sorted", "blocks"])
def test_row_multiple_grows_with_the_share_and_wastes_little(experts):
    policy = ComputePolicy(experts=experts)
    sizes = [policy.row_multiple(rows, 8) for rows in (8, 128, 512, 1024, 10**6)]
    assert sizes == sorted(sizes) and sizes[0] <= 16
    # At large shares the padding of half a multiple an expert stays below half of the rows.
    for rows in (512, 1024, 10**6):
        assert 8 * policy.row_multiple(rows, 8) / 2 <= rows / 2
