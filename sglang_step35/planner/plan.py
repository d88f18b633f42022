"""From a checkpoint, a machine and a wish (context, concurrency) to server settings and what they serve."""

from dataclasses import dataclass, replace

from sglang_step35.config import ModelSpec
from sglang_step35.planner import MIB, PlanError
from sglang_step35.planner import reserve as reserves
from sglang_step35.planner.capacity import Slots, concurrency, longest, sliding_ratio
from sglang_step35.planner.hardware import LLAMA_CPP, PORTABLE, SGLANG, Hardware
from sglang_step35.planner.kv import BF16, DEFAULT_SWA_RATIO, KVLayout, PoolSizes, kv_layout, sized
from sglang_step35.planner.parallel import check_tp, choose_ep
from sglang_step35.planner.reserve import Reserve
from sglang_step35.planner.stored import Stored
from sglang_step35.planner.weights import Parts, device_weights

EAGLE_RUNNING = 48  # SGLang's --max-running-requests under EAGLE when none is given
_RUNNING_CHOICES = (EAGLE_RUNNING, 16, 4, 1)


@dataclass(frozen=True)
class Wish:
    """What the command line asks for; None leaves the choice to the planner. context and page_size in tokens."""

    quantization: str | None = None
    tp: int | None = None
    ep: int | None = None
    context: int | None = None
    concurrency: int | None = None
    page_size: int = 1
    mem_fraction_static: float | None = None
    swa_ratio: float | None = None
    mtp: bool = True
    kv_bytes: int = BF16  # of an element


@dataclass(frozen=True)
class Setup:
    """Server settings and the pools they give. budget: bytes for KV on one device; running: --max-running-requests."""

    reserve: Reserve
    running: int
    swa_ratio: float
    budget: int
    pools: PoolSizes
    slots: Slots

    def concurrency(self, tokens: int) -> int:
        """Requests of `tokens` tokens that run at once."""
        return min(self.running, concurrency(self.pools, self.slots, tokens))


@dataclass(frozen=True)
class Plan:
    """The answer. `best` is the advised setup; `stock` has the same memory at SGLang's default pool ratio. Both are
    None when the weights leave too little room for any pool.
    """

    spec: ModelSpec
    machine: Hardware
    wish: Wish
    quantization: str
    tp: int
    ep: int
    context: int
    weights: Parts
    layout: KVLayout
    free: int  # bytes on a device before the weights
    budget: int  # bytes for KV with SGLang's default reserve; negative when the weights do not fit
    best: Setup | None
    stock: Setup | None
    stored: Stored | None  # the checkpoint the weights were counted in; None for an estimate

    @property
    def resident(self) -> int:
        """Weight bytes on a device."""
        return self.weights.shared_vocabulary

    @property
    def fits(self) -> bool:
        """Whether the asked context runs with the asked concurrency (one request where none was asked)."""
        return self.best is not None and self.best.concurrency(self.context) >= (self.wish.concurrency or 1)

    @property
    def served_context(self) -> int:
        """The context to start the server with, in tokens: the one asked for, or the longest that fits, in whole Ki."""
        if self.fits or self.best is None:
            return self.context
        longest = self.longest(self.wish.concurrency or 1)
        return longest // 1024 * 1024 or longest or self.context

    def longest(self, requests: int) -> int:
        """Longest requests, in tokens, of which `requests` run at once in the advised setup."""
        if self.best is None or requests > self.best.running:
            return 0
        return longest(self.best.pools, self.best.slots, requests, self.spec.max_position)


def make_plan(spec: ModelSpec, machine: Hardware, wish: Wish, stored: Stored | None = None) -> Plan:
    """Plan SGLang on a machine. stored: the checkpoint, where it is at hand.

    Raises PlanError naming the option that cannot be served.
    """
    quantization = wish.quantization or (stored.quantization if stored else machine.quantization)
    if machine.engine == LLAMA_CPP:
        raise PlanError(f"--hardware: {machine.label} runs this model in llama.cpp only, not in SGLang")
    if stored and quantization != stored.quantization:
        raise PlanError(f"--quantization {quantization}: {stored.path} is {stored.quantization}; leave the option out")
    if quantization == "gguf" and machine.engine == SGLANG:
        machine = _served_from_cpu(machine)
    tp = check_tp(spec, wish.tp or machine.devices, machine.devices)
    ep = choose_ep(spec, quantization, tp, wish.ep)
    context = _context(spec, wish)
    mtp = wish.mtp and bool(spec.mtp_layers if stored is None else stored.mtp)
    if stored and machine.engine == PORTABLE:
        weights = stored.weights(mtp)
    else:
        weights, stored = device_weights(spec, quantization, tp, mtp), None
    layout = kv_layout(spec, tp, mtp, wish.kv_bytes)
    if mtp and machine.engine == PORTABLE:  # `speculative/slot_states.py`
        layout = replace(layout, state=spec.hidden_size * wish.kv_bytes)
    free = machine.free(tp)
    planner = _Planner(machine, wish, tp, context, layout, free, weights.shared_vocabulary)
    best, stock = planner.settle()
    budget = planner.budget(planner.reserve("default", None).mem_fraction_static)
    return Plan(spec, machine, wish, quantization, tp, ep, context, weights, layout, free, budget, best, stock, stored)


