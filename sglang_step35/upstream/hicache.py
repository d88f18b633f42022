"""The hierarchical cache: device pools as it reads them, host pools, and its plan for the draft's KV."""

from sglang_step35.upstream.row import has, module, plain, takes

ROWS = (
    *module(
        "sglang.srt.managers.schedule_policy",
        takes(
            "PrefillAdder._select_prefill_admission",
            "self req total_tokens host_hit_length swa_host_hit_length truncation_align_size has_chunked_req",
            hooked=True,
        ),
        has("PrefillAdder", "tree_cache running_batch can_run_list"),
        has("AddReqResult", "NO_TOKEN"),
    ),
    *module(
        "sglang.srt.managers.schedule_batch",
        has("Req", "best_match_node host_hit_length swa_host_hit_length"),
    ),
    *module(
        "sglang.srt.mem_cache.base_prefix_cache",
        takes("BasePrefixCache.lock", "self node"),
        takes("BasePrefixCache.unlock", "self lock"),
        has("BasePrefixCache", "supports_swa swa_evictable_size buffer_pipeline"),
    ),
    *module(
        "sglang.srt.mem_cache.memory_pool",
        plain("MHATokenToKVPool.__init__", "not called: a view of another pool allocates nothing"),
        has("MHATokenToKVPool", "k_data_ptrs v_data_ptrs model_layer_ids"),
        has("KVCache", "layer_num"),
    ),
    *module(
        "sglang.srt.mem_cache.swa_memory_pool",
        plain("SWAKVPool.__init__", "not called: a view of another pool allocates nothing"),
        has("SWAKVPool", "full_kv_pool swa_kv_pool layer_num"),
    ),
    *module(
        "sglang.srt.mem_cache.host_memory",
        takes("available_host_memory_bytes", "allow_cgroup_fallback"),
    ),
    *module(
        "sglang.srt.mem_cache.pool_host.base",
        takes("host_memory_budget_scope", "budget_bytes"),
        takes("ranks_per_host", ""),
        has("HostKVCache", "layout"),
    ),
    *module(
        "sglang.srt.mem_cache.pool_host.mha",
        takes("get_mha_host_pool_cls", "buffer_info", hooked=True),
        takes(
            "MHATokenToKVPoolHost.__init__",
            "self buffer_info host_to_device_ratio host_size page_size layout pin_memory device allocator_type "
            "device_capacity_tokens start_layer end_layer draft_buffer_infos write_back_staging pool_label "
            "head_group_num host_token_capacity",
        ),
        takes(
            "MHATokenToKVPoolHost.load_to_device_per_layer",
            "self device_pool host_indices device_indices layer_id io_backend is_draft",
        ),
        takes(
            "MHATokenToKVPoolHost.backup_from_device_all_layer",
            "self device_pool host_indices device_indices io_backend",
        ),
        has(
            "MHATokenToKVPoolHost",
            "target_layer_num device_k_buffers device_v_buffers k_data_refs v_data_refs host_kv_data_refs",
        ),
    ),
    *module(
        "sglang.srt.mem_cache.hicache_storage",
        takes("HiCacheFile.__init__", "self storage_config file_path"),
        takes("HiCacheFile.get", "self key target_location target_sizes"),
        takes("HiCacheFile.set", "self key value target_location target_sizes"),
        takes("HiCacheFile.exists", "self key"),
        takes("HiCacheFile.batch_exists_v2", "self keys pool_transfers extra_info"),
        takes("HiCacheFile._get_suffixed_key", "self key"),
        takes("PoolTransferResult", "kv_hit_pages extra_pool_hit_pages restorable_prefix_pages"),
        has("HiCacheFile", "file_path metadata_cache _evictor", hooked=True),
        has("HiCacheStorageConfig", "model_name"),
    ),
    *module(
        "sglang.srt.mem_cache.storage.file.lru_file_evictor",
        takes("LRUFileEvictor.abort", "self suffixed_key"),
    ),
    *module(
        "sglang.srt.mem_cache.utils",
        takes("get_hash_str", "token_ids prior_hash page_size", hooked=True),
    ),
    *module(
        "sglang.srt.speculative.base_spec_worker",
        takes("BaseSpecWorker._build_hicache_draft_plan", "self"),
        takes("HiCacheDraftPlan", "mode device_pools"),
        has("HiCacheDraftMode", "NONE PACKED"),
    ),
    *module(
        "sglang.srt.model_executor.model_runner",
        has("ModelRunner", "mtp_draft_device_pools"),
    ),
    *module(
        "sglang.srt.arg_groups.model_override_base",
        takes("register_model_override_predicate", "predicate"),
    ),
    *module(
        "sglang.srt.runtime_context",
        takes("get_memory", ""),
        takes("get_model", ""),
        takes("get_schedule", ""),
    ),
)
