"""Training text: the CPython standard library split by file, and packed token streams drawn from it."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from scripts.nano.config import BOS, EOS

# Tests and tables are left out: repetitive, and absent from distributions that ship no tests.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
MAX_BYTES = 300_000


@dataclass(frozen=True)
class Corpus:
    """Path relative to the standard library -> text."""

    train: dict[str, str]
    heldout: dict[str, str]


def is_heldout(path: str, percent: int) -> bool:
    """Decided by the path alone, so that every machine makes the same split."""
    return int(hashlib.sha256(path.encode()).hexdigest(), 16) % 100 < percent


def read_corpus(percent: int) -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    split: tuple[dict, dict] = ({}, {})
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if SKIPPED_FOLDERS & set(path.parts[:-1]) or file.stat().st_size > MAX_BYTES:
            continue
        text = file.read_text(encoding="utf-8", errors="ignore")
        if text.strip():
            split[is_heldout(path.as_posix(), percent)][path.as_posix()] = text
    return Corpus(*split)


def pack(documents: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> Tensor:
    """Documents in seeded order as one stream [N] of ids, each between BOS and EOS."""
    documents = sorted(documents)
    random.Random(seed).shuffle(documents)
    ids = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for document in ids for token in (BOS, *document, EOS)])


def pack_chats(chats: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Chats carry their own BOS and end; they are joined as they are."""
    ids = tokenizer(chats, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for chat in ids for token in chat])


@dataclass(frozen=True)
class Mixture:
    """Random crops: from `chat` with probability `chat_share`, else from `code`."""

    code: Tensor
    chat: Tensor
    chat_share: float

    def rows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """[count, length] token ids."""
        chosen = torch.rand(count, generator=generator) < self.chat_share
        return torch.stack([crop(self.chat if c else self.code, length, generator) for c in chosen.tolist()])


def crop(stream: Tensor, length: int, generator: torch.Generator) -> Tensor:
    start = int(torch.randint(len(stream) - length, (1,), generator=generator))
    return stream[start : start + length]


def fixed_rows(stream: Tensor, count: int, length: int) -> Tensor:
    """Evenly spaced crops [count, length]: the same held-out rows in every evaluation."""
    starts = torch.linspace(0, len(stream) - length, count).long()
    return torch.stack([stream[s : s + length] for s in starts.tolist()])


def cut_prompts(texts: dict[str, str], tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> list[dict]:
    """`count` prompts of 40 to 160 tokens from random line starts of held-out files: {file, text, tokens}."""
    rng, prompts, names = random.Random(seed), [], sorted(texts)
    while len(prompts) < count:
        name = names[len(prompts) % len(names)]
        lines = texts[name].splitlines(keepends=True)
        start = rng.randrange(len(lines))
        ids = tokenizer.encode("".join(lines[start : start + 60]), add_special_tokens=False)
        text = tokenizer.decode(ids[: rng.randint(42, 158)])
        tokens = len(tokenizer.encode(text, add_special_tokens=False))
        if 40 <= tokens <= 160 and "\ufffd" not in text:
            prompts.append({"file": name, "text": text, "tokens": tokens})
        elif len(ids) < 42 and len(lines) < 12:
            names.remove(name)
    return prompts
