# SPDX-License-Identifier: Apache-2.0
"""Sets the formulas of the pages when the site is built: blocks of `math`, which GitHub sets itself, become MathML."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

_BLOCK = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, **_context: Any) -> str:
    """MkDocs calls this with the text of each page."""
    return _BLOCK.sub(_set, markdown)


def _set(found: re.Match[str]) -> str:
    return f'<div class="formula">{convert(found[1].strip(), display="block")}</div>'
