"""What `pretrain.py` does before it trains: checks the flags, claims the folder, makes tokenizer and rows of tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf
from absl import flags
from command import aligned, check_fresh, lock_folder, say, silence, write_text
from command_mesh import check_axes
from pretrain_data import Data, check_data_flags, corpus_tokenizer, encode_text, given_tokenizer, read_prepared, read_text
from pretrain_plan import check_micro_batches, check_plan_flags, drawn, make_schedule, stage_table, warmup_steps
from tensorflow.experimental import dtensor
from tokenizers import Tokenizer

import dsv3
from dsv3 import tree
from dsv3.checks import check
from dsv3.data import (
    MixtureUse,
    check_tokenizer,
    load_chat_template,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    tokenizer_fingerprint,
)
from dsv3.data.mixture import GROUP_TOKENS
from dsv3.data.passkey import passkey_form
from dsv3.parallel.clients import Clients, read_clients, start_clients
from dsv3.parallel.collectives import gather_mesh
from dsv3.parallel.mesh import make_mesh, parse_axes, whole
from dsv3.pretrained import pretrained_config
from dsv3.recipe import RECIPES
from dsv3.train.checkpoint import check_settings, checkpoint_step, list_checkpoints
from dsv3.train.schedule import TrainSchedule
from dsv3.typing import Tree

FLAGS = flags.FLAGS
RUN_FILE = "run.json"
# Flags that decide the numbers of a run; the others may change from one part of it to the next.
DECIDING = (
    "seed plan steps tokens batch_size accumulate seq_len context_steps lr warmup_steps weight_decay clip mtp_weight "
    "balance_weight bias_rate heldout dtype fp8 ema_decay patience"
).split()
# These do, too; one that has the value here is no setting, as in runs that were made before it was there.
LATER = {
    "passkey": 0.0, "passkey_keys": "digits", "passkey_weight": 1.0, "yarn_factor": 40.0, "context_lr": None, "init": None,
    "moment_dtype": None,
}  # fmt: skip
PARTS = (
    *"checkpoints tensorboard tokenizer plots export export_ema passkey".split(),
    *"log.jsonl trouble.jsonl results.json before.json samples.txt report.html".split(),
    RUN_FILE,
)

class Setup(NamedTuple):
    """Everything that the training needs.

    Attributes:
      cfg: the model's configuration. out: the run's folder. settings: what must be the same to go on with the run.
      data: what is trained on and what is held out. schedule: what changes as tokens are seen, and the stages.
      clients: who this process is among those of the run. mesh: their devices, `None`: one device.
      product_flops: the fastest product of all processes, FLOP/s, the yardstick of model FLOPs utilisation.
    """

    cfg: dsv3.ModelConfig
    out: Path
    settings: dict[str, Any]
    data: Data
    schedule: TrainSchedule
    clients: Clients
    mesh: dtensor.Mesh | None
    product_flops: float = math.nan

    @property
    def leads(self) -> bool:
        """Whether this process writes log, plots and export; of several the first does."""
        return self.clients.index == 0


def prepare(argv: Sequence[str], look: Callable[[Setup], None] | None = None) -> Setup:
    """Checks everything that can be wrong, cheapest first, and prepares the data; `look` checks more before files appear.

    Of several processes the first makes the folder, the tokenizer and the settings; the others wait for them.

    Raises:
      ValueError, OSError: bad input; the message is one line.
    """
    check(len(argv) == 1, f"unexpected argument {argv[1:2]}, want flags only (--help shows them)")
    cfg = read_config()
    check_flags(cfg)
    if FLAGS.data is None and given_tokenizer() is not None:
        check_tokenizer(load_tokenizer(given_tokenizer()), cfg.vocab_size)
    out = Path(FLAGS.out)
    schedule = make_schedule(begun_settings(out))
    settings = {**{name: FLAGS[name].value for name in DECIDING}, "config": cfg.to_hf(), "dtype": compute_dtype()}
    settings["warmup_steps"] = FLAGS.warmup_steps if FLAGS.plan == "paper" else warmup_steps()
    settings |= {name: FLAGS[name].value for name, none in LATER.items() if FLAGS[name].value != none}
    if not FLAGS.passkey:
        settings.pop("passkey_weight", None)
    if FLAGS.init is not None:
        settings["init"] = checkpoint_digest(FLAGS.init)
    settings["batch_multiple"] = list(schedule.multiples)
    check_micro_batches(schedule)
    clients, mesh = start_mesh(settings)
    leads = clients.index == 0
    if not leads:
        silence()
        meet(mesh)
    inputs = {name: FLAGS[name].value for name in ("init", "data", "corpus", "tokenizer", "config")}
    saved = claim_folder(out, settings, inputs) if leads else None
    data = read_data(out, cfg, settings, saved, leads)
    if FLAGS.passkey:
        least = passkey_form(data.tokenizer, FLAGS.passkey_keys).least
        shortest = min(stage.seq_len for stage in schedule.stages)
        check(shortest >= least, f"--passkey wants sequences of at least {least} tokens, got {shortest}")
    ids = special_ids(data.tokenizer)
    cfg = cfg.replace(bos_id=ids.bos, eos_ids=(ids.eos,), pad_id=ids.pad)
    tokens, longest = sum(data.mixture.tokens), max(stage.seq_len for stage in schedule.stages)
    want = f"want at least {longest + 1} for one sequence of length {longest}"
    check(tokens > longest, f"the corpus has {tokens} tokens, {want}")
    use = drawn(schedule, data.mixture)
    setup = Setup(cfg, out, settings, data, schedule, clients, mesh)
    if look is not None:
        look(setup)
    if leads:
        write_setup(out, saved, settings, data.tokenizer)
        meet(mesh)
    describe(cfg, data, schedule, use)
    return setup


def read_data(
    out: Path, cfg: dsv3.ModelConfig, settings: dict[str, Any], saved: Mapping[str, Any] | None, leads: bool
) -> Data:
    """Reads the data and adds to the settings what names it; a run that was made with other data is refused at once."""
    if FLAGS.data is not None:
        data = read_prepared(cfg.vocab_size)
        settings |= {"corpus": data.digest, "mixture": dataclasses.asdict(data.mixture)}
        agree(saved, settings, out)
    else:
        train, heldout, settings["corpus"] = read_text()
        settings["group_tokens"] = GROUP_TOKENS  # within which rows are shuffled
        agree(saved, settings, out)
        kept = not FLAGS.fresh or not leads  # the first process has deleted an old one
        tokenizer, what = corpus_tokenizer(out / "tokenizer", train, cfg.vocab_size, kept=kept)
        say(what)
        data = encode_text(train, heldout, tokenizer, cfg.vocab_size, settings["corpus"])
    settings["tokenizer"] = tokenizer_fingerprint(data.tokenizer)
    agree(saved, settings, out)
    return data


def write_setup(out: Path, saved: Mapping[str, Any] | None, settings: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Writes settings and tokenizer, now that all that can be wrong with the command has been looked at."""
    if FLAGS.fresh:
        delete_run(out)
    if saved is None:
        write_run(out, settings)
    if not (out / "tokenizer").exists():
        given = None if FLAGS.tokenizer is None else load_chat_template(FLAGS.tokenizer)
        save_tokenizer(tokenizer, out / "tokenizer", chat_template=given and given.source)


