# SPDX-License-Identifier: Apache-2.0
"""Each preset with a tiny random model of its architecture and a tokenizer with its special tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from bench_support import bench
from tiny_checkpoints import byte_tokenizer
from tiny_models import tiny
from transformers import PreTrainedTokenizerFast

from hf_polyspec.bench.conversation import stop_ids
from hf_polyspec.bench.journal import read_lines
from hf_polyspec.bench.presets import Preset, available, load_preset
from hf_polyspec.eagle import EagleHead, EagleHeadConfig
from hf_polyspec.models.conversation import encode, messages

LLAMA = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
QWEN = {"bos_token": None, "eos_token": "<|im_end|>"}
NAMED = {
    "llama3-8b-instruct": ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"],
    "qwen2-7b-instruct": ["<|im_start|>", "<|endoftext|>"],
}
VICUNA_PROMPT = (
    "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: Hi! ASSISTANT: Ho.</s> USER: Why? ASSISTANT:"
)
LLAMA2_PROMPT = "<s>[INST] Hi! [/INST] Ho. </s><s>[INST] Why? [/INST]"
LLAMA3_PROMPT = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHo.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "Why?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
QWEN_PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
    "<|im_start|>assistant\nHo.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
)
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "vicuna-7b": (LLAMA, VICUNA_PROMPT),
    "vicuna-13b": (LLAMA, VICUNA_PROMPT),
    "llama2-chat-7b": (LLAMA, LLAMA2_PROMPT),
    "llama2-chat-70b": (LLAMA, LLAMA2_PROMPT),
    "llama3-8b-instruct": (LLAMA3, LLAMA3_PROMPT),
    "qwen2-7b-instruct": (QWEN, QWEN_PROMPT),
}


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Bytes and the family's special tokens, without a chat template."""
    tokenizer = byte_tokenizer(template=False)
    roles, _ = FAMILIES[name]
    tokenizer.add_special_tokens({key: token for key, token in roles.items() if token is not None})
    tokenizer.add_special_tokens({"additional_special_tokens": NAMED.get(name, [])})
    return tokenizer


def test_there_is_a_preset_for_each_of_the_papers_models() -> None:
    assert set(FAMILIES) <= set(available())
    titles = {load_preset(name).title for name in FAMILIES}
    assert titles == {
        "Vicuna-7B",
        "Vicuna-13B",
        "LLaMA2-Chat-7B",
        "LLaMA2-Chat-70B",
        "LLaMA3-8B-Instruct",
        "Qwen2-7B-Instruct",
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_the_chat_template_writes_the_familys_format(name: str) -> None:
    preset, tokenizer = load_preset(name), tokenizer_of(name)
    conversation = messages(["Hi!", "Why?"], ["Ho."], preset.system)
    ids = encode(tokenizer, conversation, preset.chat_template)
    assert tokenizer.decode(ids) == FAMILIES[name][1]
    # Special tokens are single ids, not spelled out.
    assert len(ids) < len(FAMILIES[name][1])


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_end_at_the_familys_tokens(name: str) -> None:
    preset, tokenizer = load_preset(name), tokenizer_of(name)
    ends = stop_ids(tokenizer, None, preset.stop)
    assert [tokenizer.convert_ids_to_tokens(end) for end in ends] == preset.stop
    with pytest.raises(ValueError, match="no token '<none>'"):
        stop_ids(tokenizer, None, ["<none>"])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_command_is_one_that_the_preset_itself_serves(name: str) -> None:
    words = load_preset(name).command.split()
    assert words[:4] == ["polyspec", "bench", "--preset", name]
    assert {"--questions", "--output", "--device"} <= set(words)


@pytest.mark.parametrize("name", ["vicuna-7b", "qwen2-7b-instruct"])
def test_a_preset_runs_with_a_tiny_model_of_its_architecture(
    name: str, bench_models: dict[str, str], tmp_path: Path
) -> None:
    preset, tokenizer = load_preset(name), tokenizer_of(name)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": len(tokenizer), "num_attention_heads": 4}
    kind = "qwen2" if "qwen" in name else "llama"
    model = tiny(kind, max_position_embeddings=1024, eos_token_id=2, **sizes)
    model.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    head = EagleHeadConfig(algorithm="eagle1", fc_bias="vicuna" in name, attention_bias="qwen" in name, **sizes)
    EagleHead(head).save_pretrained(tmp_path / "head")
    code, said = bench(
        *("--preset", name, "--model", str(tmp_path / "target"), "--assistant", f"head={tmp_path / 'head'}"),
        *("--questions", bench_models["questions"], "--tasks", "mt_bench", "--output", str(tmp_path / "run")),
        *("--max-new-tokens", "5", "--warm-up", "0", "--dtype", "float32", "--no-breakdown"),
    )
    assert code == 0, said
    lines = read_lines(tmp_path / "run", "records")
    assert {line["method"] for line in lines} == set(preset.methods or [])
    plain = {(line["group"], line["turn"]): line for line in lines if line["method"] == "plain"}
    assert all(line["output_ids"] == plain[line["group"], line["turn"]]["output_ids"] for line in lines)
    three = [line for line in lines if line["method"].startswith("polyspec:middle,head")]
    assert {len(line["levels"]) for line in three} == {3}


def test_a_preset_with_a_mistake_is_refused_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for text, sentence in (
        ("- a", "must be a YAML mapping"),
        ("a: [", "mine.yaml is damaged"),
        ("modle: x", "unknown key 'modle'"),
        ("model: x", "lacks 'title'"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            load_preset(str(file))
    assert isinstance(load_preset("vicuna-7b"), Preset)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("assistants: [int8]", "must give assistants as names and what to load, not ['int8']"),
        ("stop: </s>", "must give stop as a list of tokens, not '</s>'"),
        ("max_new_tokens: many", "must give max_new_tokens as a whole number, not 'many'"),
        ("methods: chains", "must give methods as a list of methods, not 'chains'"),
    ],
)
def test_a_preset_of_the_users_own_is_checked(change: str, sentence: str, tmp_path: Path) -> None:
    content = {"title": "t", "model": "m", "dtype": "float32", "assistants": {"a": "int8"}, "stop": [], "command": "c"}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    assert load_preset(str(path)).assistants == {"a": "int8"}
    path.write_text(yaml.safe_dump(content | yaml.safe_load(change)))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_preset(str(path))
