"""A checkpoint whose attention is as uneven as the published one's."""

from pathlib import Path

from checkpoints import CheckpointShape, make_checkpoint

# A quarter of the published heads in the published groups of 8 and 12 per KV head, the published head size
# and window, one full layer in four: the nano checkpoint's 4 and 6 heads of 32 leave little to win.
WIDE = CheckpointShape(
    num_layers=4, vocab_size=2048, hidden_size=160, heads=16, sliding_heads=24, kv_groups=2, sliding_kv_groups=2,
    head_dim=128, window=512, max_position=262144, original_position=131072, limits=False, echo=1.5,
)  # fmt: skip


def wide_checkpoint(directory: Path) -> Path:
    """Random weights, and the nano checkpoint's tokenizer.

    Their greedy text soon repeats itself and every draft comes true: MTP at its best.
    """
    return make_checkpoint(directory, WIDE, seed=5)
