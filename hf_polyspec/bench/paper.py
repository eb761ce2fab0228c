# SPDX-License-Identifier: Apache-2.0
"""What the paper published (arXiv 2510.26527, Tables 2 and 3): never ours, always shown as the paper's."""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = (
    "Published in the paper (arXiv 2510.26527, Table 2): 7B and 8B models, one NVIDIA A800 80G, batch 1. "
    "Not measured here; its temperature, block size and tree are not stated."
)
LARGER = "Table 3 of the paper, over all tasks: Vicuna-13B 2.69x at 8.62 tokens a pass, LLaMA2-Chat-70B 2.92x at 7.48."
COLUMNS = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag", "overall")


@dataclass(frozen=True)
class PaperRow:
    """A row of Table 2.

    Attributes:
        method: the paper's three models, or EAGLE-2.
        model: the target.
        cells: speed-up and tokens per target pass for each of `COLUMNS`.
    """

    method: str
    model: str
    cells: tuple[tuple[float, float], ...]


def _row(method: str, model: str, numbers: tuple[float, ...]) -> PaperRow:
    return PaperRow(method, model, tuple(zip(numbers[::2], numbers[1::2], strict=True)))


def _ours(model: str, *numbers: float) -> PaperRow:
    return _row("polybasic, 3 models", model, numbers)


def _eagle(model: str, *numbers: float) -> PaperRow:
    return _row("EAGLE-2", model, numbers)


TABLE_2 = (
    _ours("Vicuna-7B", 3.77, 11.22, 3.07, 7.76, 3.01, 10.24, 3.65, 9.53, 4.43, 10.28, 2.98, 10.30, 3.48, 9.88),
    _ours("LLaMA3-8B-Instruct", 3.70, 9.97, 3.39, 8.86, 3.02, 9.38, 3.16, 9.08, 3.87, 10.08, 2.71, 9.24, 3.31, 9.44),
    _ours("LLaMA2-Chat-7B", 4.10, 10.47, 3.46, 9.15, 3.41, 9.86, 3.61, 9.49, 4.02, 9.99, 3.31, 10.08, 3.66, 9.84),
    _ours("Qwen2-7B-Instruct", 3.65, 9.85, 3.15, 8.65, 2.95, 9.15, 3.25, 8.95, 3.85, 9.95, 2.85, 9.35, 3.28, 9.32),
    _eagle("Vicuna-7B", 3.19, 4.76, 2.07, 3.22, 2.59, 3.96, 2.45, 3.71, 3.19, 4.72, 2.15, 3.95, 2.61, 4.34),
    _eagle("LLaMA3-8B-Instruct", 2.69, 3.99, 2.37, 3.53, 2.23, 3.58, 2.21, 3.42, 2.83, 4.20, 2.23, 3.95, 2.44, 3.82),
    _eagle("LLaMA2-Chat-7B", 3.04, 4.48, 2.61, 3.96, 2.50, 4.04, 2.55, 4.05, 3.04, 4.68, 2.40, 4.19, 2.70, 4.30),
    _eagle("Qwen2-7B-Instruct", 2.40, 3.74, 1.45, 2.45, 1.59, 3.06, 1.81, 2.91, 2.63, 4.26, 1.72, 3.27, 1.94, 3.51),
)
