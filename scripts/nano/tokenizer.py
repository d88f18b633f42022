"""The byte-level BPE tokenizer: special tokens, training, and its three files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sglang_step35.assets import NANO

BOS, EOS, PAD, IM_START, IM_END = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<|im_start|>",
    "<|im_end|>",
)
CONTROL = (BOS, EOS, PAD, IM_START, IM_END)
# As in the real tokenizer these survive skip_special_tokens: the reasoning and tool parsers read them.
VISIBLE = ("<think>", "</think>", "<tool_call>", "</tool_call>")
TEMPLATE = NANO / "chat_template.jinja"


def train(texts: list[str], vocab: int) -> Tokenizer:
    """Ids 0.. are CONTROL then VISIBLE, in order; merges are learned from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[*CONTROL, *VISIBLE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return relabel(tokenizer)


def relabel(tokenizer: Tokenizer) -> Tokenizer:
    """The trainer marks every added token special; VISIBLE must not be, so its flag is cleared in the file."""
    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["content"] in CONTROL
    return Tokenizer.from_str(json.dumps(data))


def save(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "additional_special_tokens": [IM_START, IM_END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 262144,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    shutil.copyfile(TEMPLATE, out / "chat_template.jinja")


def load(directory: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(str(directory))
