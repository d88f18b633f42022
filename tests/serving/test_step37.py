"""A Step-3.7 checkpoint served without its vision encoder: nano in that layout speaks as nano; images get a 400."""

import anthropic
import ollama
import openai
import pytest

from sglang_step35.assets import NANO
from sglang_step35.bench.servers import MTP_ARGS
from tests.support.nano_model import generate_all, prompts
from tests.support.reference import load_reference
from tests.support.step37 import as_step37

pytestmark = pytest.mark.server
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
QUESTION = {"type": "text", "text": "What is this?"}


@pytest.fixture(scope="module")
def server(serve, tmp_path_factory):
    directory = as_step37(NANO, tmp_path_factory.mktemp("step37") / "nano")
    return serve(
        "--model-path", str(directory), "--device", "cpu", "--dtype", "float32", "--reasoning-parser", "step3p5",
        "--tool-call-parser", "step3p5", "--max-total-tokens", "16384", *MTP_ARGS,
    )  # fmt: skip


def test_greedy_output_is_the_reference_of_nano(server):
    reference, requests = load_reference(NANO), prompts()[:3]
    answers = generate_all(server, requests, 24, at_once=3)
    assert [answer["output_ids"] for answer in answers] == [reference.greedy(ids, 24) for ids in requests]


def test_an_image_is_refused_as_each_client_expects(server):
    url = f"data:image/png;base64,{PNG}"
    with pytest.raises(openai.BadRequestError, match="only supports text input.*image_url"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0).chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": [QUESTION, {"type": "image_url", "image_url": {"url": url}}]}],
        )
    source = {"type": "base64", "media_type": "image/png", "data": PNG}
    with pytest.raises(anthropic.BadRequestError, match="takes text only"):
        anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0).messages.create(
            model="default",
            max_tokens=8,
            messages=[{"role": "user", "content": [QUESTION, {"type": "image", "source": source}]}],
        )
    with pytest.raises(ollama.ResponseError, match="images") as error:
        ollama.Client(host=server.url).chat("default", [{"role": "user", "content": "What?", "images": [PNG]}])
    assert error.value.status_code == 400
    answer = server.post("/generate", {"text": "def add(", "image_data": url})
    assert answer.status_code == 400 and "takes text only" in answer.json()["error"]["message"]
