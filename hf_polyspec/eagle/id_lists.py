# SPDX-License-Identifier: Apache-2.0
"""A head's long lists of ids: in memory fields of its config, on disk tensors beside its weights.

Thousands of ids in a config.json are thousands of lines that nobody reads and every loader parses. Files that have them
there still load, and are written the new way when they are saved.
"""

from __future__ import annotations

import torch

from hf_polyspec.eagle.configuration import ID_LISTS, EagleHeadConfig

Tensors = dict[str, torch.Tensor]


def id_tensors(config: EagleHeadConfig) -> Tensors:
    """The lists of a config that are there, each as `[N]` of int32, by the names of their fields."""
    listed = {name: getattr(config, name) for name in ID_LISTS}
    return {name: torch.tensor(ids, dtype=torch.int32) for name, ids in listed.items() if ids is not None}


def split_id_lists(tensors: Tensors, where: str) -> tuple[Tensors, dict[str, list[int]]]:
    """Parts a file's tensors into weights and lists of ids.

    Args:
        tensors: everything that the file holds.
        where: what to call the file in an error.

    Returns:
        The weights, and the lists by the names of their fields.

    Raises:
        ValueError: a list is no list of ids.
    """
    lists = {name: tensors[name] for name in ID_LISTS if name in tensors}
    for name, ids in lists.items():
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool)
        if ids.dim() != 1 or not whole or bool((ids < 0).any()):
            raise ValueError(
                f"{name!r} in the weights of {where} must list ids, but is {list(ids.shape)} of {ids.dtype}: the file "
                "is damaged; copy or download it again."
            )
    weights = {name: tensor for name, tensor in tensors.items() if name not in lists}
    return weights, {name: ids.tolist() for name, ids in lists.items()}
