# SPDX-License-Identifier: Apache-2.0
"""Hidden states and attention maps are plain generation's, in shape and value: of layers with shapes of their own,
beside every kind of cache, behind drafts and in rows that were filled up."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from tiny_models import VOCABULARY, head_for, noisy, tiny
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hf_polyspec.exactness.passes import Pass
from hf_polyspec.generation.outputs import Recorder, Wanted, _row_axes
from hf_polyspec.host.release import GENERATION_CACHE
from hf_polyspec.levels.emission import Emission
from hf_polyspec.levels.suffix import SuffixDrafter

MIXED = ["sliding_attention", "full_attention"]
NEW = 9


@pytest.fixture(scope="module")
def windows() -> PreTrainedModel:
    return tiny("gemma3_text", attention="eager", sliding_window=5, head_dim=8, layer_types=MIXED)


@pytest.fixture(scope="module")
def eager() -> PreTrainedModel:
    return tiny("llama", attention="eager")


@pytest.fixture(scope="module")
def sharing() -> dict[str, PreTrainedModel]:
    """Later layers read the keys and values of earlier ones; Gemma 3n's hidden states have a dimension more."""
    names = ("gemma3n_text", "gemma4_text")
    return {
        case.model_type: tiny(case.model_type, attention="eager", **case.settings)
        for case in ARCHITECTURES
        if case.model_type in names
    }


def asked(rows: int, length: int = 8, **options: Any) -> dict[str, Any]:
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(4))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": NEW,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_hidden_states": True,
        "output_attentions": True,
        **options,
    }


def compared(model: PreTrainedModel, call: dict[str, Any], chain: list[Any], cache: Any = None, **options: Any) -> Any:
    given = [{} if cache is None else {GENERATION_CACHE: copy.deepcopy(cache)} for _ in range(2)]
    plain = model.generate(**call, **given[0])
    ours = model.generate(**call, **given[1], assistant_models=chain, **options)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    for name in ("hidden_states", "attentions"):
        mine, theirs = getattr(ours, name), getattr(plain, name)
        assert len(mine) == len(theirs)
        for step, (left, right) in enumerate(zip(mine, theirs, strict=True)):
            for layer, (a, b) in enumerate(zip(left, right, strict=True)):
                assert a.shape == b.shape, (name, step, layer)
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=f"{name} of step {step}, layer {layer}")
    return ours


def chains(model: PreTrainedModel) -> list[list[Any]]:
    return [[SuffixDrafter(min_match=1)], [noisy(model, 0.03)], [model]]


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_layers_with_shapes_of_their_own(enabled, sharing, kind, rows):
    """Four rows beside Gemma 3n's four inputs, and as many columns in some pass."""
    for chain in chains(sharing[kind]):
        for length in (4, 8):
            compared(sharing[kind], asked(rows, length), chain, num_assistant_tokens=3)


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("use", ["eager", "windows"])
@pytest.mark.parametrize("rows", [1, 3])
def test_beside_caches_that_generate_makes(enabled, request, use, implementation, rows):
    model = request.getfixturevalue(use)
    more = {} if implementation is None else {"cache_implementation": implementation}
    for chain in chains(model):
        for length in (3, 8):
            compared(model, asked(rows, length, **more), chain, num_assistant_tokens=3)


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_shared_keys_beside_a_static_cache(enabled, sharing, kind):
    model = sharing[kind]
    try:
        model.generate(**asked(2, cache_implementation="static"))
    except Exception as error:  # a release in which this model has none
        pytest.fail(str(error))
    compared(model, asked(2, cache_implementation="static"), [noisy(model, 0.03)])


@pytest.mark.parametrize("size", [20, 17 + 40])
@pytest.mark.parametrize("use", ["eager", "windows"])
def test_beside_a_static_cache_of_the_callers(enabled, request, use, size):
    model = request.getfixturevalue(use)
    for chain in chains(model):
        compared(model, asked(2), chain, StaticCache(config=model.config, max_cache_len=size))


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("ids", ["all", "new"])
@pytest.mark.parametrize("held", [2, 6])
@pytest.mark.parametrize("use", ["eager", "windows"])
def test_from_a_callers_cache_on(enabled, request, use, held, ids, configured):
    model, call = request.getfixturevalue(use), asked(3)
    cache = DynamicCache(config=model.config) if configured else DynamicCache()
    with torch.no_grad():
        model(input_ids=call["input_ids"][:, :held], **{GENERATION_CACHE: cache})
    if ids == "new":
        call["input_ids"] = call["input_ids"][:, held:]
    for chain in chains(model):
        compared(model, call, chain, cache, num_assistant_tokens=4)


@pytest.mark.parametrize("chunk", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("use", ["eager", "windows"])
def test_a_prompt_in_chunks(enabled, request, use, chunk):
    """The first step's are those of the last chunk."""
    model = request.getfixturevalue(use)
    for chain in chains(model):
        compared(model, asked(2, prefill_chunk_size=chunk), chain)


def test_beside_a_head(enabled, eager):
    """Which would grow trees otherwise."""
    compared(eager, asked(2), [head_for(eager)])


def test_rows_that_ended(enabled, windows):
    """Zeros from there on; the others' stay right."""
    call = asked(3)
    first = windows.generate(**call).sequences[0, 8 + 3].item()
    call |= {"eos_token_id": first, "pad_token_id": 0}
    plain = windows.generate(**call)
    ours = windows.generate(**call, assistant_models=[noisy(windows, 0.03)])
    assert ours.sequences.tolist() == plain.sequences.tolist()
    for step, (mine, theirs) in enumerate(zip(ours.attentions, plain.attentions, strict=True)):
        going = [row for row in range(3) if first not in plain.sequences[row, 8 : 8 + step]]
        for a, b in zip(mine, theirs, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a[going], b[going], atol=1e-4, rtol=1e-3)


def test_where_rows_are() -> None:
    """As many rows, columns and inputs: the last two dimensions are columns and width."""
    assert _row_axes((torch.zeros(4, 4, 4, 8), torch.zeros(4, 4, 8)), 4, 4, []) == [1, 0]
    assert _row_axes((torch.zeros(3, 5, 4, 8), torch.zeros(3, 5, 8)), 3, 5, []) == [0, 0]
    # What was found in an earlier pass is believed where it fits.
    assert _row_axes((torch.zeros(4, 4, 4, 8),), 4, 4, [0]) == [0]


def test_shapes_in_which_nothing_is_to_be_found() -> None:
    class Output:
        hidden_states = (torch.zeros(2, 5, 8), torch.zeros(10, 8))

    nothing = torch.zeros(2, 1, 4)
    passed = Pass(nothing, Output(), 5, [[1] * 5] * 2)
    emission = Emission([[1], [1]], None, [[0], [0]], [0, 0], [0, 0], nothing, nothing, passed)
    recorder = Recorder(Wanted(hidden_states=True), 2, 5, None)
    with pytest.raises(ValueError, match=r"output_hidden_states: layer 1 .*\(10, 8\).* 2 rows and 5 columns"):
        recorder.emitted(emission, [5, 5], True)
