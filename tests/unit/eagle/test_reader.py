# SPDX-License-Identifier: Apache-2.0
"""A head reads published layouts however its class was come by, though it knows nothing of files itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from hf_polyspec.eagle import modeling

WAYS = (
    "from hf_polyspec.eagle.modeling import EagleHead",
    "from hf_polyspec.levels.eagle import EagleHead",
    "import transformers, hf_polyspec; EagleHead = transformers.AutoModel",
)


@pytest.mark.parametrize("way", WAYS)
def test_the_reader_is_there_in_a_fresh_process(tmp_path: Path, way: str) -> None:
    """The folder is read by us: what is missing is told in our words."""
    (tmp_path / "config.json").write_text('{"model_type": "polyspec_eagle"}', encoding="utf-8")
    script = (
        f"{way}\ntry:\n    EagleHead.from_pretrained({str(tmp_path)!r})\nexcept OSError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "has no weights (looked for model.safetensors" in done.stdout


def test_the_head_itself_imports_no_layout_of_files() -> None:
    tree = ast.parse(Path(modeling.__file__).read_text(encoding="utf-8"))
    sources = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [source for source in sources if "formats" in source]
