"""The planner: parameters, FLOPs, memory, traffic and time of a training plan, by formula and without a device.

Everything takes a `ModelConfig` and the specs of `dsv3.model_specs`, a `Plan` (mesh, schedule, batch, number formats) and,
for times, a `Hardware`. `examples/plan.py` is the program, `docs/plan.md` compares with the published run.
`trace_step` traces the step itself from shapes, to hold the formulas against it.

The data half takes a `DataPlan` and measured rates (`read_rates`): `examples/data_plan.py` and `docs/data_plan.md`.
"""

from dsv3.plan.count import Flops, flops_by_part, params_active, params_by_part, router_biases, unit_flops
from dsv3.plan.data import (
    DataPlan,
    Reading,
    Saving,
    StageRate,
    Storage,
    Work,
    data_reading,
    data_saving,
    data_storage,
    data_work,
    prepare_hosts,
)
from dsv3.plan.data_rates import Measured, change_kept, read_rates, stage_share
from dsv3.plan.explain import PUBLISHED, hours_ladder, implied_scale, is_published, step_parts
from dsv3.plan.graph_flops import graph_flops
from dsv3.plan.hardware import HARDWARE, Hardware, hardware_change, hardware_preset
from dsv3.plan.memory import Memory, Serving, cache_bytes, plan_memory, rank_memory, serving_memory
from dsv3.plan.mesh import Plan, check_plan, parse_mesh, plan_problem, stage_choices
from dsv3.plan.predict import Prediction, choose_stages, predict_step
from dsv3.plan.schedule import SCHEDULES, bubble_time, rank_stages
from dsv3.plan.search import Found, search_plans
from dsv3.plan.trace import PieceTrace, Products, StageTrace, StepTrace, trace_policy, trace_step
from dsv3.plan.trace_check import (
    Difference,
    formula_products,
    kept_bytes,
    rank_checks,
    step_differences,
    traced_params,
    unexplained,
)
from dsv3.plan.traffic import Links, parts_reached, step_traffic, token_copies

__all__ = [
    "HARDWARE",
    "PUBLISHED",
    "SCHEDULES",
    "DataPlan",
    "Difference",
    "Flops",
    "Found",
    "Hardware",
    "Links",
    "Measured",
    "Memory",
    "PieceTrace",
    "Plan",
    "Prediction",
    "Products",
    "Reading",
    "Saving",
    "Serving",
    "StageRate",
    "StageTrace",
    "StepTrace",
    "Storage",
    "Work",
    "bubble_time",
    "cache_bytes",
    "change_kept",
    "check_plan",
    "choose_stages",
    "data_reading",
    "data_saving",
    "data_storage",
    "data_work",
    "flops_by_part",
    "formula_products",
    "graph_flops",
    "hardware_change",
    "hardware_preset",
    "hours_ladder",
    "implied_scale",
    "is_published",
    "kept_bytes",
    "params_active",
    "params_by_part",
    "parse_mesh",
    "parts_reached",
    "plan_memory",
    "plan_problem",
    "predict_step",
    "prepare_hosts",
    "rank_checks",
    "rank_memory",
    "rank_stages",
    "read_rates",
    "router_biases",
    "search_plans",
    "serving_memory",
    "stage_choices",
    "stage_share",
    "step_differences",
    "step_parts",
    "step_traffic",
    "token_copies",
    "trace_policy",
    "trace_step",
    "traced_params",
    "unexplained",
    "unit_flops",
]
