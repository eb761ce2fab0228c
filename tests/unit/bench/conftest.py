# SPDX-License-Identifier: Apache-2.0
"""One small run that several tests look at: invented questions, a tiny target and a noisy copy of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_support import bench, run_arguments, write_questions
from tiny_checkpoints import save_pair


@pytest.fixture(scope="session")
def bench_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Names for the command line: target, small, questions."""
    root = tmp_path_factory.mktemp("bench")
    target, small = save_pair(root)
    return {"target": str(target), "small": str(small), "questions": str(write_questions(root / "questions.jsonl"))}


@pytest.fixture(scope="session")
def bench_run(bench_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, said = bench(*run_arguments(bench_models, folder), "--markdown", str(folder.parent / "page.md"))
    assert code == 0, said
    return folder
