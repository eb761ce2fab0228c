# SPDX-License-Identifier: Apache-2.0
"""From shards of texts to training batches with the frozen target's features.

Which texts share a batch, and in which order batches come, follows from the seed and the epoch alone: a resumed run
continues in the middle of an epoch without keeping a list of what it has seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from hf_polyspec.eagle.configuration import EagleHeadConfig
from hf_polyspec.eagle.features import TargetParts, feature_layers, select_features
from hf_polyspec.eagle.training.losses import TargetView
from hf_polyspec.eagle.training.prompts import sample_random
from hf_polyspec.eagle.training.shards import read_samples


@dataclass(frozen=True)
class Text:
    """One training text.

    Args:
        number: the sample's number in its run.
        tokens: `[n]` ids.
        prompt_length: ids of the prompt.
        kind: `GREEDY` or `SAMPLED`.
    """

    number: int
    tokens: npt.NDArray[np.int64]
    prompt_length: int
    kind: int

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Corpus:
    """The texts of a run.

    Args:
        train: texts to learn from.
        validation: texts held out.
    """

    train: list[Text]
    validation: list[Text]

    def answer_tokens(self) -> int:
        """Tokens of the training texts' answers."""
        return sum(len(text) - text.prompt_length for text in self.train)


@dataclass(frozen=True)
class Batch:
    """Texts side by side, padded on the right.

    Args:
        tokens: `[B, T]` ids.
        real: `[B, T]`, whether a position holds a token of the text.
        answer: `[B, T]`, whether the token there belongs to the answer.
        kinds: `[B]`, `GREEDY` or `SAMPLED`.
        texts: the texts, in order.
    """

    tokens: torch.Tensor
    real: torch.Tensor
    answer: torch.Tensor
    kinds: torch.Tensor
    texts: tuple[Text, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.tokens.to(device),
            self.real.to(device),
            self.answer.to(device),
            self.kinds.to(device),
            self.texts,
        )

    def only(self, rows: Sequence[int]) -> Batch:
        """Some of its texts, no wider than they need.

        Args:
            rows: which, one at least.
        """
        texts = tuple(self.texts[row] for row in rows)
        width, picked = max(len(text) for text in texts), torch.tensor(rows, device=self.tokens.device)
        tokens, real, answer = (part[picked, :width] for part in (self.tokens, self.real, self.answer))
        return Batch(tokens, real, answer, self.kinds[picked], texts)

    @property
    def size(self) -> int:
        """Tokens, padding not counted."""
        return sum(len(text) for text in self.texts)


# more texts than any folder will hold; keeps the numbers of several folders apart
_FOLDER_BITS = 40


def load_corpus(folders: Sequence[Path], max_length: int, validation_fraction: float, seed: int) -> Corpus:
    """Reads the shards of one or more folders and sets some texts aside.

    A text's side depends on its number alone, so texts added later never move one from validation to training.

    Args:
        folders: folders of shards; the order counts, since a text is known by its folder's place and its number.
        max_length: longer texts are cut.
        validation_fraction: share of texts held out, at least one of them.
        seed: decides which.

    Raises:
        ValueError: there are not enough texts for both sides.
    """
    train: list[Text] = []
    held: list[Text] = []
    for place, folder in enumerate(folders):
        for sample in read_samples(folder):
            tokens = np.array(sample.tokens[:max_length], dtype=np.int64)
            if len(tokens) < sample.prompt_length + 2 or len(tokens) < 3:
                continue  # no room to guess even one token of the answer
            number = text_number(place, sample.number)
            text = Text(number, tokens, sample.prompt_length, sample.kind)
            aside = sample_random(seed, number, "split").random() < validation_fraction
            (held if aside else train).append(text)
    if not held and len(train) > 1:
        held.append(train.pop())
    if not train or not held:
        where = " and ".join(str(folder) for folder in folders)
        raise ValueError(f"{where} holds too few texts to train on and to validate with; generate more")
    return Corpus(train, held)


def text_number(place: int, number: int) -> int:
    """What a sample is known by among several folders: its folder's place in the list and its own number."""
    return (place << _FOLDER_BITS) + number


def place_of(text: Text) -> int:
    """Its folder's place among those given to `load_corpus`."""
    return text.number >> _FOLDER_BITS


