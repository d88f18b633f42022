"""Everything we change in SGLang through its hook registry: what, why, and until when.

Hooks are the last resort, used where SGLang 0.5.23 has no registry or platform method.
`install` applies them at once and checks that they took effect, because SGLang logs and
swallows errors when it applies hooks itself.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from sglang_step35 import hook_functions

_DRAFT_BACKENDS = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
_ALGORITHM = "sglang.srt.speculative.spec_info.SpeculativeAlgorithm"
_ADAPTIVE = "sglang.srt.speculative.adaptive_spec_params"
_ALLOCATION = "sglang.srt.mem_cache.allocation"
_ANTHROPIC = "sglang.srt.entrypoints.anthropic"
_ENGINE = "sglang.srt.entrypoints.engine.Engine"
_KV_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_GGUF = "sglang.srt.utils.hf_transformers.gguf_native"
_OLLAMA = "sglang.srt.entrypoints.ollama"
_RADIX_CACHE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_SAMPLING = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"
_TOKENIZER_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_TREE_CORES = "sglang.srt.mem_cache.unified_cache.tree_core_registry"


@dataclass(frozen=True)
class Hook:
    """One hook.

    target: dotted upstream name. kind: "before" | "after" | "around" | "replace".
    why: what goes wrong without it. until: what upstream needs before it can go.
    """

    target: str
    kind: str
    function: Callable
    why: str
    until: str


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

    by_platform = _portable_hooks() if current_platform.is_out_of_tree() else _cuda_hooks()
    return [*_model_hooks(), *_gguf_hooks(), *_cache_hooks(), *_http_hooks(), *by_platform]


def _model_hooks() -> list[Hook]:
    """Which model, layers and drafting serve."""
    return [
        Hook(
            "sglang.srt.model_loader.utils.get_model_architecture",
            "after",
            hook_functions.require_our_model,
            why="a model package that fails to import is logged and SGLang's own model serves in its place",
            until="SGLang's registry raises when an external package fails to import",
        ),
        Hook(
            "sglang.srt.configs.model_config.get_hybrid_layer_ids",
            "after",
            hook_functions.mtp_layer_ids,
            why="a draft model has one layer there, ours holds every MTP layer in one runner",
            until="a model class can name its own sliding and full layers",
        ),
        Hook(
            f"{_ADAPTIVE}.adaptive_unsupported_reason",
            "around",
            hook_functions.adaptive_unsupported_reason,
            why="--speculative-adaptive is refused with multi-layer EAGLE and with a platform's own worker",
            until="SGLang asks the worker class whether it adapts",
        ),
        Hook(
            "sglang.srt.arg_groups.speculative_hook._handle_eagle_family",
            "after",
            hook_functions.keep_num_draft_tokens,
            why="a chain longer than the draft model's steps is cut to steps + 1, which leaves no room for look-ups",
            until="SGLang lets a worker verify more than its draft model drafts",
        ),
        Hook(
            f"{_ALGORITHM}.resolve_max_speculative_num_draft_tokens",
            "around",
            hook_functions.max_num_draft_tokens,
            why="with --speculative-adaptive it is SGLang's own list of steps that says how wide a verify step gets",
            until="SGLang asks the worker",
        ),
        Hook(
            f"{_DRAFT_BACKENDS}._create_flashinfer_prefill_backend",
            "around",
            hook_functions.create_flashinfer_draft_backend,
            why="the factory of draft backends does not ask the registry of attention backends",
            until="it does",
        ),
    ]


def _gguf_hooks() -> list[Hook]:
    """Opening GGUF files; SGLang's registry of configs holds ours without a hook."""
    from sglang_step35.checkpoint import gguf_sglang

    slow = "the gguf package's reader takes 16 s for a vocabulary of 128,896 tokens, in every process and for each step"
    return [
        Hook(
            "sglang.srt.model_loader.loader.get_model_loader",
            "around",
            hook_functions.get_model_loader,
            why="stock reads one file, copies every tensor and knows none of llama.cpp's conventions for this model",
            until="a model class can name its loader",
        ),
        Hook(
            f"{_GGUF}.read_gguf_architecture",
            "around",
            gguf_sglang.read_architecture,
            why=f"{slow}, and stock passes over a damaged file in silence",
            until="SGLang reads headers quickly and reports damage",
        ),
        Hook(
            f"{_GGUF}.build_gguf_generation_config",
            "around",
            gguf_sglang.generation_config,
            why=f"{slow}; stock knows no end of a turn without a key",
            until="a native config builder also gives the generation config",
        ),
        Hook(
            f"{_GGUF}.build_gguf_tokenizer",
            "around",
            gguf_sglang.tokenizer,
            why="stock knows neither this model's pre-tokenizer nor added tokens that are no control tokens",
            until="SGLang has a registry of GGUF tokenizers",
        ),
    ]


def _cache_hooks() -> list[Hook]:
    """The prefix cache under multi-token prediction."""
    from sglang_step35.speculative.prefix_key import LookaheadKey, cap_insert, select_tree_core

    return [
        Hook(
            "sglang.srt.mem_cache.radix_cache.RadixKey",
            "replace",
            LookaheadKey,
            why="the MTP layers' KV depends on more tokens ahead than SGLang's bigram keys cover",
            until="the key's look-ahead is a number of tokens that the worker names",
        ),
        Hook(
            f"{_TREE_CORES}.select_tree_core_backend",
            "after",
            select_tree_core,
            why="the tree core is chosen by SGLang alone, and only ours keeps the look-ahead",
            until="a platform or worker can name the tree core",
        ),
        Hook(
            f"{_RADIX_CACHE}.checkpoint_into_tree",
            "before",
            cap_insert,
            why="rounds that skip MTP layers leave last rows without their KV, which must not be shared",
            until="the worker can say up to where a request's KV is final",
        ),
    ]


