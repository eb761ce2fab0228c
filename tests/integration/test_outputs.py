# SPDX-License-Identifier: Apache-2.0
"""What comes out besides the text: streamed tokens, scores, logits, hidden states, attentions, telemetry."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, noisy, prompts, tiny
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

NEW = 12
LENGTH = 9


class Recording(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.puts: list[torch.Tensor] = []
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        assert not self.ends, "something came after the end"
        self.puts.append(value.clone())

    def end(self) -> None:
        self.ends += 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(BPE({f"{chr(97 + i % 26)}{'' if i < 26 else chr(65 + i - 26)} ": i for i in range(VOCABULARY)}, []))
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_streamer_gets_what_plain_generation_gives_it(target, generate, batch, eos):
    options = {**prompts(batch), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 2}
    if eos:
        options["eos_token_id"] = target.generate(**options)[0, LENGTH + 5].item()
    streamers = Recording(), Recording()
    target.generate(**options, streamer=streamers[0])
    ours = generate(target, **options, streamer=streamers[1])
    puts = [[put.tolist() for put in streamer.puts] for streamer in streamers]
    assert puts[1] == puts[0]
    assert streamers[1].ends == 1
    assert torch.stack(streamers[1].puts[1:], dim=1).tolist() == ours[:, LENGTH:].tolist()


def test_a_text_streamer_prints_the_same_text(target, generate, tokenizer, capsys):
    options = {**prompts(1), "max_new_tokens": NEW, "do_sample": False}
    target.generate(**options, streamer=TextStreamer(tokenizer))
    plain = capsys.readouterr().out
    generate(target, **options, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == plain
    assert len(plain.split()) >= NEW


def test_a_text_iterator_streamer_in_a_thread(target, generate, tokenizer):
    options = {**prompts(1), "max_new_tokens": NEW, "do_sample": False}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=240)
    thread = threading.Thread(target=lambda: generate(target, **options, streamer=streamer))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(target.generate(**options)[0, LENGTH:])


def compare(ours: tuple[Any, ...], plain: tuple[Any, ...], look: Any) -> None:
    """Per step and layer, after `look(tensor, step)` has selected what means something."""
    assert len(ours) == len(plain)
    for step, (left, right) in enumerate(zip(ours, plain, strict=True)):
        lefts = left if isinstance(left, tuple) else (left,)
        rights = right if isinstance(right, tuple) else (right,)
        for a, b in zip(lefts, rights, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(look(a, step), look(b, step), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_everything_in_the_output(enabled, kind, batch, use_cache):
    """Same class and fields, lengths, shapes, and values wherever a token is and a row goes on."""
    windows = {"sliding_window": 6, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    model = tiny(kind, attention="eager", **(windows if kind == "gemma3_text" else {}))
    options = {**prompts(batch), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 2, "use_cache": use_cache}
    options["eos_token_id"] = model.generate(**options)[-1, LENGTH + 6].item()
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options |= {"output_hidden_states": True, "output_attentions": True, "repetition_penalty": 1.1}
    plain = model.generate(**options)
    ours = model.generate(**options, assistant_models=[noisy(model, 0.03), noisy(model, 0.05)], polyspec_block_size=4)
    assert type(ours) is type(plain)
    assert set(plain.keys()) <= set(ours.keys())
    assert ours.sequences.tolist() == plain.sequences.tolist()
    # A row goes on in a step if it has not emitted the end before it.
    new = plain.sequences[:, LENGTH:]
    ended = (new == options["eos_token_id"]).long().cumsum(1)
    going = torch.cat([torch.ones(batch, 1, dtype=torch.long), 1 - ended[:, :-1].clamp(max=1)], dim=1).bool()
    mask = torch.cat([options["attention_mask"], torch.ones_like(new)], dim=1).bool()

    def rows(values: torch.Tensor, step: int) -> torch.Tensor:
        return values[going[:, step]]

    def states(values: torch.Tensor, step: int) -> torch.Tensor:
        if values.shape[1] == 1:
            return values[going[:, step]]
        return values[mask[:, : values.shape[1]] & going[:, step, None]]

    def maps(values: torch.Tensor, step: int) -> torch.Tensor:
        visible = mask[:, : LENGTH + step][:, -values.shape[3] :]
        return states(values.transpose(1, 2) * visible[:, None, None, :], step)

    compare(ours.scores, plain.scores, rows)
    compare(ours.logits, plain.logits, rows)
    compare(ours.hidden_states, plain.hidden_states, states)
    compare(ours.attentions, plain.attentions, maps)


def test_compute_transition_scores(target, generate):
    """transformers' own helper reads the output."""
    options = {**prompts(1), "max_new_tokens": NEW, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    plain, ours = target.generate(**options), generate(target, **options)
    scores = [target.compute_transition_scores(o.sequences, o.scores, normalize_logits=True) for o in (plain, ours)]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-4)


