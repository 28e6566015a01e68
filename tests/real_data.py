"""Where the real data of tests is, see CONTRIBUTING.md."""

import os
import pathlib

DATA = pathlib.Path(os.environ.get("DSV3_DATA") or pathlib.Path(__file__).resolve().parents[2] / "shared" / "data")
