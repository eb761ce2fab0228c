# SPDX-License-Identifier: Apache-2.0
"""Whose random numbers a sampled call takes, where it leaves the generator, and what it says if others drew from it."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from same_seed import CHANCES, ENDS, check, sampled
from tiny_models import head_for, noisy, prompts, tiny
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import StoppingCriteria
from transformers.generation.candidate_generator import AssistedCandidateGenerator, PromptLookupCandidateGenerator

from hf_polyspec.exactness import callers_generator
from hf_polyspec.levels.suffix import SuffixDrafter

pytestmark = pytest.mark.usefixtures("enabled")


@pytest.fixture(autouse=True)
def _nobody_follows() -> Any:
    yield
    assert not callers_generator._followed, "a call that is over still follows the generator"


class At(StoppingCriteria):
    """Does something at its n-th call, and stops nothing."""

    def __init__(self, number: int, do: Callable[[], Any]) -> None:
        self.number, self.do = number, do

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.number -= 1
        if self.number == 0:
            self.do()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class PutAt:
    """A streamer that does something when it gets its n-th step."""

    def __init__(self, number: int, do: Callable[[], Any]) -> None:
        self.left, self.do = number + 1, do  # the prompt comes first

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            self.do()

    def end(self) -> None: ...


def stop() -> None:
    raise KeyboardInterrupt


def criteria(*all_of_them: StoppingCriteria) -> StoppingCriteriaList:
    return StoppingCriteriaList(all_of_them)


def test_two_calls_after_one_seed_are_two_plain_calls(target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    found = []
    for levels in ({}, {"assistant_models": [drafter]}):
        torch.manual_seed(1)
        texts = [target.generate(**{**CHANCES, **prompts(b), **ENDS, **levels}).sequences for b in (1, 3, 1)]
        found.append((texts, torch.rand(3)))
    for left, right in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(left, right)
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("number", [1, 4, 9])
@pytest.mark.parametrize("where", ["criterion", "streamer"])
def test_an_exception_leaves_the_generator_after_the_steps_handed_out(
    target: PreTrainedModel, drafter: PreTrainedModel, where: str, number: int
) -> None:
    states = []
    for levels in ({}, {"assistant_models": [drafter]}):
        torch.manual_seed(2)
        who: dict[str, Any] = (
            {"stopping_criteria": criteria(At(number, stop))}
            if where == "criterion"
            else {"streamer": PutAt(number, stop)}
        )
        with pytest.raises(KeyboardInterrupt):
            target.generate(**{**CHANCES, **prompts(1), **who, **levels})
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    torch.manual_seed(2)
    for _ in range(number):
        torch.empty(1, target.config.vocab_size).exponential_(1)
    assert torch.equal(states[0], torch.get_rng_state())


def test_a_model_that_fails_before_the_first_token_leaves_the_generator_alone(
    target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = noisy(target, 0.0)
    monkeypatch.setattr(broken, "forward", lambda *args, **kwargs: 1 / 0)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.raises(Exception, match="forward pass"):
        target.generate(**{**CHANCES, **prompts(1)}, assistant_models=[broken])
    assert torch.equal(before, torch.get_rng_state())


def test_a_law_that_cannot_be_drawn_from_is_plain_generations_error(
    target: PreTrainedModel, drafter: PreTrainedModel
) -> None:
    class Spoils(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores * float("nan") if input_ids.shape[1] > 14 else scores

    said = []
    for levels in ({}, {"assistant_models": [drafter]}):
        with pytest.raises(RuntimeError) as caught:
            sampled(target, 4, logits_processor=LogitsProcessorList([Spoils()]), **prompts(1), **levels)
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("who", ["criterion", "streamer"])
def test_what_others_drew_is_never_taken_back(target: PreTrainedModel, drafter: PreTrainedModel, who: str) -> None:
    states: list[torch.Tensor] = []

    def draws() -> None:
        torch.rand(1)
        states.append(torch.get_rng_state())

    def request() -> dict[str, Any]:
        return {"stopping_criteria": criteria(At(3, draws))} if who == "criterion" else {"streamer": PutAt(3, draws)}

    ours, after = sampled(target, 5, assistant_models=[drafter], **prompts(1), **request())
    assert torch.equal(after, states[-1])
    torch.manual_seed(5)
    torch.rand(1)
    assert torch.equal(after, torch.get_rng_state())
    assert ours.polyspec.seed_holds is False
    (line,) = [note for note in ours.polyspec.levels[0].notes if "drawn from by something else" in note]
    assert "follows the target's law" in line
    with pytest.warns(UserWarning, match="drawn from by something else") as caught:
        sampled(target, 5, assistant_models=[drafter], return_dict_in_generate=False, **prompts(1), **request())
    assert len(caught) == 1
    # From the call that nobody disturbed on, the seed holds again.
    check(target, [drafter], 5, **prompts(1))


class Jitter(LogitsProcessor):
    """Random, and nothing but: adds noise that it takes from the default generator."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores - torch.empty_like(scores).exponential_(1).log()


