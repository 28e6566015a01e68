"""`make_layouts` on a mesh of eight virtual devices."""

import pytest
import tensorflow as tf
from tensorflow.experimental import dtensor

import dsv3
from dsv3 import layout, tree

CFG = dsv3.preset("tiny")
SPECS = dsv3.model_specs(CFG)


@pytest.fixture(scope="module")
def mesh():
    return dtensor.create_mesh([("data", 2), ("expert", 4)], devices=[f"CPU:{i}" for i in range(8)])


def test_layouts_mirror_parameters_and_place_them(mesh):
    layouts = dsv3.make_layouts(SPECS, mesh, {"expert": "expert"})
    params = dsv3.model_init(tf.constant([0, 1]), CFG)
    assert sorted(tree.to_dict(layouts)) == sorted(tree.to_dict(params))
    whole = dtensor.copy_to_mesh(params.moe.ffn.down, dtensor.Layout.replicated(mesh, 4))
    placed = dtensor.relayout(whole, layouts.moe.ffn.down)
    # [X, E, F, D] = [2, 8, 16, 32]: the eight experts lie two to a device.
    assert dtensor.fetch_layout(placed).sharding_specs == ["unsharded", "expert", "unsharded", "unsharded"]
    assert dtensor.unpack(placed)[0].shape == [2, 2, 16, 32]
    back = dtensor.relayout(placed, dtensor.Layout.replicated(mesh, 4))
    assert bool(tf.reduce_all(dtensor.unpack(back)[0] == params.moe.ffn.down))
    ffn = (SPECS.moe.ffn, SPECS.mtp.block.ffn)
    experts = dsv3.count_params([(part.gate_up, part.down) for part in ffn]) * 4
    assert layout.local_bytes(SPECS, layouts) == dsv3.count_params(SPECS) * 4 - experts + experts // 4


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"expert": "model"}, r"rule 'expert' -> 'model': the mesh has only the axes \['data', 'expert'\]"),
        ({"banana": "data"}, "rule 'banana' -> 'data': no leaf has that axis"),
        (
            {"layer": "expert"},
            r"^make_layouts: `dense.attn_norm` has shape \(1, 32\) \['layer', 'embed'\].*"
            "1 is not divisible by the axis's 4 devices",
        ),
        ({"embed": "data", "mlp": "data"}, "two of its dims"),
    ],
)
def test_impossible_layouts_name_leaf_shape_and_rule(mesh, rules, message):
    with pytest.raises(ValueError, match=message):
        dsv3.make_layouts(SPECS, mesh, rules)
