"""Looks at training checkpoints: what is in one, how two differ, and the average of several as a model.

  inspect CHECKPOINT        step, settings, position in the data, and each component's size and norm; reads everything, and
                            so finds a part that the disk has lost
  diff A B                  settings and parameters that differ
  average A [B ...] --out   the mean of parameters as a folder that Hugging Face transformers opens

A checkpoint is a folder `step-00000400`; of a run, or of its folder of checkpoints, the latest one is taken.

Examples:

  python examples/checkpoint.py inspect runs/demo
  python examples/checkpoint.py diff runs/demo/checkpoints/step-00000500 runs/demo/checkpoints/step-00000600
  python examples/checkpoint.py average runs/demo/checkpoints/step-* --out=runs/mean
  python examples/checkpoint.py average runs/demo --share=ema --out=runs/ema       # of a run with --ema_decay
"""

from __future__ import annotations

import hush  # noqa: F401 (it comes before all that loads TensorFlow)

# isort: split
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from command import aligned, flag_parser

from dsv3 import tree
from dsv3.checks import check
from dsv3.pretrained import save_pretrained
from dsv3.train.checkpoint import flat_settings
from dsv3.train.checkpoint_tools import (
    CheckpointFile,
    checkpoint_config,
    checkpoint_diff,
    checkpoint_model,
    checkpoint_numbers,
    open_checkpoint,
)

FLAGS = flags.FLAGS
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

flags.DEFINE_string("out", None, "Folder of the averaged model; must not be there yet.")
flags.DEFINE_enum("share", "params", ["params", "ema", "opt", "all"], "Which part of the states is compared or averaged.")
flags.DEFINE_list("weights", None, "Weights of the checkpoints that are averaged. Default: equal ones.")
flags.DEFINE_integer("top", 12, "Leaves that diff shows: those that differ most; 0: all.", 0)


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit code: 2 for bad input, 1 where `diff` finds a difference."""
    try:
        check(len(argv) > 1, "no command, want inspect, diff or average (--help shows examples)")
        command, paths = argv[1], argv[2:]
        check(command in COMMANDS, f"unknown command {command!r}, want inspect, diff or average")
        run, least, most = COMMANDS[command]
        wanted = f"{least}" if least == most else f"at least {least}"
        check(least <= len(paths) <= most, f"{command} got {len(paths)} checkpoints, want {wanted}")
        return run([open_checkpoint(path) for path in paths])
    except (ValueError, OSError) as error:
        print(f"checkpoint: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def inspect(files: Sequence[CheckpointFile]) -> int:
    """Prints what is in a checkpoint."""
    (file,) = files
    meta, total = file.meta, [0, 0]
    print(f"{file.path}: step {meta['step']:,}, {len(meta['files'])} file(s)")
    print("\nsettings")
    shown = {name: value for name, value in meta["settings"].items() if name != "config"}
    print(aligned([(f"  {name}", json.dumps(value)) for name, value in flat_settings(shown).items()], left=2))
    cursor = meta["cursor"]
    if isinstance(cursor, dict):
        rows = []
        for name, value in cursor.items():
            if name == "config":
                continue
            many = isinstance(value, list) and len(value) > 4
            rows.append((f"  {name}", f"{len(value)} values" if many else json.dumps(value)))
        print("\nposition\n" + aligned(rows, left=2))
    rows = [("component", "leaves", "values", "MB", "norm", "not finite")]
    for name, numbers in checkpoint_numbers(file).items():
        size = f"{numbers.bytes / 1e6:,.2f}"
        rows.append((name, str(numbers.leaves), f"{numbers.values:,}", size, f"{numbers.norm:.5g}", str(numbers.bad)))
        total = [total[0] + numbers.values, total[1] + numbers.bytes]
    rows.append(("all", "", f"{total[0]:,}", f"{total[1] / 1e6:,.2f}", "", ""))
    print("\n" + aligned(rows))
    print("\nevery checksum is right")
    return 0


def diff(files: Sequence[CheckpointFile]) -> int:
    """Prints how two checkpoints differ; returns 1 if they do."""
    a, b = files
    found = checkpoint_diff(a, b, share="" if FLAGS.share == "all" else FLAGS.share)
    print(f"a: {a.path}, step {found.steps[0]:,}\nb: {b.path}, step {found.steps[1]:,}")
    if found.settings:
        rows = [(f"  {name}", json.dumps(old), json.dumps(new)) for name, (old, new) in found.settings.items()]
        print("\n" + aligned([("settings", "a", "b"), *rows], left=3))
    if found.only:
        print("\nonly in one, or of another shape\n" + "\n".join(f"  {line}" for line in found.only))
    changed = sorted((leaf for leaf in found.leaves if leaf.change > 0), key=lambda leaf: -leaf.change)
    print(f"\n{len(changed)} of {len(found.leaves)} leaves differ")
    if changed:
        rows = [("leaf", "|b - a| / |a|", "largest", "not finite in b")]
        shown = changed[: FLAGS.top] if FLAGS.top else changed
        rows += [(leaf.path, f"{leaf.change:.3e}", f"{leaf.largest:.3e}", str(leaf.bad)) for leaf in shown]
        print(aligned(rows))
        if len(shown) < len(changed):
            print(f"... and {len(changed) - len(shown)} more (--top=0 shows all)")
    return int(bool(changed or found.only or found.settings))


def average(files: Sequence[CheckpointFile]) -> int:
    """Writes the mean of the parameters as a model."""
    check(FLAGS.out is not None, "average wants --out, a folder for the model")
    out = Path(FLAGS.out)
    check(not out.exists(), f"--out {str(out)!r} is there already, want a new folder")
    check(FLAGS.share in ("params", "ema"), f"--share is {FLAGS.share!r}, want params or ema to average")
    try:
        weights = None if FLAGS.weights is None else [float(weight) for weight in FLAGS.weights]
    except ValueError:
        raise ValueError(f"--weights is {','.join(FLAGS.weights)}, want numbers") from None
    cfg = checkpoint_config(files)
    params, router = checkpoint_model(files, cfg, share=FLAGS.share, weights=weights)
    folder = files[0].path.parent.parent / "tokenizer"
    extra = [folder / name for name in TOKENIZER if (folder / name).exists()]
    save_pretrained(out, cfg, params, router, extra_files=extra)
    count = sum(leaf.size for leaf in tree.flatten(params))
    print(f"{out}: the mean of {len(files)} checkpoint(s), {count:,} parameters" + ("" if extra else "; no tokenizer found"))
    return 0


COMMANDS = {"inspect": (inspect, 1, 1), "diff": (diff, 2, 2), "average": (average, 1, 10**6)}
parse_flags = flag_parser("checkpoint")

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
