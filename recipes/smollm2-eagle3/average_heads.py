# SPDX-License-Identifier: Apache-2.0
"""A head whose weights are the mean of several, each of which was trained on from the one before.

Such heads lie in one basin, and their mean is better than either (Wortsman et al. 2022, arXiv 2203.05482).

    python average_heads.py run_i/head run_j/head --out averaged
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from hf_polyspec.eagle.modeling import EagleHead


def average(heads: list[EagleHead]) -> EagleHead:
    """The mean, in place of the last head.

    Raises:
        ValueError: heads of other shapes.
    """
    states = [head.state_dict() for head in heads]
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    if any(shape != shapes[-1] for shape in shapes):
        raise ValueError("heads of other shapes have no mean.")
    for name, tensor in states[-1].items():
        if tensor.is_floating_point():
            tensor.copy_(torch.stack([state[name] for state in states]).mean(dim=0))
    return heads[-1]


def main() -> None:
    """Writes the head, in the dtype and with the config of the last one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heads", nargs="+", help="folders")
    parser.add_argument("--out", type=Path, required=True)
    wanted = parser.parse_args()
    heads = [EagleHead.from_pretrained(folder, dtype=torch.float32) for folder in wanted.heads]
    dtype = EagleHead.from_pretrained(wanted.heads[-1]).dtype
    average(heads).to(dtype).save_pretrained(wanted.out)
    print(f"the mean of {len(heads)} heads in {wanted.out}")


if __name__ == "__main__":
    main()
