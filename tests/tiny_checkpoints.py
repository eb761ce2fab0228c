# SPDX-License-Identifier: Apache-2.0
"""Tiny models with a tokenizer, saved to folders: what a command line is given."""

from __future__ import annotations

from pathlib import Path

from tiny_models import noisy, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}\n{% endif %}"


def byte_tokenizer(template: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single bytes, so that most characters beyond ASCII take several of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )
    if template:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_pair(root: Path) -> tuple[Path, Path]:
    """A target and a noisy copy of it with the same tokenizer, saved as `root/target` and `root/small`."""
    tokenizer = byte_tokenizer()
    target = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=2)
    for name, model in (("target", target), ("small", noisy(target, 0.02))):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root / "target", root / "small"
