"""The shape of the library, read from its syntax: who imports whom, where state is held, how long things are.

`LAYERS` is the design's table of layers. A rule here holds for every file under `dsv3/` except
`dsv3/__init__.py`, which gathers the public names. Each rule is also run on small planted trees, to show that
it can fail.
"""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

BOTTOM = "typing graph checks tree recipe policy config spec"

# From the bottom upwards: a module or package of dsv3, and what it may import besides itself. A row may
# name only rows listed before it, so no two of them can need each other; "ops.fp8" allows that one module.
LAYERS = {
    "typing": "",
    "graph": "",
    "page": "",
    "resident": "",
    "checks": "typing",
    "tree": "typing checks",
    "recipe": "checks",
    "policy": "typing checks tree recipe",
    "config": "typing checks",
    "spec": "typing checks tree config",
    "layout": "typing checks tree config spec",
    "compiled": f"{BOTTOM} layout",
    "ops": "typing graph checks",
    "data": BOTTOM,
    "pipeline": "typing checks",
    "io": f"{BOTTOM} ops.fp8 ops.quantized",
    "nn": f"{BOTTOM} layout ops",
    "pretrained": f"{BOTTOM} ops nn io",
    "export": "typing checks tree io",
    "parallel": f"{BOTTOM} layout pipeline",
    "train": f"{BOTTOM} layout compiled ops nn pipeline parallel",
    "plan": f"{BOTTOM} layout ops nn pipeline parallel train",
    "serve": f"{BOTTOM} layout compiled ops nn data io",
    "eval": f"{BOTTOM} resident layout compiled ops nn data io serve",
    "rl": f"{BOTTOM} layout compiled ops nn data train serve",
}

# Modules that are one row, split to keep files short.
FAMILY = {"config_hf": "config", "presets": "config"}

# Packages that only the named modules may import: chex has gaps that `checks` covers, and dsv3 has to work
# where the extras `export`, `parity` and `ray` are not installed.
CONFINED = {"chex": ("checks",), "jax": ("export",), "ray": ("rl",), "torch": (), "transformers": ()}

EXEMPT = "dsv3/__init__.py"
EDGE = "dsv3/compiled.py"
VARIABLES = {"Variable", "DVariable", "ResourceVariable", "get_variable"}

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 70


def read_sources(root: pathlib.Path) -> dict[str, str]:
    """Returns path → text for every Python file under `root/dsv3` that the rules hold for."""
    paths = sorted((root / "dsv3").rglob("*.py"))
    texts = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    texts.pop(EXEMPT, None)
    if not texts:
        raise FileNotFoundError(f"read_sources: no Python file under {root / 'dsv3'}")
    return texts


def dotted_name(path: str) -> str:
    """Returns a file's module: `dsv3/nn/mla.py` is `dsv3.nn.mla`, `dsv3/nn/__init__.py` is `dsv3.nn`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def layer_of(module: str) -> str:
    """Returns the row of `LAYERS` for a module below dsv3; `dsv3` itself is the row ""."""
    first = (module.split(".") + [""])[1]
    return FAMILY.get(first, first)


def find_imports(path: str, tree: ast.AST, known: set[str]) -> Iterator[tuple[int, str]]:
    """Yields (line, module) for each import of a file: at its top, in a function, or by `import_module`."""
    package = dotted_name(path) if path.endswith("/__init__.py") else dotted_name(path).rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in known else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def is_allowed(layer: str, target: str) -> bool:
    """Whether a row may import the module `target` of dsv3."""
    if layer_of(target) == layer:
        return True
    inner = target.removeprefix("dsv3.")
    return any(
        inner == entry or inner.startswith(f"{entry}.") if "." in entry else layer_of(target) == entry
        for entry in LAYERS[layer].split()
    )


def import_faults(root: pathlib.Path) -> list[str]:
    """Imports that do not go downward, or that take a confined package where it may not be."""
    texts = read_sources(root)
    modules = {dotted_name(path) for path in texts}
    known = modules | {module.rpartition(".")[0] for module in modules}
    faults = []
    for path, text in texts.items():
        layer = layer_of(dotted_name(path))
        if layer not in LAYERS:
            faults.append(f"{path}: `{layer}` has no row in LAYERS of tests/test_imports.py")
            continue
        for line, target in find_imports(path, ast.parse(text), known):
            first = target.partition(".")[0]
            what = f"{path}:{line}: `{layer}` imports {target}"
            if first == "dsv3" and not is_allowed(layer, target):
                faults.append(f"{what}, allowed: {LAYERS[layer] or 'nothing'}")
            if first in CONFINED and layer not in CONFINED[first]:
                faults.append(f"{what}, allowed in: {' '.join(CONFINED[first]) or 'no module'}")
    return faults


def variable_faults(root: pathlib.Path) -> list[str]:
    """Uses of a variable's constructor outside of `EDGE`, also uncalled: `map_structure(tf.Variable, x)`."""
    faults = []
    for path, text in read_sources(root).items():
        if path == EDGE:
            continue
        tree = ast.parse(text)
        harmless = set()
        for node in ast.walk(tree):
            about_types = [getattr(node, "annotation", None), getattr(node, "returns", None)]
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                about_types += node.args[1:]
            harmless.update(id(inner) for part in about_types if part for inner in ast.walk(part))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            used = VARIABLES & {getattr(node, "attr", ""), *names}
            if used and id(node) not in harmless:
                faults.append(f"{path}:{node.lineno}: {used.pop()} is used, only {EDGE} may have variables")
    return faults


