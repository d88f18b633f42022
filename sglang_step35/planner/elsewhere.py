"""Machines SGLang does not serve: whether the published GGUF and its KV cache fit, for llama.cpp."""

from dataclasses import dataclass

from sglang_step35.config import ModelSpec
from sglang_step35.planner import GIB, PlanError
from sglang_step35.planner.hardware import Hardware
from sglang_step35.planner.kv import kv_layout
from sglang_step35.planner.weights import GGUF_Q4_K_S_BYTES

BUFFERS = 2 * GIB  # llama.cpp's compute buffers, an estimate
UBATCH = 512  # tokens; llama.cpp's default, kept by its sliding cache next to the window


@dataclass(frozen=True)
class Judgement:
    """Whether one request of `context` tokens fits. Sizes in bytes; usable: with the GPU limit raised."""

    machine: Hardware
    context: int
    weights: int
    kv: int
    usable: int

    @property
    def needed(self) -> int:
        return self.weights + self.kv + BUFFERS

    @property
    def fits(self) -> bool:
        """With the GPU limit raised as the machine's note says."""
        return self.needed <= self.usable

    @property
    def usable_as_shipped(self) -> int:
        return min(self.usable, self.machine.wired or self.usable)

    @property
    def fits_as_shipped(self) -> bool:
        return self.needed <= self.usable_as_shipped


def judge(spec: ModelSpec, machine: Hardware, quantization: str | None, context: int | None) -> Judgement:
    """One request on a machine without SGLang. Raises PlanError when another quantisation is asked for."""
    if quantization not in (None, "gguf"):
        raise PlanError(
            f"--quantization {quantization}: not on {machine.label}, which runs this model in llama.cpp only; use gguf"
        )
    context = context or spec.max_position
    if context > spec.max_position:
        raise PlanError(f"--context {context}: the model takes {spec.max_position} tokens (max_position_embeddings)")
    kv = kv_layout(spec, mtp=True).request_bytes(context, UBATCH)
    return Judgement(machine, context, GGUF_Q4_K_S_BYTES, kv, machine.memory - machine.system)
