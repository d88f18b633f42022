"""`python -m sglang_step35 claude-code`: settings that point Claude Code at a local server.

Variables as documented at code.claude.com/docs/en/env-vars and /en/model-config, and as the CLI
2.1.330 was seen to act on them (tests/serving/test_claude_code.py drives it).
"""

import argparse
import json

CONTEXT_LENGTH = 262_144  # max_position_embeddings of Step-3.5-Flash
# Every name under which Claude Code picks a model: its own choice, the aliases that subagents and
# background tasks ask for, and what a subagent is given.
MODEL_VARIABLES = (
    "ANTHROPIC_MODEL",
    "ANTHROPIC_DEFAULT_OPUS_MODEL",
    "ANTHROPIC_DEFAULT_SONNET_MODEL",
    "ANTHROPIC_DEFAULT_HAIKU_MODEL",
    "CLAUDE_CODE_SUBAGENT_MODEL",
)


def settings(url: str, model: str, context_length: int = CONTEXT_LENGTH, api_key: str = "local") -> dict:
    """The `env` block of Claude Code's settings.json for a server at `url` serving `model`.

    SGLang answers Anthropic's Messages API under /v1/messages; it checks no key unless started
    with --api-key, but the client refuses to start without one.
    """
    return {
        "env": {
            "ANTHROPIC_BASE_URL": url.rstrip("/").removesuffix("/v1"),
            "ANTHROPIC_AUTH_TOKEN": api_key,
            **dict.fromkeys(MODEL_VARIABLES, model),
            # The CLI takes 1M tokens for a model it does not know and would compact too late.
            "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(context_length),
            # Else the system prompt starts with a line that differs from session to session, and
            # no session finds another's system prompt and tools in the prefix cache.
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
            # Step's chat template knows no tool_reference blocks, by which searched tools arrive.
            "ENABLE_TOOL_SEARCH": "false",
            # Only the local server is to be talked to.
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }
    }


def main(argv: list[str]) -> int:
    """Print the block."""
    parser = argparse.ArgumentParser(prog="python -m sglang_step35 claude-code", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="base URL of the server")
    parser.add_argument("--model", default="step3p5-flash", help="--served-model-name")
    parser.add_argument(
        "--context-length",
        type=int,
        default=CONTEXT_LENGTH,
        help="the server's --context-length, or its KV tokens where they are fewer",
    )
    parser.add_argument("--api-key", default="local", help="the server's --api-key, if it has one")
    options = parser.parse_args(argv)
    block = settings(options.url, options.model, options.context_length, options.api_key)
    print(json.dumps(block, indent=2))
    return 0
