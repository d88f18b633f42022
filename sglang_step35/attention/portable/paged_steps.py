"""Attention as steps of ggml's graphs, so that all layers of a pass are one call and nothing between them is Python.

Each layer has two steps: one writes the rows' keys and values into its pools, one lets the rows attend. Both read the
layer's `Task`, which is completed before the graph runs. Letters: T rows, H query heads, D head size.
"""

from collections import defaultdict
from collections.abc import Sequence
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from sglang_step35.attention.portable import paged_call, paged_kernel
from sglang_step35.packed.ik_library import FLOAT, Scratch
from sglang_step35.packed.ik_steps import Steps

# Of `PagedCall.fields`, and all that a pass brings.
_OF_CALL = "table table_stride mapping requests rooms records earlier_keys count record room parts".split()
_NAMES = [name for name, _ in paged_kernel.Task._fields_]
_COLUMNS = [_NAMES.index(name) for name in ("keys values new_slots keys_stride values_stride".split() + _OF_CALL)]
_SHAPE = attrgetter("tp_q_head_num", "tp_k_head_num", "qk_head_dim", "scaling")  # of SGLang's attention layers


class PagedSteps:
    """Attention of some layers over T rows; their graph must not outlive it.

    backend: a `PortableAttnBackend`, whose plans these are. layers: SGLang's. dtype: of the pools.
    """

    def __init__(self, backend, layers: Sequence, rows: int, dtype: torch.dtype):
        self.backend, self.layers, self.rows, self.dtype = backend, layers, rows, dtype
        self._kind = paged_call.kind(dtype)
        self._tasks = np.zeros(len(layers), paged_kernel.TASK)
        self._words = self._tasks.view(np.int64).reshape(len(layers), -1)  # what is no float among their fields
        self._alike: dict[tuple, list[int]] = defaultdict(list)  # layers that differ in their pools alone
        self._scratch: dict[tuple, Scratch] = defaultdict(Scratch)
        self._read: list = []
        for number, layer in enumerate(layers):
            self._alike[backend.kind(layer), _SHAPE(layer)].append(number)
            queries, heads, size, scale = _SHAPE(layer)
            own = dict(heads=heads, group=queries // heads, size=size, scale=scale, q_stride=queries * size * FLOAT)
            for name, value in dict(own, width=dtype.itemsize, q_width=FLOAT, rows=rows).items():
                self._tasks[name][number] = value
        # One assignment of all fields: one for each costs as much as the rest of `plan`.
        self._fields = {kind: np.ix_(numbers, _COLUMNS) for kind, numbers in self._alike.items()}

    def add(self, steps: Steps, number: int, parts: Sequence, address: int):
        """The steps of a layer, which gives [H * D, T] at this address.

        parts: q, k and v [D, heads, T], which have their places, and what else must be computed before.
        """
        task = self._tasks[number : number + 1]
        task["q"], task["out"] = parts[0].contents.data, address
        stored = self.store(steps, number, *parts[1:3], before=parts)
        width = int(task["heads"][0] * task["group"][0] * task["size"][0])
        out = steps.callback(paged_kernel.compiled_step(self._kind), task.ctypes.data, (width, self.rows), stored)
        out.contents.data = address
        return out

    def store(self, steps: Steps, number: int, keys, values, before: Sequence):
        """The first of a layer's steps: keys and values [D, heads, T], which have their places, into its pools.

        Alone where nobody reads what the rows attend to. before: what must be computed by then.
        """
        task = self._tasks[number : number + 1]
        task["new_keys"], task["new_values"] = keys.contents.data, values.contents.data
        return steps.callback(paged_kernel.compiled_store(self._kind), task.ctypes.data, (1,), *before)

    def plan(self, forward_batch) -> bool:
        """Let the graph compute the pass that the backend has planned; False where that takes other calls."""
        self._read = []
        return all(self._plan_alike(kind, forward_batch) for kind in self._alike)

    def _plan_alike(self, kind: tuple, forward_batch) -> bool:
        layers = [self.layers[number] for number in self._alike[kind]]
        pools = [self.backend.token_to_kv_pool.get_kv_buffer(layer.layer_id) for layer in layers]
        call = self.backend.paged_call(layers[0], pools[0][0], self.rows, self.dtype)
        slots = self.backend.new_slots(layers[0], forward_batch)
        if call is None or not _within(slots, self.rows, len(pools[0][0])):
            return False
        queries, heads, size, _ = _SHAPE(layers[0])
        fields = call.fields(queries, heads, size, self._scratch[kind].address)
        strides = (part.stride(0) * part.element_size() for part in pools[0])
        values = (slots.data_ptr(), *strides, *(fields[name] for name in _OF_CALL))
        places = [(keys.data_ptr(), values.data_ptr()) for keys, values in pools]
        self._words[self._fields[kind]] = [own + values for own in places]
        self._read += [call, slots]  # the tasks hold their addresses
        return True


def _within(slots: Tensor, rows: int, size: int) -> bool:
    """Whether there is a slot of a pool for every row; compiled code does not check."""
    if len(slots) != rows:
        return False
    found = slots.tolist()
    return min(found) >= 0 and max(found) < size
