"""Verify steps narrower than `--speculative-num-draft-tokens`, for rounds with fewer drafts on CUDA.

SGLang captures the verify step for one width, and an attention backend plans for that width alone. Each width that
adaptive depth uses gets a backend and graphs of its own here, which take their place for the step, as in SGLang's own
adaptive worker (speculative/eagle_worker_v2.py: build_adaptive_runtime_state).
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.model_executor.model_runner_components.attention_backend_setup import get_attention_backend
from sglang.srt.model_executor.runner import DecodeCudaGraphRunner
from sglang.srt.runtime_context import get_spec
from sglang.srt.utils import get_available_gpu_memory

from sglang_step35.speculative.ranks import Ranks

logger = logging.getLogger(__name__)

_SHARE = 0.25  # of the memory that the full widths' graphs left free: a prefill's activations need the rest


@dataclass(frozen=True)
class NarrowStep:
    """What serves one width. gigabytes: taken by its backend and graphs."""

    attention: AttentionBackend
    graphs: DecodeCudaGraphRunner
    gigabytes: float


@dataclass
class NarrowSteps:
    """The narrower verify steps of a target's runner; all rounds keep the full width until some are captured."""

    runner: object
    widest: int
    steps: dict[int, NarrowStep] = field(default_factory=dict)

    def capture(self, widths: Iterable[int], ranks: Ranks) -> None:
        """Capture these widths, narrow ones first, while they take at most a quarter of the free memory.

        A width is expected to take what the one before it did, the first what the full width did. All numbers are the
        same on every rank, because to capture runs collectives.
        """
        expected = ranks.same_number(self.runner.graph_memory_usage["target_verify"])
        left = _SHARE * self._free(ranks)
        for width in sorted(widths):
            if expected > left:
                logger.info(
                    f"No verify graphs of {width} tokens: {expected:.2f} GB expected, {left:.2f} GB of free memory are "
                    "theirs; rounds take the next wider ones"
                )
                continue
            self.steps[width] = step = self._capture_one(width, ranks)
            logger.info(f"Verify graphs of {width} tokens: {step.gigabytes:.2f} GB")
            expected = step.gigabytes
            left -= expected

    def _capture_one(self, width: int, ranks: Ranks) -> NarrowStep:
        before = self._free(ranks)
        with get_spec().override(speculative_num_draft_tokens=width, speculative_num_steps=width - 1):
            attention = get_attention_backend(model_runner=self.runner)
            graphs = DecodeCudaGraphRunner(
                self.runner,
                attn_backend=attention,
                speculative_num_steps=width - 1,
                speculative_num_draft_tokens=width,
            )
        return NarrowStep(attention, graphs, max(0.0, before - self._free(ranks)))

    def _free(self, ranks: Ranks) -> float:
        """Gigabytes of the GPU that has the least."""
        group = None if ranks.alone else ranks.group.cpu_group
        return get_available_gpu_memory(
            self.runner.device, self.runner.gpu_id, distributed=not ranks.alone, cpu_group=group
        )

    def width(self, needed: int) -> int:
        """The narrowest width there is for a chain of `needed` tokens."""
        return min((width for width in self.steps if width >= needed), default=self.widest)

    @property
    def gigabytes(self) -> float:
        return sum(step.gigabytes for step in self.steps.values())

    @contextmanager
    def serving(self, width: int) -> Iterator[None]:
        """Within: the target's runner verifies chains of this width, in batches larger than were captured as well.

        Any width is served by the runner as it is where none was captured, as on the portable platform.
        """
        step, runner = self.steps.get(width), self.runner
        if step is None:
            yield
            return
        before = runner.attn_backend, runner.decode_cuda_graph_runner
        runner.attn_backend, runner.decode_cuda_graph_runner = step.attention, step.graphs
        try:
            yield
        finally:
            runner.attn_backend, runner.decode_cuda_graph_runner = before
