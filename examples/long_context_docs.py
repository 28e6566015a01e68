"""The page and the plot that `long_context.py --write_docs` writes."""

from __future__ import annotations

from pathlib import Path

from long_context_report import HEADINGS, PEAKS, Results, Rows, lines, tables, verdicts

PAGE = """# Long contexts

Written by the program itself; run it again rather than quote it:

```
{command}
```

Machine: {machine}.
Model: {shape}. Its parameters are random, so what it says means nothing; what it costs does.

{verdicts}

![memory by length](long_context.png)

## Reading, decoding, and one forward pass

{runs}

An `Engine` reads the prompt in chunks into its latent cache and draws the new tokens, which with the prompt make up
the length. The rate of reading is that from the third chunk on, as the first two are traced and compiled. A token's
milliseconds are the median of all but the first. The whole pass is `model_apply` over the same tokens without a
cache; of its logits, which would take {logits} at the longest length, only the last positions' are made. `apart` is
the largest difference between the two ways' log-probabilities at the places of all new tokens, of every token of this
vocabulary; `same best` is how many of the drawn tokens are the other way's best, too. Each cell is of a process of
its own. A peak is the highest resident memory above what the process had with the model loaded.

## Memory is linear in the length

{memory}

Lines by least squares through the peaks above; `furthest off` is the largest distance from the line, as a part of its
growth from the shortest length to the longest. Up to 5% is called linear; a quadratic peak would be off by 12%.
Nothing in either way is as large as tokens times tokens:

- The whole pass goes over tiles of queries and keys with an online softmax (`dsv3/ops/attention_tiles.py`). It keeps
  the hidden states and one layer's queries, keys and values.
- A chunk of a prompt attends to a cache that is longer than `attention_block` · `attention_unroll` slots (4,096 by
  default) tile by tile (`dsv3/ops/attention_past.py`): keys and values of a tile are expanded from its latents when
  the loop reaches it, and slots that nothing has filled are not reached. A score for each slot, or an expanded cache,
  never exists.
- A cache is made once: its first step writes into it without a copy, and one that grows exists beside its successor
  only.

What is above the cache in the engine's line is the fixed part, which has compiled kernels and the chunk's tiles in
it, and what decoding reads: of one layer a score for each slot and head.

## The latent cache beside plain attention's

{caches}

Bytes a token are those of all layers, by arithmetic: L + R values a layer for a latent, H · (P + R + U) for the keys
and values of all heads. Measured is the growth of the process's resident memory when the cache was made, filled with
zeros; all caches of a length are made before anything else is computed. (What TensorFlow's allocator keeps to itself,
8 bytes for every 256 of the room it takes, is not in it.) Each is then filled, in place, with the same tokens,
keys and values being expanded from the latents through the layers' own weights, and the last layer lets one new token
attend over it: the absorbed form over latents, plain attention over keys and values, in the median of ten times.
`apart` is the relative difference of that step's output from the first row's: in float32 both sum the same terms in
another order (some 1e-7 each), in bfloat16 latents, keys, values and scores are rounded to 2⁻⁹ each, and FP8 rounds
latents to 2⁻⁴. A step over latents reads less and multiplies more, 2·L + R for each head and token instead of P + R + U: it
is the faster one where memory is what it waits for. An FP8 cache is decoded in every step, on a CPU by arithmetic.

The saving grows with the number of heads, and this model has few. So the same was done with one layer whose attention
has the published widths, 128 heads of 128 + 64 and latents of 512, in bfloat16:

{wide}

The published figure of 32,768 values for plain attention leaves the rotary part out of its keys: 128 heads of 128 for
keys and as many for values. Kept as attention reads them, with the shared rotary key beside each head's, they are
40,960.
"""


def write_docs(results: Results, folder: Path, *, command: str, machine: str) -> None:
    """Writes long_context.md and its plot."""
    draw(results, folder / "long_context.png")
    (folder / "long_context.md").write_text(page(results, command, machine), encoding="utf-8")


def page(results: Results, command: str, machine: str) -> str:
    """The text of docs/long_context.md."""
    found = dict(tables(results))
    cfg, job, mla = results.cfg, results.job, results.cfg.mla
    yarn = mla.rope.active_yarn
    logits = 4 * max(job.length for job, _ in results.found) * cfg.vocab_size
    shape = (
        f"{cfg.num_layers} layers of which {cfg.num_dense_layers} dense, hidden {cfg.hidden_size}, {mla.num_heads} heads of "
        f"{mla.nope_dim} + {mla.rope_dim}, latents of {mla.kv_latent}, {cfg.moe.router.num_experts} experts of which "
        f"{cfg.moe.router.top_k} a token, vocabulary {cfg.vocab_size}, YaRN by {yarn.factor:g} beyond "
        f"{yarn.original_length:,} tokens, at most {cfg.max_length:,}; {job.dtype}, chunks of {job.chunk}, "
        f"{job.new_tokens} new tokens"
    )
    parts = {
        "shape": shape, "machine": machine, "command": command, "logits": f"{logits / 1e6:,.0f} MB",
        "dtype": job.dtype, "verdicts": "\n".join(f"- {line}" for line in verdicts(results)),
    }  # fmt: skip
    for name, heading in HEADINGS.items():
        parts[name] = markdown(found[heading])
    return PAGE.format(**parts)


def markdown(rows: Rows) -> str:
    """Rows as a table of Markdown."""
    cells = [rows[0], ("---", *["---:"] * (len(rows[0]) - 1)), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def draw(results: Results, file: Path) -> None:
    """Peaks with their lines, and what caches took."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for color, (part, line) in enumerate(lines(results).items()):
        peaks = {length: numbers["peak"] for length, numbers in results.part(part).items()}
        ends = [0, max(peaks)]
        left.plot(ends, [(line.start + line.slope * x) / 1e6 for x in ends], color=f"C{color}", linewidth=1)
        left.plot(list(peaks), [peak / 1e6 for peak in peaks.values()], "o", color=f"C{color}", label=PEAKS[part])
    left.set_title("highest memory above the loaded model, MB")
    sizes: dict[str, dict[int, float]] = {}
    for length, numbers in results.part("caches").items():
        for row in numbers["caches"]:
            sizes.setdefault(f"{row['kind']}, {row['dtype']}", {})[length] = row["measured"] / 1e6
    for name, points in sizes.items():
        style = "o-" if name.startswith("latent") else "s--"
        right.plot(list(points), list(points.values()), style, label=name, linewidth=1)
    right.set_title("measured size of caches, MB")
    for axis in (left, right):
        axis.set_xlabel("tokens")
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.set_xticks(list(results.part("caches")))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}K")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=90, metadata={"Software": None})