def test_a_random_processor_is_noticed_and_shares_no_numbers_with_the_noise(target: PreTrainedModel) -> None:
    """Its numbers are those that the noise was to be made of: where both are used the text is another law's.

    With equal scores everywhere and noise -log e added, the law is 1 / e, and the pick under the same e would be
    argmax 1 / e^2, the same id as the processor's likeliest, always. It is drawn independently: the likeliest of 48
    is picked far more seldom.
    """
    flat = noisy(target, 0.0)
    with torch.no_grad():
        flat.lm_head.weight.zero_()
    likeliest: list[int] = []

    class Watched(Jitter):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            found = super().__call__(input_ids, scores)
            likeliest.append(int(found.argmax()))
            return found

    processors = LogitsProcessorList([Watched()])
    same = 0
    for seed in range(40):
        likeliest.clear()
        options = {"max_new_tokens": 1, "logits_processor": processors, "assistant_models": [SuffixDrafter()]}
        ours, _ = sampled(flat, seed, **options, **prompts(1))
        assert ours.polyspec.seed_holds is False
        same += int(ours.sequences[0, -1]) == likeliest[0]
    # The likeliest of 48 values 1 / e has about 0.27 of their sum: 40 of 40 would be the same numbers twice.
    assert same < 30


def test_dropout_is_noticed(target: PreTrainedModel) -> None:
    model = tiny("gpt2", resid_pdrop=0.1)
    check(model, [noisy(model, 0.03)], 6, **prompts(1))
    model.train()
    for seed in (None, 7):
        ours, _ = sampled(model, 6, assistant_models=[noisy(model, 0.03)], polyspec_seed=seed, **prompts(1))
        assert ours.polyspec.seed_holds is False
        assert any("dropout" in note for note in ours.polyspec.levels[0].notes)


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """Results of calls that run at once, each on a thread of its own."""
    found: list[Any] = [None] * len(calls)
    ready = threading.Barrier(len(calls))

    def run(place: int) -> None:
        ready.wait()
        found[place] = calls[place]()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_two_threads_write_two_texts(target: PreTrainedModel) -> None:
    """And the one that follows the generator keeps its promise: the other's seed was drawn under a lock."""
    for seed in range(8):
        plain, left = sampled(target, seed, **prompts(1))
        torch.manual_seed(seed)

        def call() -> Any:
            levels = [noisy(target, 0.03), SuffixDrafter()]
            return target.generate(**{**CHANCES, **prompts(1)}, assistant_models=levels)

        texts = together([call, call])
        state = torch.get_rng_state()
        first, second = sorted(texts, key=lambda text: not torch.equal(text.sequences, plain.sequences))
        assert torch.equal(first.sequences, plain.sequences)
        assert not torch.equal(second.sequences, first.sequences)
        if second.polyspec.seed_holds is False:  # they did run at once
            assert "another sampled call was running" in " ".join(second.polyspec.levels[0].notes)
            assert torch.equal(state, left)