def test_num_return_sequences_and_seeds(target, generate):
    options = {**prompts(2), "max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 3, "temperature": 0.9}
    outcomes = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        outcomes.append(generate(target, **options))
    assert outcomes[0].shape == (6, LENGTH + NEW)
    assert outcomes[0][:, :LENGTH].tolist() == prompts(2)["input_ids"].repeat_interleave(3, dim=0).tolist()
    assert outcomes[1].tolist() == outcomes[0].tolist()
    assert outcomes[2].tolist() != outcomes[0].tolist()
    assert len({tuple(row) for row in outcomes[0][:3].tolist()}) > 1


def levels(generate: Any, target: Any, **options: Any) -> Any:
    fixed = {**prompts(1), "max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True}
    return generate(target, **{**fixed, **options}).polyspec.levels


def longest(level: Any) -> int:
    """Longest proposal a level was given."""
    return len(level.drafted_at)


def test_num_assistant_tokens_is_honoured(target, generate):
    for count in (1, 2, 6):
        assert longest(levels(generate, target, num_assistant_tokens=count)[1]) == count
    found = levels(generate, target, polyspec_block_size=2, num_assistant_tokens=1)
    assert longest(found[0]) <= 3


def test_assistant_options_on_the_assistants_own_generation_config(target, middle, generate):
    drafter = noisy(target, 0.05, seed=2)
    drafter.generation_config.num_assistant_tokens = 2
    chain = {"assistant_models": [middle, drafter]}
    assert longest(levels(generate, target, **chain, num_assistant_tokens=None)[1]) == 2
    # What generate() is told comes first.
    assert longest(levels(generate, target, **chain, num_assistant_tokens=4)[1]) == 4


def test_the_confidence_threshold_is_honoured(target, generate):
    loose = levels(generate, target, num_assistant_tokens=6, assistant_confidence_threshold=0.0)[1]
    strict = levels(generate, target, num_assistant_tokens=6, assistant_confidence_threshold=1.0)[1]
    assert longest(loose) == 6
    assert longest(strict) == 1, "no token is that sure, so every draft ends after one"


def test_the_schedule_is_honoured(target, generate):
    """A perfect drafter: drafts grow by two a round, and the assistant's own config stays as it was."""
    twin = noisy(target, 0.0)
    options = {"assistant_models": [twin], "num_assistant_tokens": 2, "max_new_tokens": 24}
    constant = levels(generate, target, **options, num_assistant_tokens_schedule="constant")[0]
    before = twin.generation_config.to_dict()
    growing = levels(generate, target, **options, num_assistant_tokens_schedule="heuristic")[0]
    assert longest(constant) == 2
    assert growing.drafted_at[:4] == [growing.rounds] * 2 + [growing.rounds - 1] * 2
    assert twin.generation_config.to_dict() == before


def test_telemetry_adds_up(target, generate):
    output = generate(
        target, **prompts(3), max_new_tokens=16, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    stats = output.polyspec
    top = stats.levels[0]
    assert stats.new_tokens == 3 * 16 == sum(len(row) for row in stats.token_levels)
    assert top.emitted >= stats.new_tokens
    assert top.accepted == sum(top.accepted_at) == sum(j * n for j, n in enumerate(top.histogram))
    assert top.rounds == sum(top.histogram)
    assert top.mean_acceptance_length == top.emitted / top.rounds
    assert {level for row in stats.token_levels for level in row} == {0, 1, 2}
    assert 0 < top.acceptance_rate < 1
    assert [level.index for level in stats.levels] == [0, 1, 2]


@pytest.mark.parametrize("batch", [1, 3])
def test_bfloat16(enabled, batch):
    """Rounding may break ties differently in passes of other shapes; every token is still an argmax up to rounding."""
    model = tiny("llama").bfloat16()
    options = {**prompts(batch), "max_new_tokens": NEW, "do_sample": False}
    chain = [noisy(model, 0.03), noisy(model, 0.05)]
    ours = model.generate(**options, assistant_models=chain, num_assistant_tokens=3)
    assert ours.shape == (batch, LENGTH + NEW)
    mask = torch.cat([options["attention_mask"], torch.ones(batch, NEW, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ours, attention_mask=mask, position_ids=positions).logits.float()[:, LENGTH - 1 : -1]
    best = logits.amax(-1)
    chosen = logits.gather(-1, ours[:, LENGTH:, None]).squeeze(-1)
    # bfloat16 keeps 8 bits: two ways of computing a logit differ by a few units in the last place.
    assert ((best - chosen) <= 4 * best.abs() * 2**-8).all()
