# SPDX-License-Identifier: Apache-2.0
"""lighteval with a chain: its own transformers model, whose generations take assistants.

A file with a class of it is what lighteval's own command line takes (`recipes/lighteval/chain.py`):

    lighteval custom ORG/MODEL chain.py "gsm8k|0"

and a program hands `PolySpecModel(PolySpecConfig(...))` to lighteval's `Pipeline(model=...)`. Likelihoods are computed
by the target as ever: only tasks that generate get quicker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lighteval.models.custom.custom_model import CustomModelConfig
from lighteval.models.transformers.transformers_model import TransformersModel, TransformersModelConfig
from pydantic import Field

from hf_polyspec.generation.doors import generate
from hf_polyspec.generation.options import PolySpecOptions
from hf_polyspec.integrations.standing import standing
from hf_polyspec.quantization import pack as packed
from hf_polyspec.quantization.modules import sharing_copy


class PolySpecConfig(TransformersModelConfig):
    """lighteval's config of a transformers model, and a chain: answers that it kept of another are not taken for its.

    Attributes:
        assistants: names with `+` between them, the slowest level first, or `auto`.
        pack: whether the model multiplies in a faster layout on a CPU (`hf_polyspec.pack`; the same within rounding);
            one that is given stays as it is.
        options: of `generate()` for the chain, such as `{"polyspec_block_size": 12}`.
    """

    assistants: str = "suffix"
    pack: bool = False
    options: dict[str, Any] = Field(default_factory=dict)


class PolySpecModel(TransformersModel):
    """lighteval's transformers model with a chain below it.

    Args:
        config: a `PolySpecConfig`; or what `lighteval custom` makes of a model's name, to which `settings` are added.

    Attributes:
        settings: of the class, for `lighteval custom`: fields of a `PolySpecConfig`.
        passes: of the target while it generated, rows of a batch counted one by one; tokens: that it generated. Answers
            that lighteval had kept from an earlier run are not among them.

    Raises:
        ValueError, TypeError: the chain cannot work; nothing has been evaluated.
    """

    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: PolySpecConfig | CustomModelConfig) -> None:
        config = self._whole(config)
        _check(config)
        super().__init__(config)
        self._put_below()

    @classmethod
    def from_model(cls, model: Any, config: PolySpecConfig, accelerator: Any = None) -> PolySpecModel:
        """Around a model that is already loaded, which stays as it is."""
        _check(config)
        made: PolySpecModel = super().from_model(model, config, accelerator)
        made._put_below()
        return made

    @property
    def passes(self) -> int:
        return self._count.passes

    @property
    def tokens(self) -> int:
        return self._count.tokens

    @classmethod
    def _whole(cls, config: Any) -> PolySpecConfig:
        """A config with everything in it."""
        if isinstance(config, PolySpecConfig):
            return config
        shared = type(config).model_fields.keys() & PolySpecConfig.model_fields.keys()
        return PolySpecConfig(**{name: getattr(config, name) for name in shared} | cls.settings)

    def _put_below(self) -> None:
        target: Any = packed(sharing_copy(self.model)) if self.config.pack else self.model
        chain = standing(target, self.config.assistants)
        self._count = _Count()  # stays when lighteval has its answers and lets the model go
        self.model: Any = _Chained(target, chain, self.config.options, self._count)


@dataclass
class _Count:
    passes: int = 0
    tokens: int = 0


class _Chained:
    """A model whose generate() has a chain."""

    def __init__(self, model: Any, chain: Any, options: dict[str, Any], count: _Count) -> None:
        self.model, self.chain, self.options, self.count = model, chain, options, count

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own would return, which is asked for a dict."""
        # lighteval wants the scores of every step and reads none of them.
        kwargs |= {**self.options, "assistant_models": self.chain, "output_scores": False}
        answer = generate(self.model, *args, **kwargs)
        self.count.passes += answer.polyspec.levels[0].rounds
        self.count.tokens += answer.polyspec.new_tokens
        return answer


def _check(config: PolySpecConfig) -> None:
    """What is known to be wrong before a model is loaded.

    Raises:
        TypeError, ValueError: says what.
    """
    if config.continuous_batching:
        raise ValueError("continuous_batching has no place for a chain; leave it out of the config.")
    strange = sorted(set(config.options) - set(PolySpecOptions.names()))
    if strange:
        raise ValueError(f"options has {', '.join(strange)}; known are {', '.join(PolySpecOptions.names())}.")
    PolySpecOptions(**config.options)
