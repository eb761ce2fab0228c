# SPDX-License-Identifier: Apache-2.0
"""`EagleHead.from_pretrained`: one reader for every layout, then transformers' loader for the rest."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

from hf_polyspec.eagle.configuration import EagleHeadConfig
from hf_polyspec.eagle.formats.files import HUB_ARGUMENTS, read_config, read_tensors
from hf_polyspec.eagle.formats.layouts import account, check_mapping, convert
from hf_polyspec.eagle.id_lists import split_id_lists
from hf_polyspec.eagle.modeling import EagleHead
from hf_polyspec.storage.checkpoints import loading

# Arguments of from_pretrained that have no say in how a head is read.
_IDLE = ("trust_remote_code", "weights_only", "_from_auto", "_from_pipeline", "adapter_kwargs")


def load_head(
    base: Callable[..., Any],
    source: str | os.PathLike[str] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Loads a head of any known layout; see `EagleHead.from_pretrained`.

    Args:
        base: `PreTrainedModel.from_pretrained`, bound to the class.
        source: Folder or hub id, or `None` with `config` and `state_dict` given.
        args: Positional arguments for `base`.
        kwargs: Keyword arguments of `from_pretrained`.

    Returns:
        The head, or the head and a loading report, as `base` returns it.

    Raises:
        ValueError: If the checkpoint does not add up, or a file of it is damaged; the sentence names it.
    """
    if source is None:
        return base(None, *args, **kwargs)
    name = os.fspath(source)
    hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
    for key in (*HUB_ARGUMENTS, *_IDLE):
        kwargs.pop(key, None)
    prefer_safetensors = kwargs.pop("use_safetensors", None) is not False
    variant = kwargs.pop("variant", None)
    given = kwargs.pop("config", None)
    overrides = {key: kwargs.pop(key) for key in EagleHeadConfig.field_names() if key in kwargs}
    with loading(name):
        written = read_config(name, hub)
        tensors = read_tensors(name, hub, prefer_safetensors, variant)
    if written.get("model_type") == EagleHeadConfig.model_type:
        tensors, lists = split_id_lists(tensors, name)
        config = _with_lists(given, lists) or EagleHeadConfig(**{**lists, **written, **overrides})
        account(config, tensors)
        if config.maps_vocabulary:
            check_mapping(tensors["d2t"], config)
    else:
        config, tensors = convert(written, tensors, overrides)
    loaded = base(None, *args, config=config, state_dict=tensors, **kwargs)
    head: EagleHead = loaded[0] if isinstance(loaded, tuple) else loaded
    head.name_or_path = name
    head.config._name_or_path = name
    return loaded


def _with_lists(given: Any, lists: dict[str, list[int]]) -> EagleHeadConfig | None:
    """The caller's config with those of the file's lists that it lacks, or `None` where the caller gave none."""
    if not isinstance(given, EagleHeadConfig):
        return None
    config = copy.copy(given)
    for field, ids in lists.items():
        if getattr(config, field) is None:
            setattr(config, field, ids)
    return config
