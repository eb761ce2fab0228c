# SPDX-License-Identifier: Apache-2.0
"""Classes that vLLM asks for drafts, driven as vLLM drives them: rows move, come and go, and have no names."""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from served_lines import SERVED, Served
from transformers import LlamaForCausalLM

import hf_polyspec
from hf_polyspec.integrations.histories import SPARE, Histories
from hf_polyspec.integrations.vllm import ChainProposer, SuffixProposer

LONGEST = 96
PROMPTS = ([5, 6, 7, 5, 6, 7, 5], [9, 10, 9, 10, 9], [5, 6, 7, 5, 6, 7, 5], [20, 21, 22, 23, 20, 21])


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.tiny("llama")


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("target")
    model.save_pretrained(found)
    return found


def config(folder: Path, tokens: int = 4, **settings: Any) -> Any:
    """What is read of vLLM's."""
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=tokens),
        model_config=SimpleNamespace(
            model=str(folder),
            dtype=torch.float32,
            max_model_len=LONGEST,
            get_vocab_size=lambda: tiny_models.VOCABULARY,
            hf_config=SimpleNamespace(eos_token_id=None),
        ),
        device_config=SimpleNamespace(device=torch.device("cpu")),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        additional_config={"polyspec": settings} if settings else {},
    )


class Engine:
    """Verifies drafts greedily, with requests in rows that are shuffled, put off, and emptied now and then."""

    def __init__(self, model: Any, proposer: Any, seed: int = 0) -> None:
        self.model, self.proposer = model, proposer
        self.chance = random.Random(seed)
        self.passes = 0

    @torch.no_grad()
    def says(self, ids: Sequence[int]) -> list[int]:
        return self.model(torch.tensor([ids])).logits[0].argmax(-1).tolist()

    def run(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        texts = [list(prompt) for prompt in prompts]
        drafts: list[list[int]] = [[] for _ in prompts]
        going = list(range(len(prompts)))
        while going:
            rows = [r for r in going if self.chance.random() < 0.8]
            self.chance.shuffle(rows)
            sampled = []
            for r in rows:
                said = self.says(texts[r] + drafts[r])[len(texts[r]) - 1 :]
                kept = next(
                    (i for i, (a, b) in enumerate(zip(drafts[r], said, strict=False)) if a != b), len(drafts[r])
                )
                sampled.append(said[: kept + 1])
                texts[r] += said[: kept + 1]
                self.passes += 1
            ids = np.zeros((len(prompts) + 2, LONGEST + 8), dtype=np.int32)
            lengths = np.zeros(len(prompts) + 2, dtype=np.int32)
            for i, r in enumerate(rows):
                ids[i, : len(texts[r])], lengths[i] = texts[r], len(texts[r])
            # A row whose prompt is still being read is there and has been given nothing.
            offered = self.proposer.propose([*sampled, []], lengths, ids, slot_mappings=None)
            assert offered[-1] == []
            for r, draft in zip(rows, offered, strict=False):
                drafts[r] = draft
            going = [r for r in going if len(texts[r]) - len(prompts[r]) < new_tokens]
        return [text[len(prompt) :][:new_tokens] for text, prompt in zip(texts, prompts, strict=True)]


def plain(model: Any, new_tokens: int) -> list[list[int]]:
    return [
        model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


def test_a_suffix_match_speeds_up_rows_that_move(model: Any, folder: Path) -> None:
    proposer = SuffixProposer(config(folder))
    engine = Engine(model, proposer)
    assert engine.run(PROMPTS, 40) == plain(model, 40)
    assert engine.passes < 4 * 40 - 8
    # Of two requests with the same words so far, either may be taken for the other, which changes no draft.
    assert 0 <= engine.passes - len(PROMPTS) - proposer.histories.passes <= 4
    assert len(proposer.histories) <= len(PROMPTS) + 2


def test_drafts_of_a_chain_are_those_of_generate(model: Any, folder: Path, tmp_path: Path) -> None:
    """As many passes, all rows together, as `generate()` makes of the same chain over each of them alone."""
    small = tiny_models.noisy(model, 0.03)
    small.save_pretrained(tmp_path)
    proposer = ChainProposer(config(folder, assistants=[str(tmp_path), "suffix"], polyspec_block_size=3))
    engine = Engine(model, proposer)
    assert engine.run(PROMPTS, 40) == plain(model, 40)
    passes = 0
    for prompt in PROMPTS:
        out = hf_polyspec.generate(
            model,
            torch.tensor([prompt]),
            assistant_models=[small, "suffix"],
            max_new_tokens=40,
            do_sample=False,
            polyspec_block_size=3,
            return_dict_in_generate=True,
        )
        passes += out.polyspec.levels[0].rounds
    # The engine reads a prompt without a draft, and cuts what a block has beyond its four tokens.
    assert passes <= engine.passes <= passes + 2 * len(PROMPTS)
    assert engine.passes < 0.6 * 4 * 40


def test_the_middle_is_a_quantised_copy_by_default(model: Any, folder: Path) -> None:
    proposer = ChainProposer(config(folder))
    names = [str(getattr(one, "name_or_path", one.__class__.__name__)) for one in proposer.assistants]
    assert names[0].endswith("int8")
    assert names[1] == "SuffixDrafter"
    assert Engine(model, proposer).run(PROMPTS, 24) == plain(model, 24)


def test_levels_have_run_before_the_first_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled in the first passes, over many tokens and over one, is no request's to wait for."""
    lengths: list[int] = []
    forward = LlamaForCausalLM.forward

    def counted(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    proposer = ChainProposer(config(folder, tokens=8))
    assert len(lengths) > 1
    assert max(lengths) > 4
    assert (len(proposer.histories), proposer.histories.passes, proposer.histories.tokens) == (0, 0, 0)


def test_a_head_drafts_under_the_middle(model: Any, folder: Path, tmp_path: Path) -> None:
    tiny_models.head_for(model).save_pretrained(tmp_path)
    proposer = ChainProposer(config(folder, assistants=["int8", str(tmp_path)]))
    assert Engine(model, proposer).run(PROMPTS, 16) == plain(model, 16)


OURS = [line for line in SERVED if line.speculative["method"] == "custom_class"]


@pytest.mark.parametrize("line", OURS, ids=str)
def test_a_line_of_the_pages_drafts(line: Served, model: Any, folder: Path) -> None:
    """Whether vLLM's own server takes it, tests/vllm sees; here nothing of vLLM is needed."""
    module, _, name = line.speculative["model"].rpartition(".")
    proposer = getattr(import_module(module), name)(
        config(folder, tokens=line.speculative["num_speculative_tokens"], **line.chain)
    )
    engine = Engine(model, proposer)
    assert engine.run(PROMPTS, 24) == plain(model, 24)
    assert engine.passes < 4 * 24


def test_the_pages_show_every_way_into_vllm() -> None:
    assert {line.speculative["model"].rpartition(".")[2] for line in OURS} == {"SuffixProposer", "ChainProposer"}
    [head] = [line for line in SERVED if line not in OURS]
    assert head.export is not None
    words = dict(zip(head.export, head.export[1:], strict=False))
    assert (words["--to"], words["--verifier"]) == ("vllm", head.words[0])


def test_texts_end_within_what_the_engine_can_hold(model: Any, folder: Path) -> None:
    """With one place left nothing fits beside the engine's own token, and beyond it nothing is asked."""
    proposer = SuffixProposer(config(folder, tokens=8))
    text = [5, 6, 7] * 40
    ids = np.array([text[: LONGEST + 8]], dtype=np.int32)
    for length, most in ((LONGEST - 20, 8), (LONGEST - 4, 3), (LONGEST - 1, 0), (LONGEST, 0)):
        [draft] = proposer.propose([[ids[0, length - 1]]], np.array([length]), ids)
        assert len(draft) <= most
        assert bool(draft) == bool(most)


def test_what_becomes_of_a_draft_reaches_the_drafter() -> None:
    told: list[tuple[list[int], list[int]]] = []

    class Told(hf_polyspec.SuffixDrafter):
        def observe(self, drafted: list[int], accepted: list[int]) -> None:
            told.append((drafted, accepted))
            super().observe(drafted, accepted)

    histories = Histories(Told, 48)
    text = [5, 6, 7, 8] * 4
    [draft] = histories.propose([text], [3])
    assert draft == [5, 6, 7]
    text += [5, 6, 7, 8]  # all of it, and the engine's own
    [draft] = histories.propose([text], [3])
    text += [draft[0], 9]  # the first, and another than the second
    histories.propose([text], [3])
    assert told == [([3], [3]), ([len(draft)], [1])]
    assert len(draft) > 1
    assert (histories.passes, histories.tokens) == (2, 6)


def test_requests_that_ended_are_forgotten() -> None:
    ended = []

    class Ended(hf_polyspec.SuffixDrafter):
        def end(self) -> None:
            ended.append(self)
            super().end()

    histories = Histories(Ended, 48)
    for i in range(60):
        histories.propose([[i % 40, 1, 2, i]], [2])
    assert len(histories) == SPARE + 1
    assert len(ended) == 60 - SPARE - 1
    histories.close()
    assert (len(histories), len(ended)) == (0, 60)


def test_two_requests_with_one_text_are_two() -> None:
    histories = Histories(hf_polyspec.SuffixDrafter, 48)
    histories.propose([[1, 2, 1, 2], [1, 2, 1, 2]], [2, 2])
    assert len(histories) == 2
    histories.propose([[1, 2, 1, 2, 3], [1, 2, 1, 2, 4]], [2, 2])
    assert (len(histories), histories.passes, histories.tokens) == (2, 2, 2)


def test_a_vllm_that_hands_over_other_things_is_refused_in_a_sentence(folder: Path) -> None:
    proposer = SuffixProposer(config(folder))
    with pytest.raises(TypeError, match=r"hands custom proposers SimpleNamespace, .* were expected"):
        proposer.propose(SimpleNamespace())
    strange = config(folder)
    del strange.model_config.max_model_len
    with pytest.raises(ImportError, match=r"describes itself otherwise .*max_model_len"):
        SuffixProposer(strange)


def test_settings_nobody_reads_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="has assistant; known are assistants, dtype"):
        ChainProposer(config(folder, assistant=["int8"]))
    with pytest.raises(ValueError, match="has assistants; known are none"):
        SuffixProposer(config(folder, assistants=["int8"]))
    with pytest.raises(ValueError, match='"assistants" must be a list of names'):
        ChainProposer(config(folder, assistants="int8"))
    pipeline = config(folder)
    pipeline.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(ValueError, match="pipeline_parallel_size=1"):
        SuffixProposer(pipeline)
