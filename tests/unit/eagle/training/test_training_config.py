# SPDX-License-Identifier: Apache-2.0
"""Config files: what is written is what is read, and mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_polyspec.eagle.training.config import build_config, load_config

LEAST = {"target": "t", "output": "o"}


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    values = {
        **LEAST,
        "prompts": "p.txt",
        "generation": {"max_tokens": 7, "temperature": 0.5},
        "head": {"algorithm": "eagle1", "draft_vocab_size": None, "overrides": {"fc_bias": True}},
        "optimization": {"learning_rate": 0.001, "epochs": 2},
    }
    config = build_config(values)
    assert (config.head.draft_vocab_size, config.optimization.epochs) == (None, 2)
    path = tmp_path / f"c{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(config.as_dict()))
    else:
        config.save(path)
    assert build_config(load_config(path)) == config


def test_numbers_as_yaml_reads_them() -> None:
    # YAML 1.1 takes 1e-4 for a word, and whole numbers are fine where fractions are meant
    values = yaml.safe_load("{target: t, output: o, optimization: {learning_rate: 1e-4, clip: 1}}")
    plan = build_config(values).optimization
    assert (plan.learning_rate, plan.clip) == (1e-4, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": None}, "does not say 'target'"),
        ({"epochs": 3}, "unknown setting in config: epochs"),
        ({"optimization": {"lr": 1}}, "unknown setting in optimization: lr; known are epochs, steps"),
        ({"optimization": {"epochs": "many"}}, "epochs must be a whole number"),
        ({"optimization": {"epochs": 2.5}}, "epochs must be a whole number"),
        ({"optimization": {"epochs": 0}}, "epochs must be at least 1"),
        ({"optimization": {"row_stride": 0}}, "row_stride must be at least 1"),
        ({"optimization": {"clip": "tight"}}, "clip must be a number"),
        ({"optimization": {"feature_cache": 1}}, "feature_cache must be of type bool"),
        ({"optimization": {"epochs": True}}, "epochs must be of type int"),
        ({"optimization": {"schedule": "step"}}, "schedule must be one of linear, cosine, constant"),
        ({"optimization": {"objective": "kl"}}, "objective must be one of cross_entropy, negative_log_acceptance"),
        ({"optimization": {"greedy_temperature": 0.0}}, "greedy_temperature must be above 0 and at most 1, not 0.0"),
        ({"optimization": {"greedy_temperature": 2}}, "greedy_temperature must be above 0 and at most 1, not 2.0"),
        ({"optimization": {"mixed_precision": "fp8"}}, "mixed_precision must be one of"),
        ({"optimization": {"validation_fraction": 1.0}}, "validation_fraction must be between"),
        ({"optimization": {"learning_rate": 0.0}}, "must be above 0"),
        ({"optimization": {"softmax_ids": 0}}, "softmax_ids must be a whole number of at least 1, not 0"),
        ({"optimization": {"softmax_ids": "all"}}, "softmax_ids must be a whole number of at least 1, not 'all'"),
        ({"optimization": {"softmax_ids": 9}}, "softmax_ids is for heads that score the whole vocabulary"),
        (
            {"optimization": {"softmax_ids": 9}, "head": {"draft_vocab_size": None, "own_lm_head": True}},
            "softmax_ids is for heads that score the whole vocabulary",
        ),
        ({"head": {"algorithm": "eagle2"}}, "algorithm must be one of"),
        ({"generation": {"slots": 0}}, "slots must be at least 1"),
        ({"head": ["eagle3"]}, "head in the config must hold names and values, not list"),
        ({"writer": "gpt"}, "writer must be one of target, int8"),
        ({"texts": ["a", "b"], "validate_on": ["b", "c"]}, "validate_on names c, which is not among the folders"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config({**LEAST, **change})


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="names and values, not list"):
        load_config(tmp_path / "list.yaml")
    for name, content in (("a.yaml", "target: [t\n"), ("a.json", "{")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be parsed: \S"):
            load_config(tmp_path / name)
