"""What SGLang's graph code reads of our graph runner and of its batches is there.

By the source of both: nothing is imported, so that it runs without a GPU and against any version of SGLang.
"""

import ast

import pytest

from tests.support.inherited import Methods, attributes, class_fields, class_node, module_tree

OURS = "sglang_step35.speculative.graphs"
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
    return class_node(OURS, "MTPGraphRunner")


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


def set_by(node: ast.AST) -> set[str]:
    return attributes(node, "self", store=True)


def test_the_runner_sets_what_the_capture_loop_reads(stock, ours):
    methods = reached(stock, ours)
    assert "_capture_one_stream" in methods
    needed = stock.reads(methods, "self") - set(stock.nodes) - stock.writes(methods)
    assert sorted(needed - set_by(ours)) == sorted(SWITCHED_OFF)


def test_it_sets_nothing_for_the_loop_that_nothing_reads(stock, ours):
    [method] = (node for node in ours.body if getattr(node, "name", "") == "_set_what_the_capture_loop_reads")
    assert set_by(method) <= stock.reads(reached(stock, ours), "self")


def test_the_buffers_have_what_the_capture_loop_reads(stock, ours):
    read = stock.reads(reached(stock, ours), "self", "buffers")
    assert {"seq_lens", "reset_index_buffers"} <= read
    inherited = Methods.of(("sglang.srt.model_executor.input_buffers", "ForwardInputBuffers"))
    buffers = class_node("sglang_step35.speculative.pass_buffers", "PassBuffers")
    assert sorted(read - class_fields(buffers) - set(inherited.nodes)) == []


@pytest.mark.parametrize("module", ["utils", "full_cuda_graph_backend", "breakable_cuda_graph_backend"])
def test_the_runner_has_what_graph_backends_read(stock, ours, module):
    tree = module_tree(f"{RUNNER}_backend.{module}")
    read = attributes(tree, "cuda_graph_runner") | attributes(tree, "self", "_cuda_graph_runner")
    assert read
    assert sorted(read - set_by(ours) - set(stock.nodes)) == []


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
    """The fields of the batch that `MTPGraphRunner._replayed_batch` makes up, and those SGLang's plan then sets."""
    [make] = (node for node in ours.body if getattr(node, "name", "") == "_replayed_batch")
    calls = (node for node in ast.walk(make) if isinstance(node, ast.Call))
    [fake] = (call for call in calls if ast.unparse(call.func) == "SimpleNamespace")
    plan = class_node("sglang.srt.mem_cache.kv_loc_plan", "KVLocPlan")
    [bind] = (node for node in plan.body if getattr(node, "name", "") == "bind")
    targets = (target for node in ast.walk(bind) if isinstance(node, ast.Assign) for target in node.targets)
    return {keyword.arg for keyword in fake.keywords} | {target.attr for target in targets}


def test_faked_batches_have_no_field_of_their_own(ours):
    stock = class_node("sglang.srt.model_executor.forward_batch_info", "ForwardBatch")
    assert sorted(faked_batch(ours) - class_fields(stock)) == []