def spread(texts: Sequence[Text], most: int) -> list[Text]:
    """So many of the texts at most, from all over.

    Args:
        texts: in order of their folders.
        most: at least 1.
    """
    return list(texts[:: -(-len(texts) // most)]) if texts else []


def plan_batches(texts: Sequence[Text], batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Groups texts of similar length, in random order.

    Args:
        texts: the texts.
        batch_tokens: tokens in a batch, padding included, at most; a longer text is a batch of its own.
        seed: the run's seed.
        epoch: number of the epoch.

    Returns:
        Batches as indices into `texts`; each text is in exactly one.
    """
    dice = np.random.default_rng([seed, epoch])
    lengths = np.array([len(text) for text in texts])
    # a random nudge mixes neighbours anew every epoch, at the cost of little padding
    order = np.argsort(lengths * dice.uniform(0.95, 1.05, len(lengths)), kind="stable")
    batches: list[list[int]] = []
    current: list[int] = []
    longest = 0
    for index in order.tolist():
        longest = max(longest, int(lengths[index]))
        if current and longest * (len(current) + 1) > batch_tokens:
            batches.append(current)
            current, longest = [], int(lengths[index])
        current.append(index)
    batches.append(current)
    dice.shuffle(batches)
    return batches


def collate(texts: Sequence[Text], learn_prompts: bool = False) -> Batch:
    """Puts texts side by side.

    Args:
        texts: the texts.
        learn_prompts: whether prompts count as answers, sensible where the target wrote them too.
    """
    longest = max(len(text) for text in texts)
    tokens = torch.zeros(len(texts), longest, dtype=torch.long)
    real = torch.zeros(len(texts), longest, dtype=torch.bool)
    answer = torch.zeros_like(real)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.from_numpy(text.tokens)
        real[row, : len(text)] = True
        answer[row, (0 if learn_prompts else text.prompt_length) : len(text)] = True
    kinds = torch.tensor([text.kind for text in texts])
    return Batch(tokens, real, answer, kinds, tuple(texts))


class TargetReader:
    """Runs the frozen target over texts and keeps what training needs.

    Args:
        target: the model the head is for; its parameters are frozen here.
        config: the head's config, which says what it reads.
        parts: the target's modules.
        rows_at_once: positions scored with the full vocabulary at a time.
    """

    def __init__(
        self, target: PreTrainedModel, config: EagleHeadConfig, parts: TargetParts, rows_at_once: int = 2048
    ) -> None:
        self.target = target.eval().requires_grad_(False)
        self.parts = parts
        self.layers = feature_layers(config, parts.num_layers)
        self.rows_at_once = rows_at_once

    @torch.no_grad()
    def read(self, batch: Batch) -> TargetView:
        """What the target says about a batch.

        Args:
            batch: texts on the target's device.
        """
        output = self.target(
            input_ids=batch.tokens,
            attention_mask=batch.real.long(),
            use_cache=False,
            output_hidden_states=True,
            logits_to_keep=1,
        )
        states = output.hidden_states
        features = select_features(states, self.layers)  # [B, T, F]
        final = states[-1]  # [B, T, H_t], after the final norm
        # only positions whose next token is to be learned; scale and soft cap do not move the maximum
        asked = torch.zeros_like(batch.real)
        asked[:, :-1] = batch.answer[:, 1:]
        best = torch.zeros_like(batch.tokens)
        pieces = final[asked].split(self.rows_at_once)
        best[asked] = torch.cat([self.parts.lm_head(rows).argmax(dim=-1) for rows in pieces])
        return TargetView(features, final, best)


def draft_vocabulary(texts: Sequence[Text], size: int, vocab_size: int, keep: Sequence[int]) -> list[int]:
    """The ids a head shall score: the most frequent ones of the answers.

    Args:
        texts: training texts.
        size: how many ids.
        vocab_size: the target's ids.
        keep: ids always included, such as the end of a text.

    Returns:
        Distinct ids in ascending order. Where the texts use fewer, low ids fill up: in byte-pair vocabularies they
        are the oldest merges, hence the commonest.

    Raises:
        ValueError: more ids are wanted than there are.
    """
    if not len(set(keep)) <= size <= vocab_size:
        raise ValueError(f"the draft vocabulary must have {len(set(keep))} to {vocab_size} ids, not {size}")
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(text.tokens[text.prompt_length :].tolist())
    # ties by id, so that the same texts give the same vocabulary everywhere
    ranked = sorted(counts, key=lambda token: (-counts[token], token))
    chosen = list(dict.fromkeys([*keep, *ranked, *range(vocab_size)]))[:size]
    return sorted(chosen)
