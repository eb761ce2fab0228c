# SPDX-License-Identifier: Apache-2.0
"""How a head is written in this library's own layout: lists of ids beside the weights, and all files or none."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_polyspec.eagle.configuration import without_id_lists
from hf_polyspec.eagle.id_lists import id_tensors


class SavedHead(PreTrainedModel):
    """A model with an `EagleHeadConfig` whose lists of ids are tensors of its file."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the head in this library's layout.

        Args:
            save_directory: Folder, made if missing.
            is_main_process: As in `PreTrainedModel.save_pretrained`.
            state_dict: The weights to write, by default the head's.
            **kwargs: The usual ones of `PreTrainedModel.save_pretrained`.
        """
        weights = self.state_dict() if state_dict is None else state_dict
        everything = {**weights, **id_tensors(self.config)}
        with without_id_lists():
            super().save_pretrained(save_directory, is_main_process, everything, **kwargs)
