"""A plug-in for tests: whatever is looked up is verified, as on CUDA, so that rounds do not depend on the clock."""


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    gate = "sglang_step35.speculative.depth.DepthPlanner.look_ups_pay"
    HookRegistry.register(gate, lambda planner, drafted, tokens: True, HookType.REPLACE)
