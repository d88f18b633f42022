"""The serving benchmark's workloads and client: against a scripted server, and against a real one."""

import asyncio
import json
from dataclasses import replace

import pytest
from aiohttp import web

from sglang_step35.bench import load, metrics, stats, sweep
from sglang_step35.bench.load import Endpoint, connect, identify, request_body, run_sessions
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS
from sglang_step35.bench.workloads import WORKLOADS, Session, parse_names, sessions
from sglang_step35.cli import bench as bench_serving
from tests.support.sse import DONE, FINISH, delta, event

# --- workloads


def test_unknown_workloads_are_refused_with_the_known_ones():
    assert parse_names("code, chat") == ("code", "chat")
    with pytest.raises(ValueError, match="unknown workload nonsense; known: code, chat, long, agent, tools, random"):
        parse_names("code,nonsense")
    with pytest.raises(ValueError, match="unknown workload"):
        parse_names("")


@pytest.mark.parametrize("name", WORKLOADS)
def test_sessions_are_reproducible_and_differ_between_levels_and_seeds(name):
    first = sessions(name, 8, seed=1, level=0)
    assert first == sessions(name, 8, seed=1, level=0)
    assert sum(s.requests for s in first) == 8
    others = sessions(name, 8, seed=1, level=1) + sessions(name, 8, seed=2, level=0)
    texts = [(s.prompt, s.turns) for s in first + others]
    assert len(set(texts)) == len(texts)


def test_every_client_gets_a_session():
    assert len(sessions("agent", 4, seed=0, level=0)) == 1
    assert len(sessions("agent", 4, seed=0, level=0, clients=3)) == 3


def test_agents_share_their_prefix_and_random_text_does_not():
    assert len({(s.system, json.dumps(s.tools)) for s in sessions("agent", 16, seed=0, level=0)}) == 1
    assert len({s.prompt[:8] for s in sessions("random", 16, seed=0, level=0)}) == 16


def test_fields_beyond_openai_go_only_to_engines_that_know_them():
    chat, code = sessions("chat", 1, 0, 0)[0], sessions("code", 1, 0, 0)[0]
    hosted = Endpoint("http://x", "m", chat_only=True)
    path, body = request_body(hosted, code, [{"role": "user", "content": code.prompt}], 8)
    assert path == "/v1/chat/completions"
    assert set(body) == {"model", "max_tokens", "temperature", "stream", "stream_options", "messages"}
    path, body = request_body(replace(hosted, engine="sglang", chat_only=False), code, [], 8)
    assert (path, body["prompt"], body["return_spec_tokens_details"]) == ("/v1/completions", code.prompt, True)
    assert request_body(replace(hosted, engine="vllm"), chat, [], 8)[1]["ignore_eos"] is True
    tools = sessions("tools", 1, 0, 0)[0]
    body = request_body(replace(hosted, engine="sglang"), tools, [], 8)[1]
    assert "ignore_eos" not in body
    assert [tool["function"]["name"] for tool in body["tools"]] == ["read_file", "write_file", "search", "run"]


# --- the client against a scripted server


FIRST, SECOND = 0.2, 0.3  # seconds before the chunks of a slow answer


