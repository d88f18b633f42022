"""Guards on running servers: with speculation off and on the text of a plain loop, alone and among other requests."""

import functools
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoTokenizer

from sglang_step35.assets import NANO
from tests.serving import test_mtp, test_serving
from tests.support.nano_model import chi_square, generate, generate_all, greedy, prompts, reference
from tests.support.plain_guards import foreign, guarded_greedy, quoted, token_bytes

pytestmark = pytest.mark.server
COUNT = 32
GUARDS = {
    "budget": ({"reasoning": {"tokens": 7, "line": "Genug."}}, {"budget": (7, "Genug.")}),
    "no thinking": ({"reasoning": {"tokens": 0}}, {"budget": (0, "")}),
    "loop": ({"loop": {"tokens": 1, "times": 2, "line": "Again."}}, {"loop": (1, 2, 1024, "Again.")}),
    "language": ({"language": {"scripts": ["Han"]}}, {"scripts": ("Han",)}),  # nano writes Latin letters otherwise
    "all": (
        {"reasoning": {"tokens": 12}, "loop": {"tokens": 3, "times": 3, "line": ""}, "language": {"scripts": ["Han"]}},
        {
            "budget": (12, "I have used up my thinking budget, so I answer now."),
            "loop": (3, 3, 1024, ""),
            "scripts": ("Han",),
        },
    ),
}


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(NANO)


@functools.cache
def requests() -> list[list[int]]:
    """Code, the same as chats that begin inside `<think>`, and what repeats itself."""
    code = prompts()[2:4]
    turns = [f"<|im_start|>user\n{tokenizer().decode(ids)}<|im_end|>\n" for ids in code]
    chats = [tokenizer()(f"{turn}<|im_start|>assistant\n<think>\n")["input_ids"] for turn in turns]
    return [*code, *chats, [77] * 40, [77, 78, 79] * 12]


def check(name: str, ids: list[int], output: list[int]) -> None:
    """The plain loop says this output token by token; the logits of all of it come from one pass."""
    table = reference().logits(torch.tensor(ids + output))
    rows = {tuple(output[:i]): table[len(ids) + i - 1] for i in range(len(output))}

    def logits(text: list[int]) -> torch.Tensor:
        written = text[len(ids) :]
        assert tuple(written) in rows, f"{name}: {written[-1]} is due after {len(written) - 1} tokens"
        return rows[tuple(written)]

    assert guarded_greedy(logits, tokenizer(), ids, len(output), **GUARDS[name][1]) == output, name


@pytest.fixture(scope="module", params=["off", "mtp"])
def server(serve, request):
    return serve(*(test_serving.ARGS if request.param == "off" else test_mtp.ARGS))


@pytest.mark.parametrize("name", GUARDS)
def test_greedy_output_is_the_plain_loops(server, name):
    answers = generate_all(server, requests(), COUNT, custom_params={"guards": GUARDS[name][0]})
    for ids, answer in zip(requests(), answers, strict=True):
        check(name, ids, answer["output_ids"])
    free = generate_all(server, requests(), COUNT)
    assert any(a["output_ids"] != b["output_ids"] for a, b in zip(free, answers, strict=True)), "it had work to do"
    told = [event for a in answers for event in a["meta_info"]["guards"]]
    assert told or name == "language"


def test_every_mixture_of_guards_grammars_and_neither_in_one_batch(server):
    pattern = r"[a-z]{3,8}=[0-9]{2,12};"
    tasks = [(name, ids) for name in GUARDS for ids in requests()]
    bodies = [(ids, {"custom_params": {"guards": GUARDS[name][0]}}) for name, ids in tasks]
    bodies += [(ids, {"regex": pattern, "ignore_eos": False}) for ids in prompts()[10:14]]
    bodies += [(ids, {}) for ids in prompts()[14:16]]
    bodies += [(prompts()[3], {"regex": "[a-d]{9}", "custom_params": {"guards": {"loop": {"tokens": 1, "times": 2}}}})]
    order = sorted(range(len(bodies)), key=lambda i: i * 7 % len(bodies))
    jobs = [functools.partial(generate, server, bodies[i][0], COUNT, **bodies[i][1]) for i in order]
    found = dict(zip(order, together(jobs), strict=True))
    for i, (name, ids) in enumerate(tasks):
        check(name, ids, found[i]["output_ids"])
    rest = [found[i] for i in range(len(tasks), len(bodies))]
    assert all(re.fullmatch(pattern, a["text"]) for a in rest[:4])
    assert [a["output_ids"] for a in rest[4:6]] == [greedy(tuple(ids), COUNT) for ids in prompts()[14:16]]
    assert re.match("[a-d]{9}", rest[6]["text"])


def together(jobs) -> list:
    with ThreadPoolExecutor(12) as pool:
        return list(pool.map(lambda job: job(), jobs))


def test_sampled_output_follows_the_guarded_target(server):
    ids, samples = requests()[0], 1000
    expected: dict[tuple, float] = {(): 1.0}
    for _ in range(3):
        grown = {}
        for tail, chance in expected.items():
            row = reference().logits(torch.tensor([*ids, *tail]))[-1].clone()
            written = b"".join(token_bytes(tokenizer())[t] for t in tail)
            if not quoted(written.decode(errors="ignore")):  # nano may open inline code
                row[foreign(tokenizer(), written, ("Han",))] = -torch.inf
            best = (row / 1.5).topk(3)
            shares = best.values.softmax(-1).tolist()
            grown |= {(*tail, t): chance * share for t, share in zip(best.indices.tolist(), shares, strict=True)}
        expected = grown
    rule = {"temperature": 1.5, "top_k": 3, "n": 8, "custom_params": {"guards": GUARDS["language"][0]}}
    answers = generate_all(server, [ids] * (samples // 8), 3, **rule)
    found = [tuple(a["output_ids"]) for batch in answers for a in batch]
    assert len(found) == samples and set(found) <= set(expected)
    statistic, bound = chi_square(found, expected)
    assert statistic < bound


def chat(server, **fields) -> dict:
    messages = [{"role": "user", "content": "def area("}]
    body = {"model": "step3p5-nano", "messages": messages, "max_tokens": 24, "temperature": 0, "return_meta_info": True}
    response = server.post("/v1/chat/completions", body | fields)
    return response.json() | {"status": response.status_code}


def test_chats_say_how_long_to_think_and_what_was_done(server):
    free, short = chat(server)["choices"][0], chat(server, reasoning_effort="none")["choices"][0]
    assert free["message"]["reasoning_content"] and "guards" not in free["meta_info"]
    assert short["message"]["reasoning_content"] is None and short["message"]["content"]
    assert short["meta_info"]["guards"] == [{"guard": "reasoning", "at": 0, "did": "ended the thinking"}]
    short = chat(server, reasoning_effort="none", regex="[ab]{4}")["choices"][0]["message"]
    assert short["reasoning_content"] is None and re.fullmatch("[ab]{4}", short["content"])


def test_a_wrong_guard_is_a_bad_request_that_names_the_key(server):
    answer = chat(server, custom_params={"guards": {"loop": {"time": 3}}})
    assert answer["status"] == 400 and "loop.time is unknown, use tokens, times" in answer["error"]["message"]
    body = {"text": "a", "sampling_params": {"custom_params": {"guards": {"lopp": True}}}}
    response = server.post("/generate", body)
    assert response.status_code == 400 and "lopp is unknown" in response.text
