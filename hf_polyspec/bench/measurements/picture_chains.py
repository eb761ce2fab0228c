# SPDX-License-Identifier: Apache-2.0
"""Whether chains make plain generate()'s text of prompts with pictures: rows, batches, several texts each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...generation.doors import generate
from ...levels.suffix import SuffixDrafter
from .tiny_models import noisy, tiny_model
from .tiny_pictures import SEEING, NoPictures, pictured

SAME, OTHER, REFUSED, CRASHED = "same", "other", "refused", "crashed"
_NEW = 10
_RECORDED = {"num_assistant_tokens": 5, "return_dict_in_generate": True}
_WORTH = 0.5
"""Most target passes a token with an exact copy, the one over the prompt included."""


def see(model_type: str, auto: Any) -> tuple[str | None, str]:
    """What becomes of a class's pictures.

    Args:
        model_type: as in its config; auto: the class that makes a model from a configuration.

    Returns:
        "same", "other", "refused" or "crashed", None where there are no pictures to be had; and a note.

    Raises:
        TimeoutError: by the caller's clock, wherever it was heard.
    """
    try:
        model = tiny_model(model_type, auto, SEEING.get(model_type))
        inputs = {rows: pictured(model, rows) for rows in (1, 2, 3)}
    except NoPictures as error:
        return None, str(error)
    except TimeoutError:
        raise
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    runs: list[tuple[str, int, list[Any], dict[str, Any]]] = [
        ("an exact copy", 1, [noisy(model, 0.0)], {}),
        ("three levels, three rows", 3, [noisy(model, 0.02), noisy(model, 0.05, seed=2)], {}),
        ("a suffix drafter, three rows", 3, [SuffixDrafter(min_match=1)], {}),
        (
            "two rows, two texts each",
            2,
            [noisy(model, 0.05)],
            {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
        ),
    ]
    for name, rows, chain, more in runs:
        given = {**inputs[rows], "max_new_tokens": _NEW, "do_sample": False, **more}
        try:
            plain = _drawn(model.generate, given)
        except TimeoutError:
            raise
        except Exception:
            continue  # several texts of a prompt with pictures: not every class can
        try:
            found = _drawn(partial(generate, model, assistant_models=chain), given | _RECORDED)
        except ValueError as error:
            return REFUSED, f"{name}: {error}"
        except Exception as error:
            if isinstance(error.__cause__ or error.__context__ or error, TimeoutError):
                raise TimeoutError("pictures take too long") from error
            return CRASHED, f"{name}: {type(error).__name__}: {error}"
        if found.sequences.tolist() != plain.tolist():
            return OTHER, name
        passes = found.polyspec.levels[0].forward_passes / _NEW
        if rows == 1 and passes > _WORTH:
            return SAME, f"{passes:.2f} passes a token"
    return SAME, ""


def _drawn(make: Callable[..., Any], given: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return make(**given)
