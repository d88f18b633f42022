"""A tokenizer from a GGUF file equals the tokenizer.json it was made from."""

import json

import pytest
from transformers import AutoTokenizer

from sglang_step35.assets import HELDOUT_PROMPTS, NANO
from sglang_step35.checkpoint import gguf_tokenizer
from sglang_step35.checkpoint.base import DamagedFile
from sglang_step35.checkpoint.gguf_file import open_gguf
from sglang_step35.checkpoint.gguf_tokenizer import build_tokenizer
from tests.support.gguf_files import write_gguf

CHAT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n</think><tool_call></tool_call> é 一😀\t\n"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "nano.gguf"
    write_gguf(NANO, path)
    return path


def texts():
    entries = json.loads(HELDOUT_PROMPTS.read_text())
    entries = entries if isinstance(entries, list) else entries["prompts"]
    return [CHAT, *(entry if isinstance(entry, str) else entry["text"] for entry in entries[:50])]


def test_same_ids_and_texts(file):
    expected, found = AutoTokenizer.from_pretrained(NANO), build_tokenizer(open_gguf(file))
    for text in texts():
        ids = expected(text)["input_ids"]
        assert found(text)["input_ids"] == ids
        for skip in (False, True):
            assert found.decode(ids, skip_special_tokens=skip) == expected.decode(ids, skip_special_tokens=skip)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (0, 1, 2)


def test_same_chat_template(file):
    messages = [{"role": "user", "content": "hello"}]
    expected, found = AutoTokenizer.from_pretrained(NANO), build_tokenizer(open_gguf(file))
    rendered = [t.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for t in (expected, found)]
    assert rendered[0] == rendered[1]


def test_sglang_uses_it(file):
    from sglang.srt.plugins import load_plugins
    from sglang.srt.utils.hf_transformers.tokenizer import get_tokenizer

    load_plugins()
    tokenizer = get_tokenizer(str(file))
    assert tokenizer(CHAT)["input_ids"] == AutoTokenizer.from_pretrained(NANO)(CHAT)["input_ids"]


def test_published_pre_tokenizer():
    """Three cuts one after the other, as DeepSeek-V3's tokenizer.json has them."""
    cut = gguf_tokenizer._pre_tokenizer(gguf_tokenizer._CUTS["deepseek-v3"]).pre_tokenize_str
    assert [piece for piece, _ in cut("x=12345 +foo()\n\n  if a_b")] == [
        "x", "=", "123", "45", "Ġ+", "foo", "()ĊĊ", "Ġ", "Ġif", "Ġa", "_b",
    ]  # fmt: skip
    assert len(cut("日本語abc")) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokenizer.ggml.pre": "mystery"}, "gpt2, mystery, which is not implemented"),
        ({"tokenizer.ggml.model": "llama"}, "llama, gpt-2, which is not implemented"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
    ],
)
def test_refusals_name_the_flag(tmp_path, change, message):
    def edit(metadata, tensors):
        metadata |= change
        for key in [key for key, value in change.items() if value is None]:
            del metadata[key]

    write_gguf(NANO, tmp_path / "model.gguf", edit=edit)
    with pytest.raises(DamagedFile, match=f"model.gguf.*{message}.*--tokenizer-path stepfun-ai/Step-3.5-Flash"):
        build_tokenizer(open_gguf(tmp_path / "model.gguf"))
