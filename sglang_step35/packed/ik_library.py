"""libggml of the wheel `ik-llama-cpp-python`, by ctypes: graphs over memory that torch or a mapped file owns.

Its structures are those of that wheel's ggml.h, so the version is pinned. A failed assertion of ggml ends the process:
whoever builds a graph checks types and shapes first. One thread may use it at a time.
"""

import ctypes
import struct
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_bool, c_char, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p, cast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

PACKAGE, VERSION = "ik-llama-cpp-python", "0.1.5"
F32, I8, I32 = 0, 24, 26  # enum ggml_type
FLOAT = 4  # bytes
SIGMOID, SILU = 7, 10  # enum ggml_unary_op
NEOX = 2  # the rotary embedding that turns channel i with channel i + r / 2
CALLBACK_LIMIT = 8  # which of our callback's op_params holds a network's limit: the first ones are ggml's
EVERY_THREAD = -1  # GGML_N_TASKS_MAX
ARENA_BYTES = 256 << 20  # of tensors and graphs, a megabyte for 45 layers; what is not used costs nothing
GRAPH_NODES = 64  # at most, in a graph of one layer; ggml rounds its tables up from there
_OBJECT_BYTES = 32  # ggml's own header before each tensor


class CTensor(Structure):
    """struct ggml_tensor. ne: weights of each dimension, the innermost first. nb: their strides in bytes."""

    _fields_ = [
        ("type", c_int),
        ("backend", c_int),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),
        ("nb", c_size_t * 4),
        ("op", c_int),
        ("op_params", c_int32 * 16),
        ("flags", c_int32),
        ("grad", c_void_p),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
        ("name", c_char * 64),
        ("extra", c_void_p),
    ]


class _Plan(Structure):
    """struct ggml_cplan."""

    _fields_ = [
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
    ]


class _Init(Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


_TENSOR = POINTER(CTensor)
_SIGNATURES: dict[str, tuple] = {
    "ggml_init": (c_void_p, _Init),
    "ggml_free": (None, c_void_p),
    "ggml_used_mem": (c_size_t, c_void_p),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_blck_size": (c_int, c_int),
    "ggml_type_size": (c_size_t, c_int),
    "ggml_new_tensor_3d": (_TENSOR, c_void_p, c_int, c_int64, c_int64, c_int64),
    "ggml_mul_mat": (_TENSOR, c_void_p, _TENSOR, _TENSOR),
    "ggml_mul_mat_id": (_TENSOR, c_void_p, _TENSOR, _TENSOR, _TENSOR),
    "ggml_moe_up_gate": (_TENSOR, c_void_p, _TENSOR, _TENSOR, _TENSOR, _TENSOR, c_int),
    "ggml_mul_multi_add": (_TENSOR, c_void_p, _TENSOR, _TENSOR),
    "ggml_add": (_TENSOR, c_void_p, _TENSOR, _TENSOR),
    "ggml_div": (_TENSOR, c_void_p, _TENSOR, _TENSOR),
    "ggml_scale": (_TENSOR, c_void_p, _TENSOR, c_float),
    "ggml_sigmoid": (_TENSOR, c_void_p, _TENSOR),
    "ggml_sum_rows": (_TENSOR, c_void_p, _TENSOR),
    "ggml_get_rows": (_TENSOR, c_void_p, _TENSOR, _TENSOR),
    "ggml_top_k": (_TENSOR, c_void_p, _TENSOR, c_int),
    "ggml_reshape_2d": (_TENSOR, c_void_p, _TENSOR, c_int64, c_int64),
    "ggml_reshape_3d": (_TENSOR, c_void_p, _TENSOR, c_int64, c_int64, c_int64),
    "ggml_fused_rms_norm": (_TENSOR, c_void_p, _TENSOR, _TENSOR, c_float),
    "ggml_fused_up_gate": (_TENSOR, c_void_p, _TENSOR, _TENSOR, _TENSOR, c_int),
    "ggml_fused_mul_unary": (_TENSOR, c_void_p, _TENSOR, _TENSOR, c_int),
    "ggml_rope_fast": (_TENSOR, c_void_p, _TENSOR, _TENSOR),
    "ggml_map_custom1": (_TENSOR, c_void_p, _TENSOR, c_void_p, c_int, c_void_p),
    "ggml_nbytes": (c_size_t, _TENSOR),
    "ggml_graph_n_nodes": (c_int, c_void_p),
    "ggml_graph_node": (_TENSOR, c_void_p, c_int),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_void_p, _TENSOR),
    "ggml_graph_plan": (_Plan, c_void_p, c_int),
    "ggml_graph_compute": (c_int, c_void_p, POINTER(_Plan)),
    "ggml_quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "iqk_repack_tensor": (None, _TENSOR),
}


