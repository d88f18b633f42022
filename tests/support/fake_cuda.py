"""A CUDA device that is not there: tensors without data, and a record of every time the host would wait for it.

Tensors of device "cuda" are torch's fake tensors; host tensors stay real. Seen are reads (`.cpu()`, `.item()`,
`.tolist()`, boolean indexing) and blocking copies to the device (a list or an unpinned host tensor; an index that is a
list). An asynchronous copy counts as free: on a real device its source has to be pinned.

Launches are counted as well: each operation that is neither a view nor an allocation is at least one kernel.
"""

import traceback
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default)
ALLOCATES = ("empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view")
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)


@contextmanager
def fake_cuda():
    """Yields the `Waits` of what runs inside."""
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        yield waits


class Waits(TorchDispatchMode):
    """found: "what at file:line" of each wait, in order. launched: the same of each launch by the package."""

    in_graph = False  # what a graph replays is one launch, of SGLang's

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.launched: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        device = kwargs.get("device")
        to_cuda = device is not None and torch.device(device).type == "cuda"
        if not to_cuda and not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if _is_composite(func):  # seen whole in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        if _launches(func) and not Waits.in_graph and (place := _place()) != ELSEWHERE:
            self.launched.append(f"{func.__name__} at {place}")
        if func in READS:
            self._note(f"read by {func.__name__}")
        elif func is aten._to_copy.default:
            return self._move(func, args, kwargs)
        elif func is aten.copy_.default:
            return self._copy(args[0], args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
        elif func in INDEXED:
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype == torch.bool for i in indices):
                self._note("read by a boolean index")
            if any(not isinstance(i, FakeTensor) for i in indices):
                self._note("blocking copy of an index")
        return func(*args, **kwargs)

    def _move(self, func, args, kwargs):
        source, device = args[0], torch.device(kwargs.get("device") or args[0].device)
        from_cuda = isinstance(source, FakeTensor)
        if from_cuda and device.type == "cpu":
            self._note("read by a copy to the host")
            with unset_fake_temporarily():
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if not from_cuda and not kwargs.get("non_blocking"):
            self._note("blocking copy to the device")
        return func(*args, **kwargs)

    def _copy(self, target, source, non_blocking: bool):
        if isinstance(target, FakeTensor) and not isinstance(source, FakeTensor) and not non_blocking:
            self._note("blocking copy to the device")
        if not isinstance(target, FakeTensor):
            self._note("read by a copy to the host")
        return target

    def _note(self, what: str) -> None:
        self.found.append(f"{what} at {_place()}")


@contextmanager
def replayed():
    """What runs inside stands for the replay of a graph: its waits count, its launches do not."""
    Waits.in_graph = True
    try:
        yield
    finally:
        Waits.in_graph = False


ELSEWHERE = "elsewhere"


def _place() -> str:
    """The package's innermost line on the stack."""
    ours = [frame for frame in traceback.extract_stack() if "/sglang_step35/" in frame.filename]
    return f"{ours[-1].filename.rpartition('/sglang_step35/')[2]}:{ours[-1].lineno}" if ours else ELSEWHERE


def _launches(func) -> bool:
    if func.namespace != "aten" or func.overloadpacket.__name__ in ALLOCATES:
        return False
    returned = func._schema.returns
    is_view = bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
    return not is_view


def _is_composite(func) -> bool:
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )
