"""`python -m sglang_step35 claude-code`: settings that point Claude Code at a local server."""

import argparse
import json


def settings(url: str, model: str) -> dict:
    """The `env` block of Claude Code's settings.json for a server at `url` serving `model`.

    SGLang answers Anthropic's Messages API under /v1/messages; it checks no key unless started
    with --api-key, but the client refuses to start without one.
    """
    return {
        "env": {
            "ANTHROPIC_BASE_URL": url.rstrip("/"),
            "ANTHROPIC_AUTH_TOKEN": "local",
            "ANTHROPIC_MODEL": model,
            "ANTHROPIC_SMALL_FAST_MODEL": model,
            # Only the local server is to be talked to.
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }
    }


def main(argv: list[str]) -> int:
    """Print the block."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_step35 claude-code", description=__doc__
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="base URL of the server")
    parser.add_argument("--model", default="step3p5-flash", help="--served-model-name")
    options = parser.parse_args(argv)
    print(json.dumps(settings(options.url, options.model), indent=2))
    return 0
