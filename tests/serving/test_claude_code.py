"""The real Claude Code CLI, headless, against a nano server with the settings our command prints.

The nano model is no agent: what it says is rubbish, and it may not stop by itself in a prompt of
30,000 tokens. So the tests make it greedy, give it stop sequences or a tool it has to call
(CLAUDE_CODE_EXTRA_BODY adds fields to the CLI's requests), and look at the turns, not at the text.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS
from sglang_step35.cli import claude_code
from tests.support import mcp_switch

PACKAGE, VERSION = "@anthropic-ai/claude-code", "2.1.330"
MODEL, CONTEXT = "step3p5-nano", 65_536  # the CLI's own prompt is about 32,000 tokens of the nano's
SERVER_ARGS = (*NANO_ARGS, "--max-total-tokens", str(CONTEXT), *MTP_ARGS)
# Tool arguments follow their schema, whatever the model would say.
SERVER_ENV = {"SGLANG_TOOL_STRICT_LEVEL": "2"}
INSTALL_SECONDS = 300
TURN_SECONDS = 240
# One line of code at most, so that the model ends its turn.
SHORT = {"temperature": 0, "stop_sequences": ["\n\n", "):"]}
FORCED = {"temperature": 0.6, "tool_choice": {"type": "any"}}
TRIES = 6  # of what nano often spoils with blanks up to its token limit


@pytest.fixture(scope="session")
def claude(request: pytest.FixtureRequest) -> Path:
    """The CLI's native binary, from npm, kept in pytest's cache between runs."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    folder = Path(request.config.cache.mkdir(f"claude-code-{VERSION}"))
    # The platform's package holds the binary; the main one's install script would only link to it.
    pattern = f"node_modules/{PACKAGE}-*/claude*"
    if not list(folder.glob(pattern)):
        command = [npm, "install", "--prefix", str(folder), "--no-fund", "--no-audit", "--ignore-scripts"]
        done = subprocess.run(
            [*command, f"{PACKAGE}@{VERSION}"], capture_output=True, text=True, timeout=INSTALL_SECONDS
        )
        assert done.returncode == 0, done.stderr
    return next(folder.glob(pattern))


@pytest.fixture
def server(claude, serve):
    return serve(*SERVER_ARGS, **SERVER_ENV)


@pytest.fixture
def run(claude: Path, server, tmp_path: Path) -> Callable[..., list[dict]]:
    """`run(prompt, flags, ...)`: the messages the CLI prints in a home and an empty project of its own."""
    command = [sys.executable, "-m", "sglang_step35", "claude-code", "--url", server.url, "--model", MODEL]
    command += ["--context-length", str(CONTEXT)]
    settings = tmp_path / "settings.json"
    settings.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    home, project = tmp_path / "home", tmp_path / "project"
    home.mkdir()
    project.mkdir()

    def run(prompt: str, *flags: str, body: dict, max_tokens: int = 256) -> list[dict]:
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "CLAUDE_CONFIG_DIR": str(home / ".claude"),
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(max_tokens),
            "CLAUDE_CODE_EXTRA_BODY": json.dumps(body),
        }
        done = subprocess.run(
            [str(claude), "-p", prompt, "--settings", str(settings), *flags],
            env=env, cwd=project, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TURN_SECONDS,
        )  # fmt: skip
        messages = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert messages, f"exit status {done.returncode}: {done.stdout}{done.stderr}"
        return messages

    return run


def posts(server) -> int:
    """Requests to the Messages API, all of which the server must have answered with 200."""
    lines = [line for line in server.log.read_text(errors="replace").splitlines() if '"POST /v1/messages?' in line]
    assert all(" 200" in line for line in lines), lines
    return len(lines)


def assert_completed(result: dict) -> None:
    assert (result["type"], result["subtype"], result["is_error"]) == ("result", "success", False), result
    assert result["terminal_reason"] == "completed"
    assert result["usage"]["input_tokens"] > 0 and result["usage"]["output_tokens"] > 0
    assert result["modelUsage"][MODEL]["contextWindow"] == CONTEXT
    assert set(result["modelUsage"]) == {MODEL}


def until(good: Callable[[list[dict]], object], ask: Callable[[], list[dict]]) -> list[dict]:
    """The first good answer of TRIES."""
    answers = (ask() for _ in range(TRIES))
    found = next(filter(good, answers), None)
    assert found is not None, f"nothing good in {TRIES} answers"
    return found


def presses(printed: list[dict]) -> list[tuple[object, dict]]:
    """What whole calls of the switch asked for, and their results; only that tool may have been called."""
    turns = [message for message in printed if message["type"] in ("assistant", "user")]
    blocks = [block for message in turns for block in message["message"]["content"]]
    calls = [block for block in blocks if block["type"] == "tool_use"]
    assert {call["name"] for call in calls} <= {"mcp__lab__press"}
    whole = {call["id"]: call["input"]["on"] for call in calls if "on" in call["input"]}
    results = [block for block in blocks if block["type"] == "tool_result" and block["tool_use_id"] in whole]
    return [(whole[result["tool_use_id"]], result) for result in results]


