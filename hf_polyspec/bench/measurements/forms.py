# SPDX-License-Identifier: Apache-2.0
"""Forms that a model is timed in: a dtype, maybe with what is done to it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ...models.by_name import load_model, read_dtype
from ...quantization import pack, quantize_model

FORMS: dict[str, Callable[[Any], Any]] = {
    "": lambda model: model,
    "pack": pack,
    "int8": lambda model: pack(quantize_model(model, 8)),
    "int8a8": lambda model: pack(quantize_model(model, 8, activation_bits=8)),
    "int4": lambda model: pack(quantize_model(model, 4)),
}
"""By the word behind the dtype; those with integers are packed as well, as chains pack their middles."""

Form = tuple[str, str]


def parse_form(text: str) -> Form:
    """The dtype of a form and what is done to it.

    Raises:
        ArgumentTypeError: either does not exist.
    """
    dtype, _, change = text.partition("+")
    try:
        read_dtype(dtype)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if change not in FORMS:
        words = ", ".join(word for word in FORMS if word)
        raise argparse.ArgumentTypeError(f"{text!r} is no form; after a dtype comes + and one of {words}.")
    return dtype, change


def name_of_form(form: Form) -> str:
    """As `parse_form` reads it."""
    return "+".join(word for word in form if word)


def load_form(model: str, form: Form, device: str = "cpu") -> Any:
    """A model, by its name, in a form, on a device."""
    dtype, change = form
    return FORMS[change](load_model(model, dtype, device))