class Scratch:
    """Memory that one graph or kernel at a time may write; it grows to the largest size asked for and stays."""

    def __init__(self):
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def address(self, size: int) -> int:
        """Of at least `size` bytes."""
        return self.bytes(size).data_ptr()

    def bytes(self, size: int) -> torch.Tensor:
        """[size] uint8."""
        if self._bytes.numel() < size:
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size]


class Graph:
    """A computation of fixed shapes: say where its tensors lie, then `run`. Its parts live in the library's arena.

    Tensors of int8, which are records of activations, get a place here if they have none.
    """

    def __init__(self, library: "Library", outputs: Sequence, threads: int, nodes: int = GRAPH_NODES):
        self.library = library
        self.graph = library.ggml_new_graph_custom(library.arena, nodes, False)
        for output in outputs:
            library.ggml_build_forward_expand(self.graph, output)
        self.plan = library.ggml_graph_plan(self.graph, threads)
        self._unplanned, library.unplanned = library.unplanned, 0
        library.shared.clear()
        self._records: list[tuple[CTensor, int]] | None = None

    def run(self) -> None:
        """Compute. Raises RuntimeError where ggml reports failure."""
        if self._records is None:
            self._records = self._find_records()
        self.plan.work_data = self.library.work.address(self.plan.work_size + self._unplanned)
        address = self.library.records.address(sum(size for _, size in self._records))
        for tensor, size in self._records:
            tensor.data, address = address, address + size
        status = self.library.ggml_graph_compute(self.graph, byref(self.plan))
        if status:
            raise RuntimeError(f"ggml_graph_compute failed with status {status}")

    def _find_records(self) -> list[tuple[CTensor, int]]:
        """Those without a place, and their bytes."""
        count = self.library.ggml_graph_n_nodes(self.graph)
        nodes = (self.library.ggml_graph_node(self.graph, number) for number in range(count))
        own = [node for node in nodes if node.contents.type == I8 and not node.contents.data]
        return [(node.contents, self.library.ggml_nbytes(node)) for node in own]