def start_mesh(settings: Mapping[str, Any]) -> tuple[Clients, dtensor.Mesh | None]:
    """Starts the devices of --mesh, those of other processes included; nothing has been computed yet."""
    if FLAGS.mesh is None:
        return Clients(), None
    found = read_clients()
    devices = math.prod(parse_axes(FLAGS.mesh).values()) // (len(found.jobs) if found else 1)
    common = {"arguments": sys.argv[1:], "settings": hashlib.blake2b(json.dumps(settings).encode()).hexdigest()[:16]}
    return start_clients(devices, common=common), make_mesh(FLAGS.mesh)


def meet(mesh: dtensor.Mesh | None) -> None:
    """Waits until every process has come here."""
    agreed(0, mesh)


def agreed(number: int, mesh: dtensor.Mesh | None) -> int:
    """The largest of the processes' numbers."""
    if mesh is None or dtensor.num_clients() == 1:
        return number
    return int(gather_mesh([tf.constant(number)] * len(mesh.local_devices()), mesh).max())


def summed(number: float, mesh: dtensor.Mesh | None) -> float:
    """The sum of the processes' numbers."""
    if mesh is None or dtensor.num_clients() == 1:
        return number
    devices = len(mesh.local_devices())
    return float(gather_mesh([tf.constant(number / devices, tf.float64)] * devices, mesh).sum())


