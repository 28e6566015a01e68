"""Devices as numbers: what the vendor states, and, apart from it, which part of that is assumed to be reached."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from dsv3.checks import check, check_choice


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device, its links, and how much of each is reached.

    Stated by the vendor or by DeepSeek:

    Attributes:
      name: of the preset.
      memory: bytes that the driver reports.
      bf16_flops, fp8_flops: peak FLOP/s of dense products.
      hbm_bandwidth: bytes/s of the device's memory.
      nvlink_bandwidth: bytes/s in one direction between devices of a node. ib_bandwidth: one direction of the device's own
        InfiniBand card.
      sms: multiprocessors.

    Measured by somebody, or assumed; the comments in this module say which:

      memory_fraction: part of the memory that tensors may use.
      fp8_fraction, bf16_fraction: part of the peak that products reach. attention_fraction: that attention reaches, of the
        bf16 peak.
      hbm_fraction, nvlink_fraction, ib_fraction: part of each bandwidth.
      comm_sms: multiprocessors that move data while a schedule overlaps all-to-all with computation.
    """

    name: str
    memory: float
    bf16_flops: float
    fp8_flops: float
    hbm_bandwidth: float
    nvlink_bandwidth: float
    ib_bandwidth: float
    sms: int
    memory_fraction: float = 0.95
    fp8_fraction: float = 0.60
    bf16_fraction: float = 0.65
    attention_fraction: float = 0.45
    hbm_fraction: float = 0.80
    nvlink_fraction: float = 0.80
    ib_fraction: float = 0.80
    comm_sms: int = 20

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_fraction"):
                check(0 < value <= 1, f"Hardware: `{field.name}` is {value}, want more than 0 and at most 1")
            elif field.name not in ("name", "comm_sms"):
                check(value > 0, f"Hardware: `{field.name}` is {value}, want > 0")
        check(0 <= self.comm_sms < self.sms, f"Hardware: `comm_sms` is {self.comm_sms}, want 0 to {self.sms - 1}")

    @property
    def usable_memory(self) -> float:
        """Bytes that a plan may use."""
        return self.memory * self.memory_fraction

    @property
    def compute_share(self) -> float:
        """Part of the device that computes while all-to-all runs beside."""
        return 1 - self.comm_sms / self.sms

    def perfect(self) -> Hardware:
        """Returns the device with every fraction 1, endless bandwidths and no multiprocessor lent: only peaks are left."""
        endless = {name: math.inf for name in ("hbm_bandwidth", "nvlink_bandwidth", "ib_bandwidth")}
        fractions = {f.name: 1.0 for f in dataclasses.fields(self) if f.name.endswith("_fraction")}
        return dataclasses.replace(self, **endless, **fractions, comm_sms=0)


# Peaks: NVIDIA's H100 SXM data sheet states 1,979 (BF16) and 3,958 TFLOP/s (FP8) with sparsity, dense products get half;
# 3.35 TB/s, NVLink 900 GB/s in both directions together, 132 multiprocessors. H200: 4.8 TB/s, else the same.
# H800 SXM: as H100, but NVLink has 400 GB/s in both directions together (arXiv:2505.09343, section 4.2).
# Memory: `nvidia-smi` shows 81,559 MiB for the cards of "80 GB" and 143,771 MiB for the H200's "141 GB"; the former is
# 85.5e9. InfiniBand: one ConnectX-7 of 400 Gbit/s for each device (same paper).
#
# Fractions:
#   fp8_fraction        measured. DeepGEMM's first release gives 590 to 1,358 TFLOP/s on an H800 for this model's six forward
#                       products with 4,096 tokens, grouped ones with 8,192 rows an expert; weighted by their share of the
#                       time that is 1,188, which is 0.60 of 1,979 (`README.md` of github.com/deepseek-ai/DeepGEMM at
#                       a6d97a1). What training reached, and what backward products reach, is not published.
#   bf16_fraction       assumption: about 640 TFLOP/s.
#   attention_fraction  assumption: about 445 TFLOP/s for causal attention of 4,096 tokens, forward and backward together.
#                       FlashAttention-3 (arXiv:2407.08608) states up to 740 forward, for long sequences without a mask.
#   hbm_fraction        assumption. DeepGEMM's memory-bound products reach 2.1 to 2.7 of 3.35 TB/s.
#   nvlink_fraction     measured by DeepSeek: about 160 of an H800's 200 GB/s (DeepSeek-V3 section 3.2.2); DeepEP states 153
#                       to 158 (`docs/legacy.md` of github.com/deepseek-ai/DeepEP).
#   ib_fraction         measured by DeepSeek: more than 40 GB/s of 50 (arXiv:2505.09343 section 5.1). DeepEP states 50 and 51
#                       for 64 devices, but counts what stays in the node, too.
#   comm_sms            DeepSeek-V3 section 3.2.2: 20 of 132.
#   memory_fraction     assumption, for the context, communication libraries and fragmentation.
_HOPPER = {
    "bf16_flops": 989.4e12, "fp8_flops": 1978.9e12, "hbm_bandwidth": 3.35e12, "ib_bandwidth": 50e9, "sms": 132,
}  # fmt: skip

_PRESETS = {
    "h800": Hardware("h800", memory=81_559 * 2**20, nvlink_bandwidth=200e9, **_HOPPER),
    "h100": Hardware("h100", memory=81_559 * 2**20, nvlink_bandwidth=450e9, **_HOPPER),
    "h200": Hardware("h200", memory=143_771 * 2**20, nvlink_bandwidth=450e9, **_HOPPER | {"hbm_bandwidth": 4.8e12}),
}
HARDWARE = tuple(_PRESETS)


def hardware_preset(name: str) -> Hardware:
    """Returns a device by name: one of `HARDWARE`.

    >>> hardware_preset("h800").nvlink_bandwidth / hardware_preset("h800").ib_bandwidth
    4.0
    """
    check_choice("hardware_preset", "name", name, HARDWARE)
    return _PRESETS[name]


def hardware_change(hardware: Hardware, changes: Mapping[str, float]) -> Hardware:
    """Returns `hardware` with numbers changed, for what-if questions.

    Args:
      hardware: the device.
      changes: field to value. `"flops_fraction"` sets the three fractions of computation at once.

    Returns:
      `Hardware`.

    Raises:
      ValueError: a field that there is not, or a value out of its range.
    """
    known = {f.name: f.type for f in dataclasses.fields(hardware) if f.name != "name"}
    fields: dict[str, float] = {}
    for name, value in changes.items():
        check_choice("hardware_change", "changes", name, (*known, "flops_fraction"))
        many = ("fp8_fraction", "bf16_fraction", "attention_fraction") if name == "flops_fraction" else (name,)
        for each in many:
            check(known[each] != "int" or value == int(value), f"hardware_change: `{each}` is {value}, want a whole number")
            fields[each] = int(value) if known[each] == "int" else float(value)
    return dataclasses.replace(hardware, **fields)
