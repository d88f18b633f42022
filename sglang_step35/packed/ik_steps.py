"""Graphs of many steps: what lies between the steps gets its place once, when the graph is built.

Shapes are given as ggml counts them, the innermost dimension first.
"""

from collections.abc import Sequence
from ctypes import POINTER, addressof, c_void_p, cast

from torch import Tensor

from sglang_step35.packed import ik_rows
from sglang_step35.packed.ik_library import F32, GRAPH_NODES, NEOX, CTensor, Graph, Library
from sglang_step35.packed.ik_weights import Readable, kind_of, operand, place

ALIGNMENT = 64  # bytes, of every result


class Steps:
    """The steps of one graph, in the order in which they are asked for; `build` ends it.

    All arguments and results are pointers to ggml's tensors. Rows of a graph that is built lie where they were put: the
    memory and the weights must outlive it.
    """

    def __init__(self, library: Library):
        self.library = library
        self._ends: set[int] = set()

    def __getattr__(self, name: str):
        """ggml's own step of that name."""
        function, arena = getattr(self.library, f"ggml_{name}"), self.library.arena
        return lambda *operands: function(arena, *operands)

    def weight(self, part: Readable):
        """A matrix [rows, columns], or a stack of them, where it lies."""
        *experts, rows, columns = part.shape
        tensor = operand(self.library, kind_of(part), columns, rows, *experts)
        place(tensor.contents, part)
        return tensor

    def floats(self, data: Tensor, *shape: int):
        """float32 memory without gaps, in this shape."""
        tensor = self.library.tensor(F32, *shape)
        tensor.contents.data = data.data_ptr()
        return tensor

    def product(self, x, part: Readable):
        """x [K, T] times the matrix -> [N, T]."""
        return ik_rows.product(self.library, self.weight(part), x)

    def expert_product(self, x, ids, part: Readable):
        """x [K, k, T] times each token's experts ids [k, T] of the stack -> [N, k, T]."""
        return ik_rows.expert_product(self.library, self.weight(part), x, ids)

    def swiglu(self, x, gate: Readable, up: Readable, limit: float | None):
        """min(silu(gate x), limit) * clamp(up x, -limit, limit); x: [H, T]."""
        return ik_rows.gated(self.library, self.weight(gate), self.weight(up), x, limit)

    def experts(self, x, ids, gate: Readable, up: Readable, limit: float | None):
        """The same by each token's experts; x: [H, 1, T], ids: [k, T] -> [I, k, T]."""
        return ik_rows.expert_gated(self.library, self.weight(gate), self.weight(up), x, ids, limit)

    def rotate(self, x, turns: Tensor, channels: int):
        """Rotary embedding of the first `channels` of x [D, heads, T].

        turns: [T, D] float32, of which row t begins with cos and sin of angle 0, cos and sin of angle 1, ...
        """
        tokens, width = turns.shape
        rotated = self.rope_fast(x, self.floats(turns, width, tokens))
        rotated.contents.op_params[0], rotated.contents.op_params[1] = channels, NEOX
        return rotated

    def callback(self, function, data: int, shape: tuple[int, ...], *sources):
        """See `Library.callback`."""
        return self.library.callback(function, data, shape, *sources)

    def end_part(self, step) -> None:
        """Behind this step nothing of what came before is read, but for what was put in a place."""
        self._ends.add(addressof(step.contents))

    def build(self, outputs: Sequence, memory: Tensor, threads: int) -> Graph:
        """The graph up to the outputs. Results that have no place yet get one in `memory` (uint8).

        Raises MemoryError where it is too small.
        """
        graph = Graph(self.library, outputs, threads, nodes=GRAPH_NODES * (1 + len(self._ends)))
        start, end = memory.data_ptr(), memory.data_ptr() + memory.numel()
        address = last = start
        for number in range(self.library.ggml_graph_n_nodes(graph.graph)):
            node = self.library.ggml_graph_node(graph.graph, number)
            tensor = node.contents
            if tensor.view_src:
                tensor.data = cast(c_void_p(tensor.view_src), POINTER(CTensor)).contents.data + tensor.view_offs
            elif not tensor.data:
                tensor.data = address
                address += -(-self.library.ggml_nbytes(node) // ALIGNMENT) * ALIGNMENT
                last = max(last, address)
            if addressof(tensor) in self._ends:
                address = start
        if last > end:
            raise MemoryError(f"a graph needs {last - start} bytes between its steps, not {len(memory)}")
        return graph
