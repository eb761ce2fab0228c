# SPDX-License-Identifier: Apache-2.0
"""Pictures for a tiny model of any class: numbers in the form that its `get_image_features` takes, found by trying.

How many tokens a picture stands for is what the features say. No processor of the class is needed, nor its tokenizer.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from .tiny_models import IMAGE
from .tiny_settings import Settings

TEXT = 9
"""Tokens of text behind the pictures of a row, at most."""
_MOST = 120
"""Tokens of a picture, at most: positions of tiny models end at 128."""
_MARKS = {"mm_token_type_ids": torch.long, "token_type_ids": torch.long, "image_embeds_position_mask": torch.bool}
"""Arguments that say which tokens stand for pictures."""
_NAMED: Settings = {"image_token_id": IMAGE, "video_token_id": IMAGE + 1}
_TILES: Settings = {"image_grid_pinpoints": [[8, 8]]}

SEEING: dict[str, Settings] = {
    "aria": {"projector_patch_to_query_dict": {4: 4}},
    "gemma3": {"mm_tokens_per_image": 4},
    "glm_ocr": {"vision_config": {"hidden_size": 32, "out_hidden_size": 32}},
    "granite_docling": {"vision_config": {"scale_factor": 2}},
    "gemma3n": {"vision_soft_tokens_per_image": 4},
    "gemma4_unified": {"vision_config": {"pooling_kernel_size": 1, "mm_embed_dim": 32, "output_proj_dims": 32}},
    "inkling_mm_model": {"vision_config": {"num_hidden_layers": 1}},
    "kosmos-2": {"latent_query_num": 4},
    "kosmos-2.5": {"latent_query_num": 4},
    "llama4": {
        "vision_config": {
            "intermediate_size": 64,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        }
    },
    "kimi_k25": {"projection_hidden_size": 16},
    "molmo2": {"adapter_config": {"text_hidden_size": 32}},
    "mllama": {
        "vision_config": {
            "intermediate_layers_indices": [0],
            "max_num_tiles": 4,
            "num_global_layers": 1,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2]],
            "vision_output_dim": 32,
        },
        "text_config": {"cross_attention_layers": [1]},
    },
    "muse_glimmer": {"out_hidden_size": 64, "projector_hidden_size": 32},
    "paligemma": {"projection_dim": 32},
    "qwen2_vl": {"vision_config": {"embed_dim": 16, "hidden_size": 32}},
    "vipllava": {"vision_feature_layers": [-1, -1]},
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), _NAMED),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), _TILES),
}
"""What single classes need besides small numbers for their pictures to be read, by type."""


class NoPictures(ValueError):
    """No form was found in which a class takes pictures."""


def pictured(model: Any, rows: int, seed: int = 4) -> dict[str, Any]:
    """A prompt for each row: one picture, and text behind it; rows differ in length, padded on the left.

    Args:
        model: a tiny one; rows: of the batch; seed: of the pictures' numbers, not of the text.

    Returns:
        Arguments for generate().

    Raises:
        NoPictures: the class takes none, or not in any form that is known here.
    """
    _waken(model)
    reads = _reader(model)
    failures: list[str] = []
    for given in _forms(model, list(inspect.signature(reads or model.forward).parameters), rows, seed):
        try:
            inputs = {**_prompt(model, rows, _tokens(model, reads, given, rows)), **given}
            _check(model, inputs)
            return inputs
        except TimeoutError:
            raise
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
    raise NoPictures(max(failures, key=failures.count) if failures else "it takes no pictures")


def _reader(model: Any) -> Any:
    found = (getattr(part, "get_image_features", None) for part in (model.base_model, model))
    return next((one for one in found if one is not None), None)


@torch.no_grad()
def _waken(model: Any) -> None:
    """Matrices and gates of zeros, as some classes make them anew, would let nothing through."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if (parameter.dim() > 1 or parameter.numel() == 1) and not parameter.any():
            parameter.copy_(0.3 + 0.3 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def _tokens(model: Any, reads: Any, given: dict[str, Any], rows: int) -> int:
    """How many tokens one picture stands for."""
    if reads is None:
        return 0
    features = reads(**given, return_dict=True)
    found = features.pooler_output if features.get("pooler_output") is not None else features.last_hidden_state
    parts = list(found) if isinstance(found, (list, tuple)) else [found]
    width = model.get_input_embeddings().weight.shape[1]
    count = int(sum(part.numel() for part in parts) // width)
    if any(part.shape[-1] != width for part in parts) or count % rows or not 0 < count // rows <= _MOST:
        raise NoPictures(f"{count} features for {rows} pictures")
    return count // rows


def _prompt(model: Any, rows: int, tokens: int) -> dict[str, Any]:
    """Row r ends with `TEXT` - r tokens of text."""
    ids = torch.randint(3, IMAGE, (rows, tokens + TEXT), generator=torch.Generator().manual_seed(3))
    config, mask = model.config, torch.ones_like(ids)
    named = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    place = next((one for one in named if isinstance(one, int)), IMAGE)
    for row in range(rows):
        mask[row, :row] = 0
        ids[row, :row] = 0
        ids[row, row : row + tokens] = place
        start = getattr(config, "vision_start_token_id", None)
        if isinstance(start, int) and tokens:  # some classes find pictures by what stands before them
            ids[row, row] = start
            ids[row, row + 1 : row + 1 + tokens] = place
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    taken = inspect.signature(model.forward).parameters
    return inputs | {name: (ids == place).to(kind) for name, kind in _MARKS.items() if name in taken and tokens}


@torch.no_grad()
def _check(model: Any, inputs: dict[str, Any]) -> None:
    """Plain generation takes the pictures, and they change what it sees."""

    def seen(given: dict[str, Any]) -> torch.Tensor:
        more = {"output_logits": True, "return_dict_in_generate": True}
        logits: torch.Tensor = model.generate(**given, **more, max_new_tokens=2, do_sample=False).logits[0]
        return logits

    other = {name: 1 - value if name in _NUMBERS else value for name, value in inputs.items()}
    if torch.allclose(seen(inputs), seen(other), atol=1e-4):
        raise NoPictures("pictures change nothing")


_OPTIONAL = ("image_sizes", "aspect_ratio_mask")
_NUMBERS = ("pixel_values", "high_res_pixel_values", "flattened_patches")


def _forms(model: Any, names: list[str], rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Arguments that might be a picture for each row."""
    eyes = next(
        (one for name in ("vision_config", "vq_config") if (one := getattr(model.config, name, None)) is not None),
        model.config,
    )
    sizes = [_number(eyes, ("image_size", "resolution"), 0), 8, 16, 32, 64]
    patch = _number(eyes, ("patch_size", "spatial_patch_size"), 4)
    channels = _number(eyes, ("num_channels", "in_channels", "in_chans"), 3)
    times = _number(eyes, ("temporal_patch_size", "patch_temporal"), 1)
    sides = [s * _number(eyes, ("spatial_merge_size", "merge_size", "merge_kernel_size"), 1) for s in (2, 4)] + [4, 8]
    for side, size in itertools.product(dict.fromkeys(sides), dict.fromkeys(size for size in sizes if size)):
        patches = side * side
        grids = _grids(names, rows, side, size)
        shapes = [
            (rows, channels, size, size),
            (rows, 1, channels, size, size),
            (rows, 2, channels, size, size),
            (rows, 1, 4, channels, size, size),
            (rows * patches, channels * times * patch * patch),
            (rows * patches, 4 * channels * patch * patch),
            (rows, patches, 2 + channels * patch * patch),
            (rows, 2, size, size, channels),
            (rows * patches, channels, patch, patch),
            (rows, patches, channels * patch * patch),
            (1, channels, patch, rows * patches * patch),
        ]
        for shape, more in itertools.product(shapes, grids):
            numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            pixels = {name: numbers for name in _NUMBERS if name in names}
            if pixels:
                yield {**pixels, **more}


def _grids(names: list[str], rows: int, side: int, size: int) -> list[dict[str, Any]]:
    """What goes with the numbers, in the ways in which classes have it."""
    square = torch.tensor([[side, side]] * rows)
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1).reshape(1, -1, 2)
    known = {
        "image_grid_thw": torch.tensor([[1, side, side]] * rows),
        "image_merge_sizes": torch.full((rows,), 2),
        "image_sizes": torch.tensor([[size, size]] * rows),
        "spatial_shapes": square,
        "target_sizes": square,
        "image_position_ids": places.expand(rows, -1, -1).clone(),
        "image_grids": torch.tensor([[side, side, 0, 0]] * rows),
        "image_token_pooling": torch.arange(rows * side * side)[:, None],
        "qformer_input_ids": torch.full((rows, 4), 5),
        "image_attention_mask": torch.ones(rows, TEXT, 1, dtype=torch.long),
        "aspect_ratio_ids": torch.ones(rows, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(rows, 1, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(rows, TEXT, 1, 4, dtype=torch.long),
    }
    given = {name: value for name, value in known.items() if name in names}
    bare = {name: value for name, value in given.items() if name not in _OPTIONAL}
    masks: list[torch.Tensor] = []
    if "pixel_attention_mask" in names:
        masks = [torch.ones(shape, dtype=torch.bool) for shape in ((rows, 1, size, size), (rows, 1), (rows, side**2))]
    return [
        given,
        *([bare] if len(bare) < len(given) else []),
        *({**given, "pixel_attention_mask": mask} for mask in masks),
    ]


def _number(config: Any, names: tuple[str, ...], otherwise: int) -> int:
    for name in names:
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int):
            return value
    return otherwise
