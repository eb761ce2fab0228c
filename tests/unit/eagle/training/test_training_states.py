# SPDX-License-Identifier: Apache-2.0
"""What a writer keeps of a text is what a reader would find in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_polyspec.eagle.features import target_parts
from hf_polyspec.eagle.fresh import config_for
from hf_polyspec.eagle.training.dataset import TargetReader, collate, load_corpus
from hf_polyspec.eagle.training.feature_cache import FeatureCache
from hf_polyspec.eagle.training.generation import GenerationSettings, GenerationState, Generator
from hf_polyspec.eagle.training.kept_states import identity, read_seen
from hf_polyspec.eagle.training.prompts import read_prompts
from hf_polyspec.eagle.training.shards import read_progress

SETTINGS = GenerationSettings(
    max_tokens=600, slots=6, max_new_tokens=12, max_prompt_tokens=16, shard_tokens=90, min_words=2, seed=5,
    keep_states=True,
)  # fmt: skip
LAYERS = (2, 3, 3)
WHOSE = identity("tiny", None, "target", LAYERS)


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


def kill(state: GenerationState) -> None:
    if state.samples >= 12:
        raise Killed


@pytest.mark.parametrize("given", [False, True])
def test_kept_states_are_the_readers(
    chat_target: PreTrainedModel,
    chat_tokenizer: PreTrainedTokenizerFast,
    prompts_file: Callable[[int], Path],
    tmp_path: Path,
    given: bool,
) -> None:
    prompts = read_prompts(prompts_file(60)) if given else None

    def generator() -> Generator:
        return Generator(
            chat_target, chat_tokenizer, tmp_path / "texts", SETTINGS, prompts, watched=LAYERS, whose_states=WHOSE
        )

    with pytest.raises(Killed):
        generator().run(report=kill)
    generator().run()
    corpus = load_corpus([tmp_path / "texts"], 64, 0.2, seed=0)
    texts = [*corpus.train, *corpus.validation]
    assert len(texts) > 20
    config, parts = config_for(chat_target), target_parts(chat_target)
    reader = TargetReader(chat_target, config, parts)
    assert tuple(reader.layers) == LAYERS
    expected = {text.number: (text, reader.read(collate([text]))) for text in texts}
    cache = FeatureCache(tmp_path / "cache", reader, texts, config.feature_size, parts.hidden_size, "tiny")
    for number, seen in read_seen(tmp_path / "texts", WHOSE):
        cache.adopt(number, seen)
    assert cache.remembered == len(texts)
    reader.read = None  # type: ignore[assignment,method-assign]
    for text, view in expected.values():
        found = cache.read(collate([text]))
        for name in ("features", "final"):
            kept, read = getattr(found, name)[0, :-1], getattr(view, name)[0, :-1]
            torch.testing.assert_close(kept, read, rtol=2e-3, atol=2e-3)
        assert torch.equal(found.best[0, :-1], view.best[0, :-1])


def test_states_of_others_are_passed_over(
    chat_target: PreTrainedModel, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    Generator(chat_target, chat_tokenizer, tmp_path, SETTINGS, watched=LAYERS, whose_states=WHOSE).run()
    assert len(list(read_seen(tmp_path, WHOSE))) == read_progress(tmp_path).samples
    for other in (
        identity("other", None, "target", LAYERS),
        identity("tiny", "main", "target", LAYERS),
        identity("tiny", None, "int8", LAYERS),
        identity("tiny", None, "target", (1, 3, 3)),
    ):
        assert not list(read_seen(tmp_path, other))
    # states without their shard are those of a killed run
    for shard in tmp_path.glob("shard-*"):
        shard.unlink()
    assert not list(read_seen(tmp_path, WHOSE))


def test_long_texts_are_cut_with_their_states(
    chat_target: PreTrainedModel, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    Generator(chat_target, chat_tokenizer, tmp_path / "texts", SETTINGS, watched=LAYERS, whose_states=WHOSE).run()
    longest = max(len(text) for text in load_corpus([tmp_path / "texts"], 64, 0.2, seed=0).train)
    corpus = load_corpus([tmp_path / "texts"], longest - 4, 0.2, seed=0)
    cut = [text for text in corpus.train if len(text) == longest - 4]
    config, parts = config_for(chat_target), target_parts(chat_target)
    reader = TargetReader(chat_target, config, parts)
    cache = FeatureCache(tmp_path / "cache", reader, corpus.train, config.feature_size, parts.hidden_size, "tiny")
    for number, seen in read_seen(tmp_path / "texts", WHOSE):
        cache.adopt(number, seen)
    assert cache.remembered == len(corpus.train)
    assert cut
    for text in cut:
        batch = collate([text])
        torch.testing.assert_close(cache.read(batch).features, reader.read(batch).features, rtol=2e-3, atol=2e-3)


def test_models_outside_slots_are_refused(chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=45, hidden_size=32, intermediate_size=32, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, max_position_embeddings=64,
    )  # fmt: skip
    sliding = MistralForCausalLM(config).eval()
    with pytest.raises(ValueError, match="keep_states needs a model that can run in slots"):
        Generator(sliding, chat_tokenizer, tmp_path, SETTINGS, watched=LAYERS, whose_states=WHOSE)
