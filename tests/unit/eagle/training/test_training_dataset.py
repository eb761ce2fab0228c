# SPDX-License-Identifier: Apache-2.0
"""Shards, batches, features and their cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from hf_polyspec.eagle.features import target_parts
from hf_polyspec.eagle.fresh import init_for
from hf_polyspec.eagle.training.dataset import (
    Batch,
    Corpus,
    TargetReader,
    Text,
    collate,
    draft_vocabulary,
    load_corpus,
    plan_batches,
    spread,
)
from hf_polyspec.eagle.training.feature_cache import FeatureCache
from hf_polyspec.eagle.training.losses import TargetView
from hf_polyspec.eagle.training.shards import GREEDY, SAMPLED, Sample, ShardWriter, read_progress, read_samples


def text(number: int, length: int, prompt: int = 2) -> Text:
    return Text(number, np.arange(5, 5 + length, dtype=np.int64), prompt, number % 2)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(49152, "U16"), (128256, "U32")])
def test_shards_keep_samples(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    samples = [Sample(4, (1, vocab_size - 1, 7), 2, SAMPLED), Sample(0, (9, 8), 1, 0)]
    writer = ShardWriter(tmp_path, 0, vocab_size, {"fact": "x"})
    for sample in samples:
        writer.add(sample)
    writer.reject(3)
    path = writer.flush()
    assert path is not None
    assert writer.flush() is None
    assert list(read_samples(tmp_path)) == samples[::-1]
    progress = read_progress(tmp_path)
    assert (progress.numbers, progress.samples, progress.tokens, progress.answer_tokens) == ({0, 3, 4}, 2, 5, 2)
    assert dtype.encode() in path.read_bytes()
    # a later writer of the same folder does not write over it
    later = ShardWriter(tmp_path, 0, vocab_size, {})
    later.add(Sample(5, (1, 2), 1, 0))
    assert later.flush() != path


def test_no_texts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no generated texts"):
        list(read_samples(tmp_path))
    assert read_progress(tmp_path / "absent").tokens == 0


def test_texts_keep_their_side_when_more_come(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0, 100, {})
    for number in range(200):
        writer.add(Sample(number, (1, 2, 3, 4, 5), 2, 0))
        if number == 99:
            writer.flush()
            few = load_corpus([tmp_path], 64, 0.2, seed=0)
    writer.flush()
    many = load_corpus([tmp_path], 64, 0.2, seed=0)

    def numbers(corpus: Corpus) -> tuple[set[int], set[int]]:
        return {text.number for text in corpus.train}, {text.number for text in corpus.validation}

    (train, held), (all_train, all_held) = numbers(few), numbers(many)
    assert train <= all_train
    assert held <= all_held
    assert not all_train & all_held
    assert all_train | all_held == set(range(200))
    assert 20 < len(all_held) < 60


def test_every_text_is_in_one_batch_of_every_epoch() -> None:
    dice = np.random.default_rng(0)
    texts = [text(number, int(length)) for number, length in enumerate(dice.integers(5, 60, 100))]
    plans = [plan_batches(texts, 128, seed=3, epoch=epoch) for epoch in range(3)]
    for plan in plans:
        assert sorted(i for batch in plan for i in batch) == list(range(100))
        for batch in plan:
            longest = max(len(texts[i]) for i in batch)
            assert len(batch) == 1 or longest * len(batch) <= 128
        padded = sum(max(len(texts[i]) for i in batch) * len(batch) for batch in plan)
        assert padded < 1.2 * sum(map(len, texts))
    assert plans[0] != plans[1] != plans[2]
    assert plan_batches(texts, 128, seed=3, epoch=1) == plans[1]
    assert plan_batches([text(0, 500), text(1, 5)], 128, 0, 0) in ([[0], [1]], [[1], [0]])


def test_collate_marks_answers() -> None:
    batch = collate([text(0, 5, prompt=2), text(1, 3, prompt=1)])
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]]
    assert batch.real.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert batch.answer.tolist() == [[False, False, True, True, True], [False, True, True, False, False]]
    assert batch.size == 8
    assert collate([text(0, 5)], learn_prompts=True).answer.all()


def test_draft_vocabulary_takes_the_commonest_of_answers() -> None:
    ids = np.array([30, 30, 30, 30, 7, 7, 7, 9, 9, 3], dtype=np.int64)
    texts = [Text(0, ids, 4, 0)]  # the 30s are all prompt
    assert draft_vocabulary(texts, 4, 50, keep=[2]) == [2, 3, 7, 9]
    assert draft_vocabulary(texts, 3, 50, keep=[2]) == [2, 7, 9]
    # low ids fill up
    assert draft_vocabulary(texts, 7, 50, keep=[2]) == [0, 1, 2, 3, 4, 7, 9]
    with pytest.raises(ValueError, match="1 to 50 ids, not 51"):
        draft_vocabulary(texts, 51, 50, keep=[2])


def test_reader_and_cache_give_the_targets_states(
    chat_target: PreTrainedModel, texts_folder: Path, tmp_path: Path
) -> None:
    corpus = load_corpus([texts_folder], 64, 0.2, seed=0)
    head = init_for(chat_target, "eagle3")
    parts = target_parts(chat_target)
    reader = TargetReader(chat_target, head.config, parts, rows_at_once=7)
    batch = collate(corpus.train[:3])
    view = reader.read(batch)
    for row, one in enumerate(batch.texts):
        with torch.no_grad():
            output = chat_target(torch.from_numpy(one.tokens)[None], output_hidden_states=True)
        length = len(one)
        expected = torch.cat([output.hidden_states[i] for i in (2, 3, 3)], dim=-1)
        torch.testing.assert_close(view.features[row, :length], expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(view.final[row, :length], output.hidden_states[-1][0], rtol=1e-4, atol=1e-5)
        asked = batch.answer[row, 1:length]
        assert torch.equal(view.best[row, : length - 1][asked], output.logits[0, :-1].argmax(-1)[asked])

    def cache() -> FeatureCache:
        width = head.config.feature_size
        return FeatureCache(tmp_path, reader, corpus.train, width, parts.hidden_size, "tiny")

    first = cache()
    seen = first.read(batch)
    torch.testing.assert_close(seen.features, view.features * batch.real[..., None], rtol=2e-3, atol=2e-3)
    assert torch.equal(seen.best, view.best * batch.real)
    assert first.remembered == 3
    # a second process or a resumed run finds them, in any company, without asking the target
    again = cache()
    assert again.remembered == 3
    plainly, reader.read = reader.read, None  # type: ignore[assignment,method-assign]
    other = again.read(collate([corpus.train[2], corpus.train[0]]))
    length = len(corpus.train[2])
    assert torch.equal(other.features[0, :length], seen.features[2, :length])
    # beside texts that it does not know, only these are asked for
    questions: list[Batch] = []

    def noted(part: Batch) -> TargetView:
        questions.append(part)
        return plainly(part)

    reader.read = noted  # type: ignore[method-assign]
    mixed = collate(corpus.train[1:5])
    found, expected = again.read(mixed), plainly(mixed)
    assert [part.texts for part in questions] == [tuple(corpus.train[3:5])]
    torch.testing.assert_close(found.features, expected.features * mixed.real[..., None], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found.final, expected.final * mixed.real[..., None], rtol=2e-3, atol=2e-3)
    assert torch.equal(found.best, expected.best * mixed.real)
    # other texts under the same numbers make it worthless
    changed = [Text(one.number, one.tokens[::-1].copy(), one.prompt_length, one.kind) for one in corpus.train]
    renewed = FeatureCache(tmp_path, reader, changed, head.config.feature_size, parts.hidden_size, "tiny")
    assert renewed.remembered == 0


def test_spread_takes_texts_from_all_over() -> None:
    texts = [Text(number, np.arange(4), 1, GREEDY) for number in range(10)]
    assert [text.number for text in spread(texts, 3)] == [0, 4, 8]
    assert spread(texts, 10) == spread(texts, 50) == texts
    assert spread([], 3) == []


def test_folders_add_up_and_keep_their_texts_apart(texts_folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(texts_folder, again)
    one, two = load_corpus([texts_folder], 64, 0.2, seed=0), load_corpus([texts_folder, again], 64, 0.2, seed=0)
    numbers = [text.number for text in [*two.train, *two.validation]]
    assert len(numbers) == len(set(numbers)) == 2 * len([*one.train, *one.validation])
    # a second folder moves no text of the first to the other side
    assert {text.number for text in one.validation} <= {text.number for text in two.validation}
