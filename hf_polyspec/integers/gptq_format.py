# SPDX-License-Identifier: Apache-2.0
"""The tensors of a GPTQ checkpoint, written and read without AutoGPTQ, gptqmodel or AutoRound.

A linear layer `name` with K inputs and N outputs is stored as four tensors (and `name.bias`):

| tensor | shape | content |
| --- | --- | --- |
| `qweight` | `[K * bits / 32, N]` int32 | codes, packed along the inputs, first input in the lowest bits |
| `qzeros` | `[G, N * bits / 32]` int32 | zeros, packed along the outputs |
| `scales` | `[G, N]` float16 | |
| `g_idx` | `[K]` int32 | the group of each input; out of order under act-order (`desc_act`) |

AutoGPTQ stores every zero less one ("v1", `checkpoint_format: gptq`); gptqmodel's `gptq_v2` stores it as it is. Some
tools write the one and say the other; symmetric weights have one possible zero, which tells (`stored_version`).
3-bit codes straddle words: 32 codes lie as one stream of bits in 3 words, which is how all widths are read here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_polyspec.integers.weights import QuantizedWeight, check_bits, group_index

GPTQ_TENSORS = ("qweight", "qzeros", "scales", "g_idx")
_WORD = 32


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned integers along the first axis into 32-bit words, lowest bits first.

    Args:
        codes: `[R, C]` uint8, each below `2 ** bits`; `R * bits` is a multiple of 32.
        bits: Bits a code.

    Returns:
        `[R * bits / 32, C]` int32.

    Raises:
        ValueError: The codes do not fill whole words.
    """
    rows, columns = codes.shape
    if rows * bits % _WORD:
        raise ValueError(f"{rows} codes of {bits} bits do not fill whole 32-bit words.")
    if _WORD % bits == 0:
        per_word = _WORD // bits
        # Widths that divide a word need no bit stream: shift and add, column by column.
        grouped = codes.reshape(rows // per_word, per_word, columns).to(torch.int32)
        shifts = (torch.arange(per_word, device=codes.device, dtype=torch.int32) * bits)[None, :, None]
        return (grouped << shifts).sum(1, dtype=torch.int32)
    positions = torch.arange(bits, device=codes.device)
    stream = ((codes[:, None, :].to(torch.int64) >> positions[None, :, None]) & 1).reshape(-1, _WORD, columns)
    shifts = torch.arange(_WORD, device=codes.device)[None, :, None]
    words = (stream << shifts).sum(1)  # [R * bits / 32, C], unsigned in 64 bits
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """Undo `pack_codes`.

    Args:
        words: `[W, C]` int32.
        bits: Bits a code.

    Returns:
        `[W * 32 / bits, C]` uint8.
    """
    count, columns = words.shape
    if _WORD % bits == 0:
        shifts = (torch.arange(_WORD // bits, device=words.device, dtype=torch.int32) * bits)[None, :, None]
        codes = (words[:, None, :] >> shifts) & ((1 << bits) - 1)
        return codes.reshape(-1, columns).to(torch.uint8)
    shifts = torch.arange(_WORD, device=words.device)[None, :, None]
    stream = (words.to(torch.int64)[:, None, :] >> shifts) & 1
    grouped = stream.reshape(count * _WORD // bits, bits, columns)
    weights = 1 << torch.arange(bits, device=words.device)
    return (grouped * weights[None, :, None]).sum(1).to(torch.uint8)


def storable(shape: tuple[int, int], bits: int) -> bool:
    """Whether a matrix `(N, K)` fills whole words both ways, as the format demands."""
    return all(size * bits % _WORD == 0 for size in shape)


def to_gptq(weight: QuantizedWeight, version: int = 1) -> dict[str, Tensor]:
    """The four tensors of one layer.

    Args:
        weight: The quantised matrix.
        version: 1 for AutoGPTQ's stored zeros (less one), 2 for gptqmodel's.

    Returns:
        `qweight`, `qzeros`, `scales` (float16) and `g_idx`.

    Raises:
        ValueError: The matrix does not fill whole words.
    """
    top = (1 << weight.bits) - 1
    zeros = weight.zeros.to(torch.int32)
    if version == 1:
        zeros = (zeros - 1) & top  # a zero of 0 wraps round, and the reader wraps it back
    return {
        "qweight": pack_codes(weight.codes.t(), weight.bits).contiguous(),
        "qzeros": pack_codes(zeros.to(torch.uint8), weight.bits).t().contiguous(),
        "scales": weight.scales.t().to(torch.float16).contiguous(),
        "g_idx": weight.g_idx.to(torch.int32).contiguous(),
    }


def stored_version(qzeros: Tensor, bits: int) -> int:
    """How the zeros of symmetric weights are stored: 1 if less one, 2 if as they are.

    Args:
        qzeros: As in the checkpoint.
        bits: Bits a code.

    Raises:
        ValueError: They are neither, so the weights are not symmetric.
    """
    found = sorted(set(unpack_codes(qzeros.t().contiguous(), bits).flatten().tolist()))
    middle = 1 << (bits - 1)
    versions = {middle - 1: 1, middle: 2}
    if len(found) != 1 or found[0] not in versions:
        raise ValueError(
            f"the zeros of symmetric {bits}-bit weights are all stored as {middle - 1} or all as {middle}, "
            f"these are from {found[0]} to {found[-1]}"
        )
    return versions[found[0]]


def from_gptq(tensors: Mapping[str, Tensor], bits: int, group_size: int, version: int = 1) -> QuantizedWeight:
    """Read one layer of a GPTQ checkpoint.

    Args:
        tensors: `qweight`, `qzeros`, `scales` and, where the checkpoint has it, `g_idx`.
        bits: Bits a code, from the checkpoint's config.
        group_size: Group size from the config, -1 for one group a row.
        version: 1 if zeros are stored less one, 2 if as they are.

    Returns:
        The quantised matrix.

    Raises:
        ValueError: Shapes that contradict each other or the config.
    """
    check_bits(bits, group_size)
    codes = unpack_codes(tensors["qweight"], bits).t()  # [N, K]
    features, outputs = codes.shape[1], codes.shape[0]
    scales = tensors["scales"].t()
    groups = 1 if group_size == -1 else -(-features // group_size)
    if tuple(scales.shape) != (outputs, groups):
        raise ValueError(
            f"A layer of {features} inputs and {outputs} outputs in groups of {group_size} needs scales of shape "
            f"{(groups, outputs)}, the checkpoint has {tuple(tensors['scales'].shape)}."
        )
    zeros = unpack_codes(tensors["qzeros"].t().contiguous(), bits)  # [N, G]
    if zeros.shape != scales.shape:
        raise ValueError(f"qzeros hold {tuple(zeros.shape)} zeros for {tuple(scales.shape)} scales.")
    if version == 1:
        zeros = (zeros + 1) & ((1 << bits) - 1)
    g_idx = tensors.get("g_idx")
    if g_idx is None or g_idx.numel() == 0:
        g_idx = group_index(features, group_size).to(codes.device)
    return QuantizedWeight(
        codes.contiguous(), scales.contiguous().to(torch.float32), zeros.contiguous(), g_idx, bits, group_size
    )