@pytest.mark.server
def test_a_turn_with_the_clis_own_prompt_and_tools(run, server):
    before = posts(server)
    [result] = run("Write hello world in Python.", "--output-format", "json", "--max-turns", "4", body=SHORT)
    assert_completed(result)
    assert result["usage"]["input_tokens"] > 10_000
    assert posts(server) > before


@pytest.mark.server
def test_a_streamed_turn_with_a_short_prompt(run, server):
    before = posts(server)
    flags = ("--tools", "", "--system-prompt", "You write Python.", "--max-turns", "4")
    printed = run("Write hello world in Python.", *flags, "--output-format", "stream-json", "--verbose", body=SHORT)
    assert printed[0]["subtype"] == "init" and printed[0]["model"] == MODEL
    blocks = [block for message in printed if message["type"] == "assistant" for block in message["message"]["content"]]
    assert {"thinking", "text"} <= {block["type"] for block in blocks}
    assert_completed(printed[-1])
    assert printed[-1]["result"]
    assert posts(server) > before


@pytest.mark.server
def test_a_tool_call_and_its_result(run, server):
    """The model has to call a tool in every turn, so the run ends by --max-turns."""
    before = posts(server)
    switch = {"command": sys.executable, "args": [mcp_switch.__file__]}
    flags = ("--tools", "", "--system-prompt", "You press.", "--max-turns", "4", "--strict-mcp-config")
    flags += ("--mcp-config", json.dumps({"mcpServers": {"lab": {"type": "stdio", **switch}}}))
    flags += ("--allowedTools", "mcp__lab__press", "--output-format", "stream-json", "--verbose")
    # Where a turn is spoilt however often it is resumed, the CLI ends in success.
    good = lambda printed: presses(printed) and printed[-1]["subtype"] == "error_max_turns"
    printed = until(good, lambda: run("Press the switch.", *flags, body=FORCED))
    for on, result in presses(printed):
        assert not result.get("is_error")
        assert isinstance(on, bool) and f"switch pressed: {on}" in json.dumps(result["content"])
    assert posts(server) - before >= 2  # more where a turn ran into its token limit and was resumed


@pytest.mark.server
def test_structured_output(run):
    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}},
        "required": ["sure"],
        "additionalProperties": False,
    }
    flags = ("--tools", "", "--system-prompt", "You answer.", "--output-format", "json", "--max-turns", "6")
    flags += ("--json-schema", json.dumps(schema))
    [result] = until(lambda printed: printed[-1]["subtype"] == "success", lambda: run("Sure?", *flags, body=FORCED))
    assert_completed(result)
    assert isinstance(result["structured_output"]["sure"], bool)


@pytest.mark.server
def test_counted_tokens_are_the_prompts(serve):
    """As Claude Code asks: a system prompt in cached blocks, a system message among the others, tools, thinking."""
    server = serve(*SERVER_ARGS, **SERVER_ENV)
    cached = {"cache_control": {"type": "ephemeral"}}
    body = {
        "model": MODEL,
        "system": [{"type": "text", "text": "You are an agent."}, {"type": "text", "text": "Be short.", **cached}],
        "messages": [
            {"role": "user", "content": "List the files."},
            {"role": "system", "content": [{"type": "text", "text": "# Environment\nPlatform: linux", **cached}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "I list them.", "signature": ""},
                {"type": "tool_use", "id": "call_1", "name": "Bash", "input": {"command": "ls"}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "a.py"}]},
            ]},
        ],
        "tools": [{"name": "Bash", "description": "Run a command.", "input_schema": {
            "type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"],
        }}],
        "thinking": {"type": "adaptive", "display": "omitted"},
    }  # fmt: skip
    counted = server.post("/v1/messages/count_tokens?beta=true", body)
    extra = {"max_tokens": 8, "context_management": {"edits": []}, "metadata": {"user_id": "someone"}}
    answer = server.post("/v1/messages?beta=true", {**body, **extra, "output_config": {"effort": "high"}})
    assert (counted.status_code, answer.status_code) == (200, 200), (counted.text, answer.text)
    usage = answer.json()["usage"]
    assert counted.json()["input_tokens"] == usage["input_tokens"] + usage.get("cache_read_input_tokens", 0) > 100


def test_the_block_names_one_model_everywhere():
    env = claude_code.settings("http://10.0.0.1:8000/v1/", "step3p5-flash", 82_944, "secret")["env"]
    assert env["ANTHROPIC_BASE_URL"] == "http://10.0.0.1:8000"
    assert {env[name] for name in claude_code.MODEL_VARIABLES} == {"step3p5-flash"}
    assert env["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "82944"
    assert env["ANTHROPIC_AUTH_TOKEN"] == "secret"
    assert all(isinstance(value, str) for value in env.values())
