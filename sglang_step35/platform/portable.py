"""SGLang platform for `--device cpu` with plain torch: no CUDA, Triton, AMX or sgl-kernel."""

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import CpuArchEnum, PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform
from torch.profiler import ProfilerActivity

from sglang_step35.checkpoint.quantization import METHODS
from sglang_step35.names import ATTENTION_BACKEND

# SGLang's names of the quantisations that packed weights serve; it may choose a Marlin name for GPTQ and AWQ.
QUANTIZATIONS = ("gguf", *METHODS, "gptq_marlin", "awq_marlin")


class PortablePlatform(CpuDeviceMixin, SRTPlatform):
    """Out-of-tree CPU platform; kept: SGLang's CPU device operations, replaced: kernel choices.

    Out-of-tree because SGLang's in-tree CPU platform imports operators that the published
    sgl-kernel wheel does not contain.
    """

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    supported_quantization: list[str] = list(QUANTIZATIONS)
    capabilities = PlatformCapabilities()

    def get_dispatch_key_name(self) -> str:
        return "native"

    def init_backend(self) -> None:
        # SGLang compiles three lines of a divided embedding: 10 s of the first request, and a C++ compiler.
        torch.compiler.set_stance("force_eager")

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        if kind != "mha":
            return None
        from sglang_step35.platform.kv_pool import PortableMHATokenToKVPool

        return PortableMHATokenToKVPool

    def get_quantization_config(self, quantization: str) -> type:
        """Raises ValueError for what only SGLang's kernels serve."""
        if quantization not in QUANTIZATIONS:
            raise ValueError(
                f"the quantisation {quantization!r} (--quantization or config.json's quantization_config.quant_method) "
                f"has no kernels on this platform, which serves {', '.join(('gguf', *METHODS))}"
            )
        from sglang_step35.packed.methods import PackedConfig

        return PackedConfig

    def apply_server_args_defaults(self, server_args) -> None:
        """Defaults that a user's own flag overrides. Raises ValueError for what this platform lacks.

        SGLang's own CPU default comes first and stands where the user named no backend.
        """
        own_default = "torch_native" if self.cpu_arch == CpuArchEnum.ARM else "intel_amx"
        if server_args.attention_backend in (None, own_default):
            server_args.attention_backend = ATTENTION_BACKEND
        if server_args.tp_size % server_args.ep_size:
            raise ValueError(
                f"--ep-size {server_args.ep_size} does not divide --tp-size {server_args.tp_size}: the ranks form "
                "groups that each hold every expert"
            )
        if server_args.attn_dp_size > 1:
            raise ValueError(
                "data-parallel attention (--attn-dp-size, --enable-dp-attention) moves rows between ranks with a "
                "Triton kernel, which a CPU lacks: use --tp-size alone, or whole replicas by --dp-size"
            )
        # An idle scheduler would take a core. SGLang's flag only says yes, so no user's choice is overridden.
        server_args.sleep_on_idle = True
        # Nothing runs beside the scheduler here: preparing the next step first would hold every token back for a step.
        server_args.disable_overlap_schedule = True
        from sglang_step35.platform import interleave
        from sglang_step35.platform.kv_default import max_total_tokens

        interleave.set_defaults(server_args)
        tokens = max_total_tokens(server_args)
        if tokens is not None:
            server_args.max_total_tokens = tokens

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm == "EAGLE"

    def get_speculative_worker_cls(self, algorithm: str) -> type | None:
        from sglang_step35.speculative.worker import Step35SpecWorker

        return Step35SpecWorker

    def get_speculative_cache_locs_fn(self):
        from sglang_step35.speculative.pass_input import extend_cache_locs

        return extend_cache_locs

    def get_torch_profiler_activity_str(self) -> str:
        """Asked for by /start_profile; without an answer the scheduler ends."""
        return "CPU"

    def get_torch_profiler_activity(self) -> ProfilerActivity:
        return ProfilerActivity.CPU
