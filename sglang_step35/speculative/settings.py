"""The speculative settings this worker serves, checked once at start."""

from dataclasses import dataclass


class SpeculativeSettingsError(ValueError):
    """A server flag asks for something multi-token prediction with MTP layers cannot do."""


@dataclass(frozen=True)
class MTPSettings:
    """num_steps: drafts per round (`--speculative-num-steps`), one MTP layer each.

    adaptive: let measured acceptance and cost choose 0 .. num_steps drafts per round
    (`--speculative-adaptive`).
    """

    num_steps: int
    adaptive: bool = False

    @property
    def num_draft_tokens(self) -> int:
        """Verify width: the drafts and the token before them."""
        return self.num_steps + 1


def check_settings(
    *, num_steps: int, topk: int, num_draft_tokens: int, num_mtp_layers: int, attention_dp: int
) -> None:
    """Raise SpeculativeSettingsError naming the flag that cannot work."""
    if num_mtp_layers < 1:
        raise SpeculativeSettingsError(
            "this checkpoint has no MTP layers (num_nextn_predict_layers is 0): "
            "remove --speculative-algorithm"
        )
    if topk != 1:
        raise SpeculativeSettingsError(
            f"--speculative-eagle-topk {topk}: MTP layers draft one chain, use 1"
        )
    if not 1 <= num_steps <= num_mtp_layers:
        raise SpeculativeSettingsError(
            f"--speculative-num-steps {num_steps}: this checkpoint has {num_mtp_layers} MTP "
            f"layers (num_nextn_predict_layers), use 1 to {num_mtp_layers}"
        )
    if num_draft_tokens != num_steps + 1:
        raise SpeculativeSettingsError(
            f"--speculative-num-draft-tokens {num_draft_tokens}: must be "
            f"--speculative-num-steps + 1 = {num_steps + 1}"
        )
    if attention_dp > 1:
        raise SpeculativeSettingsError(
            f"data-parallel attention over {attention_dp} ranks (--attn-dp-size, "
            "--enable-dp-attention): an MTP pass has more rows than SGLang gathers between ranks "
            "for a verify step; use tensor parallelism alone, or remove --speculative-algorithm"
        )


def check_attention_backends(names: tuple[str | None, ...], window: int | None) -> None:
    """Refuse SGLang's own FlashInfer backend, in whose place `hooks.py` puts ours.

    SGLang 0.5.23's plans a sliding layer's verify window from a request's first keys instead of
    its last (tests/test_flashinfer_window.py shows it).
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    if not window or "flashinfer" not in names:
        return
    maker = ATTENTION_BACKENDS["flashinfer"].__module__
    if not maker.startswith("sglang_step35."):
        raise SpeculativeSettingsError(
            f"--attention-backend flashinfer is built by {maker}, not by sglang-step35, and reads "
            "wrong keys when it verifies drafts in sliding-window layers: remove the plug-in that "
            "replaced it, or use fa3 (Hopper), fa4 (Blackwell) or triton"
        )
