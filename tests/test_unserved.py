"""Features of SGLang that would serve something else with this model are refused before any process starts."""

import pytest
from sglang.srt.server_args import prepare_server_args

from sglang_step35 import plugin
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS


def resolve(*flags: str):
    plugin.register()
    args = prepare_server_args([*NANO_ARGS, *flags])
    args.resolve_once()


@pytest.mark.parametrize("mtp", [(), MTP_ARGS], ids=["plain", "mtp"])
@pytest.mark.parametrize("flags", [("--enable-lora",), ("--lora-paths", "a=/adapter")])
def test_adapters(flags, mtp):
    with pytest.raises(ValueError, match="--enable-lora.*numbers? of heads.*merge the adapter"):
        resolve(*flags, *mtp)


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_disaggregation_with_mtp(mode):
    with pytest.raises(ValueError, match=f"--disaggregation-mode {mode}.*hidden states.*--speculative-algorithm"):
        resolve("--disaggregation-mode", mode, *MTP_ARGS)


@pytest.mark.parametrize("mtp", [(), MTP_ARGS], ids=["plain", "mtp"])
def test_a_server_without_them(mtp):
    resolve(*mtp)
