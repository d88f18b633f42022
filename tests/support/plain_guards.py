"""Guards as a plain loop, one token at a time over the whole text: the reference of `sglang_step35/guards`."""

import codecs
import re
from collections.abc import Callable
from functools import cache

import regex
import torch
from tokenizers import pre_tokenizers
from torch import Tensor

THINK, THINK_END = "<think>", "</think>"
CALLS = ("<tool_call>", "</tool_call>")
PAIRS = dict(zip('"“„«‹「『《', '"”“»›」』》', strict=True))


def guarded_greedy(
    logits: Callable[[list[int]], Tensor], tokenizer, prompt: list[int], count: int, *,
    budget: tuple[int, str] | None = None, loop: tuple[int, int, int, str] | None = None,
    scripts: tuple[str, ...] | None = None,
) -> list[int]:  # fmt: skip
    """`count` tokens, each the best one that the guards leave.

    logits: of the token after these ids, [V]. budget: tokens and line. loop: tokens, times, longest and line.
    """
    start, end = (tokenizer.convert_tokens_to_ids(tag) for tag in (THINK, THINK_END))
    tags = [token for token in prompt if token in (start, end)]
    inside, used, forced, output, answer = tags[-1:] == [start], 0, [], [], b""
    while len(output) < count:
        whole = not pending(b"".join(token_bytes(tokenizer)[token] for token in output))
        periods = repeated(output, *loop[:3]) if loop and whole else []
        calls = [tokenizer.decode(token) for token in output if tokenizer.decode(token) in CALLS]
        thinking = inside and calls[-1:] != [CALLS[0]]
        if thinking and not forced and whole:
            if periods:
                forced = way_out(tokenizer, loop[3])
            elif budget and used >= budget[0]:
                forced = way_out(tokenizer, budget[1] if budget[0] else "")
        if forced:
            token = forced.pop(0)
        else:
            row = logits(prompt + output).clone()
            if periods and not thinking:
                row[[output[-period] for period in periods]] = -torch.inf
            if scripts and not inside and not quoted(answer.decode(errors="ignore")):
                row[foreign(tokenizer, answer, scripts)] = -torch.inf
            token = row.argmax().item()
        if inside:
            used += 1
        else:
            answer += token_bytes(tokenizer)[token]
        inside = token != end if inside else token == start
        output.append(token)
    return output


def way_out(tokenizer, line: str) -> list[int]:
    text = f"\n\n{line}\n{THINK_END}" if line else THINK_END
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def repeated(text: list[int], tokens: int, times: int, longest: int) -> list[int]:
    """Lengths of the n-grams that stand `times` times in a row at the text's end."""
    lengths = range(tokens, min(longest, len(text) // times) + 1)
    return [n for n in lengths if text[len(text) - n * times :] == text[-n:] * times]


def quoted(text: str) -> bool:
    """Whether what follows the text stands in code, a quotation or a tool call."""
    text = re.sub(r"<tool_call>.*?</tool_call>", "x", text, flags=re.S)
    if "<tool_call>" in text:
        return True
    inside, line = "", ""
    for piece in re.findall(r"`+|\n|[^`\n]", text):
        if piece == "\n":
            inside = inside if inside == "```" else ""
        elif piece.startswith("```"):
            inside = "" if inside == "```" else inside or "```"
        elif piece.startswith("`"):
            inside = {"": "`", "`": ""}.get(inside, inside)
        elif inside:
            inside = "" if piece == inside else inside
        elif piece == ">" and not line.strip(" \t"):
            inside = "quoted line"
        else:
            inside = PAIRS.get(piece, "")
        line = "" if piece == "\n" else line + piece
    return bool(inside)


@cache
def token_bytes(tokenizer) -> list[bytes]:
    """Through tokenizers' own ByteLevel decoder where a token is whole characters, by its alphabet where it is not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=ord)
    kept = [byte for byte in range(256) if chr(byte) in alphabet]
    rest = [byte for byte in range(256) if byte not in kept]
    table = {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(rest)}
    added = tokenizer.added_tokens_decoder
    found = []
    for token in range(len(tokenizer)):
        if token in added:
            found.append(b"" if added[token].special else added[token].content.encode())
        else:
            found.append(bytes(table[letter] for letter in tokenizer.convert_ids_to_tokens(token)))
    return found


def pending(text: bytes) -> bytes:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(text)
    return decoder.getstate()[0]


def foreign(tokenizer, text: bytes, scripts: tuple[str, ...]) -> list[int]:
    """Tokens that would write a character of another script behind the text, or begin one that can only be such."""
    spelled, tags = token_bytes(tokenizer), tokenizer.added_tokens_decoder
    return [v for v in range(len(tokenizer)) if v not in tags and writes_foreign(text, spelled[v], scripts)]


def writes_foreign(text: bytes, spelled: bytes, scripts: tuple[str, ...]) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    decoder.decode(text)
    if any(not fits(char, scripts) for char in decoder.decode(spelled)):
        return True
    left = decoder.getstate()[0]
    return bool(spelled and left) and not can_become(left, scripts)


@cache
def fits(char: str, scripts: tuple[str, ...]) -> bool:
    names = "".join(rf"\p{{Script={name}}}" for name in ("Common", "Inherited", "Unknown", *scripts))
    return bool(regex.fullmatch(f"[{names}]", char))


def can_become(begun: bytes, scripts: tuple[str, ...]) -> bool:
    """Whether a character of these scripts, or one that all share, has these first bytes."""
    return any(begun in beginnings(name) for name in ("Common", "Inherited", *scripts))


@cache
def beginnings(script: str) -> set[bytes]:
    """The first bytes of a script's characters."""
    chars = regex.findall(rf"\p{{Script={script}}}", "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)])))
    return {char.encode()[:length] for char in chars for length in range(1, len(char.encode()))}
