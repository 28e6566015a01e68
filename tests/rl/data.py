"""Where the real data of tests is, see CONTRIBUTING.md."""

import os
import pathlib

DATA = pathlib.Path(os.environ.get("DSV3_DATA") or pathlib.Path(__file__).resolve().parents[3] / "shared" / "data")
GSM8K = [DATA / "gsm8k" / f"{split}.jsonl" for split in ("train", "test")]
MATH = DATA / "math500" / "test.jsonl"
HUMANEVAL = DATA / "humaneval" / "HumanEval.jsonl.gz"
