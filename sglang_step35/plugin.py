"""Entry points: `register` for SGLang's plug-in group, `activate_platform` for its platform group.

SGLang logs and swallows exceptions from plug-ins and from hooks, and would go on to serve
its own Step3p5ForCausalLM. A failure here therefore raises SystemExit, which is not swallowed.
"""

import os
import sys

from sglang_step35.names import ATTENTION_BACKEND, MODEL_PACKAGE, PLATFORM, PLATFORM_CLASS, TREE_CORE

_registered = False


def register() -> None:
    """Register config class, models, hooks and caches in this process; idempotent.

    Raises SystemExit when anything cannot be registered.
    """
    global _registered
    if _registered:
        return
    try:
        from sglang_step35.platform.process_start import collection_paused

        with collection_paused():
            _register()
    except Exception as error:
        raise SystemExit(
            f"sglang-step35 cannot register with SGLang and refuses to let stock code serve "
            f"Step-3.5 in its place: {type(error).__name__}: {error}. "
            f"Run `python -m sglang_step35 doctor`, or uninstall sglang-step35."
        ) from error
    _registered = True


def activate_platform() -> str | None:
    """Class path of the portable CPU platform, or None on a host with an accelerator.

    SGLANG_PLATFORM=step35 asks for it by name on any host.
    """
    import torch
    from sglang.srt.environ import envs

    if envs.SGLANG_PLATFORM.get() == PLATFORM:
        return PLATFORM_CLASS
    # SGLANG_USE_CPU_ENGINE asks for SGLang's own CPU engine (AMX kernels): not our business.
    if torch.accelerator.is_available() or os.getenv("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    return PLATFORM_CLASS


def _register() -> None:
    from sglang_step35 import hooks, upstream
    from sglang_step35.hf_config import register_with_sglang
    from sglang_step35.parsers import register_parsers

    upstream.check_hooked()
    register_with_sglang()
    _register_models()
    register_parsers()
    hooks.install()
    _register_tree_core()
    _register_overrides()
    _register_attention_backends()
    _register_quantizations()


def _register_models() -> None:
    """Make SGLang's model registry resolve the Step-3.5 architectures to our classes.

    The external-package setting is read when the registry module is first imported, and
    spares every process the import of all stock models.
    """
    from sglang.srt.environ import envs

    chosen = envs.SGLANG_EXTERNAL_MODEL_PACKAGE.get()
    if "sglang.srt.models.registry" in sys.modules:
        from sglang.srt.models.registry import ModelRegistry

        ModelRegistry.register(MODEL_PACKAGE, overwrite=True, strict=True)
    elif chosen in (None, "", MODEL_PACKAGE):
        envs.SGLANG_EXTERNAL_MODEL_PACKAGE.set(MODEL_PACKAGE)
    else:
        raise RuntimeError(
            f"SGLANG_EXTERNAL_MODEL_PACKAGE={chosen} is set: unset it, "
            f"sglang-step35 registers its models through that setting"
        )


def _register_quantizations() -> None:
    """Names that SGLang refuses off its own platforms before it asks ours."""
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS
    from sglang.srt.platforms import current_platform

    if current_platform.is_out_of_tree():
        from sglang_step35.packed.methods import PackedConfig
        from sglang_step35.platform.portable import QUANTIZATIONS

        for name in QUANTIZATIONS:
            if name not in QUANTIZATION_METHODS:
                QUANTIZATION_METHODS[name] = PackedConfig


def _register_tree_core() -> None:
    from sglang.srt.mem_cache.unified_cache.tree_core_registry import (
        get_tree_core_factory,
        register_tree_core_backend,
    )

    from sglang_step35.speculative.prefix_key import LookaheadTreeCore

    if get_tree_core_factory(TREE_CORE) is None:
        register_tree_core_backend(TREE_CORE, LookaheadTreeCore)


def _register_overrides() -> None:
    """Applied after SGLang's own for the same architectures; the last one counts."""
    from sglang.srt.arg_groups.model_override_base import register_model_override_predicate

    from sglang_step35 import names
    from sglang_step35.hook_functions import keep_sliding_pools, refuse_unserved

    for provider in (keep_sliding_pools, refuse_unserved):
        register_model_override_predicate(names.ARCHITECTURES.__contains__)(provider)


def _register_attention_backends() -> None:
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    from sglang_step35.attention.portable.backend import create_backend
    from sglang_step35.hook_functions import create_flashinfer_backend

    if ATTENTION_BACKEND not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([ATTENTION_BACKEND])
        register_attention_backend(ATTENTION_BACKEND)(create_backend)
    register_attention_backend("flashinfer")(create_flashinfer_backend)
