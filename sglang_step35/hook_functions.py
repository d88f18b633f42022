"""The functions behind `hooks/` that belong to no other room: which model, worker and backend serve.

SGLang's own signatures; each says in which case it leaves SGLang's answer alone.
"""

import logging

from sglang_step35 import names

logger = logging.getLogger(__name__)


def require_our_model(resolved, model_config):
    """Refuse to serve a Step-3.5 architecture with a class that is not ours."""
    model_class, architecture = resolved
    if architecture in names.ARCHITECTURES and not names.is_our_code(model_class):
        raise RuntimeError(
            f"{architecture} resolved to {model_class.__module__}.{model_class.__name__} instead "
            f"of sglang-step35's model: see the import error logged above"
        )


def complete_grammar_backend(backend, *args, **kwargs) -> None:
    """after create_grammar_backend: a reasoning wrapper takes three functions from the backend inside it (0.5.23).

    It calls them only where there is no grammar, which needs --enable-strict-thinking, refused for such a backend.
    """
    inner = getattr(backend, "grammar_backend", None)
    if inner is not None:
        for name in ("allocate_vocab_mask", "move_vocab_mask", "apply_vocab_mask"):
            if not hasattr(inner, name):
                setattr(inner, name, None)


def mtp_layer_ids(layer_ids, model_architectures, hf_text_config):
    """Sliding and full layer ids of the draft model: all its MTP layers, not one.

    SGLang knows the draft as one layer per runner; ours holds every MTP layer in one
    runner, with KV pool layers 0 .. num_nextn_predict_layers - 1.
    """
    if names.MTP not in model_architectures:
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


def keep_num_draft_tokens(_result, server_args) -> None:
    """Give our worker the `--speculative-num-draft-tokens` asked for: what is above steps + 1 is room for look-ups.

    SGLang resets it to steps + 1, with a warning that does not hold then.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    asked, steps = server_args.speculative_num_draft_tokens, resolving_view(server_args).speculative_num_steps
    if asked is None or asked == steps + 1 or not serves_mtp(server_args):
        return
    logger.info("speculative_num_draft_tokens stays %d: room for %d looked-up drafts", asked, asked - steps - 1)
    declare_resolution(server_args, "sglang_step35.look_ups", speculative_num_draft_tokens=asked)


def max_num_draft_tokens(stock, algorithm, server_args) -> int | None:
    """The width of our widest verify step; adaptive depth makes none wider."""
    from sglang.srt.arg_groups.overrides import resolving_view

    if algorithm.is_eagle() and serves_mtp(server_args):
        return resolving_view(server_args).speculative_num_draft_tokens
    return stock(algorithm, server_args)


def create_step35_worker(create_worker, algorithm, server_args):
    """Our worker for Step-3.5 under EAGLE; SGLang's choice for everything else."""
    if algorithm.is_eagle() and serves_mtp(server_args):
        from sglang_step35.speculative.worker import Step35SpecWorker

        return Step35SpecWorker
    return create_worker(algorithm, server_args)


def create_flashinfer_backend(runner):
    """What `--attention-backend flashinfer` builds: ours for Step-3.5, SGLang's for every other model."""
    if not names.is_ours(runner.model_config.hf_config):
        from sglang.srt.layers.attention import attention_registry

        return attention_registry.create_flashinfer_backend(runner)
    from sglang_step35.attention.flashinfer.backend import Step35FlashInferBackend

    return Step35FlashInferBackend(runner, init_new_workspace=runner.init_new_workspace)


def create_flashinfer_draft_backend(create, factory):
    """(name, backend) of the draft-extend passes, as SGLang's factory returns it."""
    if not names.is_ours(factory.draft_model_runner.model_config.hf_config):
        return create(factory)
    from sglang_step35.attention.flashinfer.backend import Step35FlashInferBackend

    return "flashinfer", Step35FlashInferBackend(factory.draft_model_runner)


def get_model_loader(get_loader, load_config, model_config=None):
    """Our loader for GGUF files of Step-3.5; SGLang's choice for everything else."""
    loader = get_loader(load_config, model_config)
    if model_config is None or load_config.load_format != "gguf" or not names.is_ours(model_config.hf_config):
        return loader
    from sglang_step35.packed.loader import Step35GGUFLoader

    return Step35GGUFLoader(load_config)


def keep_sliding_pools(server_args, hf_config) -> dict:
    """What the user set, where SGLang gives sliding layers as many slots as full ones for a hierarchical cache.

    It did so before its host pools knew sliding windows; a Step-3.5 would need four times the KV memory.
    """
    from sglang.srt.arg_groups.overrides import resolving_view

    given = resolving_view(server_args)
    if not given.enable_hierarchical_cache:
        return {}
    return {
        "swa_full_tokens_ratio": given.swa_full_tokens_ratio,
        "disable_hybrid_swa_memory": given.disable_hybrid_swa_memory,
    }


def refuse_unserved(server_args, hf_config) -> dict:
    """Nothing to override. Raises ValueError for features that would not serve what they promise, with what to do."""
    from sglang.srt.arg_groups.overrides import resolving_view

    given = resolving_view(server_args)
    if given.enable_lora or given.lora_paths:
        raise ValueError(
            "--enable-lora, --lora-paths: SGLang sizes adapters by one number of heads for all layers, but sliding and "
            "full layers differ in theirs, and on CPUs it asks for pinned memory: merge the adapter into the checkpoint"
        )
    if given.disaggregation_mode != "null" and serves_mtp(server_args):
        raise ValueError(
            f"--disaggregation-mode {given.disaggregation_mode}: MTP layers go on from the backbone's hidden states at "
            "a request's last positions, which stay in the server that computed them: leave it out, or serve prefill "
            "and decode without --speculative-algorithm"
        )
    return {}


def serves_mtp(server_args) -> bool:
    """Whether these server arguments make our MTP worker serve."""
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import resolving_view

    if resolving_view(server_args).speculative_algorithm not in ("EAGLE", "NEXTN"):
        return False
    return names.has_mtp_worker(model_config_of(server_args).hf_config)