def _served_from_cpu(machine: Hardware) -> Hardware:
    if not machine.unified:
        raise PlanError(
            "--quantization gguf: SGLang's GGUF kernels have not been tried on CUDA by us and split no K-quants over "
            "devices; use int4, or give the host's memory, --cpu-memory-gb"
        )
    return machine.on_cpu()


def _context(spec: ModelSpec, wish: Wish) -> int:
    context = wish.context or spec.max_position
    if context > spec.max_position:
        raise PlanError(f"--context {context}: the model takes {spec.max_position} tokens (max_position_embeddings)")
    return context


@dataclass(frozen=True)
class _Planner:
    """Tries settings in the order of preference: SGLang's own reserve first, then a tight one."""

    machine: Hardware
    wish: Wish
    tp: int
    context: int
    layout: KVLayout
    free: int
    resident: int  # weight bytes on a device

    def settle(self) -> tuple[Setup | None, Setup | None]:
        """(advised setup, the same memory with SGLang's default ratio)."""
        wanted = self.wish.concurrency or 1
        tried = []
        for kind in self._kinds():
            for running in (wanted,) if self.wish.concurrency else _RUNNING_CHOICES:
                setup = self.setup(kind, running, self.wish.swa_ratio)
                if setup is None:
                    continue
                tried.append((setup, kind))
                if setup.concurrency(self.context) >= wanted:
                    return setup, self.setup(kind, running, DEFAULT_SWA_RATIO)
        if not tried:
            return None, None
        best, kind = max(tried, key=lambda pair: (pair[0].concurrency(self.context), pair[0].pools.full_tokens))
        return best, self.setup(kind, best.running, DEFAULT_SWA_RATIO)

    def _kinds(self) -> tuple[str, ...]:
        """Reserves to try. On a CPU only the tight one: there are no graphs, and SGLang's own would be 10 GiB."""
        if self.wish.mem_fraction_static is not None:
            return ("fixed",)
        return ("tight",) if self.machine.engine == PORTABLE else ("default", "tight")

    def setup(self, kind: str, running: int, ratio: float | None) -> Setup | None:
        """One combination, or None where SGLang would not start. ratio None: the smallest that serves `running`."""
        reserve = self.reserve(kind, running)
        budget = self.budget(reserve.mem_fraction_static) - self.layout.state_bytes(running)
        slots = Slots(self.layout.retained, self.wish.page_size, self.layout.mtp_layers + 1, reserve.chunk)
        if budget <= 0:
            return None
        if self.machine.engine == PORTABLE:
            budget = min(budget, self._most(running, slots))
        if ratio is None:
            ratio = sliding_ratio(budget, self.layout, slots, running, self.context)
        tokens = int(budget // (self.layout.full_cell + ratio * self.layout.sliding_cell))
        try:
            pools = sized(self.layout, tokens, self.wish.page_size, ratio)
        except PlanError:
            return None
        return Setup(reserve, running, ratio, budget, pools, slots)

    def _most(self, running: int, slots: Slots) -> int:
        """KV bytes that `running` requests of the asked context can use: the rest stays the host's.

        The last term makes up for a ratio in thousandths.
        """
        full = running * slots.full(self.context)
        if self.wish.swa_ratio is not None:
            return int(full * (self.layout.full_cell + self.wish.swa_ratio * self.layout.sliding_cell))
        sliding = slots.running_pool(running, self.context) + slots.tails(running) + full // 1000
        return full * self.layout.full_cell + sliding * self.layout.sliding_cell

    def reserve(self, kind: str, running: int | None) -> Reserve:
        memory = self.machine.memory / MIB
        # EAGLE's own limit is set after the reserve is computed; only a number on the command line shrinks the graphs.
        flagged = None if running == EAGLE_RUNNING and self.layout.mtp_layers else running
        if self.wish.mem_fraction_static is not None:
            return reserves.fixed(memory, self.tp, self.wish.mem_fraction_static, flagged)
        if kind == "tight":
            return reserves.tight(memory, self.tp, running)
        return reserves.sglang_default(memory, self.tp, flagged)

    def budget(self, fraction: float) -> int:
        """KV bytes: `KVCacheConfigurator._profile_available_bytes`, free after loading minus the untouched share."""
        return int(self.free * fraction) - self.resident