def on_host(setup: Setup, values: Tree) -> Tree:
    """Gathers what lies on the mesh, for the first process; the others take part and keep nothing."""

    def one(leaf):
        leaf = whole(leaf)
        return leaf if setup.leads else ()

    return tree.map_leaves(one, values)


def compute_dtype() -> str:
    """The compute dtype: as given, or what goes with --fp8."""
    return FLAGS.dtype or ("float32" if FLAGS.fp8 == "none" else "bfloat16")


def read_config() -> dsv3.ModelConfig:
    """The architecture of --init, --config or --preset, with --vocab_size."""
    if FLAGS.init is not None:
        for name in ("config", "preset", "vocab_size"):
            given = FLAGS[name].value is not None if name != "preset" else FLAGS[name].present
            check(not given, f"--init and --{name} are both given, want one of them")
        check(FLAGS.tokenizer is None, "--init and --tokenizer are both given; a checkpoint directory has its own tokenizer")
        cfg = pretrained_config(FLAGS.init)
        if FLAGS.plan == "context" and cfg.mla.rope.yarn is None:
            length = FLAGS.seq_len if FLAGS["seq_len"].present else cfg.max_length
            check(length <= cfg.max_length, f"--seq_len is {length}, the maximum of --init is {cfg.max_length}")
            FLAGS["seq_len"].value = length
            cfg = cfg.replace(max_length=length)
        return cfg
    check(
        FLAGS.config is None or not FLAGS["preset"].present,
        "--config and --preset are both given, want one of them",
    )
    cfg = dsv3.preset(FLAGS.preset) if FLAGS.config is None else dsv3.ModelConfig.from_hf(FLAGS.config)
    return cfg if FLAGS.vocab_size is None else cfg.replace(vocab_size=FLAGS.vocab_size)


