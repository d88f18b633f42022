"""Verify steps narrower than the full width: which are captured, with what settings, and that all ranks agree."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from sglang.srt.runtime_context import get_spec

from sglang_step35.speculative import device, verify_graphs
from sglang_step35.speculative.ranks import ALONE
from sglang_step35.speculative.settings import MTPSettings
from sglang_step35.speculative.verify_graphs import NarrowSteps


class Memory:
    """A GPU on which full verify graphs took `full` GB and narrow ones take `each`, by width."""

    def __init__(self, free: float, each: dict[int, float]):
        self.free, self.each = free, each
        self.asked = []

    def available(self, device, gpu_id, distributed, cpu_group):
        self.asked.append((device, gpu_id, distributed, cpu_group))
        return self.free


@pytest.fixture
def capture(monkeypatch):
    """Capture `widths` on such a GPU; returns NarrowSteps and what was built in which settings."""

    def run(widths, memory: Memory, full: float, ranks=ALONE):
        built = []
        spec = SimpleNamespace(speculative_num_draft_tokens=4, speculative_num_steps=3)

        @contextmanager
        def override(**values):
            before = dict(vars(spec))
            vars(spec).update(values)
            yield
            vars(spec).update(before)

        def attention(*, model_runner):
            return "attention", spec.speculative_num_draft_tokens, spec.speculative_num_steps

        def graphs(runner, *, attn_backend, speculative_num_steps, speculative_num_draft_tokens):
            built.append((attn_backend, speculative_num_draft_tokens, speculative_num_steps))
            memory.free -= memory.each[speculative_num_draft_tokens]
            return f"graphs {speculative_num_draft_tokens}"

        monkeypatch.setattr(verify_graphs, "get_spec", lambda: SimpleNamespace(override=override))
        monkeypatch.setattr(verify_graphs, "get_attention_backend", attention)
        monkeypatch.setattr(verify_graphs, "DecodeCudaGraphRunner", graphs)
        monkeypatch.setattr(verify_graphs, "get_available_gpu_memory", memory.available)
        runner = SimpleNamespace(device="cuda", gpu_id=0, graph_memory_usage={"target_verify": full})
        narrow = NarrowSteps(runner, 4)
        narrow.capture(widths, ranks)
        assert vars(spec) == dict(speculative_num_draft_tokens=4, speculative_num_steps=3)
        return narrow, built

    return run


def test_each_width_is_built_for_its_own_number_of_tokens(capture):
    narrow, built = capture(range(1, 4), Memory(8.0, {1: 0.2, 2: 0.3, 3: 0.4}), full=0.5)
    assert built == [(("attention", width, width - 1), width, width - 1) for width in (1, 2, 3)]
    assert [narrow.width(needed) for needed in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert narrow.gigabytes == pytest.approx(0.9)


@pytest.mark.parametrize(
    "free, each, full, widths",
    [
        (8.0, {1: 0.6, 2: 0.7, 3: 0.8}, 0.5, [1, 2]),  # 2 GB are theirs: 0.7 are left, and width 3 should take as much
        (8.0, {1: 0.6, 2: 0.7, 3: 0.8}, 2.1, []),
        (1.0, {1: 0.2, 2: 0.2, 3: 0.2}, 0.2, [1]),
    ],
)
def test_narrow_graphs_take_at_most_a_quarter_of_what_is_free(capture, caplog, free, each, full, widths):
    caplog.set_level("INFO", "sglang_step35")
    narrow, built = capture(range(1, 4), Memory(free, each), full)
    assert [width for _, width, _ in built] == list(narrow.steps) == widths
    for width in range(1, 4):
        assert (f"Verify graphs of {width} tokens: {each[width]:.2f} GB" in caplog.text) == (width in widths)
        assert (f"No verify graphs of {width} tokens" in caplog.text) == (width not in widths)
    assert narrow.width(3) == 4


def test_ranks_decide_by_rank_0_and_the_smallest_gpu(capture):
    """What the full graphs took differs by rank; SGLang's free memory of all ranks does not."""
    group = SimpleNamespace(cpu_group="hosts")
    ranks = SimpleNamespace(alone=False, group=group, same_number=lambda value: 2.5)
    memory = Memory(8.0, {1: 0.1})
    narrow, built = capture([1], memory, full=0.1, ranks=ranks)
    assert built == [] and set(memory.asked) == {("cuda", 0, True, "hosts")}


@pytest.mark.parametrize(
    "settings, widths",
    [
        (MTPSettings(3, adaptive=True), [1, 2, 3]),
        (MTPSettings(1, adaptive=True), [1]),
        (MTPSettings(2, adaptive=True, look_ups=5), [1, 2, 3]),  # 3: without look-ups
        (MTPSettings(3), None),
        (MTPSettings(3, look_ups=5), None),
    ],
)
@pytest.mark.parametrize("graphs", [True, False])
def test_narrow_steps_are_adaptive_depths(monkeypatch, settings, widths, graphs):
    monkeypatch.setattr(device, "_captures_decode_graphs", lambda: graphs)
    asked = []
    narrow = SimpleNamespace(capture=lambda widths, ranks: asked.append(list(widths)))
    device.capture_narrow_steps(narrow, settings, ALONE)
    assert asked == ([widths] if widths and graphs else [])


def test_sglangs_settings_can_be_overridden_for_a_while(tmp_path):
    """The bag that attention backends read their width from."""
    from tests.support.checkpoints import CheckpointShape, make_checkpoint
    from tests.support.model_host import ensure_runtime

    ensure_runtime(make_checkpoint(tmp_path, CheckpointShape()))
    before = get_spec().speculative_num_draft_tokens
    with get_spec().override(speculative_num_draft_tokens=2, speculative_num_steps=1):
        assert (get_spec().speculative_num_draft_tokens, get_spec().speculative_num_steps) == (2, 1)
    assert get_spec().speculative_num_draft_tokens == before
