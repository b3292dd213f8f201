"""Tiny models made on the spot, so that everything runs within seconds on one core and without any download.

    builtin:addition   138,112 parameters, one token per character, for the task of `sapo_ray.data.addition`
    builtin:bytes      148,352 parameters, one token per byte of UTF-8, a chat template, room for 4,096 tokens

Both are Qwen2 models with random weights in float32, in folders that transformers and vLLM load as any other. Heads
are 32 wide because vLLM's attention on CPUs takes no narrower ones.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging

PRINTABLE = string.digits + string.ascii_letters + string.punctuation + " "
"""The 95 printable characters of ASCII."""

BOXED = "\\boxed{"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, as Qwen2 uses it, without a system message of its own."""

_HIDDEN = 64


def make_addition_model(folder: Path, seed: int) -> None:
    """Write the untrained `builtin:addition` (model, tokenizer, generation config) into `folder`."""
    _write(folder, _addition_tokenizer(), positions=1024, seed=seed)


def make_bytes_model(folder: Path, seed: int) -> None:
    """Write the untrained `builtin:bytes` (model, tokenizer, chat template, generation config) into `folder`."""
    _write(folder, _bytes_tokenizer(), positions=4096, seed=seed)


def _addition_tokenizer() -> Qwen2Tokenizer:
    """99 tokens: 3 specials, the printable characters, and `\\boxed{`, so that the form of an answer is quick to learn.

    Characters beyond those are not seen by the model: they are dropped.
    """
    characters = [_spelling(character) for character in PRINTABLE]
    tokenizer = _byte_level(["<pad>", "<bos>", "<eos>", *characters], pad="<pad>", bos="<bos>", eos="<eos>")
    tokenizer.add_tokens([AddedToken(BOXED, normalized=False)])
    return tokenizer


def _bytes_tokenizer() -> Qwen2Tokenizer:
    """259 tokens: 3 specials and the 256 bytes; any (NFC) text goes there and back unchanged."""
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = _byte_level([*specials, *alphabet], pad=specials[0], bos=specials[1], eos=specials[2])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _byte_level(tokens: list[str], *, pad: str, bos: str, eos: str) -> Qwen2Tokenizer:
    """No merges, so one token a byte.

    It is Qwen2's own class because transformers loads every qwen2 folder by it, whatever tokenizer the folder holds:
    any other kind would come back silently as a different one.
    """
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        unk_token=None,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
    )


def _spelling(character: str) -> str:
    """How a byte-level vocabulary spells a printable character: itself, but for the space."""
    return "\u0120" if character == " " else character


def _write(folder: Path, tokenizer: Qwen2Tokenizer, positions: int, seed: int) -> None:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=_HIDDEN,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        initializer_range=0.5 / _HIDDEN**0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    # Ids only: sampling defaults in a generation config must never decide how rollouts are sampled.
    model.generation_config = GenerationConfig(
        pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
    )
    folder.mkdir(parents=True, exist_ok=True)
    with no_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """A model of half a megabyte needs no bar in the middle of a run's own output."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