def docstring_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Returns the number of lines of a function's docstring, quotes included."""
    first = function.body[0]
    return first.end_lineno - first.lineno + 1 if ast.get_docstring(function, clean=False) is not None else 0


def size_faults(root: pathlib.Path) -> list[str]:
    """Files that are too long, and functions that are too long without their docstring."""
    faults = []
    for path, text in read_sources(root).items():
        length = len(text.splitlines())
        if length > MAX_FILE_LINES:
            faults.append(f"{path}: {length} lines, at most {MAX_FILE_LINES} are allowed")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1 - docstring_lines(node)
                if length > MAX_FUNCTION_LINES:
                    what = f"{path}:{node.lineno}: {node.name} has {length} lines"
                    faults.append(f"{what} without its docstring, at most {MAX_FUNCTION_LINES} are allowed")
    return faults


def package_faults(root: pathlib.Path) -> list[str]:
    """Folders that an installed dsv3 would lack, since setup.cfg finds packages by their `__init__.py`."""
    folders = sorted({path.rpartition("/")[0] for path in read_sources(root)})
    bare = [folder for folder in folders if not (root / folder / "__init__.py").exists()]
    return [f"{folder}: has no __init__.py" for folder in bare]


RULES = [import_faults, variable_faults, size_faults, package_faults]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_library_keeps_rule(rule):
    faults = rule(ROOT)
    assert not faults, "\n" + "\n".join(faults)


def test_programs_take_no_name_of_the_standard_library():
    """A program's folder comes first on its path: TensorFlow would get the program for the module."""
    taken = {path.stem for path in (ROOT / "examples").glob("*.py")} & (sys.stdlib_module_names | {"compression"})
    assert not taken, f"{sorted(taken)} of examples/ are modules of Python (3.14 has `compression`)"


def test_data_loads_no_tensorflow():
    """Processes that prepare data start in a moment and stay small."""
    code = "import sys, dsv3.data; print([name for name in ('tensorflow', 'scipy', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_names_of_the_contract_are_loaded_when_asked_for():
    code = "import dsv3; print(dsv3.pipeline.dualpipe.__name__, set(dsv3.__all__) <= set(dir(dsv3)))"
    code += "; print(hasattr(dsv3, 'nothing')); from dsv3 import *; print(model_apply.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True)
    assert done.stdout == "dualpipe True\nFalse\ndsv3.nn.model\n"


def test_layers_name_only_lower_rows():
    seen: set[str] = set()
    for layer, allowed in LAYERS.items():
        unknown = {entry.partition(".")[0] for entry in allowed.split()} - seen
        assert not unknown, f"the row `{layer}` names {sorted(unknown)}, which stand not below it"
        seen.add(layer)
    assert set(FAMILY.values()) <= seen


# A tree that keeps every rule, with the awkward but allowed forms; each case below changes or adds one file.
CLEAN = {
    "dsv3/__init__.py": "from dsv3.nn.mla import mla_apply\nfrom dsv3.compiled import make_step\n",
    "dsv3/typing.py": "Tree = object\n",
    "dsv3/checks.py": "import chex\nfrom dsv3.typing import Tree\n",
    "dsv3/config.py": "def from_hf(x):\n    from dsv3 import config_hf\n    return config_hf.read(x)\n",
    "dsv3/config_hf.py": "from dsv3.config import from_hf\n",
    "dsv3/compiled.py": "import tensorflow as tf\nstate = tf.Variable(0)\n",
    "dsv3/ops/__init__.py": "from .fp8 import fp8_quantize\n",
    "dsv3/ops/fp8.py": "from dsv3 import checks\nfrom dsv3.ops import norm\n",
    "dsv3/ops/norm.py": (
        "def f(x: tf.Variable) -> bool:\n    'Not a tf.Variable(0).'\n    return isinstance(x, tf.Variable)\n"
    ),
    "dsv3/nn/__init__.py": "",
    "dsv3/nn/mla.py": "from dsv3 import ops\nfrom ..ops import fp8\nfrom ..config import from_hf\n",
    "dsv3/io/__init__.py": "",
    "dsv3/io/safetensors.py": "from dsv3.ops import fp8\nfrom dsv3.ops.fp8 import fp8_quantize\n",
    "dsv3/train/__init__.py": "",
    "dsv3/train/step.py": "from dsv3.compiled import make_step\nimport dsv3.nn.mla as mla\n",
}

