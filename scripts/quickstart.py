"""Wait for a server, stream one completion from it and print how fast it came."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator

import requests

PROMPT = '''import json


def load(file):
    """Read'''
MAX_NEW_TOKENS = 96
START_SECONDS = 300


def wait_until_healthy(url: str, server_pid: int | None) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server_pid is not None:
            try:
                os.kill(server_pid, 0)
            except ProcessLookupError:
                raise SystemExit("quickstart: the server stopped while starting") from None
        try:
            if requests.get(f"{url}/health", timeout=10).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.2)
    raise SystemExit(f"quickstart: no healthy server at {url} after {START_SECONDS} s")


def stream(url: str, prompt: str) -> Iterator[dict]:
    """Events of SGLang's native endpoint; `text` holds all that was generated so far."""
    body = {
        "text": prompt,
        "sampling_params": {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 0},
        "stream": True,
    }
    with requests.post(f"{url}/generate", json=body, stream=True, timeout=120) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    raise SystemExit(f"quickstart: {event['error']}")
                yield event


def print_completion(url: str) -> None:
    print(PROMPT, end="", flush=True)
    started = time.monotonic()
    first, shown, event = None, 0, None
    for event in stream(url, PROMPT):
        first = first or time.monotonic()
        print(event["text"][shown:], end="", flush=True)
        shown = len(event["text"])
    ended = time.monotonic()
    if event is None:
        raise SystemExit("quickstart: the stream was empty")
    print("\n" + summary(event["meta_info"], ttft=first - started, total=ended - started))


def summary(meta: dict, ttft: float, total: float) -> str:
    tokens = meta["completion_tokens"]
    text = f"{tokens} tokens in {total:.2f} s: {tokens / total:.1f} tokens/s, first token after {ttft:.2f} s"
    if "spec_accept_length" in meta:
        text += f", accept length {meta['spec_accept_length']:.2f}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--server-pid", type=int, help="give up when this process is gone")
    args = parser.parse_args()
    started = time.monotonic()
    wait_until_healthy(args.url, args.server_pid)
    print(f"quickstart: server ready after {time.monotonic() - started:.0f} s\n", flush=True)
    print_completion(args.url)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
