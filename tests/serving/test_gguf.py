"""`sglang serve --model-path nano.gguf` with the usual speculative flags and nothing beside the file."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from sglang_step35.assets import NANO
from sglang_step35.bench.servers import MTP_ARGS
from tests.support.gguf_files import write_gguf
from tests.support.nano_model import generate_all, histogram, prompts
from tests.support.reference import Reference

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(nano as Q8_0, float32 reference on the dequantised weights)."""
    file = tmp_path_factory.mktemp("gguf") / "nano.gguf"
    weights = {name: torch.from_numpy(weight.copy()) for name, weight in write_gguf(NANO, file).items()}
    return file, Reference(json.loads((NANO / "config.json").read_text()), weights)


@pytest.fixture(scope="module")
def server(serve, converted):
    return serve(
        "--model-path", str(converted[0]), "--device", "cpu", "--dtype", "float32", "--reasoning-parser", "step3p5",
        "--tool-call-parser", "step3p5", "--max-total-tokens", "16384", *MTP_ARGS,
    )  # fmt: skip


def test_greedy_output_and_accepted_drafts_are_the_references(server, converted):
    """Prompts shorter and longer than the window of 64, several at once."""
    _, reference = converted
    requests = [*prompts()[:6], [300], [77] * 90]
    answers = generate_all(server, requests, 32, at_once=4)
    for ids, answer in zip(requests, answers, strict=True):
        tokens, accepted = reference.speculative_greedy(ids, 32, 3)
        assert answer["output_ids"] == tokens[:32] == reference.greedy(ids, 32)
        assert histogram(answer) == [accepted.count(i) for i in range(4)]


def test_the_files_own_tokenizer_and_chat_template(server):
    messages = [{"role": "user", "content": "Write a function."}]
    body = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": 40}
    answer = server.post("/v1/chat/completions", body).json()
    prompt = AutoTokenizer.from_pretrained(NANO).apply_chat_template(messages, add_generation_prompt=True)
    assert answer["usage"]["prompt_tokens"] == len(prompt["input_ids"])
    assert answer["choices"][0]["message"]["reasoning_content"]