# rule → (file, its text, what the one fault says)
PLANTED = {
    import_faults: [
        ("dsv3/ops/bad.py", "from dsv3.config import ModelConfig\n", "bad.py:1: `ops` imports dsv3.config"),
        ("dsv3/ops/bad.py", "import dsv3.nn.mla\n", "`ops` imports dsv3.nn.mla"),
        ("dsv3/ops/bad.py", "def f():\n    from ..nn import mla\n", "bad.py:2: `ops` imports dsv3.nn.mla"),
        ("dsv3/ops/bad.py", "importlib.import_module('dsv3.train.step')\n", "`ops` imports dsv3.train.step"),
        ("dsv3/ops/__init__.py", "from ..nn import mla\n", "`ops` imports dsv3.nn.mla"),
        ("dsv3/nn/bad.py", "from dsv3.train.step import x\n", "`nn` imports dsv3.train.step"),
        ("dsv3/nn/bad.py", "from dsv3.compiled import make_step\n", "`nn` imports dsv3.compiled"),
        ("dsv3/nn/bad.py", "from dsv3 import mla_apply\n", "`nn` imports dsv3, allowed"),
        ("dsv3/nn/bad.py", "from .. import mla_apply\n", "`nn` imports dsv3, allowed"),
        ("dsv3/nn/bad.py", "import dsv3\n", "`nn` imports dsv3, allowed"),
        ("dsv3/nn/bad.py", "import chex\n", "`nn` imports chex, allowed in: checks"),
        ("dsv3/nn/bad.py", "from torch.nn import Linear\n", "`nn` imports torch.nn, allowed in: no module"),
        ("dsv3/data/__init__.py", "from dsv3.io import safetensors\n", "`data` imports dsv3.io"),
        ("dsv3/io/bad.py", "from dsv3.ops import norm\n", "`io` imports dsv3.ops.norm"),
        ("dsv3/io/bad.py", "from dsv3.ops import fp8_quantize\n", "`io` imports dsv3.ops, allowed"),
        ("dsv3/serve/__init__.py", "from dsv3.train import step\n", "`serve` imports dsv3.train.step"),
        ("dsv3/train/bad.py", "from dsv3.rl.grpo import x\n", "`train` imports dsv3.rl.grpo"),
        ("dsv3/presets.py", "from dsv3.spec import x\n", "`config` imports dsv3.spec"),
        ("dsv3/typing.py", "from dsv3.checks import x\n", "`typing` imports dsv3.checks, allowed: nothing"),
        ("dsv3/misc.py", "x = 1\n", "misc.py: `misc` has no row"),
    ],
    variable_faults: [
        ("dsv3/nn/bad.py", "x = 1\ny = tf.Variable(0)\n", "bad.py:2: Variable is used"),
        ("dsv3/train/bad.py", "tree.map_structure(tf.Variable, state)\n", "Variable is used"),
        ("dsv3/train/bad.py", "from tensorflow import Variable as V\n", "Variable is used"),
        ("dsv3/train/bad.py", "x = isinstance(tf.Variable(0), tf.Tensor)\n", "Variable is used"),
        ("dsv3/train/bad.py", "x = dtensor.DVariable(0)\n", "DVariable is used"),
    ],
    size_faults: [
        ("dsv3/nn/bad.py", "x = 1\n" * (MAX_FILE_LINES + 1), "bad.py: 451 lines"),
        ("dsv3/nn/bad.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES, "bad.py:1: f has 71 lines"),
    ],
    package_faults: [
        ("dsv3/nn/deep/mla.py", "x = 1\n", "dsv3/nn/deep: has no __init__.py"),
    ],
}
CASES = [(rule, *case) for rule, cases in PLANTED.items() for case in cases]


def write_tree(root: pathlib.Path, files: dict[str, str]) -> None:
    """Writes path → text below `root`."""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")


def test_clean_tree_has_no_fault(tmp_path):
    docstring = '    """One.\n' + "    Two.\n" * MAX_FUNCTION_LINES + '    """\n'
    longest = "def f():\n" + docstring + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    write_tree(tmp_path, CLEAN)
    write_tree(tmp_path, {"dsv3/nn/longest.py": longest, "dsv3/nn/full.py": "x = 1\n" * MAX_FILE_LINES})
    assert [fault for rule in RULES for fault in rule(tmp_path)] == []


@pytest.mark.parametrize(("rule", "path", "text", "message"), CASES, ids=range(len(CASES)))
def test_planted_fault_is_found(tmp_path, rule, path, text, message):
    write_tree(tmp_path, CLEAN | {path: text})
    faults = rule(tmp_path)
    assert len(faults) == 1 and message in faults[0], faults
    assert [fault for other in RULES if other is not rule for fault in other(tmp_path)] == []


def test_empty_library_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Python file"):
        read_sources(tmp_path)
