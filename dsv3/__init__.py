"""dsv3: DeepSeek-V3 as pure functions in TensorFlow.

The names below are the contract; everything else is reached through the packages (`dsv3.ops`, `dsv3.nn`, `dsv3.train`, ...).
"""

from dsv3.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig, RouterConfig, YarnConfig
from dsv3.layout import make_layouts, zero_layouts
from dsv3.nn.cache import Cache, cache_append, cache_init, cache_specs
from dsv3.nn.mla import mla_apply, mla_specs
from dsv3.nn.model import (
    ModelOutput,
    ModelParams,
    RouterState,
    active_params,
    model_apply,
    model_init,
    model_specs,
    mtp_chain,
    output_specs,
    router_init,
)
from dsv3.nn.moe import moe_apply, moe_specs
from dsv3.nn.quantized import dequantize_params, quantize_params
from dsv3.ops.fp8 import Fp8Tensor, fp8_dequantize, fp8_quantize
from dsv3.ops.quantized import QuantizedWeight
from dsv3.ops.router import router_update_bias
from dsv3.parallel.mesh import make_mesh, start_devices
from dsv3.policy import ComputePolicy, default_policy
from dsv3.presets import PRESETS, preset
from dsv3.pretrained import load_pretrained, save_pretrained
from dsv3.spec import ParamSpec, count_params, init_params
from dsv3.train.loss import pretrain_loss
from dsv3.train.optim import adamw
from dsv3.train.state import TrainState
from dsv3.train.step import gather_state, make_train_step, place_state, train_init, train_state, train_update

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Cache",
    "ComputePolicy",
    "Fp8Tensor",
    "MLAConfig",
    "MoEConfig",
    "ModelConfig",
    "ModelOutput",
    "ModelParams",
    "ParamSpec",
    "QuantizedWeight",
    "RopeConfig",
    "RouterConfig",
    "RouterState",
    "TrainState",
    "YarnConfig",
    "active_params",
    "adamw",
    "cache_append",
    "cache_init",
    "cache_specs",
    "count_params",
    "default_policy",
    "dequantize_params",
    "fp8_dequantize",
    "fp8_quantize",
    "gather_state",
    "init_params",
    "load_pretrained",
    "make_layouts",
    "make_mesh",
    "make_train_step",
    "mla_apply",
    "mla_specs",
    "model_apply",
    "model_init",
    "model_specs",
    "moe_apply",
    "moe_specs",
    "mtp_chain",
    "output_specs",
    "place_state",
    "preset",
    "pretrain_loss",
    "quantize_params",
    "router_init",
    "router_update_bias",
    "save_pretrained",
    "start_devices",
    "train_init",
    "train_state",
    "train_update",
    "zero_layouts",
]
