# SPDX-License-Identifier: Apache-2.0
"""Machine code for small models on a CPU, made by numba when it is first needed and kept on disk (the extra `cpu`).

A pass over a handful of tokens reads every weight once and does little with it, so it should take as long as the
memory takes to deliver the weights. torch's own products take two to four times that, for types that a CPU has no
instructions for from the second token on, for bfloat16 where it has them from the first.

`support.py` says whether all this can run, `numbers.py` has numbers of 16 bits, `vectors.py` registers full of them,
`tasks.py` runs a function on torch's own threads. `panels.py`, `pairs.py` and `product.py` multiply floats, `dots.py`,
`digit_vectors.py` and `digits.py` bytes; `tiles.py` and `attention.py` attend, `blocks.py` has the steps between,
`whole_block.py` and `whole_stack.py` put them together, and `samples.py` sees whether weights have changed. Only they
import numba; `compiles()` and `computes()` tell whether they may be.
"""

from .support import DTYPES, compiles, computes

__all__ = ["DTYPES", "compiles", "computes"]
