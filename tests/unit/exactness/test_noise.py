# SPDX-License-Identifier: Apache-2.0
"""Noise step by step: what torch.multinomial draws with, kept while it is needed, drawn again where it is not kept."""

from __future__ import annotations

import pytest
import torch

from hf_polyspec.exactness import noise as noises
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.noise import SharedNoise, Stream, by_inversion, by_torch, inverts, is_race

CPU = torch.device("cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def in_a_row(seed: int, steps: int, rows: int, width: int) -> list[torch.Tensor]:
    generator = seeded(seed)
    return [torch.empty(rows, width).exponential_(1, generator=generator) for _ in range(steps)]


def test_multinomial_is_the_race() -> None:
    """The fact that everything rests on: index and state afterwards, 300 of 300."""
    assert is_race(CPU)
    for seed in range(300):
        laws = torch.randn(3, 501, generator=seeded(seed)).softmax(-1)
        torch.manual_seed(seed)
        drawn, after = torch.multinomial(laws, 1).squeeze(1), torch.get_rng_state()
        generator = seeded(seed)
        noise = torch.empty_like(laws).exponential_(1, generator=generator)
        assert torch.equal(drawn, (laws / noise).argmax(-1))
        assert torch.equal(after, generator.get_state())


def test_another_multinomial_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "multinomial", lambda laws, *args, **kwargs: laws.argmax(-1, keepdim=True))
    is_race.cache_clear()
    try:
        assert not is_race(CPU)
    finally:
        is_race.cache_clear()


def test_values_drawn_all_at_once_are_those_drawn_one_by_one() -> None:
    """Five million of them, and where the generator stands after each thousand."""
    assert inverts(CPU)
    one_by_one, at_once = seeded(5), seeded(5)
    for rows, width in [(1, 1), (1, 7), (3, 501), *[(1, 1000)] * 20, (100, 49_152)]:
        assert torch.equal(by_torch(rows, width, one_by_one), by_inversion(rows, width, at_once))
        assert torch.equal(one_by_one.get_state(), at_once.get_state())


def test_where_torch_draws_otherwise_it_draws_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another state afterwards, another value in one place: both are noticed, and the stream is torch's."""

    def one_more(rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
        return by_inversion(rows, width, generator) + torch.rand((), generator=generator) * 0

    def a_bit_off(rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
        values = by_inversion(rows, width, generator)
        values[-1, -1] = values[-1, -1].nextafter(torch.tensor(0.0))
        return values

    for wrong in one_more, a_bit_off:
        monkeypatch.setattr(noises, "by_inversion", wrong)
        inverts.cache_clear()
        try:
            assert not inverts(CPU)
            stream = Stream(seeded(1), 2, 7)
            assert [torch.equal(stream.at(i), each) for i, each in enumerate(in_a_row(1, 3, 2, 7))] == [True] * 3
        finally:
            inverts.cache_clear()


@pytest.mark.parametrize("most_bytes", [1 << 20, 4 * 2 * 7 * 2, 1])
def test_a_stream_gives_any_step_again(most_bytes: int) -> None:
    """Whatever is kept: all of it, two steps, or one."""
    expected = in_a_row(1, 12, 2, 7)
    stream = Stream(seeded(1), 2, 7, most_bytes)
    for step in (3, 0, 5, 4, 3, 11, 0, 10):
        assert torch.equal(stream.at(step), expected[step])
        assert len(stream._values) <= max(1, most_bytes // 56)
    stream.pass_by(5)
    assert torch.equal(stream.at(5), expected[5])
    with pytest.raises(IndexError, match="past"):
        stream.at(4)


def test_states_are_those_of_plain_draws() -> None:
    stream, plain = Stream(seeded(2), 1, 9, 1), seeded(2)
    stream.at(6)
    for step in range(9):
        assert torch.equal(stream.state_before(step), plain.get_state())
        torch.empty(1, 9).exponential_(1, generator=plain)


def test_rows_read_their_own() -> None:
    expected = in_a_row(3, 6, 3, 5)
    noise = SharedNoise([seeded(3)], 3, 5)
    for found, wanted in zip(noise.at([2, 0], [[4, 5], [1, 1]]), ((4, 5), (1, 1)), strict=True):
        row = 2 if wanted[0] == 4 else 0
        assert torch.equal(torch.stack(found), torch.stack([expected[step][row] for step in wanted]))


def test_a_generator_for_each_row() -> None:
    noise = SharedNoise([seeded(seed) for seed in (5, 6, 5)], 3, 5)
    for row, seed in enumerate((5, 6, 5)):
        assert torch.equal(noise.at([row], [[2]])[0][0], in_a_row(seed, 3, 1, 5)[2][0])
    with pytest.raises(ValueError, match="3 rows draw from one generator or from 3, got 2"):
        SharedNoise([seeded(1), seeded(2)], 3, 5)


def test_a_law_maker_asks_by_step_and_row() -> None:
    """Rows that left the batch do not change whose noise the others read; what is beyond a row is not drawn."""
    prompt = Prompt(2, None, torch.zeros(3, 2, dtype=torch.long)).select([2, 0]).select([1, 0])
    assert prompt.rows == (0, 2)
    context = Context([[1, 1, 7], [1, 1, 7, 7, 7]], prompt)
    assert context.steps() == [1, 3]
    noise = SharedNoise([seeded(4)], 3, 6)
    law = LawMaker([], True, CPU, noise=noise)
    scores = torch.randn(2, 2, 6, generator=seeded(1))
    chosen = law.choose(scores, context, [[0, 1], [0, 0]])
    expected = in_a_row(4, 4, 3, 6)
    weights = scores.softmax(-1)
    for row, place, steps in ((0, 0, (1, 2)), (1, 2, (3, 3))):
        for i, step in enumerate(steps):
            assert chosen[row, i] == (weights[row, i] / expected[step][place]).argmax()
    assert noise.streams[0]._drawn == 4
    law.choose(scores, context, [[0, 1], [5, 6]], [True, False])
    assert noise.streams[0]._drawn == 4, "rows that do not matter have nothing drawn for them"


def test_a_law_that_is_none_is_told() -> None:
    law = LawMaker([], True, CPU, noise=SharedNoise([seeded(4)], 1, 6))
    context = Context([[1]], Prompt(1, None, torch.zeros(1, 1, dtype=torch.long)))
    scores = torch.full((1, 1, 6), float("nan"))
    assert law.choose(scores, context, [[0]]).tolist() == [[-1]]
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        law.refuse(scores[0, 0])


def test_greedy_is_the_same_without_noise() -> None:
    context = Context([[1]], Prompt(1, None, torch.zeros(1, 1, dtype=torch.long)))
    scores = torch.randn(1, 3, 6, generator=seeded(2))
    law = LawMaker([], False, CPU, noise=SharedNoise([seeded(4)], 1, 6))
    assert law.noise is None
    assert torch.equal(law.choose(scores, context, [[0, 1, 2]]), scores.argmax(-1))
