"""Attention backends, ours and FlashInfer's, and the KV pools they read."""

from sglang_step35.upstream.row import has, module, plain, reads, takes

ROWS = (
    # Triton attention of captured draft passes.
    *module(
        "sglang.srt.layers.attention.triton_backend",
        has("TritonAttnBackend", "num_draft_tokens"),
    ),
    *module(
        "sglang.srt.arg_groups.choices",
        plain("ATTENTION_BACKEND_CHOICES", "the list of names that --attention-backend accepts"),
        takes("add_attention_backend_choices", "iterable"),
    ),
    *module(
        "sglang.srt.layers.attention.attention_registry",
        plain("ATTENTION_BACKENDS", "a dict of the makers of backends by name, which we read"),
        takes("register_attention_backend", "name"),
        takes("create_flashinfer_backend", "runner"),
    ),
    *module(
        "sglang.srt.layers.attention.verify_mask",
        takes("VerifyMask", "buffer mode max_bs is_read"),
        has("VerifyMask", "is_read"),
    ),
    # The contract of a backend.
    *module(
        "sglang.srt.layers.attention.base_attn_backend",
        takes("AttentionBackend.__init__", "self *args **kwargs"),
        takes("AttentionBackend.support_triton", "self"),
        takes("AttentionBackend.get_cuda_graph_seq_len_fill_value", "self"),
        takes("AttentionBackend.init_forward_metadata", "self forward_batch"),
        takes("AttentionBackend.init_forward_metadata_out_graph", "self forward_batch in_capture"),
        takes("AttentionBackend.init_forward_metadata_in_graph", "self forward_batch"),
        takes("AttentionBackend.draft_extend_metadata_captured_in_graph", "self"),
        has("AttentionBackend", "verify_mask"),
        takes("AttentionBackend.forward", "self q k v layer forward_batch save_kv_cache **kwargs"),
        takes("AttentionBackend.forward_decode", "self q k v layer forward_batch save_kv_cache **kwargs"),
        takes("AttentionBackend.forward_extend", "self q k v layer forward_batch save_kv_cache **kwargs"),
    ),
    # KV pools.
    *module(
        "sglang.srt.mem_cache.allocator.swa",
        takes("SWATokenToKVPoolAllocator.set_full_to_swa_mapping", "self full_indices swa_indices"),
        takes("SWATokenToKVPoolAllocator.clear_full_to_swa_mapping", "self full_indices"),
        takes("SWATokenToKVPoolAllocator.swa_available_size", "self"),
        has(
            "SWATokenToKVPoolAllocator",
            "full_to_swa_index_mapping page_size size_swa swa_attn_allocator",
        ),
    ),
    *module("sglang.srt.mem_cache.allocator.token", takes("TokenToKVPoolAllocator.alloc", "self need_size")),
    *module(
        "sglang.srt.mem_cache.base_prefix_cache",
        takes("BasePrefixCache.evict_for_alloc", "self params allocation_reclaim_satisfied"),
        takes("EvictParams", "num_tokens swa_num_tokens mamba_num"),
    ),
    *module(
        "sglang.srt.mem_cache.memory_pool",
        takes("KVWriteLoc", "loc swa_loc full_loc physical"),
    ),
    *module(
        "sglang.srt.mem_cache.swa_memory_pool",
        has("SWAKVPool", "layers_mapping"),
        takes("SWAKVPool.translate_loc_from_full_to_swa", "self kv_indices"),
        takes("SWAKVPool.get_kv_buffer", "self layer_id"),
        takes("SWAKVPool.set_kv_buffer", "self layer loc_info cache_k cache_v k_scale v_scale"),
    ),
    *module(
        "sglang.srt.mem_cache.kv_loc_plan",
        has("IdSpaceKind", "FULL SLIDING_WINDOW"),
    ),
    *module(
        "sglang.srt.mem_cache.kv_index_translator",
        has("KVIndexTranslator", "reads_are_translated"),
        takes(
            "KVIndexTranslator.pack_read_stream",
            "self plan req_pool_indices seq_lens indptr out kv_start_idx kind token_mapping "
            "num_token_blocks kv_lens_sum",
        ),
        takes("KVIndexTranslator.write_ids", "self forward_batch kind"),
        takes("KVIndexTranslator.bind_runner_slots", "self forward_batch"),
    ),
    # FlashInfer on CUDA.
    *module(
        "sglang.srt.speculative.draft_utils",
        takes(
            "DraftBackendFactory",
            "draft_model_runner topk speculative_num_steps seed_dsa_topk_from_draft_extend qsa_profile",
        ),
        takes("DraftBackendFactory._create_flashinfer_prefill_backend", "self", hooked=True),
        takes("DraftBackendFactory.create_draft_extend_backend", "self"),
    ),
    *module(
        "sglang.srt.speculative.spec_info",
        has("SpecInputType", "EAGLE_VERIFY EAGLE_DRAFT_EXTEND"),
    ),
    *module(
        "sglang.srt.layers.attention.flashinfer_backend",
        takes(
            "FlashInferAttnBackend.__init__",
            "self model_runner skip_prefill kv_indptr_buf kv_last_page_len_buf init_new_workspace",
        ),
        takes("FlashInferAttnBackend.init_forward_metadata", "self forward_batch"),
        takes("FlashInferAttnBackend.init_cuda_graph_state", "self max_bs max_num_tokens kv_indices_buf"),
        takes("FlashInferAttnBackend._create_prefill_wrappers", "self bs use_custom_mask"),
        takes(
            "FlashInferAttnBackend._full_cg_prefill_workspace_bytes",
            "num_slots max_num_tokens num_qo_heads num_kv_heads head_dim device",
        ),
        takes("FlashInferAttnBackend._check_kv_attention_access", "self phase access"),
        has(
            "FlashInferAttnBackend",
            "cuda_graph_kv_indices cuda_graph_qo_indptr cuda_graph_swa_out_cache_loc decode_backend "
            "decode_kv_access decode_use_tensor_cores decode_wrappers enable_mis forward_metadata "
            "indices_updater_decode indices_updater_prefill kv_index_translator kv_indptr "
            "max_context_len num_wrappers prefill_kv_access prefill_uses_dequant_workspace "
            "prefill_wrappers_paged use_paged use_sliding_window_kv_pool workspace_buffer",
        ),
        takes(
            "PrefillMetadata",
            "prefill_wrappers use_ragged extend_no_prefix multi_item_params swa_out_cache_loc",
        ),
        takes("FlashInferIndicesUpdaterPrefill.__init__", "self model_runner attn_backend"),
        takes(
            "FlashInferIndicesUpdaterPrefill.update",
            "self req_pool_indices seq_lens seq_lens_cpu seq_lens_sum prefix_lens prefill_wrappers "
            "use_ragged encoder_lens spec_info fixed_split_size multi_item_params "
            "cross_attention_custom_mask extend_prefix_lens_cpu custom_kv_indices plan",
        ),
        has("FlashInferIndicesUpdaterPrefill", "_swa_kv_pool attn_backend data_type kv_last_page_len q_data_type"),
        takes("FlashInferIndicesUpdaterDecode.__init__", "self model_runner attn_backend"),
        takes(
            "FlashInferIndicesUpdaterDecode.call_begin_forward",
            "self wrapper paged_kernel_lens paged_kernel_lens_sum kv_indptr kv_start_idx spec_info "
            "seq_lens_cpu use_sliding_window_kv_pool fixed_split_size disable_split_kv plan "
            "req_pool_indices",
        ),
        has("FlashInferIndicesUpdaterDecode", "kv_indptr num_qo_heads num_kv_heads head_dim"),
    ),
    # Imported there on CUDA only, so read in the source.
    *module(
        "sglang.srt.layers.attention",
        reads("flashinfer_backend", "BatchDecodeWithPagedKVCacheWrapper"),
    ),
)
