# SPDX-License-Identifier: Apache-2.0
"""Assistants by name in generate(), and float assistants packed while a chain runs."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import head_for, prompts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_polyspec
from hf_polyspec.cpu import packing
from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.host.own_rows import rows_apart
from hf_polyspec.integers.linear import Kernel
from hf_polyspec.models import assistants
from hf_polyspec.models.assistants import by_name
from hf_polyspec.quantization import agreement, is_packed
from hf_polyspec.quantization.model import merged_adapters
from hf_polyspec.quantization.modules import quantized_layers

OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
IDS = torch.randint(3, 48, (4, 20), generator=torch.Generator().manual_seed(5))
# transformers 5.23 warns about a name that PEFT still reads.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def adapted(target: PreTrainedModel) -> Any:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return peft.get_peft_model(copy.deepcopy(target), lora).eval()


@pytest.mark.parametrize("names", [["int8"], ["int8", "suffix"], ["early-exit:1"], ["int8", "early-exit:1"]])
def test_by_name(enabled: None, target: PreTrainedModel, names: list[str]) -> None:
    plain = target.generate(**prompts(3), **OPTIONS).sequences
    output = target.generate(**prompts(3), **OPTIONS, assistant_models=names)
    assert output.sequences.tolist() == plain.tolist()
    assert len(output.polyspec.levels) == 1 + len(names)
    assert by_name(target, ["int8"])[0] is by_name(target, ["int8"])[0]


def test_a_peft_target_gets_a_middle_with_its_adapters(enabled: None, adapted: Any, target: PreTrainedModel) -> None:
    plain = adapted.generate(**prompts(1), **OPTIONS).sequences
    assert plain.tolist() != target.generate(**prompts(1), **OPTIONS).sequences.tolist()
    output = adapted.generate(**prompts(1), **OPTIONS, assistant_models=["int8"])
    assert output.sequences.tolist() == plain.tolist()
    level = output.polyspec.levels[0]
    assert level.accepted > 0.7 * level.drafted
    assert any("lora" in name for name, _ in adapted.named_modules())


def test_the_model_inside_a_peft_model_is_merged_too(adapted: Any, target: PreTrainedModel) -> None:
    """generate() on a PEFT model hands on the model inside it, adapters and all."""
    inner = adapted.get_base_model()
    merged = merged_adapters(inner)
    torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, rtol=1e-3, atol=1e-3)
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert merged_adapters(target) is target
    middle = by_name(inner, ["int8"])[0]
    assert not any("lora" in name for name, _ in middle.named_modules())
    assert len(quantized_layers(middle)) == 15
    assert agreement(adapted, middle, IDS) > 0.95
    with adapted.disable_adapter():
        bare = by_name(inner, ["int8"])[0]
        assert agreement(target, bare, IDS) > 0.95
    assert bare is not middle
    assert agreement(adapted, by_name(inner, ["int8"])[0], IDS) > 0.95


def test_changed_weights_are_quantised_again(target: PreTrainedModel) -> None:
    model = copy.deepcopy(target)
    first = by_name(model, ["int8"])[0]
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    second = by_name(model, ["int8"])[0]
    assert second is not first
    assert agreement(model, second, IDS) > 0.95
    model.lm_head.weight.data.mul_(-1)  # which torch does not count
    third = by_name(model, ["int8"])[0]
    assert third is not second
    assert agreement(model, third, IDS) > 0.95


def test_what_a_model_computes_anew_by_itself_changes_no_copy(target: PreTrainedModel) -> None:
    model = copy.deepcopy(target)
    first = by_name(model, ["int8"])[0]
    rotary = model.model.rotary_emb
    rotary.register_buffer("inv_freq", rotary.inv_freq.clone(), persistent=False)
    assert by_name(model, ["int8"])[0] is first


def test_names_that_cannot_be(enabled: None, target: PreTrainedModel) -> None:
    for names, words in ((["suffix", "int8"], "only drafts"), (["early-exit"], "number of layers")):
        with pytest.raises(ValueError, match=words):
            target.generate(**prompts(1), **OPTIONS, assistant_models=names)


def test_one_name_is_a_list_of_one(enabled: None, target: PreTrainedModel, tmp_path: Path) -> None:
    plain = target.generate(**prompts(1), **OPTIONS)
    target.save_pretrained(tmp_path)
    for name in ("int8", "suffix", str(tmp_path), tmp_path):
        found = target.generate(**prompts(1), **OPTIONS, assistant_models=name)
        assert found.sequences.tolist() == plain.sequences.tolist()


def test_folders_are_levels_and_are_loaded_once(
    enabled: None, target: PreTrainedModel, middle: PreTrainedModel, tmp_path: Path
) -> None:
    place = tmp_path / "middle"
    middle.save_pretrained(place)
    model = copy.deepcopy(target)
    first = by_name(model, (str(place), "suffix"))
    assert [type(one).__name__ for one in first] == ["LlamaForCausalLM", "SuffixDrafter"]
    assert first[0].dtype is model.dtype
    assert not first[0].training
    assert by_name(model, [place])[0] is first[0]
    middle.save_pretrained(place)  # written anew
    os.utime(place / "config.json", (1, 1))
    again = by_name(model, [place])[0]
    assert again is not first[0]
    assert by_name(copy.deepcopy(model), [place])[0] is not again, "kept with its target"
    out = model.generate(**prompts(2), **OPTIONS, assistant_models=[place, "suffix"])
    assert out.sequences.tolist() == model.generate(**prompts(2), **OPTIONS).sequences.tolist()
    assert [level.name for level in out.polyspec.levels[1:]] == ["middle", "suffix"]


def test_a_folder_with_a_head_is_a_head(enabled: None, target: PreTrainedModel, tmp_path: Path) -> None:
    head_for(target).save_pretrained(tmp_path / "head")
    model = copy.deepcopy(target)
    (head,) = by_name(model, [tmp_path / "head"])
    assert type(head).__name__ == "EagleHead"
    out = model.generate(**prompts(1), **OPTIONS, assistant_models=str(tmp_path / "head"))
    assert out.sequences.tolist() == model.generate(**prompts(1), **OPTIONS).sequences.tolist()


@pytest.mark.parametrize("name", ["int7", "gpt2", "owner/model", "no/such/folder", "", "~/nowhere"])
def test_a_name_of_nothing_is_refused_with_the_names_there_are(
    enabled: None, target: PreTrainedModel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without asking a hub: what is not here is not fetched in the middle of a call."""
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", lambda url, **_: asked.append(url))
    with pytest.raises(ValueError, match=r"assistant_models\[1\] is ") as caught:
        target.generate(**prompts(1), **OPTIONS, assistant_models=["int8", name])
    sentence = str(caught.value)
    assert repr(name) in sentence
    assert "int8, int4, early-exit:<layers>, suffix" in sentence
    assert "\n" not in sentence
    assert not asked


