# SPDX-License-Identifier: Apache-2.0
"""PEFT's arguments with an entry for each prompt: an adapter by name, and where an activated one begins.

They reach the layers through hooks, for all rows of the call; a chain's rows leave when they have ended, and its passes
cover several tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import head_for, noisy, prompts, tiny
from torch import nn

from hf_polyspec.host.row_arguments import RowArguments
from hf_polyspec.levels.early_exit import early_exit
from hf_polyspec.levels.suffix import SuffixDrafter

# PEFT asks models by an older name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

LENGTH, NEW = 9, 20
OTHER = {"french": "german", "german": "__base__", "__base__": "french"}
MATRICES = ["q_proj", "v_proj", "down_proj"]


def lora(**settings: Any) -> LoraConfig:
    usual = {"r": 4, "lora_alpha": 64, "target_modules": MATRICES, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**usual, **settings})


@pytest.fixture(scope="module")
def adapted() -> Any:
    """A model with two adapters."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(tiny(), lora(), adapter_name="french")
        model.add_adapter("german", lora())
    return model.eval()


def levels(model: Any) -> dict[str, list[Any]]:
    base = tiny()
    return {
        "a model": [noisy(base, 0.02)],
        "three": [noisy(base, 0.02), noisy(base, 0.05, seed=2)],
        "suffix": [SuffixDrafter(min_match=1)],
        "itself": [model],
        "its own first layer": [early_exit(model, 1)],
        "int8": ["int8"],
        "head": [head_for(model.get_base_model())],
    }


@pytest.mark.parametrize("names", [["french", "german", "__base__"], ["german", "french", "french"]], ids="/".join)
@pytest.mark.parametrize("chain", ["a model", "three", "suffix", "itself", "its own first layer", "int8", "head"])
def test_each_row_keeps_its_adapter(enabled, adapted, chain, names):
    """To the end, and where rows leave in every order."""
    below = levels(adapted)[chain]
    call = {**prompts(3), "adapter_names": names, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    plain = adapted.generate(**call)
    others = adapted.generate(**{**call, "adapter_names": [OTHER[name] for name in names]})
    assert all(mine != other for mine, other in zip(plain.tolist(), others.tolist(), strict=True))
    assert adapted.generate(**call, assistant_models=below).tolist() == plain.tolist()
    hooks = count_hooks(adapted)
    for row in range(3):
        early = {**call, "eos_token_id": int(plain[row, LENGTH + 3])}
        uneven = adapted.generate(**early)
        assert adapted.generate(**early, assistant_models=below).tolist() == uneven.tolist()
    assert count_hooks(adapted) == hooks == 0
    # The next call has no names, and none are left over.
    del call["adapter_names"]
    assert adapted.generate(**call, assistant_models=below).tolist() == adapted.generate(**call).tolist()


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_names_with_samples_and_output(enabled, adapted):
    """Where rows stay to the end (outputs were asked for), and where they are sampled."""
    call = {**prompts(3), "adapter_names": ["french", "german", "french"], "max_new_tokens": NEW, "pad_token_id": 0}
    plain = adapted.generate(**call, do_sample=False, return_dict_in_generate=True, output_scores=True)
    ours = adapted.generate(
        **call, do_sample=False, return_dict_in_generate=True, output_scores=True, assistant_models=["int8"]
    )
    assert ours.sequences.tolist() == plain.sequences.tolist()
    torch.testing.assert_close(torch.stack(ours.scores), torch.stack(plain.scores), atol=1e-4, rtol=1e-4)
    eos = plain.sequences[:, LENGTH + 2].tolist()
    sampled = adapted.generate(**call, do_sample=True, eos_token_id=eos, assistant_models=[noisy(tiny(), 0.02)])
    assert sampled.shape[0] == 3


@pytest.mark.parametrize("place", [1, 5, LENGTH - 2])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_adapter_that_begins_at_its_invocation(enabled, rows, place):
    """Activated LoRA counts from the end of the prompt; a pass of several tokens ends further behind it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        settings = {"alora_invocation_tokens": [40, 41], "target_modules": ["q_proj", "k_proj", "v_proj"]}
        model = get_peft_model(tiny(), lora(**settings)).eval()
    ids = prompts(1, LENGTH)["input_ids"].repeat(rows, 1).clamp(max=39)
    for row in range(rows - 1 if rows > 1 else 1):  # the last of three is not invoked at all
        ids[row, max(0, place - row) : max(0, place - row) + 2] = torch.tensor([40, 41])
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    plain = model.generate(**call)
    with model.disable_adapter():
        assert model.generate(**call)[0].tolist() != plain[0].tolist()
    early = {**call, "eos_token_id": int(plain[0, LENGTH + 4]), "pad_token_id": 0}
    uneven = model.generate(**early)
    for chain in ([noisy(tiny(), 0.02)], [model], [SuffixDrafter(min_match=1)]):
        assert model.generate(**call, assistant_models=chain, num_assistant_tokens=6).tolist() == plain.tolist()
        assert model.generate(**early, assistant_models=chain, num_assistant_tokens=6).tolist() == uneven.tolist()


class Told(nn.Module):
    """Keeps the arguments of its last call."""

    def forward(self, *_: Any, **given: Any) -> None:
        self.given = given


def test_only_what_has_an_entry_for_each_row_is_changed() -> None:
    def add(_module: nn.Module, args: Any, given: dict[str, Any], **more: Any) -> Any:
        return args, {**given, **more}

    module = nn.Sequential(Told(), Told())
    names, pair = ["a", "b", "c"], [1, 2]
    module[0].register_forward_pre_hook(partial(add, adapter_names=names, pair=pair, one="text"), with_kwargs=True)
    module[0].register_forward_pre_hook(partial(add, alora_offsets=[4, None, 2]), with_kwargs=True)
    module[1].register_forward_pre_hook(lambda *_: None)
    arguments = RowArguments(module)
    with arguments.of(None, [1, 1, 7]):
        module[0]()
    assert module[0].given == {"adapter_names": names, "pair": [1, 2], "one": "text", "alora_offsets": [5, None, 9]}
    with arguments.of([2, 0], [7, 1]):
        module[0]()
        module[1]()
    assert module[0].given == {"adapter_names": ["c", "a"], "pair": [1, 2], "one": "text", "alora_offsets": [9, 5]}
    assert module[1].given == {}
    assert (names, pair) == (["a", "b", "c"], [1, 2])
    module[0]()
    assert module[0].given["adapter_names"] is names
    with pytest.raises(KeyError), arguments.of([1], [0]):
        raise KeyError
    assert count_hooks(module) == 3
