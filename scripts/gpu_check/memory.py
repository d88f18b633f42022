"""What a server took against what our planner says."""

from dataclasses import dataclass

import requests

from scripts.gpu_check.options import Setting
from scripts.gpu_check.servers import plan_for, served_kind
from sglang_step35.config import parse_config
from sglang_step35.planner import GIB
from sglang_step35.planner.kv import kv_layout, sized
from sglang_step35.planner.weights import device_weights

TOLERANCE = 0.03


@dataclass(frozen=True)
class Figure:
    """planned None: the planner has no figure for it here. ratio: taken / planned."""

    name: str
    taken: float
    planned: float | None
    unit: str

    @property
    def ratio(self) -> float | None:
        return None if not self.planned else self.taken / self.planned

    def line(self) -> str:
        planned = "-" if self.planned is None else f"{self.planned:.2f}"
        ratio = "-" if self.ratio is None else f"{self.ratio:.3f}"
        return f"{self.name:24}{self.taken:14.2f}{planned:>14}{ratio:>8}  {self.unit}"


def figures(usage: dict, fields: dict, full_planned: int | None, sliding_planned: int | None) -> list[Figure]:
    """usage: `memory_usage` of SGLang's /server_info, GiB and tokens. *_planned: slots, None where nothing was planned.

    KV bytes are compared for the slots the server has, slots with those planned from the GPU's memory.
    """
    spec = parse_config(fields)
    full, sliding = usage["token_capacity"], usage.get("token_capacity_swa") or usage["token_capacity"]
    pools = sized(kv_layout(spec), full, swa_ratio=sliding / full)
    return [
        Figure("weights", usage["weight"], device_weights(spec).shared_vocabulary / GIB, "GiB"),
        Figure("KV of these slots", usage["kvcache"], pools.total_bytes / GIB, "GiB"),
        Figure("full slots", full, full_planned, "tokens"),
        Figure("sliding slots", sliding, sliding_planned, "tokens"),
        *(Figure(f"graphs: {name}", taken, None, "GiB") for name, taken in (usage.get("graph") or {}).items()),
    ]


def run(setting: Setting) -> dict:
    with served_kind(setting, "mtp") as server:
        info = requests.get(f"{server.url}/server_info", timeout=60).json()
    usage = info["internal_states"][0]["memory_usage"]
    planned = plan_for(setting, "mtp").best.pools if setting.device == "cuda" else None
    slots = (planned.full_tokens, planned.sliding_tokens) if planned else (None, None)
    found = figures(usage, setting.need("checkpoint")["config"], *slots)
    print(f"{'':24}{'taken':>14}{'planned':>14}{'ratio':>8}")
    for figure in found:
        print(figure.line())
    far = [f.name for f in found if f.ratio is not None and abs(f.ratio - 1) > TOLERANCE]
    if far:
        print(f"more than {TOLERANCE:.0%} off the planner: {', '.join(far)}")
    return {
        "figures": [{"name": f.name, "taken": f.taken, "planned": f.planned, "unit": f.unit} for f in found],
        "far": far,
    }
