"""Measures dsv3 and transformers' DeepseekV3 side by side, in turns, and prints ratios.

    python examples/benchmark.py                           # everything, half an hour on two cores
    python examples/benchmark.py --cases=train,decode      # some of it
    python examples/benchmark.py --write_docs              # everything, and docs/benchmark.md anew
    python examples/benchmark.py --quick                   # tiny sizes: only shows that the program runs

It needs the extra `parity` (torch and transformers): `pip install -e '.[parity]'`.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shlex
import sys
import tempfile
import time

from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import cases as cases_lib  # noqa: E402
from benchmarks import report  # noqa: E402
from benchmarks.protocol import Worker  # noqa: E402
from benchmarks.runner import Workers, collect_versions, measure  # noqa: E402

_CASES = flags.DEFINE_list("cases", ["all"], "Names of cases or groups: train, prefill, decode, experts, ...")
flags.DEFINE_alias("case", "cases")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Turns of each side.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 2, "Threads of each side.", lower_bound=1)
_QUICK = flags.DEFINE_boolean("quick", False, "Tiny sizes and two turns: the numbers mean nothing.")
_MODES = flags.DEFINE_enum("modes", "short", ["short", "all"], "How many modes of transformers to try.")
_COMPILE = flags.DEFINE_boolean("torch_compile", True, "Whether torch.compile is among the modes.")
_WRITE_DOCS = flags.DEFINE_boolean("write_docs", False, "Write docs/benchmark.md.")

DOCS = ROOT / "docs" / "benchmark.md"


def choose_cases() -> list[cases_lib.Case]:
    """Returns the cases that the flags ask for; refuses what cannot work before anything is started."""
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        raise ValueError(f"benchmark: {' and '.join(missing)} not installed; get the extra: pip install -e '.[parity]'")
    if _WRITE_DOCS.value and (_QUICK.value or _CASES.value != ["all"] or not _COMPILE.value):
        raise ValueError("benchmark: --write_docs wants the whole benchmark, without --quick, --cases and --notorch_compile")
    if _WRITE_DOCS.value and not os.access(DOCS.parent, os.W_OK):
        raise ValueError(f"benchmark: the folder {DOCS.parent.name}/ cannot be written")
    chosen = cases_lib.select_cases(
        cases_lib.all_cases(quick=_QUICK.value, all_modes=_MODES.value == "all"), _CASES.value
    )
    return chosen if _COMPILE.value else [cases_lib.without_compile(case) for case in chosen]


def make_workers(scratch: pathlib.Path) -> Workers:
    """Returns the workers; whichever starts first, both have the parameters that dsv3 drew."""
    sizes = cases_lib.QUICK if _QUICK.value else cases_lib.FULL
    env = {"OMP_NUM_THREADS": str(_THREADS.value), "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
    weights, config = scratch / "weights.npz", {}

    def start(side: str) -> Worker:
        if side == cases_lib.TORCH and not config:
            workers[cases_lib.DSV3]  # writes the parameters
        worker = Worker([sys.executable, "-m", f"benchmarks.{side}_side", str(_THREADS.value)], env=env)
        if side == cases_lib.TORCH:
            worker.call("setup", config=config, weights=str(weights))
        else:
            config.update(worker.call("setup", overrides=sizes.overrides, weights=None if config else str(weights)))
        return worker

    workers = Workers(start)
    return workers


def compare_logits(workers: Workers) -> str:
    """Checks that both sides compute the same function, and returns a sentence that says how nearly."""
    ours, theirs = (workers[side].call("logits", batch=2, length=16) for side in (cases_lib.DSV3, cases_lib.TORCH))
    largest = max(map(abs, theirs))
    error = max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / largest
    if error > 1e-4:
        raise ValueError(f"benchmark: the two sides' logits differ by {error:.1e} of the largest, want the same model")
    return f"Both sides have the same parameters: their float32 logits differ by {error:.1e} of the largest."


def main(argv: list[str]) -> int:
    """Measures, prints, and writes the page if asked."""
    if len(argv) > 1:
        raise ValueError(f"benchmark: unexpected argument {argv[1]!r}, want flags only")
    chosen, repeats = choose_cases(), min(2, _REPEATS.value) if _QUICK.value else _REPEATS.value
    if (load := os.getloadavg()[0]) > 1:
        print(f"benchmark: this machine is busy (load {load:.1f}); ratios mean little now", file=sys.stderr)
    start, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as scratch:
        workers = make_workers(pathlib.Path(scratch))
        try:
            checks = [compare_logits(workers)]
            print(checks[0], flush=True)
            versions = collect_versions(workers, (cases_lib.DSV3, cases_lib.TORCH))
            for case in chosen:
                print(f"{case.name}", flush=True)
                if case.memory:
                    workers.close()  # a fresh process is measured: nothing else shall hold memory
                result = measure(case, workers, repeats=repeats, say=lambda text: print(text, flush=True))
                results.append(result)
                for row in report.result_rows([result]):
                    print("  " + "  ".join(filter(None, row.cells())), flush=True)
        finally:
            workers.close()
    print("\n" + report.text_table(report.result_rows(results)))
    print("\n" + report.aligned(report.alone_cells(results)))
    print("\n" + "\n".join(["Modes of the peers:", *(f"  {line}" for line in report.mode_lines(results))]))
    print(f"\n{time.monotonic() - start:.0f} s")
    if _WRITE_DOCS.value:
        command = shlex.join(["python", "examples/benchmark.py", *sys.argv[1:]])
        DOCS.write_text(report.page(results, command=command, versions=versions, checks=checks), encoding="utf-8")
        print("wrote docs/benchmark.md")
    return 1 if any(cases_lib.OURS not in result.values for result in results) else 0


def run() -> None:
    """Runs `main`; what the caller got wrong is one line."""

    def guarded(argv: list[str]) -> int:
        try:
            return main(argv)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2

    app.run(guarded)


if __name__ == "__main__":
    run()
