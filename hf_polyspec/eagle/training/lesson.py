# SPDX-License-Identifier: Apache-2.0
"""What is trained: a head, fresh or continued, together with its loss."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_polyspec.eagle.configuration import EagleHeadConfig
from hf_polyspec.eagle.features import TargetParts, bind, feature_layers, target_parts
from hf_polyspec.eagle.fresh import config_for, init_for, with_whole_vocabulary
from hf_polyspec.eagle.modeling import EagleHead
from hf_polyspec.eagle.training.config import TrainingConfig
from hf_polyspec.eagle.training.dataset import Corpus, draft_vocabulary
from hf_polyspec.eagle.training.jobs import stop_ids
from hf_polyspec.eagle.training.losses import OBJECTIVES, LossSums, TargetView, Teacher, eagle1_loss, eagle3_loss
from hf_polyspec.eagle.training.slots import cannot_keep, serves_slots
from hf_polyspec.eagle.training.softmax_ids import SoftmaxIds, check_size
from hf_polyspec.eagle.vocabulary import readable_rows
from hf_polyspec.models.by_name import resolve


class LearningHead(nn.Module):
    """A head and its loss in one module, so that one forward call is all a data-parallel wrapper has to see.

    Args:
        head: the head.
        teacher: the target's distribution over the head's ids.
        config: the run.
    """

    def __init__(self, head: EagleHead, teacher: Teacher, config: TrainingConfig) -> None:
        super().__init__()
        self.head = head
        self.lesson = (teacher,)  # in a tuple: not a part of what is trained and saved
        self.config = config

    def forward(
        self,
        tokens: torch.Tensor,
        answer: torch.Tensor,
        view: TargetView,
        among: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
        first: int = 0,
    ) -> LossSums:
        """The loss of a batch, see `eagle1_loss` and `eagle3_loss`; `keep` and `first` are for the latter."""
        plan = self.config.optimization
        objective = OBJECTIVES[plan.objective]
        if self.head.config.algorithm == "eagle1":
            weights = {"feature_weight": plan.feature_weight, "token_weight": plan.token_weight}
            return eagle1_loss(
                self.head, self.lesson[0], tokens, answer, view, **weights, among=among, objective=objective
            )
        steps, decay = plan.steps, plan.step_decay
        return eagle3_loss(
            self.head, self.lesson[0], tokens, answer, view, steps, decay, among, keep, first, objective=objective
        )


def build_head(
    config: TrainingConfig, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus
) -> EagleHead:
    """Makes the head a run trains, in float32 whatever the target's type: small updates vanish in 16 bits.

    Args:
        config: the run.
        target: the frozen model.
        tokenizer: the target's.
        corpus: the texts, whose commonest ids a fresh head with a vocabulary of its own shall score.

    Returns:
        The head, bound to the target, on its device.

    Raises:
        ValueError: the head does not fit the target.
    """
    settings, parts = config.head, target_parts(target)
    if config.init_from is not None:
        return _continued(config.init_from, settings.draft_vocab_size is None, target)
    ids = None
    if settings.draft_vocab_size is not None and settings.draft_vocab_size < parts.vocab_size:
        keep = sorted(stop_ids(target, tokenizer))
        ids = draft_vocabulary(corpus.train, settings.draft_vocab_size, parts.vocab_size, keep)
    head = init_for(
        target,
        settings.algorithm,
        ids,
        own_lm_head=settings.own_lm_head,
        dtype=torch.float32,
        **settings.overrides,
    )
    start_norm(head, target)
    return head


def _continued(source: str, whole: bool, target: PreTrainedModel) -> EagleHead:
    """A head to go on training, scoring the whole vocabulary if asked."""
    head: EagleHead = EagleHead.from_pretrained(resolve(source)[0], dtype=torch.float32)
    if whole:
        head = with_whole_vocabulary(head)
    bind(head, target).to(target.device).train()
    return head


def check_lesson(config: TrainingConfig, target: PreTrainedModel) -> None:
    """Finds what `build_head` and `build_softmax_ids` would refuse, before hours are spent on texts.

    Args:
        config: the run.
        target: the frozen model.

    Raises:
        ValueError, TypeError, OSError: the head to go on with cannot be loaded or does not fit, or there are no such
            ids to compare head and target on, or states are to be kept of a model that cannot run in slots.
    """
    if config.init_from is not None:
        _continued(config.init_from, config.head.draft_vocab_size is None, target)
    if config.generation.keep_states and config.texts is None and not serves_slots(target):
        raise cannot_keep(target)
    wanted, parts = config.optimization.softmax_ids, target_parts(target)
    if wanted is not None:
        check_size(wanted, parts.vocab_size)
        readable_rows(parts.lm_head, torch.zeros(1, dtype=torch.long))


def layers_to_read(config: TrainingConfig, target: PreTrainedModel) -> list[int]:
    """Which entries of the target's `hidden_states` the head of a run reads."""
    settings = config.head
    if config.init_from is not None:
        head = EagleHeadConfig.from_pretrained(resolve(config.init_from)[0])
    else:
        head = config_for(target, settings.algorithm, **settings.overrides)
    return feature_layers(head, target_parts(target).num_layers)


def build_softmax_ids(config: TrainingConfig, corpus: Corpus, parts: TargetParts) -> SoftmaxIds | None:
    """The ids that head and target are compared on, None for all.

    Raises:
        ValueError: more are wanted than the target has.
    """
    plan = config.optimization
    return None if plan.softmax_ids is None else SoftmaxIds(corpus.train, plan.softmax_ids, parts.vocab_size, plan.seed)


@torch.no_grad()
def start_norm(head: EagleHead, target: PreTrainedModel) -> None:
    """Starts a head's final norm where the target's stands, since both stand before the same output rows.

    Args:
        head: a fresh head.
        target: its target; nothing happens where it has no such norm.
    """
    weight = getattr(getattr(target.base_model, "norm", None), "weight", None)
    if head.config.final_norm and torch.is_tensor(weight) and weight.shape == head.norm.weight.shape:
        head.norm.weight.copy_(weight)
