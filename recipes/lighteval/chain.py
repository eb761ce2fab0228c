# SPDX-License-Identifier: Apache-2.0
"""For `lighteval custom`: which chain stands below the model, and how the model is loaded."""

from hf_polyspec.integrations import lighteval


class Chain(lighteval.PolySpecModel):
    """Fields of `PolySpecConfig`, which are those of lighteval's TransformersModelConfig and the chain's own."""

    settings = {"assistants": "int8+suffix", "dtype": "float32", "batch_size": 1}  # noqa: RUF012 - a recipe is read