def test_a_call_inside_a_call_takes_a_stream_of_its_own(target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    inside: list[Any] = []

    def sample() -> None:
        inside.append(target.generate(**{**CHANCES, **prompts(1)}, assistant_models=[drafter]))

    plain, left = sampled(target, 8, **prompts(1))
    ours, after = sampled(
        target, 8, assistant_models=[drafter], stopping_criteria=criteria(At(2, sample)), **prompts(1)
    )
    assert torch.equal(ours.sequences, plain.sequences)
    assert torch.equal(after, left)
    assert ours.polyspec.seed_holds
    assert inside[0].polyspec.seed_holds is False
    assert not torch.equal(inside[0].sequences, plain.sequences)


# A request with its own seed


@pytest.mark.parametrize("batch", [1, 3])
def test_a_seed_of_its_own(target: PreTrainedModel, drafter: PreTrainedModel, batch: int) -> None:
    plain, _ = sampled(target, 9, **prompts(batch), **ENDS)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for given in ({"polyspec_seed": 9}, {"generation_config": GenerationConfig(**ENDS)}):
        if "generation_config" in given:
            given["generation_config"].polyspec_seed = 9
        request = {**CHANCES, **prompts(batch), **ENDS, **given}
        ours = target.generate(**request, assistant_models=[drafter])
        assert torch.equal(ours.sequences, plain.sequences)
        assert ours.polyspec.seed_holds
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_seed_of_its_own_under_the_other_rules(target: PreTrainedModel, drafter: PreTrainedModel, rule: str) -> None:
    def text(seed: int) -> torch.Tensor:
        request = {**CHANCES, **prompts(2), "polyspec_verification": rule, "polyspec_seed": seed}
        return target.generate(**request, assistant_models=[drafter]).sequences

    before = torch.get_rng_state()
    assert torch.equal(text(1), text(1))
    assert not torch.equal(text(1), text(2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("tree", [{}, {"polyspec_tree_tokens": 8}])
def test_a_seed_for_every_row(target: PreTrainedModel, tree: dict[str, int]) -> None:
    """Each row is what plain generation writes for its prompt alone, whoever else is in the batch."""
    given, seeds = prompts(3), [21, 22, 21, 24, 25, 26]
    before = torch.get_rng_state()
    request = {**CHANCES, **given, **ENDS, "max_new_tokens": 20, "num_return_sequences": 2, **tree}
    ours = target.generate(**request, polyspec_seed=seeds, assistant_models=[head_for(target)])
    assert ours.polyspec.seed_holds
    assert torch.equal(before, torch.get_rng_state())
    width = given["input_ids"].shape[1]
    for row, seed in enumerate(seeds):
        ids = given["input_ids"][row // 2][given["attention_mask"][row // 2].bool()][None]
        alone, _ = sampled(target, seed, input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, **ENDS)
        text = alone.sequences[0, ids.shape[1] :]
        assert torch.equal(ours.sequences[row, width : width + len(text)], text)
        assert set(ours.sequences[row, width + len(text) :].tolist()) <= {0}


def test_seeds_hold_on_many_threads(target: PreTrainedModel) -> None:
    plain = [sampled(target, seed, **prompts(1))[0].sequences for seed in range(4)]

    def call(seed: int) -> Any:
        return target.generate(**{**CHANCES, **prompts(1)}, assistant_models=[SuffixDrafter()], polyspec_seed=seed)

    before = torch.get_rng_state()
    for seed, text in enumerate(together([lambda seed=seed: call(seed) for seed in range(4)])):
        assert torch.equal(text.sequences, plain[seed])
        assert text.polyspec.seed_holds
    assert torch.equal(before, torch.get_rng_state())


def test_a_random_processor_is_noticed_under_a_seed_of_its_own(target: PreTrainedModel) -> None:
    options = {"logits_processor": LogitsProcessorList([Jitter()]), "assistant_models": [noisy(target, 0.0)]}
    ours, _ = sampled(target, 9, polyspec_seed=3, **options, **prompts(1))
    assert ours.polyspec.seed_holds is False
    with pytest.warns(UserWarning, match="polyspec_seed"):
        sampled(target, 9, polyspec_seed=3, return_dict_in_generate=False, **options, **prompts(1))


def test_nothing_is_said_where_nothing_was_promised(target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {"return_dict_in_generate": False, "logits_processor": LogitsProcessorList([Jitter()]), **prompts(1)}
        sampled(target, 9, assistant_models=[drafter], polyspec_verification="token", **options)
        sampled(target, 9, assistant_models=[drafter], do_sample=False, **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"polyspec_seed": [1, 2]}, "polyspec_seed has 2 seeds, and this batch has 1 row(s); give one for each."),
        ({"polyspec_seed": []}, "polyspec_seed must be a whole number"),
        ({"polyspec_seed": 1.5}, "polyspec_seed must be a whole number"),
        ({"polyspec_seed": True}, "polyspec_seed must be a whole number"),
        ({"polyspec_seed": 1 << 64}, "polyspec_seed must be a whole number"),
        ({"polyspec_seed": [1, "2"]}, "polyspec_seed must be a whole number"),
        ({"polyspec_seed": [1], "polyspec_verification": "token"}, "polyspec_seed as a list gives each row"),
        ({"polyspec_seed": [1], "polyspec_bias_budget": 0.1}, "polyspec_seed as a list gives each row"),
        (
            {"polyspec_verification": "coupled", "polyspec_bias_budget": 0.1},
            'polyspec_bias_budget is defined token by token; leave polyspec_verification="coupled" out with it.',
        ),
    ],
)
def test_refusals(target: PreTrainedModel, options: dict[str, Any], sentence: str) -> None:
    passes: list[int] = []
    model = noisy(target, 0.0)
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        model.generate(**CHANCES, **prompts(1), assistant_models=[SuffixDrafter()], **options)
    assert not passes


# Candidate generators, which draw by themselves


def assisted(target: PreTrainedModel, small: PreTrainedModel, ids: torch.Tensor) -> AssistedCandidateGenerator:
    import copy

    config = copy.deepcopy(target.generation_config)
    config.update(do_sample=True, max_length=60, max_new_tokens=None, num_assistant_tokens=5, top_k=0)
    for name, value in (("min_length", 0), ("output_scores", False), ("return_dict_in_generate", False)):
        setattr(config, name, value)
    small.generation_config.num_assistant_tokens = 5
    small.generation_config.assistant_confidence_threshold = 0.0
    small.generation_config.num_assistant_tokens_schedule = "constant"
    processors = LogitsProcessorList()
    return AssistedCandidateGenerator(
        ids, small, config, {"attention_mask": torch.ones_like(ids)}, logits_processor=processors
    )


def test_generators_that_draw_by_themselves_draw_with_the_same_noise(target: PreTrainedModel) -> None:
    """transformers' own assistant is lent the generator where plain generation would stand: a copy is never wrong."""
    given = prompts(1)
    for distance, always in ((0.0, True), (0.05, False)):
        generator = assisted(target, noisy(target, distance), given["input_ids"])
        top = check(target, [generator], 10, max_new_tokens=30, top_k=0, **given).levels[0]
        assert top.accepted == top.drafted if always else 0 < top.accepted < top.drafted
        assert not always or top.forward_passes <= 0.4 * 30
    middle = noisy(target, 0.03)
    check(target, [middle, assisted(target, noisy(target, 0.0), given["input_ids"])], 11, top_k=0, **given)
    check(target, [PromptLookupCandidateGenerator(num_output_tokens=3, max_matching_ngram_size=1)], 12, **given)