class Script:
    """Answers by the word in the prompt; knows how many requests it held at once and what it was sent."""

    def __init__(self):
        self.now, self.most, self.bodies, self.keys, self.clients = 0, 0, [], [], []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        self.clients.append(request.transport.get_extra_info("peername"))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return await self._stream(request, body)
        finally:
            self.now -= 1

    async def _stream(self, request: web.Request, body: dict) -> web.StreamResponse:
        text = body.get("prompt") or body["messages"][-1]["content"]
        if text == "refuse":
            return web.Response(status=503, text="busy")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(FIRST if text == "slow" else 0)
        await response.write(delta(content="one "))
        if text == "malformed":
            await response.write(b"data: {oops\n\n")
        elif text == "cut":
            request.transport.abort()
        elif text == "hang":
            await asyncio.sleep(60)
        elif text != "end early":
            await asyncio.sleep(SECOND if text == "slow" else 0)
            await response.write(delta(content="two") + FINISH)
            usage = {"completion_tokens": 4, "prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 5}}
            await response.write(event(choices=[], usage=usage) + DONE)
        return response

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m", "owned_by": "vllm"}]})


async def with_script(test, **fields):
    script = Script()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", script.answer)
    app.router.add_post("/v1/completions", script.answer)
    app.router.add_get("/v1/models", script.models)
    runner = web.AppRunner(app, handler_cancellation=True)  # else it waits for hanging answers
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    endpoint = Endpoint(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", "m", **fields)
    try:
        async with connect(endpoint) as client:
            return script, await test(client, endpoint)
    finally:
        await runner.cleanup()


def talk(*turns: str) -> Session:
    return Session(turns=turns)


def drive(work: list[Session], concurrency: int, **fields):
    return asyncio.run(with_script(lambda client, e: run_sessions(client, e, work, concurrency, 4), **fields))


def test_times_and_counts_of_a_known_stream():
    script, (results, seconds) = drive([talk("slow")] * 6, concurrency=3, api_key="secret")
    assert script.most == 3
    assert script.keys == ["Bearer secret"] * 6
    assert [r.error for r in results] == [None] * 6
    assert all(r.tokens == 4 and r.cached_tokens == 5 for r in results)
    # lower bounds only: the server's sleeps do not end early, however loaded the machine is
    assert all(FIRST <= r.ttft <= r.latency and r.latency >= FIRST + SECOND for r in results)
    assert seconds >= 2 * (FIRST + SECOND)


def test_each_kind_of_error_is_counted_and_the_rest_goes_on():
    words = ["refuse", "malformed", "cut", "end early", "hang", "fine"]
    _, (results, seconds) = drive([talk(word) for word in words], concurrency=6, timeout=5)
    cell = stats.summarize("chat", 6, results, seconds, {})
    assert cell.errors == {"http 503": 1, "malformed": 1, "broken off": 1, "truncated": 1, "timeout": 1}
    assert cell.tokens == 4


@pytest.mark.parametrize("kept, connections", [(60, 1), (0.01, 2)])
def test_connections_that_the_server_may_be_closing_are_not_used_again(monkeypatch, kept, connections):
    monkeypatch.setattr(load, "KEPT_SECONDS", kept)

    async def twice(client, endpoint):
        for pause in (0.1, 0):
            await run_sessions(client, endpoint, [talk("a")], 1, 4)
            await asyncio.sleep(pause)

    script, _ = asyncio.run(with_script(twice))
    assert len(set(script.clients)) == connections


def test_nobody_listens():
    async def test():
        endpoint = Endpoint("http://127.0.0.1:9", "m")
        async with connect(endpoint) as client:
            results, _ = await run_sessions(client, endpoint, [talk("a")], 1, 4)
            return results, await identify(client, endpoint), await metrics.scrape(client, endpoint)

    results, engine, counters = asyncio.run(test())
    assert [r.error for r in results] == ["connect"]
    assert (engine, counters) == ("other", None)


def test_turns_carry_the_answers_and_end_with_the_first_failure():
    script, (results, _) = drive([talk("a", "b"), talk("refuse", "never sent")], concurrency=1)
    assert [r.error for r in results] == [None, None, "http 503", "skipped turn"]
    assert [m["content"] for m in script.bodies[1]["messages"]] == ["a", "one two", "b"]
    assert len(script.bodies) == 3


def test_a_sweep_covers_every_cell_and_asks_for_the_engine(capsys):
    chosen = sweep.Settings(workloads=("chat", "agent"), concurrency=(1, 2), requests=4, tokens=4, warm_up=1)
    _, (found,) = asyncio.run(with_script(lambda client, e: sweep.run({"one": e}, chosen)))
    assert [(c.workload, c.concurrency, c.requests) for c in found.cells] == [
        ("chat", 1, 4), ("chat", 2, 4), ("agent", 1, 4), ("agent", 2, 8),
    ]  # fmt: skip
    assert (found.engine, found.cells[0].cache_hit_rate, found.cells[0].failed) == ("vllm", 0.5, 0)


@pytest.mark.parametrize("field", ["requests", "tokens"])
def test_settings_below_one_are_refused(field):
    with pytest.raises(ValueError, match="start at 1"):
        sweep.Settings(workloads=("chat",), **{field: 0})


# --- the real thing


@pytest.mark.server
def test_real_server_tells_acceptance_and_cache_hits(serve, tmp_path, capsys):
    server = serve(*NANO_ARGS, *MTP_ARGS, "--enable-metrics", "--enable-cache-report")
    out = tmp_path / "mtp.json"
    bench_serving.main(
        ["run", server.url, "--label", "mtp", "--model", "step3p5-nano", "--workload", "code,agent,tools",
         "--concurrency", "2", "--requests", "4", "--tokens", "16", "--out", str(out)]
    )  # fmt: skip
    (run,) = bench_serving.load(out)
    assert run.engine == "sglang"
    assert [cell.failed for cell in run.cells] == [0, 0, 0]
    code, agent, _ = run.cells
    assert code.tokens == 4 * 16
    assert len(code.acceptance) == 3
    # acceptance by position and the accept length come from the same rounds
    assert code.accept_length == pytest.approx(1 + sum(code.acceptance), abs=0.01)
    assert agent.cache_hit_rate > 0.5 > code.cache_hit_rate


@pytest.mark.server
def test_counters_of_a_real_server_agree_with_its_answers(serve):
    async def test():
        server = serve(*NANO_ARGS, *MTP_ARGS, "--enable-metrics", "--enable-cache-report")
        endpoint = Endpoint(server.url, "step3p5-nano", engine="sglang")
        async with connect(endpoint) as client:
            before = await metrics.scrape(client, endpoint)
            results, _ = await run_sessions(client, endpoint, sessions("agent", 4, seed=5, level=0), 1, 16)
            await asyncio.sleep(1)  # counters of other processes reach /metrics through files
            return results, metrics.difference(before, await metrics.scrape(client, endpoint))

    results, change = asyncio.run(test())
    assert metrics.cache_hit_rate(change) == pytest.approx(stats.cache_hit_rate(results), abs=1e-6)
    assert metrics.accept_length(change) == pytest.approx(stats.accept_length(results), abs=0.3)
