# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness with a chain: its own Hugging Face model, whose generations take assistants.

    python -m hf_polyspec.integrations.lm_eval run --model polyspec --tasks gsm8k \\
        --model_args pretrained=org/model,assistants=int8+suffix

is lm-eval's command line, which then knows the model `polyspec`; in a program, import this module before
`lm_eval.simple_evaluate(model="polyspec", ...)`. Likelihoods are computed by the target as ever: only tasks that
generate (`generate_until`) get quicker.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from hf_polyspec.generation.doors import attach
from hf_polyspec.generation.options import PolySpecOptions
from hf_polyspec.integrations.standing import standing
from hf_polyspec.quantization import pack as packed
from hf_polyspec.quantization.modules import sharing_copy


@register_model("polyspec")
class PolySpecLM(HFLM):
    """lm-eval's `hf` model with a chain below it.

    Args:
        *args: as for `hf`.
        assistants: names with `+` between them, the slowest level first, `auto`, or a list as
            `generate(assistant_models=...)` takes it.
        pack: whether the model multiplies in a faster layout on a CPU (`hf_polyspec.pack`; the same within rounding);
            one that is given stays as it is.
        **kwargs: as for `hf`; options of `generate()` for the chain, such as `polyspec_block_size`, are taken out.

    Attributes:
        passes: of the target while it generated, rows of a batch counted one by one; tokens: that it generated.

    Raises:
        ValueError, TypeError: the chain cannot work; nothing has been evaluated.
    """

    def __init__(self, *args: Any, assistants: Any = "suffix", pack: bool = False, **kwargs: Any) -> None:
        self.options = {name: kwargs.pop(name) for name in PolySpecOptions.names() if name in kwargs}
        PolySpecOptions(**self.options)
        super().__init__(*args, **kwargs)
        if pack:
            self._model = packed(sharing_copy(self.model))
        self.chain = standing(attach(self.model), assistants)
        self.passes = self.tokens = 0

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        answer: Any = super()._model_generate(
            context, *args, **kwargs, **self.options, assistant_models=self.chain, return_dict_in_generate=True
        )
        self.passes += answer.polyspec.levels[0].rounds
        self.tokens += answer.polyspec.new_tokens
        sequences: torch.Tensor = answer.sequences
        return sequences


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
