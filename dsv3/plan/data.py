"""The data half of a plan: storage, shards, hosts, the cost of preparing text, read and write bandwidth.

Everything here is arithmetic on a `DataPlan` and on rates that somebody measured. Each field of the plan says where its
number comes from; what the functions return is computed. The rates are read by `data_rates.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from dsv3.checks import check, check_choice
from dsv3.plan.explain import PUBLISHED

ORIGINS = ("published", "measured", "assumed", "chosen", "computed")
SMALL_VOCAB = 2**16  # ids below it are stored in two bytes, others in four
INDEX_BYTES = 24  # of a document: where it starts, its bytes, its hash
SIGNATURE_BYTES = 4  # of a number of a MinHash signature


def _field(default: float, origin: str, what: str) -> float:
    return dataclasses.field(default=default, metadata={"origin": origin, "what": what})


@dataclasses.dataclass(frozen=True)
class DataPlan:
    """What the data of a training is, and what it is prepared and read with. Where a default comes from is in its metadata.

    Published: DeepSeek-V3 (arXiv:2412.19437) table 1 and sections 3.1 and 4.2. `failure_hours`: 419 unexpected interruptions
    in 54 days on 16,384 devices (arXiv:2407.21783 section 3.3.4), for 2,048.
    """

    tokens: float = _field(PUBLISHED.tokens, "published", "tokens of the training")
    length: int = _field(PUBLISHED.length, "published", "tokens of a sequence")
    hours: float = _field(PUBLISHED.hours, "published", "device hours of the training")
    devices: int = _field(PUBLISHED.devices, "published", "devices")
    host_devices: int = _field(8, "published", "devices of a host")
    vocab_size: int = _field(129_280, "published", "ids of the tokenizer")
    bytes_per_token: float = _field(4.0, "assumed", "bytes of text (UTF-8) of a token")
    document_tokens: float = _field(1000.0, "assumed", "tokens of a document")
    kept: float = _field(0.5, "assumed", "bytes that stay, of those that are read")
    packed: float = _field(0.35, "assumed", "bytes of compressed text, of its own")
    repeats: float = _field(1.0, "assumed", "epochs, the mean over all text")
    shard_bytes: float = _field(2.0**30, "chosen", "bytes of text of a shard")
    window_tokens: float = _field(2.0**20, "chosen", "tokens of a window, which is shuffled as a whole")
    permutations: int = _field(128, "chosen", "numbers of a MinHash signature")
    prepare_days: float = _field(14.0, "chosen", "days for preparing")
    prepare_cores: int = _field(64, "chosen", "cores of a host that prepares")
    save_minutes: float = _field(30.0, "chosen", "minutes between checkpoints")
    keep: int = _field(3, "chosen", "checkpoints that stay")
    write_bandwidth: float = _field(1e9, "assumed", "bytes/s that a host writes")
    failure_hours: float = _field(54 * 24 / 419 * 8, "published", "hours between failures of the whole")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check(math.isfinite(value) and value > 0, f"DataPlan: `{field.name}` is {value}, want above 0")
            whole = field.type != "int" or value == int(value)
            check(whole, f"DataPlan: `{field.name}` is {value}, want a whole number")
        check(self.kept <= 1, f"DataPlan: `kept` is {self.kept}, want at most 1")
        check(
            self.devices % self.host_devices == 0,
            f"DataPlan: {self.devices} devices are not divisible by host_devices={self.host_devices}",
        )

    @property
    def hosts(self) -> int:
        """Hosts that train."""
        return self.devices // self.host_devices

    @property
    def seconds(self) -> float:
        """Wall time of the training."""
        return self.hours * 3600 / self.devices

    @property
    def token_bytes(self) -> int:
        """Bytes of a stored token."""
        return 2 if self.vocab_size <= SMALL_VOCAB else 4

    @property
    def prepared_tokens(self) -> float:
        """Different tokens, each of which is read `repeats` times."""
        return self.tokens / self.repeats

    @property
    def prepared_bytes(self) -> float:
        """Bytes of the text that stays."""
        return self.prepared_tokens * self.bytes_per_token

    @property
    def documents(self) -> float:
        """Documents that stay."""
        return self.prepared_tokens / self.document_tokens

    def replace(self, **fields: float) -> DataPlan:
        """Returns a copy with fields changed; whole numbers may come as floats."""
        known = {f.name: f.type for f in dataclasses.fields(self)}
        for name in fields:
            check_choice("DataPlan.replace", "fields", name, tuple(known))
        whole = {n: int(v) if known[n] == "int" and math.isfinite(v) and v == int(v) else v for n, v in fields.items()}
        return dataclasses.replace(self, **whole)


class StageRate(NamedTuple):
    """How fast a core does a stage of the preparation.

    Attributes:
      bytes_per_second: of text that comes into the stage.
      share: bytes that come into it, for each byte of text that stays in the end.
    """

    bytes_per_second: float
    share: float


class Work(NamedTuple):
    """A stage of the preparation of everything: bytes that come into it, and core hours."""

    stage: str
    bytes: float
    core_hours: float


class Storage(NamedTuple):
    """Bytes, and how many files or items they are.

    Attributes:
      raw: text as it comes, compressed. text: what stays of it, not compressed. signatures: of all documents that come,
        while duplicates are looked for. tokens: the shards' tokens. index: documents' starts, bytes and hashes.
      shards, windows, documents: how many there are.
    """

    raw: float
    text: float
    signatures: float
    tokens: float
    index: float
    shards: int
    windows: int
    documents: float


class Reading(NamedTuple):
    """What the training reads while it runs.

    Attributes:
      tokens_per_second: of all hosts. bytes_per_second: stored tokens that they use, which is also the most that one host
        reads. host_bytes: bytes/s that one host uses.
      rows, windows: sequences and windows of all hosts that begin in a second.
    """

    tokens_per_second: float
    bytes_per_second: float
    host_bytes: float
    rows: float
    windows: float


class Saving(NamedTuple):
    """What checkpoints cost.

    Attributes:
      bytes: of one: float32 parameters and two moments. host_bytes: a host's part of it.
      seconds: to write one, all hosts at a time. bandwidth: bytes/s of all hosts together that one interval allows at least.
      blocked: share of the time that the training would wait, did it wait for each write.
      lost: share of the time that is done again after failures, half an interval each.
      best_minutes: the interval at which both together are least, √(2·write·failure), if the training waits.
    """

    bytes: float
    host_bytes: float
    seconds: float
    bandwidth: float
    blocked: float
    lost: float
    best_minutes: float


def data_storage(plan: DataPlan) -> Storage:
    """Returns what is stored for a training by `plan`.

    A document has 8 bytes each for its start, its number of bytes and its hash; a signature has 4 for each permutation. So
    many documents come as would at the length of those that stay.
    """
    read = plan.prepared_bytes / plan.kept
    return Storage(
        raw=read * plan.packed,
        text=plan.prepared_bytes,
        signatures=plan.documents / plan.kept * plan.permutations * SIGNATURE_BYTES,
        tokens=plan.prepared_tokens * plan.token_bytes,
        index=plan.documents * INDEX_BYTES,
        shards=math.ceil(plan.prepared_bytes / plan.shard_bytes),
        windows=math.ceil(plan.prepared_tokens / plan.window_tokens),
        documents=plan.documents,
    )


def data_work(plan: DataPlan, rates: Mapping[str, StageRate]) -> list[Work]:
    """Returns the core hours of preparing all text: for each stage `bytes / rate`.

    Args:
      plan: the plan.
      rates: by stage, of one core.

    Returns:
      A list of `Work`, in the order of `rates`. Each stage is taken to cost the same for a byte of any text.
    """
    found = []
    for stage, rate in rates.items():
        fine = all(math.isfinite(value) and value > 0 for value in rate)
        check(fine, f"data_work: `rates` has {tuple(rate)} for {stage!r}, want a rate and a share above 0")
        size = plan.prepared_bytes * rate.share
        found.append(Work(stage, size, size / rate.bytes_per_second / 3600))
    return found


def prepare_hosts(plan: DataPlan, core_hours: float) -> int:
    """Returns how many hosts do `core_hours` within the days of `plan`."""
    return math.ceil(core_hours / (plan.prepare_cores * plan.prepare_days * 24))


def data_reading(plan: DataPlan) -> Reading:
    """Returns what the hosts of `plan` read at the speed of the whole training.

    Sequences overlap by one token, so that a sequence of T has T + 1. A host uses its own sequences and no others, but it
    reads whole windows, whose other sequences are other hosts': between its share and, where every window has a sequence
    for it, all that the hosts use together.
    """
    speed = plan.tokens / plan.seconds
    size = speed * plan.token_bytes * (plan.length + 1) / plan.length
    return Reading(speed, size, size / plan.hosts, speed / plan.length, speed / plan.window_tokens)


def data_saving(plan: DataPlan, params: int, *, moment_bytes: int = 2) -> Saving:
    """Returns what checkpoints of a model cost.

    Args:
      plan: the plan.
      params: scalars of the model, MTP modules included.
      moment_bytes: of each of AdamW's two moments, in the paper bfloat16.

    Returns:
      `Saving`. Working weights are made from the float32 ones and are not stored.

    References: Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974.
    """
    size = float(params) * (4 + 2 * moment_bytes)
    write, interval = size / plan.hosts / plan.write_bandwidth, plan.save_minutes * 60
    failure = plan.failure_hours * 3600
    best = math.sqrt(2 * write * failure) / 60
    return Saving(size, size / plan.hosts, write, size / interval, write / interval, interval / 2 / failure, best)
