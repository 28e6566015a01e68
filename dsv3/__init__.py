"""dsv3: DeepSeek-V3 as pure functions in TensorFlow.

The names below are the contract; everything else is reached through the packages (`dsv3.ops`, `dsv3.nn`, `dsv3.train`, ...).
A name or a package is loaded when it is first asked for: what needs no TensorFlow, as `dsv3.data`, does not load it.
"""

from __future__ import annotations

import importlib
from typing import Any

# Module → what it gives to the contract.
_NAMES = {
    "config": "MLAConfig ModelConfig MoEConfig RopeConfig RouterConfig YarnConfig",
    "layout": "make_layouts zero_layouts",
    "nn.cache": "Cache cache_append cache_init cache_specs",
    "nn.mla": "mla_apply mla_specs",
    "nn.model": (
        "ModelOutput ModelParams RouterState active_params model_apply model_init model_specs mtp_chain output_specs "
        "router_init"
    ),
    "nn.moe": "moe_apply moe_specs",
    "nn.quantized": "dequantize_params quantize_params",
    "ops.fp8": "Fp8Tensor fp8_dequantize fp8_quantize",
    "ops.quantized": "QuantizedWeight",
    "ops.router": "router_update_bias",
    "parallel.mesh": "make_mesh start_devices",
    "policy": "ComputePolicy default_policy",
    "presets": "PRESETS preset",
    "pretrained": "load_pretrained save_pretrained",
    "rl.advantage": "group_advantages",
    "rl.grpo": "grpo_loss",
    "rl.step": "make_grpo_step",
    "spec": "ParamSpec count_params init_params",
    "train.distill": "make_distill_step",
    "train.loss": "pretrain_loss",
    "train.optim": "adamw",
    "train.state": "TrainState",
    "train.step": "gather_state make_train_step place_state train_init train_state train_update",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__version__ = "0.1.0"
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Loads a public name, or a module or package of dsv3, when it is first asked for."""
    if name in _HOMES:
        globals()[name] = value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value
    module = f"{__name__}.{name}"
    if not name.startswith("_"):
        try:
            package = importlib.import_module(module)
            for home in _NAMES:  # with the modules that have public names, as `dsv3.nn.mla`
                if home.startswith(f"{name}."):
                    importlib.import_module(f"{__name__}.{home}")
            return package
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The contract's names beside what is loaded."""
    return sorted({*globals(), *__all__})
