"""SGLang's resolved speculative arguments for workers that run without a server."""

from argparse import ArgumentParser, Namespace
from functools import cache

from sglang.srt.server_args import ServerArgs


def parsed(*flags: str) -> Namespace:
    """As SGLang's own command line understands them."""
    return _parser().parse_args(["--model-path", "any", *flags])


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser


def speculative_flags(steps: int, *, look_ups: int = 0, adaptive: bool = False) -> Namespace:
    """--speculative-num-steps and what goes with it."""
    found = parsed("--speculative-num-steps", str(steps), "--speculative-eagle-topk", "1")
    found.speculative_num_draft_tokens, found.speculative_adaptive = steps + 1 + look_ups, adaptive
    return found
