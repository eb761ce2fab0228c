# SPDX-License-Identifier: Apache-2.0
"""Token trees as lists of parents: depths, paths, and grafting a branch on one."""

from __future__ import annotations

from collections.abc import Container

ROOT = -1
"""The parent of nodes that follow the context directly."""


def depths(parents: list[int]) -> list[int]:
    """Depth of each node, 1 for those that follow the context; parents come before their children."""
    found: list[int] = []
    for parent in parents:
        found.append(1 if parent == ROOT else found[parent] + 1)
    return found


def path_to(node: int, parents: list[int]) -> list[int]:
    """Nodes from the first after the context to `node`; empty for ROOT."""
    path: list[int] = []
    while node != ROOT:
        path.append(node)
        node = parents[node]
    return path[::-1]


def graft(
    tokens: list[int], parents: list[int], branch: list[int], besides: Container[int] = ()
) -> tuple[list[int], list[int]]:
    """The nodes that a tree lacks for `branch` to be one of its paths, with their parents, in order.

    Args:
        tokens, parents: of the tree's nodes; branch: ids after the context.
        besides: nodes that the path may not lead through.
    """
    nodes = enumerate(zip(tokens, parents, strict=True))
    child = {(parent, token): node for node, (token, parent) in nodes if node not in besides}
    node, shared = ROOT, 0
    while shared < len(branch) and (node, branch[shared]) in child:
        node = child[node, branch[shared]]
        shared += 1
    more = branch[shared:]
    return more, [node, *range(len(tokens), len(tokens) + len(more) - 1)][: len(more)]
