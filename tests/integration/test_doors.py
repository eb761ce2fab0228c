# SPDX-License-Identifier: Apache-2.0
"""Every way of getting `assistant_models` into generate(): all give the same tokens, none changes plain generation."""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from every_door import DOORS, RECIPE, WithMixin, callable_given
from tiny_models import VOCABULARY, noisy, prompts, tiny
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextGenerationPipeline,
    dynamic_module_utils,
)

import hf_polyspec
from hf_polyspec.generation.plan import Plan, mark_of

OPTIONS = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True}
CHAIN = {"polyspec_block_size": 4, "num_assistant_tokens": 3}


@pytest.fixture(autouse=True)
def _leave_no_door_open() -> Iterator[None]:
    before = GenerationMixin.generate
    yield
    hf_polyspec.disable()
    assert GenerationMixin.generate is before


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture
def chain(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [noisy(model, 0.03, seed=1), noisy(model, 0.05, seed=2)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_every_door_leads_to_the_same_tokens(model, chain, door, batch):
    plain = model.generate(**prompts(batch), **OPTIONS)
    ours = door(model, **prompts(batch), **OPTIONS, **CHAIN, assistant_models=chain)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    levels = ours.polyspec.levels
    assert len(levels) == 3
    assert 0 < levels[0].accepted < levels[0].drafted
    assert len(levels[1].drafted_at) == 3, "the options of the chain came through"


@pytest.mark.parametrize("door", [door for door in DOORS if door is not callable_given], ids=lambda door: door.__name__)
def test_every_door_but_the_bare_callable_streams(model, chain, door):
    from transformers.generation.streamers import BaseStreamer

    class Recording(BaseStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []
            self.ends = 0

        def put(self, value: torch.Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ends += 1

    streamer = Recording()
    ours = door(model, **prompts(1), **OPTIONS, assistant_models=chain, streamer=streamer)
    assert streamer.ids == ours.sequences[0].tolist()
    assert streamer.ends == 1


def test_enable_and_disable(model, chain):
    original = GenerationMixin.generate
    hf_polyspec.enable()
    wrapped = GenerationMixin.generate
    hf_polyspec.enable()
    assert GenerationMixin.generate is wrapped
    assert "assistant_models" in inspect.signature(GenerationMixin.generate).parameters
    hf_polyspec.disable()
    assert GenerationMixin.generate is original
    hf_polyspec.disable()
    assert GenerationMixin.generate is original
    with pytest.raises(ValueError, match="assistant_models"):
        model.generate(**prompts(1), **OPTIONS, assistant_models=chain)


def test_attach_and_detach(model, chain):
    hf_polyspec.attach(hf_polyspec.attach(model))
    other = chain[0]
    with pytest.raises(ValueError, match="assistant_models"):
        other.generate(**prompts(1), **OPTIONS, assistant_models=chain[1:])
    twin = copy.deepcopy(model)
    assert twin.generate.__self__ is twin
    outputs = [each.generate(**prompts(1), **OPTIONS, assistant_models=chain).sequences for each in (model, twin)]
    assert outputs[0].tolist() == outputs[1].tolist()
    assert hf_polyspec.detach(model) is model
    assert "generate" not in vars(model)
    hf_polyspec.detach(model)
    with pytest.raises(ValueError, match="assistant_models"):
        model.generate(**prompts(1), **OPTIONS, assistant_models=chain)


def test_an_attachment_outlives_enable_and_disable(model, chain):
    hf_polyspec.enable()
    hf_polyspec.attach(model)
    inside = model.generate(**prompts(1), **OPTIONS, assistant_models=chain).sequences
    hf_polyspec.disable()
    outside = model.generate(**prompts(1), **OPTIONS, assistant_models=chain).sequences
    assert inside.tolist() == outside.tolist()


def test_an_instance_attribute_of_somebody_else_is_kept(model, chain):
    """Model repositories with a recipe put generate on the instance; attach goes around it, detach restores it."""
    called: list[dict[str, Any]] = []
    inner = model.generate

    def somebodys(*args: Any, **kwargs: Any) -> Any:
        called.append(kwargs)
        return inner(*args, **kwargs)

    model.generate = somebodys
    hf_polyspec.attach(model)
    model.generate(**prompts(1), **OPTIONS, assistant_models=chain)
    assert len(called) == 1
    hf_polyspec.detach(model)
    assert model.generate is somebodys


@pytest.mark.parametrize("door", ["enable", "attach", "mixin"])
def test_without_assistant_models_nothing_changes(model, monkeypatch, door):
    """The very same function gets the very same arguments."""
    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def spy(self: Any, *args: Any, **kwargs: Any) -> str:
        seen.append((self, args, kwargs))
        return "result"

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    if door == "enable":
        hf_polyspec.enable()
    elif door == "attach":
        hf_polyspec.attach(model)
    else:
        mixed = WithMixin(model.config)
        model = mixed
    ids, config, extra = object(), object(), object()
    assert model.generate(ids, config, streamer=extra, max_new_tokens=3) == "result"
    ((self, args, kwargs),) = seen
    assert self is model
    assert args == (ids, config)
    assert kwargs == {"streamer": extra, "max_new_tokens": 3}
    hf_polyspec.disable()
    assert GenerationMixin.generate is spy


def lora(model: PreTrainedModel, seed: int) -> Any:
    """The model with an adapter that changes what it says."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return get_peft_model(copy.deepcopy(model), config).eval()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("door", ["enable", "attach"])
@pytest.mark.parametrize("batch", [1, 3])
def test_lora_target_and_lora_assistants(model, chain, door, batch):
    target = lora(model, 1)
    plain = target.generate(**prompts(batch), **OPTIONS)
    assert plain.sequences.tolist() != model.generate(**prompts(batch), **OPTIONS).sequences.tolist()
    hf_polyspec.enable() if door == "enable" else hf_polyspec.attach(target)
    # A copy of the target as middle agrees with it, a LoRA of other weights drafts.
    assistants = [copy.deepcopy(target), lora(model, 2)]
    ours = target.generate(**prompts(batch), **OPTIONS, **CHAIN, assistant_models=assistants)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert ours.polyspec.levels[0].accepted > 0
    mixed = target.generate(**prompts(batch), **OPTIONS, **CHAIN, assistant_models=chain)
    assert mixed.sequences.tolist() == plain.sequences.tolist()
    hf_polyspec.detach(target)


def test_a_text_generation_pipeline(model, chain):
    words = {f"{chr(97 + i % 26)}{'' if i < 26 else chr(65 + i - 26)}": i for i in range(VOCABULARY)}
    raw = Tokenizer(BPE(words, [], unk_token="a"))
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="a", padding_side="left")
    hf_polyspec.enable()
    pipe = TextGenerationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    options = {"max_new_tokens": 10, "do_sample": False}
    for texts in ("thequickfox", ["thequick", "brownfox"]):
        plain = pipe(texts, **options)
        assert pipe(texts, **options, assistant_models=chain) == plain
    together = pipe(["thequick", "brownfoxes"], **options, batch_size=2)
    assert pipe(["thequick", "brownfoxes"], **options, batch_size=2, assistant_models=chain) == together


STRANGERS = """from transformers import GenerationMixin

def generate(model, *arguments, **named):
    model.called = getattr(model, "called", 0) + 1
    return GenerationMixin.generate(model, *arguments, **named)
"""


def from_folder(model: PreTrainedModel, place: Path, own: str) -> Any:
    """The model from a folder that brings its own generate(): a stranger's, or a copy of this project's recipe."""
    model.save_pretrained(place)
    if own == "recipe":
        shutil.copytree(RECIPE / "custom_generate", place / "custom_generate")
    else:
        (place / "custom_generate").mkdir()
        (place / "custom_generate" / "generate.py").write_text(STRANGERS, encoding="utf-8")
    loaded = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True).eval()
    loaded.generation_config.pad_token_id = 0
    return loaded


@pytest.mark.parametrize("when", ["as it is", "enabled", "attached"])
@pytest.mark.parametrize("own", ["recipe", "stranger"])
def test_a_model_folder_that_brings_its_own_generate(model, chain, tmp_path, monkeypatch, own, when):
    """The chain runs at every door that leads to it, nothing recurses, and plain calls stay plain."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    loaded = from_folder(model, tmp_path / "model", own)
    plain = model.generate(**prompts(1), **OPTIONS).sequences.tolist()
    if when == "enabled":
        hf_polyspec.enable()
    elif when == "attached":
        hf_polyspec.attach(loaded)
    given = {**prompts(1), **OPTIONS, "assistant_models": chain}
    outputs = [
        hf_polyspec.generate(loaded, **given),
        model.generate(**given, custom_generate=hf_polyspec.decode),
        model.generate(**given, custom_generate=str(RECIPE), trust_remote_code=True),
    ]
    # transformers puts the folder's function in generate()'s place: only through that is the chain reached.
    through = own == "recipe" or when != "as it is"
    outputs += (
        [loaded.generate(**given), loaded.generate(**given, custom_generate=hf_polyspec.decode)] if through else []
    )
    for output in outputs:
        assert output.sequences.tolist() == plain
        assert len(output.polyspec.levels) == 3
    bare = loaded.generate(**prompts(1), **OPTIONS)
    assert bare.sequences.tolist() == plain
    assert not hasattr(bare, "polyspec")
    assert own == "recipe" or loaded.called > 0, "the folder's own function is not passed by"


@pytest.mark.parametrize("door", ["enable", "attach", "mixin", "function", "callable", "recipe"])
@pytest.mark.parametrize("where", ["generation_config", "the model's"])
def test_assistants_in_a_generation_config_are_used(model, chain, door, where, monkeypatch):
    """Whoever keeps all settings in one place; names survive saving, models are handed on as they are."""
    plain = model.generate(**prompts(2), **OPTIONS).sequences.tolist()
    if door == "mixin":
        other = WithMixin(model.config).eval()
        other.load_state_dict(model.state_dict())
        other.generation_config = copy.deepcopy(model.generation_config)
        model = other
    for given in (chain, ["int8", "suffix"], "suffix"):
        own = copy.deepcopy(model.generation_config)
        config = own if where == "the model's" else GenerationConfig(pad_token_id=0)
        config.assistant_models = given
        config.polyspec_block_size = 4
        options: dict[str, Any] = {**prompts(2), **OPTIONS}
        if where == "the model's":
            monkeypatch.setattr(model, "generation_config", own)
        else:
            options["generation_config"] = config
        if door == "enable":
            hf_polyspec.enable()
        elif door == "attach":
            hf_polyspec.attach(model)
        extra = {"callable": {"custom_generate": hf_polyspec.decode}}.get(door, {})
        extra |= {"custom_generate": str(RECIPE), "trust_remote_code": True} if door == "recipe" else {}
        out = hf_polyspec.generate(model, **options) if door == "function" else model.generate(**options, **extra)
        assert out.sequences.tolist() == plain
        assert len(out.polyspec.levels) == (3 if isinstance(given, list) else 2)
        assert config.assistant_models is given
        if door in ("enable", "attach", "mixin"):
            bare = model.generate(**options, assistant_models=None)
            assert not hasattr(bare, "polyspec"), "None says that there are none"
            said = model.generate(**options, assistant_models=[chain[1]])
            assert len(said.polyspec.levels) == 2, "the argument comes first"
            assert said.sequences.tolist() == plain


def test_a_level_that_asks_the_target_for_plain_text_gets_it(model, monkeypatch):
    """Though the target's own config names assistants and every generate() takes them."""
    monkeypatch.setattr(model, "generation_config", copy.deepcopy(model.generation_config))
    plain = model.generate(**prompts(1), **OPTIONS).sequences.tolist()
    model.generation_config.assistant_models = ["synthetic:1"]
    hf_polyspec.enable()
    out = model.generate(**prompts(1), **OPTIONS)
    assert out.sequences.tolist() == plain
    assert out.polyspec.levels[0].acceptance_rate == 1.0


def test_options_set_in_a_config_survive_saving(model, chain, tmp_path):
    """Also in one that transformers derived from the model's config, whose own values alone it would read back."""
    config = model.generation_config
    assert config._from_model_config, "as every model made from a config has one"
    values = {
        "polyspec_block_size": 3, "polyspec_direct_tokens": 0, "polyspec_verification": "token", "polyspec_pack": False,
        "polyspec_tree_tokens": 0, "polyspec_seed": 7, "num_assistant_tokens": 2,
        "assistant_models": ["int8", "suffix"],
    }  # fmt: skip
    plain = model.generate(**prompts(1), **OPTIONS).sequences.tolist()
    for name, value in values.items():
        setattr(config, name, value)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert {name: getattr(again.generation_config, name) for name in values} == values
    again.generation_config.pad_token_id = 0
    out = hf_polyspec.generate(again, **prompts(1), **OPTIONS)
    assert out.sequences.tolist() == plain
    assert [level.name for level in out.polyspec.levels[2:]] == ["suffix"]
    del config.polyspec_block_size
    with pytest.raises(AttributeError, match="polyspec_block_size"):
        _ = config.polyspec_block_size
    with pytest.raises(AttributeError, match="polyspec_block_size"):
        del config.polyspec_block_size
    assert not hasattr(GenerationConfig(), "polyspec_block_size")


@pytest.mark.parametrize("door", ["function", "callable", "enable"])
def test_a_plan_in_a_config_acts_as_the_argument_does(model, chain, tmp_path, door):
    plan = Plan(
        made_by="by hand", machine="any", target=mark_of(model, "target"), temperature=0.0, new_tokens=14, chosen=(1,),
        assistants=(mark_of(chain[0], "first"), mark_of(chain[1], "second")), options={"num_assistant_tokens": 2},
        tokens_per_second=2.0, plain_tokens_per_second=1.0,
    )  # fmt: skip
    plan.save(tmp_path / "plan.json")
    config = copy.deepcopy(model.generation_config)
    config.polyspec_plan = str(tmp_path / "plan.json")
    options = {**prompts(1), **OPTIONS, "assistant_models": chain, "generation_config": config}
    if door == "enable":
        hf_polyspec.enable()
    extra = {"custom_generate": hf_polyspec.decode} if door == "callable" else {}
    out = hf_polyspec.generate(model, **options) if door == "function" else model.generate(**options, **extra)
    assert len(out.polyspec.levels) == 2
    assert len(out.polyspec.levels[0].drafted_at) == 2
    assert out.sequences.tolist() == model.generate(**prompts(1), **OPTIONS).sequences.tolist()


def test_a_trainer_that_predicts_hands_labels_on(model, chain, tmp_path):
    """They are in the batch, since the loss needs them; plain generation drops them."""
    pytest.importorskip("accelerate")
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    rows = [{name: value[0] for name, value in prompts(1, seed=seed).items()} for seed in range(4)]
    examples = [{**row, "labels": row["input_ids"].clone()} for row in rows]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), predict_with_generate=True, per_device_eval_batch_size=2, report_to=[],
        disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(model=copy.deepcopy(model), args=arguments, eval_dataset=examples)
    plain = trainer.predict(examples, max_new_tokens=8, do_sample=False).predictions
    hf_polyspec.enable()
    for given in (chain, ["suffix"], ["int8", "suffix"]):
        found = trainer.predict(examples, max_new_tokens=8, do_sample=False, assistant_models=given).predictions
        assert found.tolist() == plain.tolist()


@pytest.mark.parametrize("form", ["outside", "forward", "in place", "a layer", "the model inside"])
@pytest.mark.parametrize("role", ["drafter", "middle", "target"])
def test_compiled_models_are_levels(model, form, role):
    """Backend "eager": the wrappers are those of any other backend, and no compiler is needed."""
    torch.compiler.reset()
    one = noisy(model, 0.0 if role == "target" else 0.03)
    if form == "outside":
        one = torch.compile(one, backend="eager")
    elif form == "forward":
        one.forward = torch.compile(one.forward, backend="eager")
    elif form == "in place":
        one.compile(backend="eager")
    elif form == "a layer":
        one.model.layers[0].compile(backend="eager")
    else:
        one.model = torch.compile(one.model, backend="eager")
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(**prompts(1), **options).tolist()
    target = one if role == "target" else model
    chain = {"drafter": [one], "middle": [one, "suffix"], "target": ["int8", "suffix"]}[role]
    assert hf_polyspec.generate(target, **prompts(1), **options, assistant_models=chain).tolist() == plain
    if role == "target" and form == "forward":
        middle = hf_polyspec.quantize_model(one, 4, group_size=16)
        assert "forward" not in vars(middle), "a copy computes with its own layers"
        ids = prompts(1)["input_ids"]
        assert not torch.allclose(middle(ids).logits, one(ids).logits)
