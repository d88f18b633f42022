"""A checkpoint with the published attention and little else."""

from pathlib import Path

from tests.support.checkpoints import CheckpointShape, make_checkpoint

# The published heads, head size and window, one full layer in four: the nano checkpoint's 4 and 6 heads of
# 32 leave little to win.
WIDE = CheckpointShape(
    num_layers=4, vocab_size=2048, hidden_size=160, heads=64, sliding_heads=96, kv_groups=8, sliding_kv_groups=8,
    head_dim=128, window=512, max_position=262144, original_position=131072, limits=False, echo=1.5,
)  # fmt: skip


def wide_checkpoint(directory: Path) -> Path:
    """Random weights, and the nano checkpoint's tokenizer.

    Their greedy text soon repeats itself and every draft comes true: MTP at its best.
    """
    return make_checkpoint(directory, WIDE, seed=5)
