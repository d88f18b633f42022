"""Everything we change in SGLang through its hook registry: what, why, and until when.

Hooks are the last resort, used where SGLang 0.5.23 has no registry or platform method.
`install` applies them at once and checks that they took effect, because SGLang logs and
swallows errors when it applies hooks itself.
"""

import pkgutil

from sglang_step35.hooks import model
from sglang_step35.hooks.hook import Hook
from sglang_step35.hooks.http import http_hooks
from sglang_step35.hooks.portable import portable_hooks


def install() -> None:
    """Register and apply all hooks; raises RuntimeError when one did not take effect."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks = all_hooks()
    for hook in hooks:
        HookRegistry.register(hook.target, hook.function, HookType(hook.kind))
    HookRegistry.apply_hooks()
    for hook in hooks:
        applied = pkgutil.resolve_name(hook.target)
        if applied is not hook.function and not hasattr(applied, "__wrapped__"):
            raise RuntimeError(f"SGLang did not apply the hook on {hook.target}")


def all_hooks() -> list[Hook]:
    """The hooks of this process, by the platform it runs on."""
    from sglang.srt.platforms import current_platform

    by_platform = portable_hooks() if current_platform.is_out_of_tree() else model.cuda_hooks()
    everywhere = (model.model_hooks, model.guard_hooks, model.gguf_hooks, model.cache_hooks, http_hooks)
    return [*(hook for hooks in everywhere for hook in hooks()), *by_platform]
