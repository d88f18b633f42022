"""What the MTP worker refuses at start, and that the message names the flag."""

from types import SimpleNamespace

import pytest

from sglang_step35 import plugin
from sglang_step35.speculative.settings import (
    MTPSettings,
    SpeculativeSettingsError,
    check_attention_backends,
    check_settings,
    check_unserved,
)
from tests.support.speculative_flags import parsed

GOOD = {"num_steps": 3, "topk": 1, "num_draft_tokens": 4, "num_mtp_layers": 3, "attention_dp": 1, "pipeline": 1}


@pytest.mark.parametrize("steps, layers", [(3, 3), (1, 3), (2, 2), (1, 1)])
def test_as_many_steps_as_layers_or_fewer(steps, layers):
    shape = {"num_steps": steps, "num_draft_tokens": steps + 1, "num_mtp_layers": layers}
    check_settings(**{**GOOD, **shape})
    assert MTPSettings(num_steps=steps).num_draft_tokens == steps + 1


@pytest.mark.parametrize("width", [4, 5, 12, 64])
def test_what_is_above_steps_and_one_is_room_for_look_ups(width):
    check_settings(**{**GOOD, "num_draft_tokens": width})
    spec = SimpleNamespace(
        speculative_num_steps=3, speculative_num_draft_tokens=width, speculative_adaptive=True, speculative_eagle_topk=1
    )
    settings = MTPSettings.from_spec(spec)
    assert (settings.num_steps, settings.look_ups, settings.num_draft_tokens) == (3, width - 4, width)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_mtp_layers": 0}, "no MTP layers .*remove --speculative-algorithm"),
        ({"topk": 2}, "--speculative-eagle-topk 2.*use 1"),
        ({"num_steps": 4, "num_draft_tokens": 5}, "--speculative-num-steps 4.*use 1 to 3"),
        ({"num_steps": 0, "num_draft_tokens": 1}, "--speculative-num-steps 0"),
        ({"num_draft_tokens": 3}, "--speculative-num-draft-tokens 3.*= 4"),
        ({"num_draft_tokens": 65}, "--speculative-num-draft-tokens 65.*up to 60 more"),
        ({"attention_dp": 2}, "--attn-dp-size"),
        ({"pipeline": 2}, "--pp-size 2.*remove --speculative-algorithm"),
    ],
)
def test_what_cannot_work_is_refused(change, message):
    with pytest.raises(SpeculativeSettingsError, match=message):
        check_settings(**{**GOOD, **change})


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--speculative-accept-threshold-single", 0.5),
        ("--speculative-accept-threshold-acc", 0.9),
        ("--speculative-adaptive-config", "depths.json"),
        ("--speculative-draft-window-size", 256),
        ("--speculative-token-map", "tokens.pt"),
    ],
)
def test_what_would_be_passed_over_is_refused(flag, value):
    """By the fields of SGLang's own parser, whose defaults pass."""
    check_unserved(parsed())
    with pytest.raises(SpeculativeSettingsError, match=f"{flag} {value}: .*remove the flag"):
        check_unserved(parsed(flag, str(value)))


def test_flashinfer_is_ours_or_refused(monkeypatch):
    """SGLang's own backend cannot verify sliding layers; another plug-in may have put it back."""
    from sglang.srt.layers.attention import attention_registry

    plugin.register()
    check_attention_backends(("flashinfer", "flashinfer"), 511)
    stock = attention_registry.create_flashinfer_backend
    monkeypatch.setitem(attention_registry.ATTENTION_BACKENDS, "flashinfer", stock)
    with pytest.raises(SpeculativeSettingsError, match="--attention-backend flashinfer"):
        check_attention_backends(("flashinfer", "flashinfer"), 511)
    check_attention_backends(("flashinfer", None), None)
    check_attention_backends(("fa3", "fa3"), 511)