class Library:
    """The functions of `_SIGNATURES` as attributes, and the memory that graphs need.

    work: for ggml itself. rows: for what lies between the steps of a graph. records: for its records of activations.
    shared: steps of the graph being built that serve several others. unplanned: bytes of `work` that its steps write
    and `ggml_graph_plan` does not count.

    Raises OSError or AttributeError where the file is no such library, RuntimeError where its structures differ.
    """

    def __init__(self, path: Path):
        # torch is imported: its libgomp is the one found first, so that both work with one pool of threads.
        library = ctypes.CDLL(str(path))
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        if self.ggml_tensor_overhead() != ctypes.sizeof(CTensor) + _OBJECT_BYTES:
            raise RuntimeError(f"{path} is of another version: struct ggml_tensor has another size")
        self.work, self.rows, self.records = Scratch(), Scratch(), Scratch()
        self.shared: dict[tuple, Any] = {}
        self.unplanned = 0
        self._graphs: dict[tuple, object] = {}
        self.arena: int | None = None

    def __getattr__(self, name: str):
        """Only for names that `__init__` did not set."""
        raise AttributeError(f"libggml's {name} has no signature here")

    def tensor(self, kind: int, *shape: int):
        """A pointer to a new tensor of up to three dimensions, the innermost first, without data."""
        return self.ggml_new_tensor_3d(self.arena, kind, *shape, *[1] * (3 - len(shape)))

    def callback(
        self, function, data: int | None, shape: tuple[int, ...], *sources, kind: int = F32, limit: float | None = None
    ):
        """A step, [shape] of a type, by a numba callback (`numba_cache.GRAPH_STEP`) on every thread.

        The function finds the sources from the result's `src[1]` on; data: what it gets besides, an address. limit: of
        a gated network, in CALLBACK_LIMIT; 0 there without one.
        """
        out = self.ggml_map_custom1(self.arena, self.tensor(kind, *shape), function.address, EVERY_THREAD, data)
        for number, source in enumerate(sources, start=1):
            out.contents.src[number] = cast(source, c_void_p)
        out.contents.op_params[CALLBACK_LIMIT] = float_bits(limit or 0.0)
        return out

    def graph(self, key: tuple, build: Callable, nodes: int = GRAPH_NODES):
        """What `build` made for this key before, or makes now, in the arena; a full arena is emptied first.

        nodes: at most, in its graphs together.
        """
        found = self._graphs.get(key)
        if found is None:
            self._make_room(nodes)
            found = self._graphs[key] = build()
        return found

    def repack(self, kind: int, wanted: int, data: torch.Tensor, columns: int) -> None:
        """Interleave rows of `kind`, bytes [.., rows, bytes of a row] without gaps, in place as type `wanted`.

        Raises RuntimeError where the library would make another type of them.
        """
        self._make_room()
        *experts, rows, _ = data.shape
        tensor = self.tensor(kind, columns, rows, *experts)
        tensor.contents.data = data.data_ptr()
        self.iqk_repack_tensor(tensor)
        if tensor.contents.type != wanted:
            raise RuntimeError(f"the library made type {tensor.contents.type} of {kind}, not {wanted}")

    def quantize(self, kind: int, weights: torch.Tensor) -> torch.Tensor:
        """Weights [rows, columns] float32, in whole blocks, as `kind` -> bytes of rows [rows, bytes]."""
        weights = weights.contiguous()
        rows, columns = weights.shape
        blocks = columns // self.ggml_blck_size(kind)
        out = torch.empty(rows, blocks * self.ggml_type_size(kind), dtype=torch.uint8)
        self.ggml_quantize_chunk(kind, weights.data_ptr(), out.data_ptr(), 0, rows, columns, None)
        return out

    def _make_room(self, nodes: int = GRAPH_NODES) -> None:
        needed = nodes * self.ggml_tensor_overhead() + self.ggml_graph_overhead_custom(nodes, False)
        if self.arena and self.ggml_used_mem(self.arena) + 2 * needed < ARENA_BYTES:
            return
        if self.arena:
            self._graphs.clear()
            self.shared.clear()
            self.ggml_free(self.arena)
        self.arena = self.ggml_init(_Init(ARENA_BYTES, None, True))


@cache
def library() -> Library:
    """The installed library; ask `ik_check.why_not` first."""
    return Library(library_path())


def library_path() -> Path:
    """Where the wheel has libggml. Raises ImportError without the wheel."""
    spec = find_spec("ik_llama_cpp")
    if spec is None or spec.origin is None:
        raise ImportError(f"{PACKAGE} is not installed")
    return Path(spec.origin).parent / "lib" / "libggml.so"


def set_strides(tensor: CTensor, row: int, matrix: int) -> None:
    """In bytes: from row to row, from matrix to matrix."""
    tensor.nb[1], tensor.nb[2], tensor.nb[3] = row, matrix, matrix * tensor.ne[2]


def float_bits(value: float) -> int:
    (bits,) = struct.unpack("i", struct.pack("f", value))
    return bits
