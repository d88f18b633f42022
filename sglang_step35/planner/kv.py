"""KV cache: what a token costs, and the two pools SGLang cuts a byte budget into.

Full layers keep every token; sliding ones, MTP layers among them, only those a window can still reach. SGLang holds
them in two pools with separate slot numbers. The arithmetic is that of SGLang 0.5.23,
`model_executor/pool_configurator.py: HybridSWAPoolConfigurator`, and a test compares the two.
"""

from dataclasses import dataclass

from sglang_step35.config import AttentionSpec, ModelSpec
from sglang_step35.planner import PlanError
from sglang_step35.speculative.settings import MTPSettings

BF16 = 2  # bytes of an element
DEFAULT_SWA_RATIO = 0.8  # SGLang's --swa-full-tokens-ratio: sliding slots for each full slot


@dataclass(frozen=True)
class KVLayout:
    """KV bytes on one device. full_token and sliding_token: of one token in one layer.

    replication: how many devices hold a copy of the same KV head (1 unless tp exceeds the KV heads).
    """

    full_layers: int
    sliding_layers: int
    mtp_layers: int
    full_token: int
    sliding_token: int
    replication: int
    earlier_keys: int  # of a sliding layer, the query's own not counted
    state: int = 0  # of one token: the hidden state that the portable platform keeps for the MTP layers

    @property
    def full_cell(self) -> int:
        """Bytes of one slot of the full pool: all full layers."""
        return self.full_layers * self.full_token

    @property
    def sliding_cell(self) -> int:
        """Bytes of one sliding slot: the backbone's sliding layers and the MTP layers, which share slot numbers."""
        return (self.sliding_layers + self.mtp_layers) * self.sliding_token

    @property
    def mtp_share(self) -> float:
        """MTP layers' share of a sliding slot."""
        return self.mtp_layers / (self.sliding_layers + self.mtp_layers)

    @property
    def window(self) -> int:
        """Keys of a sliding layer, the query's own among them."""
        return self.earlier_keys + 1

    @property
    def retained(self) -> int:
        """Earlier tokens whose sliding slots are kept: the worker's `draft_swa_window` under MTP, else the window's.

        SGLang's floor for a pool counts the window's only.
        """
        return MTPSettings(self.mtp_layers).retained(self.earlier_keys) if self.mtp_layers else self.earlier_keys

    def state_bytes(self, requests: int) -> int:
        """Hidden states, beside the pools, of a server of so many requests at once."""
        return self.state * MTPSettings(self.mtp_layers).state_rows(self.earlier_keys, requests) if self.state else 0

    def request_bytes(self, tokens: int, chunk: int = 0) -> int:
        """KV of one request of `tokens` tokens at most: the sliding layers keep a window and the chunk in flight."""
        return tokens * self.full_cell + min(tokens, self.window + chunk) * self.sliding_cell


@dataclass(frozen=True)
class PoolSizes:
    """Slots and bytes of the pools on one device, allocated bytes: SGLang adds one padding page to a pool."""

    full_tokens: int
    sliding_tokens: int
    full_bytes: int
    sliding_bytes: int  # backbone's sliding layers only
    mtp_bytes: int  # one sliding pool for each MTP layer

    @property
    def total_bytes(self) -> int:
        return self.full_bytes + self.sliding_bytes + self.mtp_bytes


def kv_layout(spec: ModelSpec, tp: int = 1, mtp: bool = True, element_bytes: int = BF16) -> KVLayout:
    """The layout of a checkpoint on `tp` devices.

    SGLang counts every MTP layer as a sliding one when the backbone has sliding layers, which they are.
    """
    full = [layer.attention for layer in spec.layers if layer.attention.window is None]
    sliding = [layer.attention for layer in spec.layers if layer.attention.window is not None]
    if not full or not sliding:
        raise PlanError("--config: layer_types must have full and sliding layers; SGLang sizes others differently")
    heads = min(full[0].num_kv_heads, sliding[0].num_kv_heads)
    return KVLayout(
        full_layers=len(full),
        sliding_layers=len(sliding),
        mtp_layers=len(spec.mtp_layers) if mtp else 0,
        full_token=_token_bytes(full[0], tp, element_bytes),
        sliding_token=_token_bytes(sliding[0], tp, element_bytes),
        replication=max(1, tp // heads),
        earlier_keys=spec.earlier_keys,
    )


def _token_bytes(attention: AttentionSpec, tp: int, element_bytes: int) -> int:
    """K and V of one token in one layer on one device: heads are cut among devices, at least one each."""
    return max(1, attention.num_kv_heads // tp) * 2 * attention.head_dim * element_bytes


def pool_sizes(
    spec: ModelSpec,
    budget_bytes: int,
    *,
    tp: int = 1,
    mtp: bool = True,
    page_size: int = 1,
    swa_ratio: float = DEFAULT_SWA_RATIO,
    element_bytes: int = BF16,
) -> PoolSizes:
    """The pools SGLang makes of `budget_bytes` on one device.

    mtp: EAGLE is on, so the MTP layers' pools come out of the same budget. Raises PlanError where SGLang would not
    start.
    """
    layout = kv_layout(spec, tp, mtp, element_bytes)
    cell = layout.full_cell + swa_ratio * layout.sliding_cell
    return sized(layout, int(budget_bytes // cell), page_size, swa_ratio)


def sized(
    layout: KVLayout, max_total_tokens: int, page_size: int = 1, swa_ratio: float = DEFAULT_SWA_RATIO
) -> PoolSizes:
    """The pools for a given number of full slots (SGLang's --max-total-tokens, or what the budget allows)."""
    full = _floor_page(max_total_tokens, page_size)
    sliding = _floor_page(int(full * swa_ratio), page_size)
    if sliding <= layout.earlier_keys + page_size:
        raise PlanError(
            f"a sliding pool of {sliding} tokens cannot hold {layout.earlier_keys} earlier ones and a page of "
            f"{page_size}: SGLang refuses to start; give more memory or raise --swa-full-tokens-ratio"
        )
    return PoolSizes(
        full_tokens=full,
        sliding_tokens=sliding,
        full_bytes=(full + page_size) * layout.full_cell,
        sliding_bytes=(sliding + page_size) * layout.sliding_layers * layout.sliding_token,
        mtp_bytes=(sliding + page_size) * layout.mtp_layers * layout.sliding_token,
    )


def _floor_page(tokens: int, page_size: int) -> int:
    return max(tokens, 0) // page_size * page_size
