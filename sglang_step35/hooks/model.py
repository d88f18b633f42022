"""Hooks of every platform below HTTP: model, drafting, GGUF files, prefix cache; and CUDA's own."""

from sglang_step35 import hook_functions
from sglang_step35.hooks.hook import Hook

_DRAFT_BACKENDS = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
_ALGORITHM = "sglang.srt.speculative.spec_info.SpeculativeAlgorithm"
_ADAPTIVE = "sglang.srt.speculative.adaptive_spec_params"
_GRAMMARS = "sglang.srt.constrained.grammar_manager.GrammarManager"
_GGUF = "sglang.srt.utils.hf_transformers.gguf_native"
_RADIX_CACHE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_TREE_CORES = "sglang.srt.mem_cache.unified_cache.tree_core_registry"


def model_hooks() -> list[Hook]:
    """Which model, layers and drafting serve."""
    return [
        Hook(
            "sglang.srt.constrained.base_grammar_backend.create_grammar_backend",
            "after",
            hook_functions.complete_grammar_backend,
            why="with a reasoning parser llguidance refuses every grammar: its backend has no `allocate_vocab_mask`",
            until="ReasonerGrammarBackend asks the backend only for what it has",
        ),
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


def guard_hooks() -> list[Hook]:
    """Guards stand around a request's grammar, so that whatever applies grammars applies them."""
    from sglang_step35.guards.admission import guard_ready_requests, guard_request

    why = "a request has a grammar only when it asks for one by SGLang's own fields"
    until = "SGLang lets a plug-in give a request a grammar"
    return [
        Hook(f"{_GRAMMARS}.process_req_with_grammar", "after", guard_request, why=why, until=until),
        Hook(f"{_GRAMMARS}.get_ready_grammar_requests", "after", guard_ready_requests, why=why, until=until),
    ]


def gguf_hooks() -> list[Hook]:
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


def cache_hooks() -> list[Hook]:
    """The prefix cache under multi-token prediction."""
    from sglang_step35.hicache.files import SealedFiles
    from sglang_step35.hicache.load_back import select_admission
    from sglang_step35.hicache.page_hash import page_hashes
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
        Hook(
            "sglang.srt.mem_cache.utils.get_hash_str",
            "around",
            page_hashes,
            why="pages in storage are named by their tokens and one more, as bigram keys are",
            until="the hash follows the key's look-ahead",
        ),
        Hook(
            "sglang.srt.mem_cache.hicache_storage.HiCacheFile",
            "replace",
            SealedFiles,
            why="files say neither which weights and MTP depth wrote them nor whether they are whole; "
            "registering the name `file` anew is possible, but warns in every process of every server",
            until="SGLang seals its files, or registers without a warning",
        ),
        Hook(
            "sglang.srt.managers.schedule_policy.PrefillAdder._select_prefill_admission",
            "around",
            select_admission,
            why="sliding slots on the device that loading a hit pins count as free, and the scheduler runs out of them",
            until="SGLang counts them, as tests/hicache/test_load_back.py shows",
        ),
    ]


def cuda_hooks() -> list[Hook]:
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
