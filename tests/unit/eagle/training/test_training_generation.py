# SPDX-License-Identifier: Apache-2.0
"""Texts are the target's own, and a killed run neither repeats nor loses one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_polyspec.eagle.training.generation import GenerationSettings, GenerationState, Generator
from hf_polyspec.eagle.training.jobs import draw
from hf_polyspec.eagle.training.prompts import prompt_ids, read_prompts
from hf_polyspec.eagle.training.shards import GREEDY, SAMPLED, Sample, read_progress, read_samples, read_shard

SETTINGS = GenerationSettings(
    max_tokens=500, slots=8, max_new_tokens=12, max_prompt_tokens=16, shard_tokens=60, min_words=2, seed=5
)


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


def kill_after(samples: int) -> Callable[[GenerationState], None]:
    def report(state: GenerationState) -> None:
        if state.samples >= samples:
            raise Killed

    return report


def by_number(folder: Path) -> dict[int, Sample]:
    return {sample.number: sample for sample in read_samples(folder)}


@pytest.fixture(scope="module")
def invented(
    chat_target: PreTrainedModel,
    chat_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Sample]:
    """Texts whose prompts the target invented, in a run killed once."""
    folder: Path = tmp_path_factory.mktemp("invented")
    with pytest.raises(Killed):
        Generator(chat_target, chat_tokenizer, folder, SETTINGS).run(report=kill_after(10))
    before = by_number(folder)
    assert 0 < len(before) <= 10
    generator = Generator(chat_target, chat_tokenizer, folder, SETTINGS)
    assert len(generator.filter.seen) == len(before)
    state = generator.run()
    assert generator.complete
    after = by_number(folder)
    assert before.items() <= after.items()
    facts = json.loads((folder / "STATUS").read_text())
    assert facts["phase"] == "finished"
    assert facts["tokens"] == facts["tokens_on_disk"] == state.tokens == read_progress(folder).tokens >= 500
    return list(after.values())


def test_greedy_answers_are_what_generate_gives(chat_target: PreTrainedModel, invented: list[Sample]) -> None:
    greedy = [sample for sample in invented if sample.kind == GREEDY]
    assert len(greedy) > 5
    for sample in greedy:
        prompt = torch.tensor([sample.tokens[: sample.prompt_length]])
        expected = chat_target.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert tuple(expected[0].tolist()) == sample.tokens


def test_answers_end_at_the_end_or_at_the_limit(invented: list[Sample]) -> None:
    assert {sample.kind for sample in invented} == {GREEDY, SAMPLED}
    for sample in invented:
        answer = sample.tokens[sample.prompt_length :]
        assert 1 <= len(answer) <= 12
        assert 2 not in answer[:-1]
        assert len(answer) == 12 or answer[-1] == 2
        # <s> <user> words <end> <bot>
        assert sample.tokens[:2] == (1, 3)
        assert sample.tokens[sample.prompt_length - 2 : sample.prompt_length] == (2, 4)


def test_a_killed_run_goes_on_without_repeating_or_losing(
    chat_target: PreTrainedModel, chat_tokenizer: PreTrainedTokenizerFast, prompts_file: Callable[[int], Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    prompts = read_prompts(prompts_file(60))
    settings = replace(SETTINGS, max_tokens=10**6)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    Generator(chat_target, chat_tokenizer, whole, settings, prompts).run()
    with pytest.raises(Killed):
        Generator(chat_target, chat_tokenizer, broken, settings, prompts).run(report=kill_after(20))
    before = by_number(broken)
    assert 0 < len(before) < 60
    (broken / "shard-000-00099.partial").write_bytes(b"half a shard")
    with pytest.raises(Killed):
        Generator(chat_target, chat_tokenizer, broken, settings, prompts).run(report=kill_after(40))
    Generator(chat_target, chat_tokenizer, broken, settings, prompts).run()
    numbers = [n for path in sorted(broken.glob("shard-*.safetensors")) for n in _numbers(path)]
    assert sorted(numbers) == list(range(60))
    assert by_number(broken) == by_number(whole)


def _numbers(path: Path) -> list[int]:
    return [sample.number for sample in read_shard(path)]


def test_invented_prompts_are_distinct(invented: list[Sample]) -> None:
    prompts = [sample.tokens[: sample.prompt_length] for sample in invented]
    assert len(set(prompts)) == len(prompts)


def test_processes_share_the_prompts(
    chat_target: PreTrainedModel, chat_tokenizer: PreTrainedTokenizerFast, prompts_file: Callable[[int], Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    prompts = read_prompts(prompts_file(11))
    settings = replace(SETTINGS, max_tokens=10**6)
    for rank in range(2):
        generator = Generator(chat_target, chat_tokenizer, tmp_path, settings, prompts, rank=rank, world=2)
        generator.run()
        assert generator.complete
    assert sorted(by_number(tmp_path)) == list(range(11))


def test_prompts_of_a_file_are_answered_as_they_are(
    chat_target: PreTrainedModel, chat_tokenizer: PreTrainedTokenizerFast, prompts_file: Callable[[int], Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    prompts = read_prompts(prompts_file(5))
    settings = replace(SETTINGS, samples_per_prompt=2, max_tokens=10**6, greedy_fraction=1.0)
    Generator(chat_target, chat_tokenizer, tmp_path, settings, prompts).run()
    samples = by_number(tmp_path)
    assert sorted(samples) == list(range(10))
    for number, sample in samples.items():
        assert list(sample.tokens[: sample.prompt_length]) == prompt_ids(chat_tokenizer, prompts[number % 5])
        # a second greedy answer would be the first one again
        assert sample.kind == (GREEDY if number < 5 else SAMPLED)


def test_excluded_prompts_are_left_out(
    chat_target: PreTrainedModel, chat_tokenizer: PreTrainedTokenizerFast, prompts_file: Callable[[int], Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    prompts = read_prompts(prompts_file(6))
    banned = frozenset({" ".join(prompts[2][0]["content"].split())})
    Generator(chat_target, chat_tokenizer, tmp_path, replace(SETTINGS, max_tokens=10**6), prompts, banned).run()
    assert sorted(by_number(tmp_path)) == [0, 1, 3, 4, 5]
    # A conversation that only begins with such a prompt is left out as well.
    longer = [[*prompts[2], {"role": "assistant", "content": "w1"}, {"role": "user", "content": "w2"}], prompts[3]]
    Generator(
        chat_target, chat_tokenizer, tmp_path / "longer", replace(SETTINGS, max_tokens=10**6), longer, banned
    ).run()
    assert sorted(by_number(tmp_path / "longer")) == [1]


STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<user> {{ m['content'] }} <end> {% endfor %}<bot> "
)


@pytest.fixture
def strict(chat_tokenizer: PreTrainedTokenizerFast) -> Iterator[PreTrainedTokenizerFast]:
    """The tokenizer with a template that wants a user first."""
    before, chat_tokenizer.chat_template = chat_tokenizer.chat_template, STRICT
    yield chat_tokenizer
    chat_tokenizer.chat_template = before


def test_a_prompt_that_the_template_refuses_costs_that_prompt_only(
    chat_target: PreTrainedModel, strict: PreTrainedTokenizerFast, prompts_file: Callable[[int], Path], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    prompts = read_prompts(prompts_file(6))
    prompts[2] = [{"role": "assistant", "content": "w1"}, {"role": "user", "content": "w2"}]
    prompts[5] = [{"role": "user", "content": "w1"}, {"role": "user", "content": "w2"}]
    settings = replace(SETTINGS, max_tokens=10**6)
    generator = Generator(chat_target, strict, tmp_path, settings, prompts)
    generator.run()
    assert generator.complete
    assert sorted(by_number(tmp_path)) == [0, 1, 3, 4]
    assert json.loads((tmp_path / "STATUS").read_text())["refused_by_the_template_this_run"] == 2
    told = [record.getMessage() for record in caplog.records]
    assert [line.split(" is left out")[0] for line in told] == ["prompt 3 of the file", "prompt 6 of the file"]
    assert all("roles must alternate" in line for line in told)


def test_many_refusals_are_told_of_a_few_times(
    chat_target: PreTrainedModel, strict: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refused = [{"role": "assistant", "content": "w1"}, {"role": "user", "content": "w2"}]
    prompts = [*([refused] * 20), [{"role": "user", "content": "w3"}]]
    Generator(chat_target, strict, tmp_path, replace(SETTINGS, max_tokens=10**6), prompts).run()
    assert sorted(by_number(tmp_path)) == [20]
    assert len(caplog.records) == 5


def test_a_template_that_refuses_every_prompt_ends_the_run_with_its_words(
    chat_target: PreTrainedModel, strict: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    prompts = [[{"role": "assistant", "content": "w1"}, {"role": "user", "content": "w2"}]] * 3
    with pytest.raises(ValueError, match=r"none of the 3 prompts can be answered: .*roles must alternate"):
        Generator(chat_target, strict, tmp_path, SETTINGS, prompts).run()
    # a mended template is asked again
    strict.chat_template = STRICT.replace("raise_exception('roles must alternate')", "''")
    Generator(chat_target, strict, tmp_path, replace(SETTINGS, max_tokens=10**6), prompts).run()
    assert sorted(by_number(tmp_path)) == [0, 1, 2]


def test_an_invented_prompt_that_the_template_refuses_costs_that_prompt_only(
    chat_target: PreTrainedModel, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plain = chat_tokenizer.chat_template
    unlucky = "{% if 'w7' in messages[0]['content'] %}{{ raise_exception('no sevens') }}{% endif %}"
    chat_tokenizer.chat_template = unlucky + str(plain)
    try:
        generator = Generator(chat_target, chat_tokenizer, tmp_path, replace(SETTINGS, max_tokens=2000))
        generator.run()
    finally:
        chat_tokenizer.chat_template = plain
    assert generator.state.refused > 0
    seven = chat_tokenizer.convert_tokens_to_ids("w7")
    texts = by_number(tmp_path).values()
    assert texts
    assert not any(seven in sample.tokens[: sample.prompt_length] for sample in texts)


def test_a_template_that_takes_no_user_is_refused_before_a_run(
    chat_target: PreTrainedModel, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plain, chat_tokenizer.chat_template = chat_tokenizer.chat_template, "{{ raise_exception('a system first') }}"
    try:
        with pytest.raises(ValueError, match=r"a system first.*prompts must come from a file"):
            Generator(chat_target, chat_tokenizer, tmp_path, SETTINGS)
    finally:
        chat_tokenizer.chat_template = plain


def test_a_deadline_ends_the_run(
    chat_target: PreTrainedModel, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    generator = Generator(chat_target, chat_tokenizer, tmp_path, SETTINGS)
    assert generator.run(deadline=0.0).steps == 0
    assert not generator.complete
    assert json.loads((tmp_path / "STATUS").read_text())["phase"] == "stopped"


def test_drawn_tokens_follow_the_distribution() -> None:
    """Chi-square over 8 ids, 20000 draws; 26.1 is exceeded by a right sampler once in 2000 runs (7 degrees)."""
    logits = torch.tensor([1.0, 0.2, -1.0, 2.0, 0.0, -0.5, 0.7, -math.inf])
    uniforms = torch.rand(20000, generator=torch.Generator().manual_seed(2))
    temperature = 0.7
    drawn, best = draw(logits.expand(20000, -1), uniforms, temperature)
    assert bool((best == logits.argmax()).all())
    counts = torch.bincount(drawn, minlength=8).double()

    def statistic(expected: torch.Tensor) -> float:
        kept = expected > 0
        return float(((counts - expected)[kept] ** 2 / expected[kept]).sum())

    assert counts[7] == 0
    assert statistic((logits / temperature).softmax(-1).double() * 20000) < 26.1
    # the same draws against the distribution at another temperature: caught
    assert statistic(logits.softmax(-1).double() * 20000) > 1000


def test_extreme_uniforms_never_draw_an_impossible_token() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]]).repeat(2, 1)
    drawn, _ = draw(logits, torch.tensor([0.0, 1.0 - 2**-24]), 1.0)
    assert drawn.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("name", "value"), [("slots", 0), ("max_new_tokens", 0), ("greedy_fraction", 1.5), ("temperature", 0.0)]
)
def test_impossible_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        replace(SETTINGS, **{name: value})
