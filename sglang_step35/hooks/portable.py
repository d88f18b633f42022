"""Hooks that only the portable CPU platform needs."""

from sglang_step35.hooks.hook import Hook

_ALLOCATION = "sglang.srt.mem_cache.allocation"
_ENGINE = "sglang.srt.entrypoints.engine.Engine"
_KV_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_METRICS = "sglang.srt.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_SAMPLING = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"


def portable_hooks() -> list[Hook]:
    """Kernels and choices without a platform method, on CPUs."""
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    from sglang_step35.hicache.portable_host import host_pool_class
    from sglang_step35.platform.cores import bind_rank, part_of_memory
    from sglang_step35.platform.interleave import arm_behind_chunks
    from sglang_step35.platform.kv_default import name_flags
    from sglang_step35.platform.process_start import launch_by_fork
    from sglang_step35.platform.seeds import filter_min_p, hash32, keep_seeds
    from sglang_step35.platform.slots import assign_req_to_token
    from sglang_step35.platform.widths import keep_widths
    from sglang_step35.speculative.metrics import update_spec_metrics

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
        Hook(
            "sglang.srt.layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch",
            "around",
            filter_min_p,
            why="min-p with a seed ends the server by an assertion",
            until="the seeded sampler takes min-p",
        ),
        Hook(
            f"{_METRICS}.update_spec_metrics",
            "around",
            update_spec_metrics,
            why="a round without drafts may take several plain steps, which would look like accepted drafts",
            until="SGLang takes a round's num_non_draft_tokens_per_req for as many steps",
        ),
        Hook(
            f"{_SCHEDULER}._arm_prefill_decode_interval",
            "around",
            arm_behind_chunks,
            why="decode rounds behind every prefill would hold back requests that could join at once",
            until="--prefill-decode-interval can be for chunks of long prompts alone",
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
            f"{_KV_CONFIGURATOR}.configure",
            "around",
            name_flags,
            why="an allocation that fails at start names no flag",
            until="SGLang says what to set on CPUs, as it does for GPUs",
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
