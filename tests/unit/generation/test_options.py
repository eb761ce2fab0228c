# SPDX-License-Identifier: Apache-2.0
"""Options: read once, in the right order of precedence, refused in one sentence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from hf_polyspec import PolySpecOptions


def prepared(**values: Any) -> GenerationConfig:
    """A generation config as generate() has prepared it: transformers' own defaults filled in."""
    config = GenerationConfig(**values)
    defaults = getattr(GenerationConfig, "_get_default_generation_params", dict)()
    for name, value in defaults.items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    return config


def test_what_was_passed_by_name_wins() -> None:
    options = PolySpecOptions.read(
        {"num_assistant_tokens": 3, "polyspec_block_size": None},
        prepared(num_assistant_tokens=7, polyspec_block_size=4, assistant_confidence_threshold=0.2),
    )
    assert options.num_assistant_tokens == 3
    assert options.polyspec_block_size == 4
    assert options.assistant_confidence_threshold == 0.2


def test_defaults_of_transformers_are_not_taken_for_wishes() -> None:
    options = PolySpecOptions.read({}, prepared())
    assert options == PolySpecOptions()
    assert options.num_assistant_tokens is None


def test_an_assistants_own_config_fills_the_gaps() -> None:
    assistant = SimpleNamespace(generation_config=GenerationConfig(num_assistant_tokens=9))
    assert PolySpecOptions().for_assistant(assistant).num_assistant_tokens == 9
    assert PolySpecOptions(num_assistant_tokens=2).for_assistant(assistant).num_assistant_tokens == 2
    assert PolySpecOptions().for_assistant(SimpleNamespace()).num_assistant_tokens is None


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("num_assistant_tokens", 0, "num_assistant_tokens must be a whole number of at least 1, got 0."),
        ("num_assistant_tokens", 2.5, "num_assistant_tokens must be a whole number of at least 1, got 2.5."),
        ("polyspec_block_size", True, "polyspec_block_size must be a whole number of at least 1, got True."),
        ("polyspec_direct_tokens", -1, "polyspec_direct_tokens must be a whole number of at least 0, got -1."),
        (
            "assistant_confidence_threshold",
            1.5,
            "assistant_confidence_threshold must be a number from 0 to 1, got 1.5.",
        ),
        (
            "num_assistant_tokens_schedule",
            "often",
            "num_assistant_tokens_schedule must be one of 'constant', 'heuristic', 'heuristic_transient', got 'often'.",
        ),
        (
            "polyspec_verification",
            "lenient",
            "polyspec_verification must be one of 'auto', 'coupled', 'token', 'block', got 'lenient'.",
        ),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=name) as error:
        PolySpecOptions.read({name: value}, prepared())
    assert str(error.value) == sentence


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown option 'polyspec_blocksize'; did you mean polyspec_block_size"):
        PolySpecOptions.read({}, prepared(polyspec_blocksize=4))
