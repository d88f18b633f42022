"""Everything we change in SGLang through its hook registry, each with its reason.

Hooks are the last resort, used where SGLang 0.5.23 has no registry or platform method.
`install` applies them at once and checks that they took effect, because SGLang logs and
swallows errors when it applies hooks itself.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from sglang_step35.plugin import ARCHITECTURES, ATTENTION_BACKEND

_DRAFT_BACKENDS = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
_ADAPTIVE = "sglang.srt.speculative.adaptive_spec_params"
_ALLOCATION = "sglang.srt.mem_cache.allocation"
_ANTHROPIC = "sglang.srt.entrypoints.anthropic"
_OLLAMA = "sglang.srt.entrypoints.ollama"
_PADDING = "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp"
_RADIX_CACHE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_SAMPLING = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"
_TOKENIZER_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_TREE_CORES = "sglang.srt.mem_cache.unified_cache.tree_core_registry"


@dataclass(frozen=True)
class Hook:
    """One hook: dotted upstream target, "before" | "after" | "around" | "replace", our callable."""

    target: str
    kind: str
    function: Callable


def install() -> None:
    """Register and apply all hooks; raises RuntimeError when one did not take effect."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks = _hooks()
    for hook in hooks:
        HookRegistry.register(hook.target, hook.function, HookType(hook.kind))
    HookRegistry.apply_hooks()
    for hook in hooks:
        applied = pkgutil.resolve_name(hook.target)
        if applied is not hook.function and not hasattr(applied, "__wrapped__"):
            raise RuntimeError(f"SGLang did not apply the hook on {hook.target}")
    _register_tree_core()
    _register_attention_backends()


def _register_tree_core() -> None:
    from sglang.srt.mem_cache.unified_cache.tree_core_registry import (
        get_tree_core_factory,
        register_tree_core_backend,
    )

    from sglang_step35.cache.lookahead import TREE_CORE, LookaheadTreeCore

    if get_tree_core_factory(TREE_CORE) is None:
        register_tree_core_backend(TREE_CORE, LookaheadTreeCore)


def _register_attention_backends() -> None:
    from sglang.srt.arg_groups.choices import (
        ATTENTION_BACKEND_CHOICES,
        add_attention_backend_choices,
    )
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    from sglang_step35.attention.backend import create_backend

    if ATTENTION_BACKEND not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([ATTENTION_BACKEND])
        register_attention_backend(ATTENTION_BACKEND)(create_backend)
    register_attention_backend("flashinfer")(create_flashinfer_backend)


def _hooks() -> list[Hook]:
    from sglang.srt.platforms import current_platform

    from sglang_step35.cache.lookahead import (
        LookaheadKey,
        cap_insert,
        select_tree_core,
    )
    from sglang_step35.http.admission import generate
    from sglang_step35.http.anthropic import (
        CountTokensRequest,
        MessagesRequest,
        Step35AnthropicServing,
    )
    from sglang_step35.http.middleware import install as install_error_format
    from sglang_step35.http.ollama import Step35OllamaServing
    from sglang_step35.http.ollama_protocol import OllamaChatRequest, OllamaGenerateRequest

    hooks = [
        Hook("sglang.srt.model_loader.utils.get_model_architecture", "after", require_our_model),
        Hook("sglang.srt.configs.model_config.get_hybrid_layer_ids", "after", mtp_layer_ids),
        # The MTP layers' KV depends on more tokens ahead than SGLang's bigram keys cover.
        Hook("sglang.srt.mem_cache.radix_cache.RadixKey", "replace", LookaheadKey),
        Hook(f"{_TREE_CORES}.select_tree_core_backend", "after", select_tree_core),
        Hook(f"{_RADIX_CACHE}.checkpoint_into_tree", "before", cap_insert),
        Hook(f"{_ADAPTIVE}.adaptive_unsupported_reason", "around", adaptive_unsupported_reason),
        # What a request may ask is checked nowhere whole before the scheduler dies of it.
        Hook(f"{_TOKENIZER_MANAGER}.generate_request", "around", generate),
        # The last step before the HTTP server starts; SGLang has no registry for middleware.
        Hook("sglang.srt.utils.common.set_uvicorn_logging_configs", "after", install_error_format),
        # Thinking that cannot be switched off, and stop sequences.
        Hook(f"{_ANTHROPIC}.serving.AnthropicServing", "replace", Step35AnthropicServing),
        # A thinking display that only newer clients know.
        Hook(f"{_ANTHROPIC}.protocol.AnthropicMessagesRequest", "replace", MessagesRequest),
        Hook(f"{_ANTHROPIC}.protocol.AnthropicCountTokensRequest", "replace", CountTokensRequest),
        # Stock's Ollama API loses text, tools and reasoning.
        Hook(f"{_OLLAMA}.serving.OllamaServing", "replace", Step35OllamaServing),
        Hook(f"{_OLLAMA}.protocol.OllamaChatRequest", "replace", OllamaChatRequest),
        Hook(f"{_OLLAMA}.protocol.OllamaGenerateRequest", "replace", OllamaGenerateRequest),
        # The factory of draft backends does not ask the registry.
        Hook(
            f"{_DRAFT_BACKENDS}._create_flashinfer_prefill_backend",
            "around",
            create_flashinfer_draft_backend,
        ),
    ]
    if current_platform.is_out_of_tree():
        from sglang.srt.mem_cache.allocation import get_last_loc_torch

        from sglang_step35.platform.seeds import hash32, keep_seeds
        from sglang_step35.platform.slots import assign_req_to_token
        from sglang_step35.platform.widths import keep_widths

        # Triton kernels without a platform method.
        hooks += [
            Hook(f"{_ALLOCATION}.assign_req_to_token_pool_func", "replace", assign_req_to_token),
            Hook(f"{_ALLOCATION}.get_last_loc", "replace", get_last_loc_torch),
            # SGLang honours seeds only with batch-invariant kernels, which need CUDA.
            Hook(f"{_SAMPLING}.adjusted_from_schedule_batch", "after", keep_seeds),
            Hook("sglang.srt.layers.sampler.murmur_hash32", "replace", hash32),
            # ModelRunner pads the config's widths on every CPU, without asking the platform.
            Hook(_PADDING, "around", keep_widths),
        ]
    else:
        # Out-of-tree platforms name their worker themselves.
        target = "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker"
        hooks.append(Hook(target, "around", create_step35_worker))
    return hooks


