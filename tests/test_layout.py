"""`make_layouts` on a mesh of eight virtual devices, in a process of its own (devices are fixed at start-up)."""

import subprocess
import sys
import textwrap

PROGRAM = """
import os
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow as tf
from tensorflow.experimental import dtensor
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 8)
import dsv3
from dsv3 import layout, tree
cfg = dsv3.preset("tiny")
specs = dsv3.model_specs(cfg)
mesh = dtensor.create_mesh([("data", 2), ("expert", 4)], devices=[f"CPU:{i}" for i in range(8)])
"""


def run(body: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + textwrap.dedent(body)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_layouts_mirror_parameters_and_place_them():
    out = run(
        """
        layouts = dsv3.make_layouts(specs, mesh, {"expert": "expert"})
        params = dsv3.model_init(tf.constant([0, 1]), cfg)
        print(sorted(tree.to_dict(layouts)) == sorted(tree.to_dict(params)))
        placed = dtensor.relayout(dtensor.copy_to_mesh(params.moe.ffn.down, dtensor.Layout.replicated(mesh, 4)),
                                  layouts.moe.ffn.down)
        print(dtensor.fetch_layout(placed).sharding_specs, dtensor.unpack(placed)[0].shape)
        back = dtensor.relayout(placed, dtensor.Layout.replicated(mesh, 4))
        print(bool(tf.reduce_all(dtensor.unpack(back)[0] == params.moe.ffn.down)))
        whole = dsv3.count_params(specs) * 4
        experts = dsv3.count_params((specs.moe.ffn.gate_up, specs.moe.ffn.down,
                                     specs.mtp.block.ffn.gate_up, specs.mtp.block.ffn.down)) * 4
        print(layout.local_bytes(specs, layouts) == whole - experts + experts // 4)
        """
    )
    # [X, E, F, D] = [2, 8, 16, 32]: the eight experts lie two to a device.
    assert out.splitlines() == ["True", "['unsharded', 'expert', 'unsharded', 'unsharded'] (2, 2, 16, 32)", "True", "True"]


def test_impossible_layouts_name_leaf_shape_and_rule():
    out = run(
        """
        for rules in ({"expert": "model"}, {"banana": "data"}, {"layer": "expert"}, {"embed": "data", "mlp": "data"}):
            try:
                dsv3.make_layouts(specs, mesh, rules)
            except ValueError as e:
                print(e)
        """
    )
    lines = out.splitlines()
    assert "rule 'expert' -> 'model': the mesh has only the axes ['data', 'expert']" in lines[0]
    assert "rule 'banana' -> 'data': no leaf has that axis" in lines[1]
    assert lines[2].startswith("make_layouts: `dense.attn_norm` has shape (1, 32) ['layer', 'embed']")
    assert "1 is not divisible by the axis's 4 devices" in lines[2]
    assert "two of its dims" in lines[3]
