"""Plans a training run without a device: parameters, memory, FLOPs, traffic, time and hours, by formula.

Without flags it plans the published run of DeepSeek-V3: 2,048 H800s as 16 pipeline, 64 expert and 2 data ranks, DualPipe,
15,360 sequences of 4,096 tokens, 14.8T tokens in all; and compares with what DeepSeek states. A changed flag asks "what if".

The mesh: tokens are sharded over data·expert, routed experts over expert, layers over pipe; there is no tensor parallelism.

Examples:

  python examples/plan.py
  python examples/plan.py --dispatch_dtype bfloat16 --recompute none          # what if ...
  python examples/plan.py --set fp8_fraction=0.5 --set ib_bandwidth=25e9      # ... the hardware were slower
  python examples/plan.py --hardware h200 --mesh pipe:8,expert:64,data:4
  python examples/plan.py --search --devices 2048                             # which meshes fit, and which is fastest
  python examples/plan.py --search --devices 1024 --schedule any --recompute block --hardware h100
  python examples/plan.py --trace                                             # does the step do what the formulas say?
  python examples/plan.py --trace --preset tiny --mesh expert:2 --schedule one_f_one_b --batch 8 --length 32
  python examples/plan.py --serve 4096 --mesh expert:32 --length 8192 --weights_dtype fp8 --batch 32
  python examples/plan.py --config model/config.json --mesh data:8 --schedule one_f_one_b --batch 64 \\
      --length 1024 --tokens 1e9

--trace traces the training step itself on the planned mesh, at the planned shapes and without memory for them: the programs
that one device of each pipeline stage runs, forward, backward for inputs and backward for weights. Parameters and products
are counted in the graphs and compared with the formulas; each difference is named and computed, and if one is left over the
exit code is 1. The experts' load is taken as balanced. The step computes in bfloat16, whatever --products_dtype says, and
recomputes blocks or nothing.

Fields of --set are those of dsv3.plan.Hardware (memory, bf16_flops, fp8_flops, hbm_bandwidth, nvlink_bandwidth,
ib_bandwidth, the fractions of each that are reached, comm_sms) and flops_fraction, which sets the three fractions of
computation at once. What is assumed is in dsv3/plan/hardware.py, with sources. A plan that does not fit is shown, too; the
exit code is then 1.
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import sys
from collections.abc import Sequence

from absl import app, flags
from command import flag_parser

import dsv3
from dsv3.checks import check
from dsv3.config import ModelConfig
from dsv3.plan import (
    HARDWARE,
    PUBLISHED,
    SCHEDULES,
    Hardware,
    Plan,
    check_plan,
    choose_stages,
    hardware_change,
    hardware_preset,
    parse_mesh,
    predict_step,
    report,
    search_plans,
    trace_step,
)
from dsv3.plan.count import RECOMPUTE

FLAGS = flags.FLAGS
PAPER = "pipe:16,expert:64,data:2"

flags.DEFINE_enum("preset", "deepseek-v3-pretrain", list(dsv3.PRESETS), "Model.")
flags.DEFINE_string("config", None, "A config.json or its folder, instead of --preset.")
flags.DEFINE_string("mesh", None, f"Axes pipe, expert and data with sizes; left-out axes are 1. Default: {PAPER}.")
flags.DEFINE_enum("schedule", None, [*SCHEDULES, "any"], 'Of the pipeline; "any" is for --search. Default: dualpipe.')
flags.DEFINE_string("stages", None, "Layers of each pipeline stage, such as 5,4,4,3. Default: what fits and is fastest.")
flags.DEFINE_integer("batch", PUBLISHED.batch, "Sequences of a step.", 1)
flags.DEFINE_integer("length", PUBLISHED.length, "Tokens of a sequence.", 1)
flags.DEFINE_integer("micro_batch", 1, "Sequences that a device computes at a time.", 1)
flags.DEFINE_float("tokens", float(PUBLISHED.tokens), "Tokens of the whole training.", 1)
flags.DEFINE_enum("recompute", "paper", list(RECOMPUTE), "What the backward pass computes again: norms, MLA up-projections "
                  "and SwiGLU (paper), each whole block, or nothing.")  # fmt: skip
flags.DEFINE_enum("weights_dtype", "bfloat16", ["bfloat16", "fp8", "float32"], "Of the working weights.")
flags.DEFINE_enum("products_dtype", "fp8", ["fp8", "bfloat16"], "Of the blocks' linear layers and their kept inputs.")
flags.DEFINE_enum("dispatch_dtype", "fp8", ["fp8", "bfloat16"], "Of tokens on their way to experts.")
flags.DEFINE_enum("combine_dtype", "bfloat16", ["fp8", "bfloat16"], "Of experts' outputs on their way back.")
flags.DEFINE_enum("moments_dtype", "bfloat16", ["bfloat16", "float32"], "Of AdamW's moments.")
flags.DEFINE_bool("zero", True, "Shard master weights and moments over replicas (ZeRO-1).")
flags.DEFINE_bool("mtp", True, "Train the MTP modules along.")
flags.DEFINE_enum("routing", "limit", ["limit", "uniform"], "Nodes and devices of a token: the most allowed, or a mean.")
flags.DEFINE_float("imbalance", 1.1, "Load of the busiest expert device over the mean.", 1.0)
flags.DEFINE_enum("hardware", "h800", list(HARDWARE), "Device.")
flags.DEFINE_multi_string("set", [], "Field of the hardware to change, field=value; repeat for several.")
flags.DEFINE_integer("devices", None, "Size of the mesh: for --search (default 2048), else to check --mesh.", 1)
flags.DEFINE_bool("search", False, "Try every mesh of --devices with micro-batches of 1, 2 and 4.")
flags.DEFINE_integer("top", 12, "Plans that --search lists.", 1)
flags.DEFINE_bool("trace", False, "Instead of times: trace the training step from shapes, and compare it with the formulas.")
flags.DEFINE_integer("serve", None, "Instead of training: serve so many sequences of --length on the mesh's expert axis.", 1)


def main(argv: list[str]) -> int:
    """Prints the plan; returns the exit code: 0 if it fits (or is as traced), 1 if not, 2 for bad input."""
    try:
        cfg, plan, hardware = read_flags(argv)
        specs = dsv3.model_specs(cfg)
        if FLAGS.trace:
            return trace(cfg, specs, plan, hardware)
        if FLAGS.search:
            return search(cfg, specs, plan, hardware)
        if FLAGS.serve is not None:
            print(report.serving_report(cfg, specs, plan, hardware, FLAGS.serve))
            return 0
        return show(cfg, specs, plan, hardware)
    except (ValueError, OSError) as error:
        print(f"plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def read_flags(argv: Sequence[str]) -> tuple[ModelConfig, Plan, Hardware]:
    """Reads and checks everything that is asked for."""
    check(len(argv) == 1, f"{len(argv) - 1} arguments, want flags only (--help shows examples)")
    check(not (FLAGS.search and FLAGS.serve), "--search and --serve exclude each other")
    check(not (FLAGS.trace and (FLAGS.search or FLAGS.serve)), "--trace excludes --search and --serve")
    check(FLAGS.schedule != "any" or FLAGS.search, "--schedule=any wants --search")
    check(not FLAGS.search or FLAGS.mesh is None, "--search wants no --mesh: it tries all meshes of --devices")
    check(not FLAGS.search or FLAGS.stages is None, "--search wants no --stages: it cuts the layers itself")
    cfg = ModelConfig.from_hf(FLAGS.config) if FLAGS.config else dsv3.preset(FLAGS.preset)
    names = (
        "batch", "length", "micro_batch", "recompute", "weights_dtype", "products_dtype", "dispatch_dtype", "combine_dtype",
        "moments_dtype", "zero", "mtp", "routing", "imbalance",
    )  # fmt: skip
    mesh = parse_mesh(PAPER if FLAGS.mesh is None else FLAGS.mesh)
    schedule = FLAGS.schedule if FLAGS.schedule not in (None, "any") else "one_f_one_b" if FLAGS.serve else "dualpipe"
    plan = Plan(**mesh, schedule=schedule, stages=read_stages(), **{name: FLAGS[name].value for name in names})
    if not FLAGS.search and FLAGS.devices is not None:
        check(plan.devices == FLAGS.devices, f"--mesh has {plan.devices} devices, want --devices={FLAGS.devices}")
    if not FLAGS.search and FLAGS.serve is None:
        check_plan(cfg, plan)
    return cfg, plan, hardware_change(hardware_preset(FLAGS.hardware), read_changes())


def read_stages() -> tuple[int, ...]:
    """Returns --stages as numbers."""
    items = FLAGS.stages.split(",") if FLAGS.stages else []
    check(all(item.strip().isdecimal() for item in items), f"--stages={FLAGS.stages}, want numbers such as 5,4,4,3")
    return tuple(int(item) for item in items)


def read_changes() -> dict[str, float]:
    """Returns the fields of --set."""
    changes = {}
    for item in FLAGS["set"].value:
        field, equals, value = item.partition("=")
        try:
            changes[field] = float(value)
        except ValueError:
            equals = ""
        check(equals == "=", f"--set={item}, want field=number, such as fp8_fraction=0.5")
    return changes


def title(plan: Plan, hardware: Hardware) -> str:
    """Returns the first line: model, devices, mesh, stages."""
    model = FLAGS.config or FLAGS.preset
    return f"{model} on {plan.devices} {hardware.name.upper()}: {report.describe(plan)}, layers {list(plan.stages)}"


def show(cfg: ModelConfig, specs, plan: Plan, hardware: Hardware) -> int:
    """Prints everything about one plan."""
    plan = choose_stages(cfg, specs, plan, hardware)
    found = predict_step(cfg, specs, plan, hardware)
    blocks = [
        title(plan, hardware),
        report.params_report(cfg, specs),
        report.flops_report(cfg, specs, plan),
        report.memory_report(cfg, plan, found.memory, hardware),
        report.traffic_report(cfg, specs, plan),
        report.time_report(plan, found, hardware, FLAGS.tokens),
        report.hours_report(cfg, specs, plan, hardware, found, FLAGS.tokens),
    ]
    print("\n\n".join(blocks))
    return 0 if found.fits else 1


def trace(cfg: ModelConfig, specs, plan: Plan, hardware: Hardware) -> int:
    """Prints the traced step beside the formulas."""
    plan = choose_stages(cfg, specs, plan, hardware)
    traced = trace_step(cfg, specs, plan)
    print(title(plan, hardware) + "\n\n" + report.trace_report(cfg, specs, plan, traced))
    return 0 if report.trace_agrees(cfg, specs, plan, traced) else 1


def search(cfg: ModelConfig, specs, plan: Plan, hardware: Hardware) -> int:
    """Prints what a search finds."""
    schedules = SCHEDULES if FLAGS.schedule in (None, "any") else (FLAGS.schedule,)
    devices = FLAGS.devices or 2048
    found = search_plans(cfg, specs, plan, hardware, devices=devices, schedules=schedules)
    print(report.search_report(found, hardware, FLAGS.tokens, top=FLAGS.top))
    return 0 if found.fitting else 1


parse_flags = flag_parser("plan")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
