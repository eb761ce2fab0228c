# SPDX-License-Identifier: Apache-2.0
"""`EagleHead.from_pretrained`: finding out what a checkpoint is, and accounting for every one of its keys."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_polyspec.eagle.configuration import EagleHeadConfig

if TYPE_CHECKING:
    from hf_polyspec.eagle.modeling import EagleHead


def load_head(
    cls: type[EagleHead],
    base: Callable[..., Any],
    source: str | os.PathLike[str] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> EagleHead:
    """Loads a head of any known layout through transformers' own loader; see `EagleHead.from_pretrained`."""
    want_info = kwargs.pop("output_loading_info", False)
    head, info = base(source, *args, output_loading_info=True, **kwargs)
    refuse_unaccounted(info, source)
    return (head, info) if want_info else head


def refuse_unaccounted(info: dict[str, Any], source: object) -> None:
    """Raises if a load left weights without keys or keys without weights.

    Args:
        info: The loading info of `PreTrainedModel.from_pretrained`.
        source: What was loaded, for the message.

    Raises:
        ValueError: Listing every missing, unexpected and misshapen key.
    """
    complaints = [
        f"{kind} keys: {', '.join(sorted(str(key) for key in info[name]))}"
        for kind, name in (
            ("missing", "missing_keys"),
            ("unexpected", "unexpected_keys"),
            ("misshapen", "mismatched_keys"),
        )
        if info.get(name)
    ]
    if complaints:
        raise ValueError(f"The EAGLE head {str(source)!r} does not add up; {'; '.join(complaints)}.")


__all__ = ["EagleHeadConfig", "load_head", "refuse_unaccounted"]
