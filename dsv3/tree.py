"""Path-keyed maps over trees of NamedTuples, tuples and dicts.

A path joins field names with dots: `moe.mla.kv_a`. An empty tuple `()` is a subtree without leaves: it stands for
"this model has no such part", so that a tree never holds `None`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tree as dm_tree

from dsv3.typing import Tree


def map_leaves(fn: Callable[..., Any], tree: Tree, *trees: Tree) -> Tree:
    """Applies `fn(leaf, *leaves)` to every leaf of trees with the same structure."""
    return dm_tree.map_structure(fn, tree, *trees)


def map_with_path(fn: Callable[..., Any], tree: Tree, *trees: Tree) -> Tree:
    """Applies `fn(path, leaf, *leaves)` to every leaf; `path` is dotted, e.g. `"moe.mla.kv_a"`."""
    return dm_tree.map_structure_with_path(lambda path, *leaves: fn(join(path), *leaves), tree, *trees)


def flatten(tree: Tree) -> list[Any]:
    """Returns the leaves in a fixed order (fields as declared, dict keys sorted)."""
    return dm_tree.flatten(tree)


def unflatten_as(structure: Tree, leaves: list[Any]) -> Tree:
    """Builds a tree like `structure` from leaves in the order of `flatten`."""
    return dm_tree.unflatten_as(structure, list(leaves))


def items(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Yields `(path, leaf)` pairs in the order of `flatten`."""
    for path, leaf in dm_tree.flatten_with_path(tree):
        yield join(path), leaf


def to_dict(tree: Tree) -> dict[str, Any]:
    """Returns `{path: leaf}`."""
    return dict(items(tree))


def join(path: tuple[Any, ...]) -> str:
    """Joins the parts of a path with dots."""
    return ".".join(str(p) for p in path)


def path_hash(path: str) -> int:
    """Returns a stable 31-bit hash of a path; it seeds a leaf's random key."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=4).digest(), "little") & 0x7FFFFFFF


def subtree(tree: Tree, path: str) -> Tree:
    """Returns what lies at a dotted path: a leaf or a tree."""
    for part in path.split("."):
        tree = tree[int(part)] if part.isdigit() else tree[part] if isinstance(tree, dict) else getattr(tree, part)
    return tree


def graft(tree: Tree, subtrees: Mapping[str, Tree]) -> Tree:
    """Returns a tree of NamedTuples with others in the place of what lies at some dotted paths.

    >>> from dsv3.nn.linear import MLPParams
    >>> graft(MLPParams(1, 2), {"down": (3, 4)})
    MLPParams(gate_up=1, down=(3, 4))
    """

    def build(node: Tree, path: str) -> Tree:
        if path in subtrees:
            return subtrees[path]
        if not hasattr(node, "_fields"):
            return node
        return type(node)(*(build(getattr(node, name), f"{path}.{name}".lstrip(".")) for name in node._fields))

    return build(tree, "")


def slice_leading(tree: Tree, index: Any) -> Tree:
    """Returns element `index` of every leaf's leading dim: one layer of a stack."""
    return map_leaves(lambda leaf: leaf[index], tree)


def leading_size(tree: Tree) -> int:
    """Returns the size of the leading dim that all leaves share, 0 for a tree without leaves."""
    leaves = flatten(tree)
    return int(leaves[0].shape[0]) if leaves else 0
