"""Times the training step on meshes, and shows what they move and hold.

Each mesh gets the same model and batch. On one machine's cores more devices are no faster: what there is to see is what a
layout costs (exchanges, idle ranks), that the loss stays the same, and how memory and traffic are shared out. With the
launcher the devices belong to several processes.

Examples:

  python examples/mesh.py
  python examples/mesh.py --mesh expert:4 --mesh pipe:2,expert:2 --schedule dualpipe
  python examples/launch.py --num_clients=2 examples/mesh.py --mesh data:2
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import math
import statistics
import sys
import time

import numpy as np
import tensorflow as tf
from absl import app, flags, logging
from command import aligned, flag_parser
from command_mesh import check_axes

import dsv3
from dsv3 import pipeline
from dsv3.checks import check
from dsv3.layout import local_bytes
from dsv3.parallel.clients import read_clients, start_clients
from dsv3.parallel.mesh import parse_axes

FLAGS = flags.FLAGS
DEFAULT = ["data:1", "data:2", "expert:2", "pipe:2", "data:2,expert:2", "pipe:2,expert:2", "expert:8"]

flags.DEFINE_multi_string("mesh", DEFAULT, "A mesh, as data:2,expert:4; may be given several times.")
flags.DEFINE_enum("schedule", "one_f_one_b", sorted(pipeline.SCHEDULES), "The order of micro-batches on pipeline ranks.")
flags.DEFINE_integer("expert_nodes", 1, "Nodes that the axis expert of each mesh is cut into.", 1)
flags.DEFINE_enum("preset", "demo", dsv3.PRESETS, "Architecture by name.")
flags.DEFINE_integer("micro_batches", 4, "Micro-batches of a step.", 1)
flags.DEFINE_integer("batch_size", 8, "Sequences of a micro-batch.", 1)
flags.DEFINE_integer("seq_len", 128, "Tokens of a sequence.", 1)
flags.DEFINE_integer("steps", 5, "Steps that are timed, after two that compile.", 1)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")

NOTES = """entry: the step's time by the most entries that a rank has in the schedule's table
sent: by a device to others' experts in a step, to other nodes if there are; stored: a device's parameters and moments
held: forward passes at a time, by pipeline rank"""
HEAD = ("mesh", "table", "loss", "step ms", "tokens/s", "entry ms", "sent KB", "to nodes", "padding", "stored MB", "held")


def main(argv: list[str]) -> int:
    try:
        check(len(argv) == 1, f"unexpected argument {argv[1:2]}, want flags only (--help shows them)")
        sizes = [math.prod(parse_axes(mesh).values()) for mesh in FLAGS.mesh]
        logging.set_verbosity(logging.WARNING)  # DTensor tells of every mesh
        others = read_clients()
        count = 1 if others is None else len(others.jobs)
        alone = count == 1 or (len(sizes) == 1 and sizes[0] % count == 0)
        check(alone, f"with {count} processes give one --mesh whose devices they can share")
        for mesh in FLAGS.mesh:
            check_axes(
                mesh, dsv3.preset(FLAGS.preset), rows=FLAGS.batch_size, micro_batches=FLAGS.micro_batches,
                schedule=FLAGS.schedule, nodes=FLAGS.expert_nodes, processes=count, what=f"--batch_size {FLAGS.batch_size}",
            )  # fmt: skip
        with start_clients(max(sizes) // count, common={"arguments": sys.argv[1:]}) as clients:
            rows = [HEAD, *(measure(mesh) for mesh in FLAGS.mesh)]
    except ValueError as error:
        print(f"mesh: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if clients.index == 0:
        print(aligned(rows, left=2))
        print(NOTES)
    return 0


def measure(axes: str) -> tuple[str, ...]:
    """Runs some steps on a mesh and returns a row of the table."""
    cfg, optimizer = dsv3.preset(FLAGS.preset), dsv3.adamw(1e-3)
    specs, mesh = dsv3.model_specs(cfg), dsv3.make_mesh(axes)
    layouts = dsv3.zero_layouts(specs, dsv3.make_layouts(specs, mesh))
    policy = dsv3.default_policy().replace(dtype=None if FLAGS.dtype == "float32" else FLAGS.dtype)
    schedule = pipeline.SCHEDULES[FLAGS.schedule]
    step = dsv3.make_train_step(
        cfg, optimizer, layouts, schedule=schedule, policy=policy, expert_nodes=FLAGS.expert_nodes
    )
    state = dsv3.place_state(dsv3.train_init(tf.constant([0, 1]), cfg, optimizer), layouts)
    rng, seconds, losses = np.random.default_rng(0), [], []
    for _ in range(FLAGS.steps + 2):
        tokens = rng.integers(0, cfg.vocab_size, (FLAGS.micro_batches, FLAGS.batch_size, FLAGS.seq_len + 1))
        begin = time.perf_counter()
        state, metrics = step(state, tokens.astype(np.int32))
        losses.append(float(metrics.loss))
        seconds.append(time.perf_counter() - begin)
    table = schedule(mesh.dim_size("pipe"), FLAGS.micro_batches)
    median = statistics.median(seconds[2:])
    tokens = FLAGS.micro_batches * FLAGS.batch_size * FLAGS.seq_len
    return (
        axes, table.name, f"{losses[-1]:.6f}", f"{1e3 * median:.0f}", f"{tokens / median:,.0f}",
        f"{1e3 * median / max(map(len, table.rows)):.1f}", f"{int(metrics.mesh.bytes) / 1e3:,.0f}",
        f"{int(metrics.mesh.node_bytes) / 1e3:,.0f}", f"{float(metrics.mesh.padding):.0%}",
        f"{3 * local_bytes(specs, layouts) / 1e6:.2f}",
        "/".join(map(str, metrics.mesh.held.numpy())),
    )  # fmt: skip


parse_flags = flag_parser("mesh")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
