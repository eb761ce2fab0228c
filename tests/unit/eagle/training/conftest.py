# SPDX-License-Identifier: Apache-2.0
"""A tiny target with a tokenizer that chats, and texts it wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_polyspec.eagle.training.shards import GREEDY, SAMPLED, Sample, ShardWriter

WORDS = [f"w{index}" for index in range(40)]
SPECIALS = ["<unk>", "<s>", "<end>", "<user>", "<bot>"]
TEMPLATE = (
    "{{ '<s> ' }}{% for m in messages %}"
    "{{ ('<user> ' if m['role'] == 'user' else '<bot> ') + m['content'] + ' <end> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Forty words, and a chat template whose turns end in `<end>`."""
    vocabulary = {word: index for index, word in enumerate([*SPECIALS, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<bot>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def chat_target() -> PreTrainedModel:
    """A random Llama of six layers over the forty words and five special ids."""
    config = LlamaConfig(
        vocab_size=len(SPECIALS) + len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForCausalLM(config).float().eval()


@pytest.fixture(scope="session")
def texts_folder(chat_target: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty texts in two shards, half of them greedy."""
    folder: Path = tmp_path_factory.mktemp("texts")
    generator = torch.Generator().manual_seed(11)
    writer = ShardWriter(folder, 0, chat_target.config.vocab_size, {"prompts": "drawn at random"})
    for number in range(40):
        kind = GREEDY if number % 2 else SAMPLED
        prompt = torch.randint(5, 45, (1, 3 + number % 4), generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(number)
            whole = chat_target.generate(
                prompt, max_new_tokens=8 + number % 9, do_sample=kind == SAMPLED, pad_token_id=0, top_k=0
            )
        writer.add(Sample(number, tuple(whole[0].tolist()), prompt.shape[1], kind))
        if number == 19:
            writer.flush()
    writer.flush()
    return folder


@pytest.fixture
def prompts_file(tmp_path: Path) -> Callable[[int], Path]:
    """`prompts_file(n)`: a file of n different prompts."""

    def make(count: int) -> Path:
        path = tmp_path / "prompts.txt"
        path.write_text("\n".join(f"w{i % 40} w{(7 * i + 1) % 40} w{(i * i) % 40}" for i in range(count)))
        return path

    return make
