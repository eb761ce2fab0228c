# SPDX-License-Identifier: Apache-2.0
"""Every compiled function of the package on memory between forbidden pages, at sizes drawn by chance.

Run as a program (`python -m tests.faults.passes SEED ROUNDS`) it says what it is about to do before it does it, so that
whoever started it knows what a SIGSEGV was met in.
"""

from __future__ import annotations

import faulthandler
import random
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .guards import Fence, free, moved

TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Draw:
    """Sizes and numbers of one case.

    Args:
        seed: of both; after: on which side of the memory the forbidden page is.
    """

    def __init__(self, seed: int, after: bool) -> None:
        self.chance, self.after = random.Random(seed), after
        self.numbers = torch.Generator().manual_seed(seed)

    def size(self, most: int) -> int:
        """A size, often one of those around which vector registers and tiles end."""
        near = [size + d for size in (1, 4, 8, 16, 32, 64) if size <= most for d in (-1, 0, 1) if 0 < size + d <= most]
        return self.chance.choice([*near, self.chance.randint(1, most)])

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return moved(torch.randn(shape, generator=self.numbers).to(dtype), after=self.after)

    def bytes(self, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        low = -128 if dtype is torch.int8 else 0
        return moved(torch.randint(low, low + 256, shape, generator=self.numbers).to(dtype), after=self.after)

    def dtype(self) -> torch.dtype:
        return self.chance.choice(TYPES)


def _product(draw: Draw) -> None:
    from hf_polyspec.cpu.compiled.product import CompiledProduct

    dtype, outputs, width = draw.dtype(), draw.size(150), draw.size(150)
    whole = draw.chance.random() < 0.5
    weight = draw.bytes(outputs, width, dtype=torch.int8) if whole else draw.floats(outputs, width, dtype=dtype)
    zeros = draw.floats(outputs).round() if draw.chance.random() < 0.5 else None
    made = CompiledProduct(weight, draw.floats(outputs), draw.floats(outputs), zeros)
    made._panels, made._vectors = (moved(part, after=draw.after) for part in (made._panels, made._vectors))
    found = made(draw.floats(draw.size(70), width, dtype=dtype))
    assert bool(found.isfinite().all())


def _digits(draw: Draw) -> None:
    from hf_polyspec.cpu.compiled.digits import DigitProduct
    from hf_polyspec.cpu.compiled.dots import has_dots

    if not has_dots():
        return
    outputs, width = draw.size(150), draw.size(150)
    zeros = torch.randint(0, 256, (outputs,), generator=draw.numbers)
    made = DigitProduct(
        draw.bytes(outputs, width), zeros, draw.floats(outputs), draw.floats(outputs), draw.chance.choice((1, 2))
    )
    made._codes, made._vectors = (moved(part, after=draw.after) for part in (made._codes, made._vectors))
    found = made(draw.floats(draw.size(70), width, dtype=draw.dtype()))
    assert bool(found.isfinite().all())


def _attention(draw: Draw) -> None:
    from hf_polyspec.cpu.compiled.attention import attend

    dtype, batch, shared = draw.dtype(), draw.size(3), draw.size(3)
    heads, fed, size = shared * draw.size(3), draw.size(20), draw.chance.choice((8, 16, 32, 64, 128))
    seen = fed + draw.chance.choice((0, draw.size(70)))
    queries = draw.floats(batch, heads, fed, size, dtype=dtype)
    keys, values = (draw.floats(batch, shared, seen, size, dtype=dtype) for _ in range(2))
    mask = None
    if draw.chance.random() < 0.7:
        rows = draw.chance.choice((1, batch))
        mask = moved(torch.rand(rows, 1, fed, seen, generator=draw.numbers) < 0.6, after=draw.after)
        if draw.chance.random() < 0.5:
            mask = moved(mask.float().mul(9).sub(9), after=draw.after)
    attend(queries, keys, values, mask, 0.3)


def _norm(draw: Draw) -> None:
    from hf_polyspec.cpu.compiled.blocks import rms_norm

    dtype, rows, width = draw.dtype(), draw.size(40), draw.size(150)
    update = draw.floats(rows, width, dtype=dtype) if draw.chance.random() < 0.5 else None
    rms_norm(draw.floats(rows, width, dtype=dtype), draw.floats(width, dtype=dtype), 1e-5, update)


def _rotate(draw: Draw) -> None:
    from hf_polyspec.cpu.compiled.blocks import rotate

    dtype, batch, fed, heads, shared = draw.dtype(), draw.size(3), draw.size(40), draw.size(4), draw.size(3)
    size, rows = 2 * draw.size(64), draw.chance.choice((1, batch))
    joint = draw.floats(batch, fed, (heads + 2 * shared) * size, dtype=dtype)
    cos, sin = (draw.floats(rows, fed, size, dtype=dtype) for _ in range(2))
    rotate(joint, cos, sin, heads, shared)


def _gate(draw: Draw) -> None:
    from hf_polyspec.cpu.compiled.blocks import gated

    gated(draw.floats(draw.size(40), 2 * draw.size(150), dtype=draw.dtype()))


def _samples(draw: Draw) -> None:
    from hf_polyspec.cpu.compiled.samples import Samples

    parts = [draw.bytes(draw.size(200)) for _ in range(draw.size(5))]
    kept = Samples([(part.data_ptr(), part.numel()) for part in parts])
    assert kept.same()
    parts[-1][-1] ^= 1
    assert not kept.same()


CASES: dict[str, Callable[[Draw], None]] = {
    "product": _product, "digits": _digits, "attention": _attention, "norm": _norm, "rotate": _rotate, "gate": _gate,
    "samples": _samples,
}  # fmt: skip


def cases(seed: int, rounds: int) -> Iterator[tuple[str, int, bool]]:
    """Name, seed and side of every case."""
    for number in range(rounds):
        for name in CASES:
            for after in (True, False):
                yield name, seed * 100_003 + number, after


def main(seed: int, rounds: int) -> None:
    """Run them all; the number of cases is the last line."""
    from hf_polyspec.cpu.compiled import compiles

    faulthandler.enable()
    torch.set_num_threads(1)
    count = 0
    if compiles():
        for name, own, after in cases(seed, rounds):
            print(f"case {name}, seed {own}, page {'after' if after else 'before'}", flush=True)
            with torch.inference_mode(), Fence(after):
                CASES[name](Draw(own, after))
            free()
            count += 1
    print(count)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
