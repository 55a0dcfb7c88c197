# SPDX-License-Identifier: Apache-2.0
"""A small byte-level BPE built exactly as Qwen2's: NFC, Qwen2's split regex, single digits, the same special tokens."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qwen2_jax.chat_template import CHATML
from qwen2_jax.files.atomic_folder import write_file
from qwen2_jax.tokenizer import END_OF_TEXT, IM_END, IM_START, PATTERN

SPECIALS = (END_OF_TEXT, IM_START, IM_END)  # appended after the learned vocabulary, in Qwen2's order
SYSTEM = "You are a helpful assistant."  # the chat template's default


def train(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Learns `vocab_size` tokens (256 bytes included) and appends the three special ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(
        add_prefix_space=True,
        trim_offsets=True,
        use_regex=True,  # type: ignore[call-arg]  # the stub lacks them
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in SPECIALS])
    return tokenizer


def padded_size(tokenizer: Tokenizer, multiple: int = 128) -> int:
    """Rows of the embedding: the vocabulary rounded up, as the released checkpoints do. The extra ids are unused."""
    return -(-tokenizer.get_vocab_size() // multiple) * multiple


def save(tokenizer: Tokenizer, folder: Path, *, max_length: int) -> None:
    """Writes new files tokenizer.json, tokenizer_config.json and generation_config.json (end: <|im_end|>)."""
    write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    ids = {s: tokenizer.token_to_id(s) for s in SPECIALS}
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": s, **special} for s, i in ids.items()},
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    generation = {
        "bos_token_id": ids[END_OF_TEXT],
        "do_sample": True,  # mild, as in the released instruct models: greedy decoding of a small model loops
        "eos_token_id": [ids[IM_END], ids[END_OF_TEXT]],
        "pad_token_id": ids[END_OF_TEXT],
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
    }
    for name, value in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        write_file(folder / name, (json.dumps(value, indent=2) + "\n").encode())
