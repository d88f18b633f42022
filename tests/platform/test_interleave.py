"""Decode rounds between the chunks of long prompts: SGLang's interval, on CPUs by default and for these alone."""

import json
import threading
from types import SimpleNamespace

import pytest

from sglang_step35.assets import NANO, PUBLISHED_CONFIG
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS
from sglang_step35.config import parse_config
from sglang_step35.platform import interleave
from tests.support.nano_model import generate, greedy, prompts, random_ids

CHUNK, ROUNDS = 64, 12


def defaults(**given):
    args = dict(chunked_prefill_size=None, prefill_decode_interval=None, prefill_decode_interval_min_bs=0)
    args |= dict(model_path=str(NANO), nnodes=1, dp_size=1)
    args = SimpleNamespace(**(args | given))
    interleave.set_defaults(args)
    return args.chunked_prefill_size, args.prefill_decode_interval, args.prefill_decode_interval_min_bs


def test_what_the_user_says_stays():
    assert defaults() == (2048, 16, 1)
    assert [defaults(chunked_prefill_size=size)[1] for size in (-1, 64, 512, 8192)] == [1, 1, 4, 64]
    given = dict(chunked_prefill_size=512, prefill_decode_interval=0, prefill_decode_interval_min_bs=4)
    assert defaults(**given) == (512, 0, 4)


@pytest.mark.parametrize("cores, chunk", [(2, 256), (8, 256), (16, 512), (32, 1024), (192, 2048)])
def test_a_chunk_of_the_published_model_takes_some_seconds_on_any_machine(monkeypatch, cores, chunk):
    """22 billion operations a token, 100 billion a second and core, eight seconds."""
    spec = parse_config(json.loads(PUBLISHED_CONFIG.read_text()))
    monkeypatch.setattr(interleave, "facts", lambda _: (spec, None))
    monkeypatch.setattr(interleave, "threads_on", lambda _: cores)
    assert defaults()[0] == defaults(nnodes=2, dp_size=2)[0] == chunk


def test_another_model_s_chunk_is_as_long_as_any(tmp_path):
    assert defaults(model_path=str(tmp_path))[0] == 2048


@pytest.mark.parametrize("left", [None, "a request with a part of its prompt to come"])
def test_only_chunks_inside_a_prompt_hold_prefills_back(left):
    armed = []
    interleave.arm_behind_chunks(lambda *each: armed.append(each), scheduler := SimpleNamespace(chunked_req=left), 3)
    assert armed == ([(scheduler, 3)] if left else [])


@pytest.mark.server
@pytest.mark.parametrize("drafting", [(), MTP_ARGS], ids=["off", "mtp"])
def test_a_long_prompt_leaves_the_others_their_tokens(serve, drafting):
    """Ten chunks, nine pauses: without them the other answer stands still, but for what is on its way."""
    flags = ("--chunked-prefill-size", str(CHUNK), "--prefill-decode-interval", str(ROUNDS))
    server, seen = serve(*NANO_ARGS, *drafting, "--dtype", "float32", *flags), []
    ids, long = prompts()[0], random_ids(1, 10 * CHUNK, seed=5)[0]
    generate(server, long[:9], 1)
    begun, sampling = threading.Event(), {"temperature": 0, "max_new_tokens": 250, "ignore_eos": True}

    def stream():
        for answer in server.stream("/generate", {"input_ids": ids, "sampling_params": sampling, "stream": True}, 120):
            seen.append(answer["output_ids"])
            begun.set()

    other = threading.Thread(target=stream)
    other.start()
    assert begun.wait(60)
    before = len(seen[-1])
    answer = generate(server, long, 1)
    meanwhile = len(seen[-1]) - before
    other.join()
    assert meanwhile >= 8 * ROUNDS
    assert answer["output_ids"] == greedy(tuple(long), 1)
    assert seen[-1] == greedy(tuple(ids), 250)
