"""What SGLang's graph code reads of our graph runner and of its batches is there, by the source: no GPU needed."""

import ast
from pathlib import Path

import pytest

from sglang_step35.speculative import graphs
from tests.support.inherited import Methods, attributes, module_tree
from tests.support.sglang_uses import self_attributes

RUNNER = "sglang.srt.model_executor.runner"
BACKENDS = "sglang.srt.layers.attention"
CALLED = ("capture", "model_context", "_pad_to_bucket")

# Read behind a switch that our runner, or its server, leaves off.
SWITCHED_OFF = {
    "require_gathered_buffer": "enable_torch_compile, which we set to False",
    "stream_groups": "enable_pdmux, which we set to False",
}
REPLAY_NEVER_READS = {
    "positions": "sizes the buffers of a captured pass, in a capture only",
    "extend_prefix_lens": "prefill graphs, which this runner does not capture",
}


@pytest.fixture(scope="module")
def ours() -> ast.ClassDef:
    tree = ast.parse(Path(graphs.__file__).read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "MTPGraphRunner")


@pytest.fixture(scope="module")
def stock() -> Methods:
    return Methods.of(
        (f"{RUNNER}.decode_cuda_graph_runner", "DecodeCudaGraphRunner"),
        (f"{RUNNER}.base_cuda_graph_runner", "BaseCudaGraphRunner"),
        (f"{RUNNER}.base_runner", "BaseRunner"),
    )


def reached(stock: Methods, ours: ast.ClassDef) -> set[str]:
    replaced = frozenset(node.name for node in ours.body if isinstance(node, ast.FunctionDef))
    return stock.reached(CALLED, replaced)


def test_the_runner_sets_what_the_capture_loop_reads(stock, ours):
    methods = reached(stock, ours)
    assert {"_capture", "_capture_one_stream"} <= methods
    set_by_us = self_attributes(ours)[1]
    needed = stock.reads(methods, "self") - set(stock.nodes) - stock.writes(methods)
    assert sorted(needed - set_by_us) == sorted(SWITCHED_OFF)


def test_it_sets_nothing_for_the_loop_that_nothing_reads(stock, ours):
    [method] = (node for node in ours.body if getattr(node, "name", "") == "_set_what_the_capture_loop_reads")
    assert self_attributes(method)[1] <= stock.reads(reached(stock, ours), "self")


def test_the_buffers_have_what_the_capture_loop_reads(stock, ours):
    read = stock.reads(reached(stock, ours), "self", "buffers")
    assert {"seq_lens", "reset_index_buffers"} <= read
    fields = graphs.PassBuffers.__dataclass_fields__
    assert [name for name in read if name not in fields and not hasattr(graphs.PassBuffers, name)] == []


@pytest.mark.parametrize("module", ["utils", "full_cuda_graph_backend", "breakable_cuda_graph_backend"])
def test_the_runner_has_what_graph_backends_read(stock, ours, module):
    tree = module_tree(f"{RUNNER}_backend.{module}")
    read = attributes(tree, "cuda_graph_runner") | attributes(tree, "self", "_cuda_graph_runner")
    assert read
    assert sorted(read - self_attributes(ours)[1] - set(stock.nodes)) == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("flashinfer_backend", "FlashInferAttnBackend"),
        ("flashattention_backend", "FlashAttentionBackend"),
        ("triton_backend", "TritonAttnBackend"),
    ],
)
def test_a_replayed_batch_has_what_attention_plans_read(ours, module, name):
    backend = Methods.of((f"{BACKENDS}.{module}", name))
    methods = backend.reached(("init_forward_metadata_out_graph",), frozenset())
    read = backend.reads(methods, "forward_batch")
    assert {"seq_lens", "spec_info"} <= read
    assert sorted(read - faked_batch(ours) - set(REPLAY_NEVER_READS)) == []


def faked_batch(ours: ast.ClassDef) -> set[str]:
    """The fields of the batch that `MTPGraphRunner.begin` makes up."""
    [begin] = (node for node in ours.body if getattr(node, "name", "") == "begin")
    calls = (node for node in ast.walk(begin) if isinstance(node, ast.Call))
    [fake] = (call for call in calls if ast.unparse(call.func) == "SimpleNamespace")
    return {keyword.arg for keyword in fake.keywords}


def test_faked_batches_have_no_field_of_their_own(ours):
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    assert faked_batch(ours) <= set(ForwardBatch.__dataclass_fields__)
