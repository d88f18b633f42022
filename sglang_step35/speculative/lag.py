"""How far the MTP layers are behind in rounds that draft nothing, and when they catch up."""

from collections.abc import Sequence

_FEWEST_STEPS = 4  # that layers are left out for, else describing passes costs more than they do


class Lag:
    """Host-side bound, per request, of positions committed since the MTP layers last ran.

    Rounds that draft nothing may leave the layers out; they have no KV then for the positions committed since. The pass
    that catches up starts that much earlier; the rings hold the hidden states it needs.
    """

    def __init__(self, pool_size: int, num_layers: int, capacity: int, rows: int):
        """rows: of a batch, behind which a pass costs no less a row by waiting for more."""
        self.capacity = capacity
        self.num_layers = num_layers
        self.rows = rows
        self.behind = [0] * pool_size

    def of(self, pool_idx: int) -> int:
        """Positions by which the request's layers lag."""
        return self.behind[pool_idx]

    def clear(self, pool_idx: Sequence[int]) -> None:
        """A pass or a prefill ran the layers for these requests."""
        for index in pool_idx:
            self.behind[index] = 0

    def note(self, pool_idx: Sequence[int], width: int) -> None:
        """The layers were left out after a verify of `width` tokens."""
        for index in pool_idx:
            self.behind[index] += width

    def rows_needed(self, pool_idx: Sequence[int], width: int) -> int:
        """Rows of a pass after a verify of `width` tokens: layer i recomputes its i last positions as well."""
        return width + self._widest(pool_idx) + self.num_layers - 1

    def is_due(self, pool_idx: Sequence[int], width: int, widest: int) -> bool:
        """Whether layers catch up after a verify of `width` tokens: enough rows have come together, or another round,
        of `widest` tokens at most, could outrun the rings."""
        rows = self.rows_needed(pool_idx, width) + widest
        full = rows + self.num_layers > self.capacity  # the last layer reads S tokens past its rows
        return full or self._widest(pool_idx) + width >= self.wait(len(pool_idx))

    def wait(self, batch: int) -> int:
        """Plain decode steps from one pass to the next, the rings' limit aside."""
        return max(_FEWEST_STEPS, self.rows // max(1, batch))

    def _widest(self, pool_idx: Sequence[int]) -> int:
        return max(map(self.of, pool_idx), default=0)
