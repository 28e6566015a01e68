"""Drawn meshes, models and schedules: some steps give the numbers of one device.

One small case is drawn, the same in each run; `.ci/run` holds more. Others: DSV3_MESH_CASES=first:count, as 100:20.
"""

import os
import random

import pytest

import dsv3
from dsv3 import pipeline
from dsv3.parallel.mesh import AXES
from tests.more import more
from tests.small import model_config
from tests.train.test_mesh_step import assert_same_run, batches_of, train

FIRST, COUNT = map(int, os.environ.get("DSV3_MESH_CASES", "210:1").split(":"))
TABLES = {name: make for name, make in pipeline.SCHEDULES.items() if name != "interleaved"}


def draw(seed):
    """A case: fields of a model, axes, nodes, micro-batches, rows, length, table, layers of its stages."""
    rng = random.Random(seed)
    sizes = [(p, d, e) for p in (1, 2, 3, 4) for d in (1, 2, 3) for e in (1, 2, 3, 4, 6, 8) if 2 <= p * d * e <= 8]
    pipe, data, expert = rng.choice(sizes)
    groups = rng.choice([1, 2, 3, 4])
    fields = {
        "hidden_size": rng.choice([6, 10, 12]), "num_attention_heads": rng.choice([1, 3]),
        "num_hidden_layers": rng.choice([2, 3, 4]), "num_nextn_predict_layers": rng.choice([0, 1]),
        "n_routed_experts": expert * groups * (2 if expert == 1 else rng.choice([1, 2])), "n_group": groups,
        "q_lora_rank": rng.choice([None, 5]),
        "n_shared_experts": rng.choice([0, 1]), "moe_intermediate_size": rng.choice([3, 5]),
        "vocab_size": rng.choice([37, 40]),
    }  # fmt: skip
    fields["first_k_dense_replace"] = rng.choice([1, fields["num_hidden_layers"] - 1])
    a_group = fields["n_routed_experts"] // groups
    kept = rng.randint(1, groups)
    fields |= {"topk_group": kept, "num_experts_per_tok": rng.randint(1, min(4, kept * a_group))}
    name = rng.choice(sorted(TABLES)) if pipe > 1 else "one_f_one_b"
    stages = {"dualpipe_v": 2 * pipe}.get(name, pipe)
    micro = 2 * pipe if name.startswith("dualpipe") else rng.choice([1, 2, 3])
    if name == "dualpipe" and pipe % 2:
        name = "zb1p"
    layers = [0] * stages
    for _ in range(fields["num_hidden_layers"]):
        layers[rng.randrange(stages)] += 1
    nodes = rng.choice([n for n in (1, 2, 3, 4, 6, 8) if expert % n == 0])
    axes = dict(zip(AXES, (pipe, data, expert)))
    return fields, axes, nodes, micro, data * expert * rng.choice([1, 2]), rng.choice([3, 4]), name, layers


def case_id(seed):
    _, axes, nodes, _, _, _, name, _ = draw(seed)
    return f"{seed}-{','.join(f'{axis}:{n}' for axis, n in axes.items())}-{nodes}-{name}"


@pytest.mark.parametrize("seed", [*range(FIRST, FIRST + COUNT), *more(44)], ids=case_id)
def test_any_mesh_gives_the_run_of_one_device(seed):
    fields, axes, nodes, micro, rows, length, table, layers = draw(seed)
    cfg = model_config(**fields)
    batches = batches_of(cfg, micro, rows, length)
    kwargs = {"schedule": TABLES[table], "expert_nodes": nodes, "stage_layers": layers}
    assert_same_run(train(cfg, axes, batches, **kwargs), train(cfg, None, batches))


def test_drawn_cases_cover_the_axes():
    """Over many seeds every axis, table, and cut into nodes comes, and every case is one that a step takes."""
    drawn = [draw(seed) for seed in range(200)]
    assert {name for *_, name, _ in drawn} == set(TABLES)
    for axis in AXES:
        assert len({axes[axis] for _, axes, *_ in drawn}) >= 3, axis
    assert len({nodes for _, _, nodes, *_ in drawn}) >= 4
    for fields, axes, nodes, micro, rows, _, table, layers in drawn:
        cfg = model_config(**fields)
        made = TABLES[table](axes["pipe"], micro)
        assert made.stages == len(layers) and sum(layers) == cfg.num_layers
        assert rows % (axes["data"] * axes["expert"]) == 0 and cfg.moe.router.num_experts % axes["expert"] == 0
        assert axes["expert"] % nodes == 0 and dsv3.model_specs(cfg)
