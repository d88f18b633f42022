"""Machines people run this model on, with the memory a process finds there.

SGLANG machines are planned for CUDA, PORTABLE ones for the portable platform, which serves from the CPU's memory;
LLAMA_CPP ones are judged only.
"""

from dataclasses import dataclass, replace

from sglang_step35.planner import GIB, PlanError

SGLANG, PORTABLE, LLAMA_CPP = "sglang", "portable", "llama.cpp"

# CUDA context and NCCL buffers before the weights are loaded. From a log of 8 x H200 with TP8 (sgl-project/sglang PR
# 11716): 140.40 GiB in all, 137.29 free when loading begins, 2.01 of the difference NCCL's.
CONTEXT_BYTES = int(1.1 * GIB)
NCCL_BYTES = int(2.0 * GIB)
PROCESS_BYTES = int(1.5 * GIB)  # a CPU server's processes without weights and KV


@dataclass(frozen=True)
class Hardware:
    """One machine.

    memory: bytes of one device as its driver reports them. system: bytes of it the operating system holds (unified
    memory only, an estimate). wired: bytes a GPU may use as shipped, where that is less. quantization: what to run.
    attention: SGLang's attention backend, where its own choice does not run.
    """

    label: str
    devices: int
    memory: int
    quantization: str
    engine: str = SGLANG
    unified: bool = False
    system: int = 0
    wired: int | None = None
    attention: str | None = None
    note: str = ""

    def on_cpu(self) -> "Hardware":
        """The same machine served by the portable platform: only with unified memory is the CPU's the one given."""
        return replace(self, engine=PORTABLE, attention=None, note=PORTABLE_NOTE)

    def free(self, tp: int) -> int:
        """Bytes free on a device when the weights begin to load."""
        if self.engine == PORTABLE:
            return self.memory - self.system - PROCESS_BYTES
        return self.memory - self.system - CONTEXT_BYTES - (NCCL_BYTES if tp > 1 else 0)


PORTABLE_NOTE = (
    "The portable CPU platform. GGUF weights stay in the mapped file: leave them that memory, what does not fit is "
    "read from the disk again for every token. No published file of this size has been run by us; llama.cpp is the "
    "faster way on a GPU that shares this memory."
)


def _gib(value: float) -> int:
    return int(value * GIB)


_H100 = 81559 << 20  # nvidia-smi: 81559 MiB
_H200 = 143771 << 20
_SPARK = 128 * 10**9  # 119.2 GiB
_SYSTEM = _gib(4)

MACHINES: dict[str, Hardware] = {
    "8xh100": Hardware("8 x H100 80 GB", 8, _H100, "bf16"),
    "8xh200": Hardware("8 x H200 141 GB", 8, _H200, "bf16"),
    "4xh200": Hardware("4 x H200 141 GB", 4, _H200, "fp8"),
    "dgx-spark": Hardware(
        "DGX Spark 128 GB", 1, _SPARK, "int4", unified=True, system=_SYSTEM,
        attention="flashinfer",  # SGLang picks fa4, which reads no paged KV on SM 12.x
        note="CPU and GPU share the memory, and so does the page cache: drop it before starting. SGLang "
        "runs here through CUDA; a GGUF file (--quantization gguf) is served from the CPU. "
        "A 4-bit checkpoint on this machine has not been run by us; llama.cpp with Q4_K_S is the proven path.",
    ),
    "mac-studio": Hardware(
        "Mac Studio M4 Max 128 GB", 1, _gib(128), "gguf", LLAMA_CPP, unified=True, system=_gib(8), wired=_gib(96),
        note="SGLang has no Metal kernels for this model, and its CPU path is untried on macOS: use llama.cpp. "
        "macOS lets the GPU use about three quarters of the memory: raise it, sysctl iogpu.wired_limit_mb=122880.",
    ),
    "ai-max-395": Hardware(
        "AMD AI Max+ 395 128 GB", 1, _gib(128), "gguf", PORTABLE, unified=True, system=_gib(8),
        note="SGLang's ROCm kernels are for Instinct cards. " + PORTABLE_NOTE + " Let the BIOS give the GPU as little "
        "as it can (512 MiB): the rest is the CPU's.",
    ),
    "x86-128gb": Hardware("x86 machine 128 GB", 1, _gib(128), "gguf", PORTABLE, system=_SYSTEM, note=PORTABLE_NOTE),
}  # fmt: skip


def machine(name: str) -> Hardware:
    """The entry of MACHINES. Raises PlanError listing the names."""
    if name not in MACHINES:
        raise PlanError(
            f"--hardware {name}: unknown; expected one of {', '.join(MACHINES)}, --devices and --memory-gb, or "
            "--cpu-memory-gb"
        )
    return MACHINES[name]


def custom(devices: int, memory_gb: float, quantization: str) -> Hardware:
    """A machine of CUDA devices given on the command line; memory_gb is nvidia-smi's MiB divided by 1024."""
    return Hardware(f"{devices} x {memory_gb:g} GiB", devices, _gib(memory_gb), quantization)


def host(memory_gb: float) -> Hardware:
    """A machine without a GPU; memory_gb is what the operating system finds, in GiB."""
    label = f"a CPU with {memory_gb:g} GiB"
    return Hardware(label, 1, _gib(memory_gb), "gguf", PORTABLE, system=_SYSTEM, note=PORTABLE_NOTE)
