# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests: tiny models, built once a session and never changed (law 5 says so)."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# What transformers and evaluate load from a folder of code they copy first, in place, and they look once where to: a
# process that runs beside this one might load what is half there.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")

import pytest
import torch
from transformers import PreTrainedModel

import hf_polyspec

with contextlib.suppress(ImportError):  # which an environment for tests/vllm alone may lack
    from hypothesis import HealthCheck, settings

    # The same examples every time, and as long as they take: a test that fails now and then tells nobody anything.
    settings.register_profile(
        "suite", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("suite")

# Modules that several test files share lie beside this one.
sys.path.insert(0, str(Path(__file__).parent))
import tiny_models

SEED = 271_828
"""Where torch's default generator stands when a test begins; no test's own choice."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What fixtures of several tests draw is the same whatever ran before, which no two runs of a suite agree in."""
    torch.manual_seed(SEED)


def pytest_unconfigure() -> None:
    """The folder of this process goes with it."""
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices are slower on many threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """So is what the test draws, whichever of those fixtures were there already."""
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """`tiny(model_type, attention=..., **settings)`: a random model."""
    return tiny_models.tiny


@pytest.fixture(scope="session")
def noisy() -> Callable[..., PreTrainedModel]:
    """`noisy(model, scale, seed)`: a copy that is right now and then."""
    return tiny_models.noisy


@pytest.fixture(scope="session")
def target() -> PreTrainedModel:
    """A tiny Llama."""
    return tiny_models.tiny("llama")


@pytest.fixture(scope="session")
def middle(target: PreTrainedModel) -> PreTrainedModel:
    """A copy of the target that agrees with it most of the time."""
    return tiny_models.noisy(target, 0.03, seed=1)


@pytest.fixture(scope="session")
def drafter(target: PreTrainedModel) -> PreTrainedModel:
    """A copy of the target that agrees with it less often."""
    return tiny_models.noisy(target, 0.05, seed=2)


@pytest.fixture
def enabled() -> Iterator[None]:
    """`generate()` takes `assistant_models` during the test."""
    hf_polyspec.enable()
    yield
    hf_polyspec.disable()


@pytest.fixture
def generate(enabled: None, middle: PreTrainedModel, drafter: PreTrainedModel) -> Callable[..., Any]:
    """`generate(model, **options)`: through a chain of three with small blocks, unless the options say otherwise."""

    def call(model: PreTrainedModel, **options: Any) -> Any:
        chain = {"assistant_models": [middle, drafter], "polyspec_block_size": 4, "num_assistant_tokens": 3}
        return model.generate(**{**chain, **options})

    return call