def require_our_model(resolved, model_config):
    """Refuse to serve a Step-3.5 architecture with a class that is not ours."""
    model_class, architecture = resolved
    if architecture in ARCHITECTURES and not model_class.__module__.startswith("sglang_step35."):
        raise RuntimeError(
            f"{architecture} resolved to {model_class.__module__}.{model_class.__name__} instead "
            f"of sglang-step35's model: see the import error logged above"
        )


def mtp_layer_ids(layer_ids, model_architectures, hf_text_config):
    """Sliding and full layer ids of the draft model: all its MTP layers, not one.

    SGLang knows the draft as one layer per runner; ours holds every MTP layer in one
    runner, with KV pool layers 0 .. num_nextn_predict_layers - 1.
    """
    if "Step3p5MTP" not in model_architectures:
        return None
    first = hf_text_config.num_hidden_layers
    types = hf_text_config.layer_types[first : first + hf_text_config.num_nextn_predict_layers]
    sliding = [i for i, kind in enumerate(types) if kind == "sliding_attention"]
    return sliding, [i for i in range(len(types)) if i not in sliding]


def adaptive_unsupported_reason(stock_reason, server_args) -> str | None:
    """Allow `--speculative-adaptive` with our worker, which chooses the depth itself.

    SGLang refuses it with multi-layer EAGLE and with a platform's own worker.
    """
    from sglang.srt.arg_groups.overrides import attn_dp_enabled_of, resolved_view

    if not serves_mtp(server_args) or attn_dp_enabled_of(resolved_view(server_args)):
        return stock_reason(server_args)
    return None


def create_step35_worker(create_worker, algorithm, server_args):
    """Our worker for Step-3.5 under EAGLE; SGLang's choice for everything else."""
    if algorithm.is_eagle() and serves_mtp(server_args):
        from sglang_step35.speculative.worker import Step35SpecWorker

        return Step35SpecWorker
    return create_worker(algorithm, server_args)


def create_flashinfer_backend(runner):
    """What `--attention-backend flashinfer` builds: ours for Step-3.5, SGLang's for every other model."""
    if not _runs_our_model(runner):
        from sglang.srt.layers.attention import attention_registry

        return attention_registry.create_flashinfer_backend(runner)
    from sglang_step35.attention.flashinfer import Step35FlashInferBackend

    return Step35FlashInferBackend(runner, init_new_workspace=runner.init_new_workspace)


def create_flashinfer_draft_backend(create, factory):
    """(name, backend) of the draft-extend passes, as SGLang's factory returns it."""
    if not _runs_our_model(factory.draft_model_runner):
        return create(factory)
    from sglang_step35.attention.flashinfer import Step35FlashInferBackend

    return "flashinfer", Step35FlashInferBackend(factory.draft_model_runner)


def _runs_our_model(runner) -> bool:
    architectures = runner.model_config.hf_config.architectures or []
    return bool(architectures) and architectures[0] in ARCHITECTURES


def serves_mtp(server_args) -> bool:
    """Whether these server arguments make our MTP worker serve."""
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import resolving_view

    if resolving_view(server_args).speculative_algorithm not in ("EAGLE", "NEXTN"):
        return False
    architectures = model_config_of(server_args).hf_config.architectures or []
    return architectures[:1] == ["Step3p5ForCausalLM"]
