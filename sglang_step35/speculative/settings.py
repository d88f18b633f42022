"""The speculative settings this worker serves, checked once at start."""

from dataclasses import dataclass

from sglang_step35.names import is_our_code

MAX_LOOK_UPS = 60  # a verify step of 64 tokens
_FEWEST_STATES = 16_384  # hidden states
_MAX_LAG = 96  # positions that layers may lag before they must catch up


class SpeculativeSettingsError(ValueError):
    """A server flag asks for something multi-token prediction with MTP layers cannot do."""


@dataclass(frozen=True)
class MTPSettings:
    """num_steps: drafts per round (`--speculative-num-steps`), one MTP layer each.

    adaptive: let measured acceptance and cost choose 0 .. num_steps drafts per round
    (`--speculative-adaptive`). look_ups: drafts looked up in the request's own text after a whole chain of num_steps,
    the room that `--speculative-num-draft-tokens` leaves. by_slot: `device.keeps_states_by_slot`.
    """

    num_steps: int
    adaptive: bool = False
    look_ups: int = 0
    by_slot: bool = False

    @classmethod
    def from_spec(cls, spec, by_slot: bool = False) -> "MTPSettings":
        """From SGLang's resolved speculative arguments."""
        steps = spec.speculative_num_steps
        return cls(steps, spec.speculative_adaptive, spec.speculative_num_draft_tokens - steps - 1, by_slot)

    @property
    def num_draft_tokens(self) -> int:
        """Verify width at most: all drafts and the token before them."""
        return self.num_steps + 1 + self.look_ups

    @property
    def narrow_widths(self) -> range:
        """Verify widths below the full one that rounds without look-ups need at the depths 0 .. S."""
        return range(1, min(self.num_steps + 2, self.num_draft_tokens))

    @property
    def pass_rows(self) -> int:
        """Rows of an MTP pass behind the widest verify step: its tokens, and the S - 1 positions before
        them whose KV the last layer recomputes with the true tokens."""
        return self.num_draft_tokens + self.num_steps - 1

    @property
    def ring_capacity(self) -> int:
        """Positions the worker keeps per request, a power of two.

        The last layer reads tokens S positions past a pass's rows, and no two of these may share an
        entry. Where rounds may skip layers, what they lag comes on top.
        """
        needed = self.pass_rows + self.num_steps + (_MAX_LAG if self._lags else 0)
        return 1 << (needed - 1).bit_length()

    def retained(self, earlier_keys: int) -> int:
        """Tokens before a request's committed length that its sliding and MTP layers may still read.

        A pass begins S - 1 positions before it, and where rounds may skip layers, as far back as the rings reach.
        """
        return earlier_keys + (self.ring_capacity if self._lags else self.num_steps)

    def state_rows(self, earlier_keys: int, requests: int) -> int:
        """Hidden states kept `by_slot` for so many requests at once: what all of them can need, and of former ones."""
        return max(_FEWEST_STATES, requests * self.reach(earlier_keys))

    def reach(self, earlier_keys: int) -> int:
        """Last positions of a request that exact KV for its next pass is computed from: a layer reads the window before
        it of the layer below."""
        return self.retained(earlier_keys) + (self.num_steps - 1) * earlier_keys

    @property
    def _lags(self) -> bool:
        """Whether rounds may leave the MTP layers out as far as the rings reach."""
        return self.adaptive and not self.by_slot


def check_settings(
    *, num_steps: int, topk: int, num_draft_tokens: int, num_mtp_layers: int, attention_dp: int, pipeline: int
) -> None:
    """Raise SpeculativeSettingsError naming the flag that cannot work."""
    if num_mtp_layers < 1:
        raise SpeculativeSettingsError(
            "this checkpoint has no MTP layers (num_nextn_predict_layers is 0): remove --speculative-algorithm"
        )
    if topk != 1:
        raise SpeculativeSettingsError(f"--speculative-eagle-topk {topk}: MTP layers draft one chain, use 1")
    if not 1 <= num_steps <= num_mtp_layers:
        raise SpeculativeSettingsError(
            f"--speculative-num-steps {num_steps}: this checkpoint has {num_mtp_layers} MTP "
            f"layers (num_nextn_predict_layers), use 1 to {num_mtp_layers}"
        )
    if not num_steps < num_draft_tokens <= num_steps + 1 + MAX_LOOK_UPS:
        raise SpeculativeSettingsError(
            f"--speculative-num-draft-tokens {num_draft_tokens}: use --speculative-num-steps + 1 = {num_steps + 1} "
            f"or, with look-up drafts, up to {MAX_LOOK_UPS} more"
        )
    if attention_dp > 1:
        raise SpeculativeSettingsError(
            f"data-parallel attention over {attention_dp} ranks (--attn-dp-size, "
            "--enable-dp-attention): an MTP pass has more rows than SGLang gathers between ranks "
            "for a verify step; use tensor parallelism alone, or remove --speculative-algorithm"
        )
    if pipeline > 1:
        raise SpeculativeSettingsError(
            f"--pp-size {pipeline}: the MTP layers read the backbone's last hidden states and the sampled tokens, "
            "which only the last pipeline rank has; use tensor parallelism alone, or remove --speculative-algorithm"
        )


def check_unserved(spec) -> None:
    """Raise SpeculativeSettingsError where SGLang's resolved arguments ask for what this worker would pass over."""
    exact = "drafts are accepted so that the output follows the model alone"
    flags = (
        ("accept-threshold-single", spec.speculative_accept_threshold_single, 1.0, exact),
        ("accept-threshold-acc", spec.speculative_accept_threshold_acc, 1.0, exact),
        ("adaptive-config", spec.speculative_adaptive_config, None, "it measures all that it goes by"),
        ("draft-window-size", spec.speculative_draft_window_size, None, "the window is that of the checkpoint"),
        ("token-map", spec.speculative_token_map, None, "MTP layers draft from every token"),
    )
    for flag, value, nothing, why in flags:
        if value != nothing:
            raise SpeculativeSettingsError(f"--speculative-{flag} {value}: {why}; remove the flag")


def check_attention_backends(names: tuple[str | None, ...], window: int | None) -> None:
    """Refuse SGLang's own FlashInfer backend, in whose place `hooks/` puts ours.

    SGLang 0.5.23's plans a sliding layer's verify window from a request's first keys instead of
    its last (tests/attention/test_flashinfer_window.py shows it).
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    if not window or "flashinfer" not in names:
        return
    maker = ATTENTION_BACKENDS["flashinfer"]
    if not is_our_code(maker):
        raise SpeculativeSettingsError(
            f"--attention-backend flashinfer is built by {maker.__module__}, not by sglang-step35, and reads "
            "wrong keys when it verifies drafts in sliding-window layers: remove the plug-in that "
            "replaced it, or use fa3 (Hopper), fa4 (Blackwell) or triton"
        )
