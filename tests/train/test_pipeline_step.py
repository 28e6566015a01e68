"""The step through a pipeline: loss and every gradient are those of one device, and memory is what the table says."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import dsv3
from dsv3 import pipeline, tree
from dsv3.parallel.mesh import parse_axes
from dsv3.parallel.tape import Piece, Turn
from dsv3.pipeline.pieces import ATTENTION, COMBINE, DISPATCH, EXPERTS, slot_pieces
from dsv3.train.executor import take_turns
from dsv3.train.optim import Optimizer, OptimStats
from dsv3.train.stages import cut_stages
from tests.compare import PLAIN, assert_close
from tests.more import LONG, more
from tests.small import model_config, random_params, random_router, random_tokens
from tests.train.test_mesh_step import RATES, assert_same_run, batches_of, layouts_of, train

# Five layers, one dense, and a module: stages of unlike length, of one kind and of both.
CFG = model_config(num_hidden_layers=5, first_k_dense_replace=1, num_nextn_predict_layers=1)


def recorder():
    """An optimiser whose step is the gradient itself, so that nothing hides or magnifies an error."""

    def update(grads, state, params, tokens, norm, take):
        return tree.map_leaves(lambda g: tf.cast(g, tf.float32), grads), state, OptimStats(norm, tf.constant(0.0))

    return Optimizer(lambda params: (), update)


def gradients(cfg, axes, tokens, weights=None, times=1, **kwargs):
    """Returns gradients as a tree of parameters, and the metrics, of one step from parameters that hide nothing.

    With `times` the same step is made so often: later ones find what the first has prepared.
    """
    state = dsv3.train_state(random_params(dsv3.model_specs(cfg)), random_router(cfg), recorder())
    kwargs = {"policy": PLAIN} | RATES | kwargs
    layouts = None if axes is None else layouts_of(cfg, axes)
    if layouts is not None:
        state = dsv3.place_state(state, layouts)
    # Compiled on one device too: outside of a graph other kernels round, of which a gradient here shows up to 1.2e-5.
    step = dsv3.make_train_step(cfg, recorder(), layouts, **kwargs)
    for _ in range(times):
        after, metrics = step(state, tokens, weights)
    return (after if axes is None else dsv3.gather_state(after)).params, metrics


@functools.cache
def on_one_device(cfg, micro):
    return gradients(cfg, None, tokens_of(cfg, micro), weights_of(micro))


def tokens_of(cfg, micro):
    return np.stack([random_tokens(cfg, 4, 6, seed=m) for m in range(micro)])


def weights_of(micro):
    """Some targets are left out, unlike many in each micro-batch."""
    return np.random.default_rng(0).integers(0, 2, (micro, 4, 5)).astype(np.float32)


TWO_CHUNKS = functools.partial(pipeline.interleaved, chunks=2)
# A stage of a dense layer, one of a mixture and a module: little to compile, and still every kind of block.
FEW = model_config(num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=1)
CASES = [
    pytest.param("pipe:2,data:2", pipeline.zb1p, 3, marks=LONG),
    *more(
        ("pipe:4,expert:2", pipeline.dualpipe, 8), ("pipe:2,expert:2", TWO_CHUNKS, 2),
        ("pipe:2,expert:2", pipeline.dualpipe_v, 4),
    ),
]


def assert_gradients_of_one_device(cfg, axes, schedule, micro):
    want, ref = on_one_device(cfg, micro)
    got, metrics = gradients(cfg, axes, tokens_of(cfg, micro), weights_of(micro), schedule=schedule)
    for name in ("nll", "mtp", "balance"):
        assert_close(getattr(metrics.parts, name), getattr(ref.parts, name), what=name)
    assert_close(metrics.loss, ref.loss)
    assert_close(metrics.optim.grad_norm, ref.optim.grad_norm, 1e-5)
    for a, b in zip(metrics.parts.load, ref.parts.load):
        np.testing.assert_array_equal(a, b)
    for (path, a), b in zip(tree.items(got), tree.flatten(want)):
        assert_close(a, b, 1e-5, path)
    table = schedule(parse_axes(axes)["pipe"], micro)
    assert metrics.mesh.held.numpy().tolist() == list(pipeline.peak_activations(table)), "memory as the table says"


@pytest.mark.parametrize(("axes", "schedule", "micro"), CASES)
def test_loss_and_every_gradient(axes, schedule, micro):
    assert_gradients_of_one_device(CFG, axes, schedule, micro)


def test_loss_and_every_gradient_of_few_layers():
    assert_gradients_of_one_device(FEW, "pipe:2", pipeline.zb1p, 3)


@LONG
def test_ten_steps_with_uneven_stages_and_rows_in_two_directions():
    batches = batches_of(CFG, 4, 4, 5)
    got = train(CFG, "pipe:2,data:2", batches, schedule=pipeline.dualpipe, stage_layers=[1, 4])
    assert_same_run(got, train(CFG, None, batches))


def test_a_stage_without_layers_and_tied_embeddings():
    cfg = model_config(num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=0, tie_word_embeddings=True)
    want, _ = on_one_device(cfg, 2)
    got, _ = gradients(cfg, "pipe:4", tokens_of(cfg, 2), weights_of(2), stage_layers=[0, 1, 1, 0])
    for (path, a), b in zip(tree.items(got), tree.flatten(want)):
        assert_close(a, b, 1e-5, path)


@pytest.mark.parametrize(
    ("kwargs", "micro", "message"),
    [
        ({"schedule": pipeline.dualpipe}, 3, "dualpipe: `micro_batches` is 3"),
        ({"stage_layers": [2, 2]}, 2, r"cut_stages: `layers` is \[2, 2\], want 2 numbers that add up to 5"),
        ({"schedule": lambda ranks, micro: pipeline.one_f_one_b(ranks, 4)}, 2, "and 4 micro-batches, want 2 and 2"),
        ({"stage_layers": [5]}, 2, r"cut_stages: `layers` is \[5\], want 2 numbers"),
    ],
)
def test_what_cannot_be_is_named(kwargs, micro, message):
    with pytest.raises(ValueError, match=message):
        gradients(CFG, "pipe:2", tokens_of(CFG, micro), **kwargs)


def test_layers_by_stage_and_rank():
    cut = cut_stages(CFG, 4)
    assert [list(cut.layers(s)) for s in range(4)] == [[0, 1], [2], [3], [4]]
    rows = cut.rows(CFG, pipeline.dualpipe_v(2, 4), 0)
    assert rows["dense"].ranks == ((0,), ()) and rows["dense"].room == 1
    assert rows["moe"].ranks == ((0, 3), (1, 2)) and rows["moe"].flat == [0, 3, 1, 2]
    assert rows["moe"].places(4) == [0, 2, 3, 1]
    second = cut_stages(CFG, 2).rows(CFG, pipeline.dualpipe(2, 4), 1)
    assert second["moe"].ranks == ((2, 3), (0, 1)), "direction 1 has the first stage on the last rank"
    assert second["dense"].flat == [0, 0] and second["dense"].places(1) == [1]


def test_programs_change_at_turns_alone():
    seen = []

    def program(name, count):
        for i in range(count):
            assert (yield (name, i)) == f"{name}{i}"
            if i % 2:
                assert (yield Turn()) is None

    def answer(request):
        seen.append(request)
        return f"{request[0]}{request[1]}"

    take_turns([program("f", 4), program("b", 3)], answer)
    assert seen == [("f", 0), ("f", 1), ("b", 0), ("b", 1), ("f", 2), ("f", 3), ("b", 2)]


PARTS_CFG = model_config(num_hidden_layers=4, first_k_dense_replace=0, num_nextn_predict_layers=0)


ORDERS = [
    (pipeline.dualpipe, 1), pytest.param(pipeline.one_f_one_b, 1, marks=LONG), pytest.param(pipeline.zb1p, 2, marks=LONG)
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "nodes"), ORDERS)
def test_the_order_of_pieces_is_that_of_the_table(schedule, nodes, monkeypatch):
    """Attention, dispatch, experts and combine of overlapping passes alternate as figure 4 of DeepSeek-V3 has them."""
    seen, split = [], Piece.split

    def logged(piece, params, inputs):
        made = split(piece, params, inputs)
        names = {"experts": EXPERTS, "dispatch": DISPATCH, "attention": ATTENTION}
        names["back" if nodes == 1 else "combine"] = COMBINE
        name = next((part for word, part in names.items() if word in piece.fn.__qualname__.split(".", 1)[-1]), None)
        if name is None:
            return made

        def log(kind, run):
            def wrapped(*args):
                found = run(*args)
                if kind != "W" or any(g is not None for g in found):
                    seen.append((kind, name))
                return found

            return wrapped

        return made._replace(
            forward=log("F", made.forward), backward=log("I", made.backward), weights=log("W", made.weights)
        )

    monkeypatch.setattr(Piece, "split", logged)
    gradients(PARTS_CFG, "pipe:2,expert:2", tokens_of(PARTS_CFG, 4), schedule=schedule, expert_nodes=nodes)
    table = schedule(2, 4)
    want = []
    for rank, place in pipeline.schedule_order(table).steps:
        for piece in slot_pieces(table.rows[rank][place], 4 // table.stages):
            want += [(piece.kind, piece.part)] * 2  # on two devices
    assert seen == want
