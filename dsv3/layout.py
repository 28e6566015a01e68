"""Layouts: which mesh axis shards which dimension of which tensor, as data.

Rules map the logical axes of `ParamSpec`s to mesh axes. A layout that cannot be is refused here, by leaf, shape and rule,
not by the compiler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tensorflow.experimental import dtensor

from dsv3 import tree
from dsv3.checks import check
from dsv3.spec import ParamSpec
from dsv3.typing import Tree

LayoutRules = Mapping[str, str | None]
"""Logical axis (`"layer"`, `"expert"`, `"embed"`, `"heads"`, ...) to mesh axis; left-out ones are not sharded."""

MESH_AXES = ("pipe", "data", "expert")
"""The axes of a mesh that a training step runs on, slowest first: neighbouring devices share experts."""

RULES: LayoutRules = {"expert": "expert"}
"""Experts over the axis `expert`, everything else whole on every device."""


def make_layouts(specs: Tree, mesh: dtensor.Mesh, rules: LayoutRules = RULES) -> Tree:
    """Returns a tree of `dtensor.Layout`s that mirrors the specs.

    Args:
      specs: a tree of `ParamSpec`: parameters (`model_specs`), a cache (`cache_specs`), activations (`output_specs`).
      mesh: the devices, with named axes.
      rules: see `LayoutRules`.

    Returns:
      A tree like `specs`; `parallel.mesh.place(leaf, layout)` places a leaf. Optimiser moments and gradients lie as their
      parameters.

    Raises:
      ValueError: a rule for an axis that no leaf or mesh has, a dimension that does not divide, or a mesh axis used
        twice in one leaf, naming the leaf.
    """
    known = {axis for spec in tree.flatten(specs) for axis in spec.axes}
    if rules is RULES:
        rules = {logical: axis for logical, axis in rules.items() if logical in known and axis in mesh.dim_names}
    for logical, axis in rules.items():
        check(
            logical in known,
            f"make_layouts: rule {logical!r} -> {axis!r}: no leaf has that axis, only {sorted(known)}",
        )
        check(
            axis is None or axis in mesh.dim_names,
            f"make_layouts: rule {logical!r} -> {axis!r}: the mesh has only the axes {list(mesh.dim_names)}",
        )
    return tree.map_with_path(lambda path, spec: _layout(path, spec, mesh, rules), specs)


def _layout(path: str, spec: ParamSpec, mesh: dtensor.Mesh, rules: LayoutRules) -> dtensor.Layout:
    shards: list[str] = []
    for size, logical in zip(spec.shape, spec.axes):
        axis = rules.get(logical)
        if axis is None:
            shards.append(dtensor.UNSHARDED)
            continue
        where = f"make_layouts: `{path}` has shape {spec.shape} {list(spec.axes)}"
        check(axis not in shards, f"{where}; the rules use mesh axis {axis!r} for two of its dims")
        ways = mesh.dim_size(axis)
        check(
            size % ways == 0,
            f"{where}; rule {logical!r} -> {axis!r}: {size} is not divisible by the axis's {ways} devices",
        )
        shards.append(axis)
    return dtensor.Layout(shards, mesh)


def zero_layouts(specs: Tree, layouts: Tree, *, axes: Sequence[str] = MESH_AXES) -> Tree:
    """ZeRO-1: returns layouts that shard what `layouts` leave whole, so that each device stores and updates a part.

    Master parameters and optimiser moments are stored so; a step gathers the parameters that it uses, and sums gradients to
    these layouts.

    Args:
      specs: a tree of `ParamSpec`.
      layouts: a tree of layouts that mirrors it, from `make_layouts`.
      axes: mesh axes to shard over as well, each over the largest dim that is still whole and divides, or over none.

    References: arXiv:1910.02054 section 5, stage 1.
    """
    unknown = [axis for axis in axes if axis not in MESH_AXES]
    check(not unknown, f"zero_layouts: `axes` has {unknown}, want some of {', '.join(MESH_AXES)}")

    def one(spec: ParamSpec, layout: dtensor.Layout) -> dtensor.Layout:
        shards, mesh = list(layout.sharding_specs), layout.mesh
        for axis in axes:
            if axis not in mesh.dim_names or axis in shards or mesh.dim_size(axis) == 1:
                continue
            ways = mesh.dim_size(axis)
            free = [d for d, s in enumerate(shards) if s == dtensor.UNSHARDED and spec.shape[d] % ways == 0]
            free = [d for d in free if spec.axes[d] != "layer"]  # a step takes layers apart
            if free:
                shards[max(free, key=lambda d: spec.shape[d])] = axis
        return dtensor.Layout(shards, mesh)

    return tree.map_leaves(one, specs, layouts)


def mesh_of(layouts: Tree) -> dtensor.Mesh:
    """Returns the mesh that a tree of layouts is on.

    Raises:
      ValueError: the tree has no layouts, or they are on unlike meshes.
    """
    leaves = tree.flatten(layouts)
    check(
        bool(leaves) and all(isinstance(leaf, dtensor.Layout) for leaf in leaves),
        "mesh_of: `layouts` holds other things than layouts, want a tree from make_layouts",
    )
    mesh = leaves[0].mesh
    check(all(leaf.mesh == mesh for leaf in leaves), "mesh_of: `layouts` are on more than one mesh, want one")
    return mesh


def expert_dim(spec: ParamSpec) -> int | None:
    """Returns the dim of a parameter that counts experts, or `None`: that which a step uses sharded over `expert`."""
    return spec.axes.index("expert") if "expert" in spec.axes else None


def local_bytes(specs: Tree, layouts: Tree, *, bytes_per_value: int = 4) -> int:
    """Returns the bytes that one device holds of parameters laid out so."""

    def one(spec: ParamSpec, layout: dtensor.Layout) -> int:
        ways = 1
        for axis in layout.sharding_specs:
            ways *= 1 if axis == dtensor.UNSHARDED else layout.mesh.dim_size(axis)
        return spec.size // ways * bytes_per_value

    return sum(one(s, lay) for s, lay in zip(tree.flatten(specs), tree.flatten(layouts)))
