"""How the package is registered, and what it hooks; the hooks' reasons are in `hooks/`."""

from sglang_step35.upstream.row import has, module, plain, takes

ROWS = (
    # Registration.
    *module(
        "sglang.srt.plugins.hook_registry",
        takes("HookRegistry.register", "target hook hook_type source", hooked=True),
        takes("HookRegistry.apply_hooks", "", hooked=True),
        plain("HookType", "an enum, called with the kinds of `hooks.Hook`"),
    ),
    *module(
        "sglang.srt.environ",
        has(
            "envs",
            "SGLANG_PLATFORM SGLANG_EXTERNAL_MODEL_PACKAGE SGLANG_DISABLE_DRAFT_EXTEND_CUDA_GRAPH",
        ),
    ),
    *module(
        "sglang.srt.models.registry",
        takes("ModelRegistry.register", "package_name overwrite strict"),
    ),
    *module(
        "sglang.srt.utils.hf_transformers",
        plain("common._CONFIG_REGISTRY", "a dict of config classes by model type, to which we add ours"),
    ),
    *module(
        "sglang.srt.model_loader.utils",
        takes("get_model_architecture", "model_config", hooked=True),
    ),
    *module(
        "sglang.srt.configs.model_config",
        takes("get_hybrid_layer_ids", "model_architectures hf_text_config", hooked=True),
    ),
    *module(
        "sglang.srt.configs.update_config",
        takes("adjust_config_with_unaligned_cpu_tp", "model_config load_config tp_size", hooked=True),
    ),
    # Start of the processes.
    *module(
        "sglang.srt.entrypoints.engine",
        takes("_server_args_for_logging", "server_args", hooked=True),
        takes(
            "Engine._launch_scheduler_processes",
            "server_args port_args run_scheduler_process_func placement_group",
            hooked=True,
        ),
        takes(
            "Engine._launch_detokenizer_subprocesses", "server_args port_args run_detokenizer_process_func", hooked=True
        ),
    ),
    # Chunks of long prompts.
    *module(
        "sglang.srt.managers.scheduler",
        takes("Scheduler._arm_prefill_decode_interval", "self batch", hooked=True),
        has("Scheduler", "chunked_req"),
    ),
    # Which worker serves.
    *module(
        "sglang.srt.speculative.spec_info",
        takes("SpeculativeAlgorithm.create_worker", "self server_args", hooked=True),
        takes("SpeculativeAlgorithm.is_eagle", "self"),
        takes("SpeculativeAlgorithm.resolve_max_speculative_num_draft_tokens", "self server_args", hooked=True),
    ),
    *module(
        "sglang.srt.speculative.adaptive_spec_params",
        takes("adaptive_unsupported_reason", "server_args", hooked=True),
    ),
    *module(
        "sglang.srt.arg_groups.speculative_hook",
        takes("_handle_eagle_family", "server_args", hooked=True),
    ),
    *module(
        "sglang.srt.arg_groups.model_override_base",
        takes("model_config_of", "server_args"),
    ),
    *module(
        "sglang.srt.arg_groups.overrides",
        takes("attn_dp_enabled_of", "cfg"),
        takes("declare_resolution", "server_args source **fields"),
        takes("resolved_view", "server_args"),
        takes("resolving_view", "server_args"),
    ),
    # Prefix cache and its tree.
    *module(
        "sglang.srt.mem_cache.radix_cache",
        takes("RadixKey.__init__", "self token_ids extra_key is_bigram limit cache_salt", hooked=True),
        takes("RadixKey.__len__", "self"),
        takes("RadixKey.__iter__", "self"),
        takes("RadixKey.__getitem__", "self idx"),
        takes("RadixKey.maybe_to_bigram_view", "self is_eagle value"),
        takes("RadixKey.match_at", "self other offset page_size"),
        takes("RadixKey.child_key_at", "self offset page_size"),
        has(
            "RadixKey",
            "__slots__ token_ids extra_key cache_salt limit is_bigram _raw_len raw_token_ids",
        ),
    ),
    *module(
        "sglang.srt.mem_cache.unified_radix_cache",
        takes("UnifiedRadixCache.checkpoint_into_tree", "self req up_to **kwargs", hooked=True),
        has("UnifiedRadixCache", "req_to_token_pool tree_core"),
    ),
    *module(
        "sglang.srt.mem_cache.unified_cache.unified_tree_core",
        takes("UnifiedTreeCore.__init__", "self params components"),
        has("UnifiedTreeCore", "is_eagle"),
    ),
    *module(
        "sglang.srt.mem_cache.unified_cache.tree_core_registry",
        takes("select_tree_core_backend", "params", hooked=True),
        takes("register_tree_core_backend", "name factory", hooked=True),
        takes("get_tree_core_factory", "name"),
    ),
    # Platform.
    *module(
        "sglang.srt.platforms",
        has("current_platform", "is_out_of_tree get_dispatch_key_name"),
    ),
    *module(
        "sglang.srt.utils.common",
        takes("get_free_cpu_memory", ""),
    ),
    *module(
        "sglang.srt.platforms.cpu",
        has("CpuDeviceMixin", "_enum device_name device_type cpu_arch"),
    ),
    *module(
        "sglang.srt.platforms.device_mixin",
        has("CpuArchEnum", "ARM"),
        has("PlatformEnum", "OOT"),
    ),
    *module(
        "sglang.srt.platforms.interface",
        plain("PlatformCapabilities", "built with its defaults: no capability"),
        has("SRTPlatform", "supported_quantization capabilities"),
        takes("SRTPlatform.get_dispatch_key_name", "self"),
        takes("SRTPlatform.init_backend", "self"),
        takes("SRTPlatform.get_default_attention_backend", "self"),
        takes("SRTPlatform.get_kv_pool_cls", "self kind"),
        takes("SRTPlatform.apply_server_args_defaults", "self server_args"),
        takes("SRTPlatform.supports_speculative_algorithm", "self algorithm"),
        takes("SRTPlatform.get_speculative_worker_cls", "self algorithm"),
        takes("SRTPlatform.get_speculative_cache_locs_fn", "self"),
        takes("SRTPlatform.get_torch_profiler_activity_str", "self"),
        takes("SRTPlatform.get_torch_profiler_activity", "self"),
    ),
    *module(
        "sglang.srt.utils.numa_utils",
        takes("init_threads_binding", "numa_index world_size", hooked=True),
    ),
    *module(
        "sglang.srt.utils",
        takes("get_cpu_ids_by_node", ""),
    ),
    *module(
        "sglang.srt.mem_cache.kv_cache_configurator",
        takes("KVCacheConfigurator.configure", "self pre_model_load_memory", hooked=True),
        takes("KVCacheConfigurator._profile_available_bytes", "self pre_model_load_memory", hooked=True),
    ),
    *module(
        "sglang.srt.mem_cache.memory_pool",
        takes("MHATokenToKVPool._init_kv_copy_and_warmup", "self"),
        takes("MHATokenToKVPool.move_kv_cache", "self tgt_loc src_loc"),
        has("MHATokenToKVPool", "k_buffer v_buffer _kv_copy_config"),
    ),
    *module(
        "sglang.srt.mem_cache.allocation",
        takes(
            "assign_req_to_token_pool_func",
            "req_pool_indices req_to_token start_offset end_offset out_cache_loc batch_size",
            hooked=True,
        ),
        takes("get_last_loc", "req_to_token req_pool_indices_tensor prefix_lens_tensor", hooked=True),
        takes("get_last_loc_torch", "req_to_token req_pool_indices_tensor prefix_lens_tensor"),
    ),
    *module(
        "sglang.srt.sampling.sampling_batch_info",
        takes("SamplingBatchInfo.adjusted_from_schedule_batch", "self batch vocab_size", hooked=True),
    ),
    *module(
        "sglang.srt.layers.sampler",
        takes("murmur_hash32", "seed positions col_indices", hooked=True),
        takes(
            "top_k_top_p_min_p_sampling_from_probs_torch",
            "probs top_ks top_ps min_ps need_min_p_sampling sampling_seed positions return_filtered_probs max_top_k",
            hooked=True,
        ),
    ),
)
