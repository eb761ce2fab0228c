# SPDX-License-Identifier: Apache-2.0
"""A drafter object serves one generation at a time; the second gets a copy of it, or one sentence."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
from tiny_models import noisy, prompts, tiny

import hf_polyspec
from hf_polyspec import Drafter, Proposal, SuffixDrafter
from hf_polyspec.generation.members import lent


class Alone(Drafter):
    """Cannot be in two places."""

    name = "alone"

    def propose(self, context: Any, limits: list[int], law: Any) -> Proposal:
        return Proposal([[] for _ in limits], None, [[] for _ in limits])


def test_what_is_in_use_is_copied_or_refused_and_free_again_afterwards():
    model, suffix, alone = tiny("llama"), SuffixDrafter([[1, 2, 3]]), Alone()
    with lent([model, suffix]) as first, lent([model, suffix]) as second:
        assert first == [model, suffix]
        assert second[0] is model
        assert second[1] is not suffix
        assert second[1].corpus is suffix.corpus
    with lent([suffix]) as again:
        assert again[0] is suffix
    with (
        lent([alone]),
        pytest.raises(ValueError, match=r"assistant_models\[1\] \(Alone\) serves one generation at a time"),
    ):
        lent([model, alone]).__enter__()
    with lent([alone]) as again:
        assert again[0] is alone


def test_it_is_free_again_after_an_error_and_nobody_elses_turn_is_given_back():
    suffix, alone = SuffixDrafter(), Alone()
    with pytest.raises(KeyError), lent([alone]):
        raise KeyError
    with lent([suffix]):
        with pytest.raises(ValueError, match="Alone"), lent([alone]), lent([alone]):
            pass
        with lent([suffix]) as second:
            assert second[0] is not suffix
        with lent([suffix]) as third:
            assert third[0] is not suffix, "the first one still has it"


def test_a_refused_call_leaves_the_drafter_free():
    target, alone = tiny("llama"), Alone()
    for _ in range(2):
        with pytest.raises(ValueError, match="beam"):
            hf_polyspec.generate(target, **prompts(1), assistant_models=[alone], max_new_tokens=2, num_beams=2)
        assert hf_polyspec.generate(target, **prompts(1), assistant_models=[alone], max_new_tokens=2).shape[1] == 11


def together(calls: list[Any]) -> list[Any]:
    """What each call gives, or the error it ends with, all at the same time."""
    found: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def work(place: int) -> None:
        barrier.wait()
        try:
            found[place] = calls[place]()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize("kind", ["suffix", "models", "int8", "a head", "copies of the target"])
def test_one_chain_serves_several_threads(kind):
    """On one target, whose assistants are packed and borrow its keys and values while they run."""
    from tiny_models import head_for

    target = tiny("llama")
    chain: list[Any] = {
        "suffix": [SuffixDrafter([[5, 6, 7, 8]])],
        "models": [noisy(target), noisy(target, 0.05)],
        "int8": ["int8", "suffix"],
        "a head": [noisy(target), head_for(target)],
        "copies of the target": [copy.deepcopy(target), SuffixDrafter()],
    }[kind]
    requests = [prompts(1 + i % 2, 9 + i, seed=i) for i in range(6)]
    options = {"max_new_tokens": 12, "do_sample": False}
    plain = [target.generate(**request, **options).tolist() for request in requests]

    def serve(request: dict[str, Any]) -> Any:
        return [hf_polyspec.generate(target, **request, **options, assistant_models=chain).tolist() for _ in range(3)]

    found = together([lambda request=request: serve(request) for request in requests])
    assert found == [[text] * 3 for text in plain]


def test_learning_while_others_draft():
    """Texts may be added at any time, from any thread, to all copies at once."""
    target = tiny("llama")
    suffix = SuffixDrafter([[40, 41, 42]])
    options = {**prompts(1), "max_new_tokens": 16, "do_sample": False}
    plain = target.generate(**options)

    def learns() -> int:
        for i in range(30):
            suffix.learn([plain[0, : 10 + i % 10].tolist()])
        return suffix.corpus.size if suffix.corpus is not None else 0

    def drafts() -> list[bool]:
        return [
            hf_polyspec.generate(target, **options, assistant_models=[suffix]).tolist() == plain.tolist()
            for _ in range(6)
        ]

    size, *texts = together([learns, drafts, drafts])
    assert size == 4 + sum(11 + i % 10 for i in range(30))
    assert texts == [[True] * 6] * 2
    out = hf_polyspec.generate(target, **options, assistant_models=[suffix], return_dict_in_generate=True)
    assert out.polyspec.levels[0].accepted > 8, "what was learnt is drafted"


def test_a_drafter_with_a_corpus_is_copied_and_pickled_like_any_object():
    suffix = SuffixDrafter([[1, 2, 3]])
    for other in (copy.deepcopy(suffix), pickle.loads(pickle.dumps(suffix))):
        other.learn([[4, 5]])
        assert other.corpus is not None
        assert suffix.corpus is not None
        assert (other.corpus.size, suffix.corpus.size) == (7, 4)
    shared = copy.copy(suffix)
    shared.learn([[6]])
    assert suffix.corpus.size == 6
