"""What a server took, by its log and /server_info, against what our planner says."""

import re
from dataclasses import asdict, dataclass

import requests

from scripts.gpu_check.options import Setting
from scripts.gpu_check.servers import plan_for, served_kind
from sglang_step35.config import parse_config
from sglang_step35.planner import GIB
from sglang_step35.planner.kv import PoolSizes, kv_layout, sized
from sglang_step35.planner.weights import device_weights

TOLERANCE = 0.03
SMALLEST = 0.5  # GiB: below, the log's two decimals say too little
WEIGHTS = re.compile(r"Load weight end\..*mem usage=([\d.]+) GB")  # the backbone's, then the MTP layers'
POOLS = re.compile(r"SWAKVPool mem usage: ([\d.]+) GB")  # in the same order


@dataclass(frozen=True)
class Figure:
    """taken None: the log does not tell. planned None: the planner has no figure for it here."""

    name: str
    taken: float | None
    planned: float | None
    unit: str

    @property
    def ratio(self) -> float | None:
        """taken / planned, None where they cannot be compared."""
        if not self.planned or self.taken is None or (self.unit == "GiB" and self.planned < SMALLEST):
            return None
        return self.taken / self.planned

    @property
    def line(self) -> str:
        shown = ["-" if value is None else f"{value:.2f}" for value in (self.taken, self.planned)]
        ratio = "-" if self.ratio is None else f"{self.ratio:.3f}"
        return f"{self.name:24}{shown[0]:>14}{shown[1]:>14}{ratio:>8}  {self.unit}"


def figures(usage: dict, log: str, fields: dict, planned: PoolSizes | None) -> list[Figure]:
    """usage: `memory_usage` of SGLang's /server_info, GiB and tokens. planned: the pools our planner expects.

    KV bytes are compared for the slots the server has, slots with those planned from the GPU's memory.
    """
    spec = parse_config(fields)
    full, sliding = usage["token_capacity"], usage.get("token_capacity_swa") or usage["token_capacity"]
    pools, weights = sized(kv_layout(spec), full, swa_ratio=sliding / full), device_weights(spec)
    taken = [_pair(pattern, log) for pattern in (WEIGHTS, POOLS)]
    graphs = {phase: size for phase, size in (usage.get("graph") or {}).items() if size}
    return [
        Figure("weights, backbone", taken[0][0], weights.backbone / GIB, "GiB"),
        Figure("weights, MTP layers", taken[0][1], weights.mtp / GIB, "GiB"),
        Figure("KV, backbone", taken[1][0], (pools.full_bytes + pools.sliding_bytes) / GIB, "GiB"),
        Figure("KV, MTP layers", taken[1][1], pools.mtp_bytes / GIB, "GiB"),
        Figure("full slots", full, planned and planned.full_tokens, "tokens"),
        Figure("sliding slots", sliding, planned and planned.sliding_tokens, "tokens"),
        *(Figure(f"graphs, {phase}", size, None, "GiB") for phase, size in graphs.items()),
    ]


def _pair(pattern: re.Pattern, log: str) -> list[float | None]:
    found = [float(value) for value in pattern.findall(log)]
    return [*found[:2], None, None][:2]


def run(setting: Setting) -> dict:
    planned = plan_for(setting, "mtp").best.pools if setting.device == "cuda" else None
    with served_kind(setting, "mtp") as server:
        info = requests.get(f"{server.url}/server_info", timeout=60).json()
        log = server.log.read_text(errors="replace")
    usage = info["internal_states"][0]["memory_usage"]
    found = figures(usage, log, setting.need("checkpoint")["config"], planned)
    print(f"{'':24}{'taken':>14}{'planned':>14}{'ratio':>8}")
    for figure in found:
        print(figure.line)
    far = [f.name for f in found if f.ratio is not None and abs(f.ratio - 1) > TOLERANCE]
    print(f"more than {TOLERANCE:.0%} off the planner: {', '.join(far) or 'nothing'}")
    return {"figures": [asdict(figure) for figure in found], "far": far}