def checkpoint_digest(folder: str) -> str:
    """Names the checkpoint of --init by its configuration and by names, sizes and heads of its files of weights."""
    digest = hashlib.blake2b(digest_size=16)
    for path in [Path(folder) / "config.json", *sorted(Path(folder).glob("*.safetensors"))]:
        with open(path, "rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode() + file.read(1 << 20))
    return digest.hexdigest()


def check_flags(cfg: dsv3.ModelConfig) -> None:
    """Checks the flags' values against each other and the model; their signs are checked as they are parsed."""
    for name in ("lr", "weight_decay", "clip", "mtp_weight", "balance_weight", "bias_rate", "heldout", "passkey_weight"):
        check(math.isfinite(FLAGS[name].value), f"--{name} is {FLAGS[name].value}, want a number")
    check(0 < FLAGS.heldout < 1, f"--heldout is {FLAGS.heldout}, want a share above 0 and below 1")
    check_plan_flags(cfg)
    check(not FLAGS.fresh or FLAGS.resume, "--fresh and --noresume are both given, want one of them")
    check_mesh(cfg)
    check_data_flags(cfg.vocab_size)


def check_mesh(cfg: dsv3.ModelConfig) -> None:
    """Checks --mesh against the batch, the model and the number of processes."""
    found = read_clients()
    processes = len(found.jobs) if found else 1
    if FLAGS.mesh is None:
        check(processes == 1, f"{processes} processes run this, but there is no --mesh; want one, such as data:{processes}")
        for name in ("zero", "schedule", "expert_nodes"):
            check(not FLAGS[name].present, f"--{name} is given, but no --mesh")
        return
    recipe = RECIPES.get(FLAGS.fp8)
    check(
        recipe is None or recipe.scaling != "delayed",
        f"--fp8 {FLAGS.fp8} has delayed scales, which devices do not share; want another recipe, or no --mesh",
    )
    rows = FLAGS.batch_size // FLAGS.accumulate
    check_axes(
        FLAGS.mesh, cfg, rows=rows, micro_batches=FLAGS.accumulate, schedule=FLAGS.schedule, nodes=FLAGS.expert_nodes,
        processes=processes, what=f"--batch_size {FLAGS.batch_size} with --accumulate {FLAGS.accumulate}",
    )  # fmt: skip


def claim_folder(out: Path, settings: Mapping[str, Any], inputs: Mapping[str, str | None]) -> dict[str, Any] | None:
    """Makes the folder and locks it; returns the settings of the run in it, `None` for a new run. It deletes nothing.

    `inputs` are the files and folders that are read, by their flags: --fresh must not delete them.

    Raises:
      ValueError: the folder is in use, holds something else, a run with other settings, or with --fresh what is needed.
      OSError: it cannot be written.
    """
    lock_folder(out)
    others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if not others:
        return None
    check(
        RUN_FILE in others,
        f"--out {str(out)!r} holds {others[0]!r} but no run of this program; want an empty folder",
    )
    if FLAGS.fresh:
        foreign = [name for name in others if name not in PARTS]
        if foreign:
            raise ValueError(f"--out {str(out)!r} holds {foreign[0]!r}, which is no part of a run; want it moved away")
    try:
        saved = json.loads((out / RUN_FILE).read_text(encoding="utf-8"))
    except ValueError:
        check(FLAGS.fresh, f"{str(out / RUN_FILE)!r} cannot be read as JSON; --fresh starts anew")
        saved = None
    if FLAGS.fresh:
        check_fresh(out, saved, settings.get("program", "pretrain"), inputs)
        return None
    kind = type(saved).__name__
    check(isinstance(saved, dict), f"{str(out / RUN_FILE)!r} holds a {kind}, want an object; --fresh starts anew")
    agree(saved, settings, out)
    check(FLAGS.resume, f"--noresume, but --out {str(out)!r} holds a run; --fresh starts anew")
    return saved


def begun_settings(out: Path) -> dict[str, Any] | None:
    """The settings of a run that may go on in the folder; `None` without one, or where `claim_folder` will refuse them."""
    try:
        found = None if FLAGS.fresh else json.loads((out / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def agree(saved: Mapping[str, Any] | None, settings: Mapping[str, Any], out: Path) -> None:
    """Refuses other settings than the run in the folder has, as far as they are known yet."""
    if saved is None:
        return
    try:
        known = [*settings, *(name for name in LATER if name in saved and name not in settings)]
        old, new = ({name: of.get(name) for name in known} for of in (saved, settings))
        check_settings(old, new, where=f"the run in {str(out)!r}")
    except ValueError as error:
        raise ValueError(f"{error}; another --out keeps both, --fresh starts anew") from None


def delete_run(out: Path) -> None:
    """Deletes what a run has written. Its settings go last: until then the folder is known to hold a run."""
    for part in PARTS:
        shutil.rmtree(out / part) if (out / part).is_dir() else (out / part).unlink(missing_ok=True)


def last_checkpoint(out: Path) -> str:
    """What there is to go back to."""
    found = list_checkpoints(out / "checkpoints")
    return f"the last checkpoint is of step {checkpoint_step(found[-1])}" if found else "no checkpoint was saved before it"


def write_run(out: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings of the run, atomically."""
    write_text(out / RUN_FILE, json.dumps(settings, indent=1) + "\n")


def describe(cfg: dsv3.ModelConfig, data: Data, schedule: TrainSchedule, use: MixtureUse) -> None:
    """Says what will be trained on what."""
    held = data.heldout
    rows = [("source", "documents", "tokens", "drawn", "epochs")]
    for name, source in data.sources.items():
        drawn_tokens, epochs = use.tokens[name], use.epochs[name]
        rows.append((name, f"{source.documents:,}", f"{source.tokens:,}", f"{drawn_tokens:,}", f"{epochs:.2f}"))
    say(aligned(rows))
    if use.left_out:
        say(f"skipped until the next epoch, as the length of sequences changes: {use.left_out:,} tokens")
    share = held.text_bytes.sum() / len(held.tokens)
    say(f"held out: {len(held.text_bytes):,} documents, {len(held.tokens):,} tokens, {share:.2f} bytes a token")
    moe = cfg.moe.router
    count = dsv3.count_params(dsv3.model_specs(cfg))
    say(
        f"model: {count:,} parameters, {dsv3.active_params(cfg):,} active for a token; {cfg.num_layers} layers, "
        f"{cfg.num_moe_layers} with {moe.num_experts} experts of which a token uses {moe.top_k}, {cfg.num_mtp_layers} MTP"
    )
    say(stage_table(schedule))