def _http_hooks() -> list[Hook]:
    """What a request may ask, and how each API answers."""
    from sglang_step35.http.admission import generate
    from sglang_step35.http.anthropic import CountTokensRequest, MessagesRequest, Step35AnthropicServing
    from sglang_step35.http.middleware import install as install_error_format
    from sglang_step35.http.ollama import Step35OllamaServing
    from sglang_step35.http.ollama_protocol import OllamaChatRequest, OllamaGenerateRequest

    newer_clients = "stock refuses a thinking display that only newer clients know, and Claude Code asks for one"
    loses = "stock's Ollama API loses text, tools and reasoning"
    return [
        Hook(
            f"{_TOKENIZER_MANAGER}.generate_request",
            "around",
            generate,
            why="what a request may ask is checked nowhere whole before the scheduler dies of it",
            until="SGLang checks every field before the scheduler",
        ),
        Hook(
            "sglang.srt.utils.common.set_uvicorn_logging_configs",
            "after",
            install_error_format,
            why="it is the last step before the HTTP server starts; SGLang has no registry for middleware",
            until="SGLang lets a plug-in add middleware",
        ),
        Hook(
            f"{_ANTHROPIC}.serving.AnthropicServing",
            "replace",
            Step35AnthropicServing,
            why="stock refuses `thinking: disabled` and reports stop sequences as end_turn",
            until="stock hides the thinking of models that always reason, and names stop sequences",
        ),
        *(
            Hook(f"{_ANTHROPIC}.protocol.{name}", "replace", ours, why=newer_clients, until="stock passes over it")
            for name, ours in (
                ("AnthropicMessagesRequest", MessagesRequest),
                ("AnthropicCountTokensRequest", CountTokensRequest),
            )
        ),
        *(
            Hook(f"{_OLLAMA}.{name}", "replace", ours, why=loses, until="stock's Ollama API serves tools and thinking")
            for name, ours in (
                ("serving.OllamaServing", Step35OllamaServing),
                ("protocol.OllamaChatRequest", OllamaChatRequest),
                ("protocol.OllamaGenerateRequest", OllamaGenerateRequest),
            )
        ),
    ]


def _portable_hooks() -> list[Hook]:
    """Kernels and choices without a platform method, on CPUs."""
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    from sglang_step35.hicache.portable_host import host_pool_class
    from sglang_step35.platform.cores import bind_rank, part_of_memory
    from sglang_step35.platform.process_start import launch_by_fork
    from sglang_step35.platform.seeds import hash32, keep_seeds
    from sglang_step35.platform.slots import assign_req_to_token
    from sglang_step35.platform.waiting import after_binding
    from sglang_step35.platform.widths import keep_widths

    triton = "stock launches a Triton kernel and asks no platform"
    method = "platforms have a method for it"
    return [
        Hook(f"{_ALLOCATION}.assign_req_to_token_pool_func", "replace", assign_req_to_token, why=triton, until=method),
        Hook(f"{_ALLOCATION}.get_last_loc", "replace", get_last_loc_torch, why=triton, until=method),
        Hook(
            "sglang.srt.mem_cache.pool_host.mha.get_mha_host_pool_cls",
            "after",
            host_pool_class,
            why="host pools of the hierarchical cache pin memory and copy with CUDA's kernels",
            until="platforms name the host pool beside get_kv_pool_cls",
        ),
        Hook(
            f"{_SAMPLING}.adjusted_from_schedule_batch",
            "after",
            keep_seeds,
            why="SGLang honours seeds only with batch-invariant kernels, which need CUDA",
            until="seeds are kept wherever a sampler can use them",
        ),
        Hook("sglang.srt.layers.sampler.murmur_hash32", "replace", hash32, why=triton, until=method),
        Hook(
            "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp",
            "around",
            keep_widths,
            why="on CPUs SGLang pads widths and heads behind our back, and the checkpoint no longer fits config.json",
            until="SGLang asks the platform before it pads",
        ),
        Hook(
            "sglang.srt.utils.numa_utils.init_threads_binding",
            "around",
            bind_rank,
            why="more ranks than NUMA nodes die at start, and without AMX kernels no rank is bound to any core",
            until="SGLang divides the cores over the ranks by itself",
        ),
        Hook(
            "sglang.srt.utils.numa_utils.init_threads_binding",
            "after",
            after_binding,
            why="OpenMP's threads spin for milliseconds on a core that another process or the next operation needs",
            until="SGLang chooses OpenMP's wait policy before it imports torch",
        ),
        Hook(
            f"{_KV_CONFIGURATOR}._profile_available_bytes",
            "after",
            part_of_memory,
            why="every rank takes the free memory of a whole NUMA node for its KV pool",
            until="SGLang divides it over the node's ranks",
        ),
        *(
            Hook(
                f"{_ENGINE}.{name}",
                "around",
                launch_by_fork,
                why="spawned processes import SGLang again, for most of a start",
                until="a platform can choose the start method",
            )
            for name in ("_launch_scheduler_processes", "_launch_detokenizer_subprocesses")
        ),
    ]


def _cuda_hooks() -> list[Hook]:
    """What an out-of-tree platform would name itself."""
    return [
        Hook(
            f"{_ALGORITHM}.create_worker",
            "around",
            hook_functions.create_step35_worker,
            why="only out-of-tree platforms may name the worker of a reserved algorithm",
            until="a model class can name its speculative worker",
        ),
    ]
