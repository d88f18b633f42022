"""`rope_scaling` of a config.json from the frequency divisors that a GGUF file has in its place.

llama3 scaling with factor f divides the frequency w of a channel pair by 1 / (s + (1 - s) / f), where the smooth step
s = clamp((o w / 2 pi - low) / (high - low), 0, 1) and o is the original context. f is the largest divisor; low and
high have one published value, so one divisor between 1 and f tells o.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

LOW, HIGH = 1.0, 32.0  # low_freq_factor and high_freq_factor of every published config
PUBLISHED_CONTEXT = 131072
_TOLERANCE = 1e-4  # float32 divisors, float32 frequencies


class UnknownScaling(ValueError):
    """The divisors are not those of llama3 scaling."""


def rope_scaling(divisors: Sequence[float], theta: float, head_dim: int, rotated: int) -> dict[str, Any] | None:
    """The `rope_scaling` fields that give these divisors; None where all are 1.

    divisors: [head_dim / 2], of full layers. theta: their base. rotated: channels they turn. Raises UnknownScaling.

    The first rotated / 2 divisors count and the rest are 1. Converters of before MTP support computed all of them, for
    frequencies over the whole of head_dim: read so, they tell the same fields.
    """
    given = np.asarray(divisors, dtype=np.float64)
    if np.allclose(given, 1.0, atol=1e-6):
        return None
    over_all = not np.allclose(given[rotated // 2 :], 1.0, atol=1e-6)
    channels = head_dim if over_all else rotated
    frequencies = theta ** (-np.arange(0, channels, 2) / channels)
    used = given[: len(frequencies)]
    factor = _rounded(used.max())
    for original in (_original_context(used, frequencies, factor), PUBLISHED_CONTEXT):
        if original and np.allclose(llama3_divisors(frequencies, factor, original), used, rtol=_TOLERANCE):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LOW,
                "high_freq_factor": HIGH,
                "original_max_position_embeddings": original,
            }
    raise UnknownScaling(
        f"its {len(used)} divisors up to {used.max():.6g} are not those of llama3 scaling with "
        f"low_freq_factor {LOW:g} and high_freq_factor {HIGH:g}"
    )


def llama3_divisors(frequencies: np.ndarray, factor: float, original: int) -> np.ndarray:
    """[pairs] -> what llama3 scaling divides each frequency by."""
    turns = original * frequencies / (2 * math.pi)
    smooth = np.clip((turns - LOW) / (HIGH - LOW), 0.0, 1.0)
    return 1.0 / (smooth + (1.0 - smooth) / factor)


def _original_context(divisors: np.ndarray, frequencies: np.ndarray, factor: float) -> int | None:
    """From the pair in the middle of the ramp, where rounding counts least."""
    smooth = (1.0 / divisors - 1.0 / factor) / (1.0 - 1.0 / factor)
    pair = np.abs(smooth - 0.5).argmin()
    if not 1e-3 < smooth[pair] < 1.0 - 1e-3:
        return None
    return round((smooth[pair] * (HIGH - LOW) + LOW) * 2 * math.pi / frequencies[pair])


def _rounded(value: float) -> float:
    """A float32's value as someone wrote it down."""
    return float(f"{value:.6g}")
