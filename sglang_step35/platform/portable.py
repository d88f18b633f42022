"""SGLang platform for `--device cpu` with plain torch: no CUDA, Triton, AMX or sgl-kernel."""

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import CpuArchEnum, PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform
from torch.profiler import ProfilerActivity

from sglang_step35.names import ATTENTION_BACKEND


class PortablePlatform(CpuDeviceMixin, SRTPlatform):
    """Out-of-tree CPU platform; kept: SGLang's CPU device operations, replaced: kernel choices.

    Out-of-tree because SGLang's in-tree CPU platform imports operators that the published
    sgl-kernel wheel does not contain.
    """

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    supported_quantization: list[str] = ["gguf"]
    capabilities = PlatformCapabilities()

    def get_dispatch_key_name(self) -> str:
        return "native"

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        if kind != "mha":
            return None
        from sglang_step35.platform.kv_pool import PortableMHATokenToKVPool

        return PortableMHATokenToKVPool

    def get_quantization_config(self, quantization: str) -> type | None:
        if quantization != "gguf":
            return None
        from sglang_step35.packed.methods import PackedConfig

        return PackedConfig

    def apply_server_args_defaults(self, server_args) -> None:
        """Defaults that a user's own flag overrides.

        SGLang's own CPU default comes first and stands where the user named no backend.
        """
        own_default = "torch_native" if self.cpu_arch == CpuArchEnum.ARM else "intel_amx"
        if server_args.attention_backend in (None, own_default):
            server_args.attention_backend = ATTENTION_BACKEND

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
