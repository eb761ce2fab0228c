# SPDX-License-Identifier: Apache-2.0
"""How a head is written in this library's own layout: lists of ids beside the weights, and all files or none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_polyspec.eagle.configuration import without_id_lists
from hf_polyspec.eagle.id_lists import id_tensors
from hf_polyspec.storage.folders import filling


class SavedHead(PreTrainedModel):
    """A model with an `EagleHeadConfig` whose lists of ids are tensors of its file."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the head in this library's layout: all of its files or none, `config.json` last.

        Args:
            save_directory: Folder, made if missing; what else is in it stays.
            is_main_process: As in `PreTrainedModel.save_pretrained`.
            state_dict: The weights to write, by default the head's.
            **kwargs: The usual ones of `PreTrainedModel.save_pretrained`.

        Raises:
            OSError: If it cannot be written; an earlier head is then still there unless the last moves had begun.
        """
        weights = self.state_dict() if state_dict is None else state_dict
        everything = {**weights, **id_tensors(self.config)}
        write = super().save_pretrained
        with without_id_lists():
            if not is_main_process or kwargs.get("distributed_checkpoint"):
                # several processes write one folder, each its part
                write(save_directory, is_main_process, everything, **kwargs)
                return
            folder = Path(save_directory)
            if kwargs.get("push_to_hub"):
                kwargs.setdefault("repo_id", folder.resolve().name)
            with filling(folder, replaces=_weights_names(kwargs.get("variant"))) as place:
                write(place, is_main_process, everything, **kwargs)


def _weights_names(variant: str | None) -> list[str]:
    """Patterns of what an earlier head of the same variant may have left: one file, or shards and their index."""
    stem, index = ("model", "index") if variant is None else (f"model.{variant}", f"index.{variant}")
    return [f"{stem}.safetensors", f"{stem}-*-of-*.safetensors", f"model.safetensors.{index}.json"]