def test_a_hub_id_is_what_lies_in_the_hubs_cache(
    enabled: None, target: PreTrainedModel, middle: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_here = tmp_path / "snapshots" / "0123abc"
    middle.save_pretrained(copy_here)

    def cached(name: str, file: str, **options: Any) -> str | None:
        assert options == {"local_files_only": True}
        return str(copy_here / file) if name == "owner/middle" else None

    monkeypatch.setattr(assistants, "cached_file", cached)
    (found,) = by_name(copy.deepcopy(target), ["owner/middle"])
    assert found.name_or_path == "owner/middle"
    assert torch.equal(found.lm_head.weight, middle.lm_head.weight)


def test_code_in_a_folder_is_never_run_and_never_asked_about(
    enabled: None, target: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to load a level nor to compare its tokenizer with the target's."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is to be asked"))
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise RuntimeError('ran')\n"
    for place, kind in ((tmp_path / "model", "config"), (tmp_path / "words", "tokenizer_config")):
        target.save_pretrained(place)
        (place / "own.py").write_text(code, encoding="utf-8")
        file = place / f"{kind}.json"
        told = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"tokenizer_class": "OwnTokenizer"}
        names = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", None]}
        told["auto_map"] = {k: v for k, v in names.items() if (k == "AutoTokenizer") == (kind == "tokenizer_config")}
        if kind == "config":
            told["model_type"] = "something_of_its_own"
        file.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(ValueError, match=r"assistant_models\[0\] is .*trust_remote_code=True and pass the model"):
        target.generate(**prompts(1), **OPTIONS, assistant_models=[tmp_path / "model"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "words").eval()
    loaded.generation_config.pad_token_id = 0
    other = copy.deepcopy(loaded)
    other.name_or_path = str(tmp_path / "model")
    out = loaded.generate(**prompts(1), **OPTIONS, assistant_models=[other])
    assert out.polyspec.levels[1].forward_passes > 0
    assert not (tmp_path / "ran").exists()


def test_threads_that_name_the_same_level_have_the_same(target: PreTrainedModel) -> None:
    model = copy.deepcopy(target)
    made: list[Any] = []
    threads = [threading.Thread(target=lambda: made.append(by_name(model, "int8")[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert len({id(one) for one in made}) == 1


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every matrix that is packed."""
    built: list[int] = []
    plain = packing.pack_float

    def counting(weight: Tensor, bias: Tensor | None) -> Kernel:
        built.append(1)
        return plain(weight, bias)

    monkeypatch.setattr(packing, "pack_float", counting)
    return built


def _forwards(model: nn.Module) -> dict[str, Callable[..., Any]]:
    return {name: module.__dict__["forward"] for name, module in model.named_modules() if "forward" in module.__dict__}


def test_assistants_are_packed_while_the_chain_runs(
    enabled: None, target: PreTrainedModel, middle: PreTrainedModel, drafter: PreTrainedModel, watched: list[int]
) -> None:
    members = [copy.deepcopy(middle), copy.deepcopy(drafter)]
    seen: list[tuple[bool, bool]] = []
    rows_apart(members[0])  # tries the model, once
    members[0].register_forward_hook(lambda *_: seen.append((is_packed(members[0]), is_packed(target))))
    plain = target.generate(**prompts(3), **OPTIONS).sequences
    for _ in range(2):
        output = target.generate(**prompts(3), **OPTIONS, assistant_models=members, num_assistant_tokens=4)
        assert output.sequences.tolist() == plain.tolist()
        assert not any(is_packed(model) for model in (*members, target))
        assert not any(_forwards(model) for model in members)
    assert set(seen) == {(True, False)}
    # Every product of both members once, not once a generation: query with key and value, gate with up, two more
    # a layer, and the head; the drafter's head never sees the four rows from which torch's own product loses.
    unused = 0 if compiles() else 1
    assert len(watched) == sum(4 * member.config.num_hidden_layers + 1 for member in members) - unused
    seen.clear()
    target.generate(**prompts(3), **OPTIONS, assistant_models=members, polyspec_pack=False)
    assert set(seen) == {(False, False)}


def test_what_is_shared_with_the_target_and_what_the_user_packed_stay(
    enabled: None, target: PreTrainedModel, middle: PreTrainedModel
) -> None:
    seen: list[bool] = []
    hook = target.register_forward_hook(lambda *_: seen.append(is_packed(target)))
    target.generate(**prompts(3), **OPTIONS, assistant_models=[target])
    hook.remove()
    assert not any(seen)
    mine = hf_polyspec.pack(copy.deepcopy(middle))
    before = _forwards(mine)
    target.generate(**prompts(3), **OPTIONS, assistant_models=[mine])
    assert _forwards(mine) == before
    assert before


def test_unpacked_after_an_error(enabled: None, target: PreTrainedModel, middle: PreTrainedModel) -> None:
    broken = copy.deepcopy(middle)

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    broken.register_forward_hook(fail)
    with pytest.raises(hf_polyspec.LevelError):
        target.generate(**prompts(3), **OPTIONS, assistant_models=[broken])
    assert not is_packed(broken)


def test_a_changed_weight_is_packed_again(target: PreTrainedModel, middle: PreTrainedModel) -> None:
    member = copy.deepcopy(middle)
    with torch.no_grad(), packing.packed_assistants([member], target):
        member(IDS)
    with torch.no_grad():
        member.lm_head.weight.mul_(2)
        expected = member(IDS).logits
        with packing.packed_assistants([member], target):
            found = member(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
