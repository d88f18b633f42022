"""The speculative worker: its base classes, the verify step, and what passes between it and the scheduler."""

from sglang_step35.upstream.row import has, module, takes

ROWS = (
    # Base classes.
    *module(
        "sglang.srt.speculative.base_spec_worker",
        takes("BaseSpecWorker.__init__", "self"),
        takes(
            "BaseSpecWorker.alloc_memory_pool", "self memory_pool_config req_to_token_pool token_to_kv_pool_allocator"
        ),
        takes("BaseSpecWorker.init_cuda_graphs", "self"),
        takes("BaseSpecWorker.on_verify_complete_cpu", "self num_correct_drafts_per_req batch_size"),
        has(
            "BaseSpecWorker",
            "last_shared_read_runner spec_v2_attn_backends draft_swa_window req_to_token_pool "
            "_additional_graph_memory_usage",
        ),
        takes("EagleDraftWorkerBase.__init__", "self"),
        takes("EagleDraftWorkerBase.alloc_memory_pool", "self **kwargs"),
        takes("EagleDraftWorkerBase.init_attention_backends", "self"),
        takes("EagleDraftWorkerBase.init_cuda_graphs", "self"),
        takes("EagleDraftWorkerBase.draft", ""),
        takes("EagleDraftWorkerBase.draft_extend", ""),
    ),
    # Verify.
    *module(
        "sglang.srt.speculative.eagle_utils",
        takes("default_tree_mask_mode", ""),
        has("TreeMaskMode", "QLEN_ONLY"),
        takes("eagle_prepare_for_verify", "verify_input req_to_token_pool batch target_worker"),
    ),
    *module(
        "sglang.srt.speculative.eagle_worker_common",
        takes(
            "build_eagle_verify_input",
            "batch draft_input parent_list top_scores_index draft_tokens draft_probs target_worker "
            "topk num_steps num_draft_tokens tree_mask_mode device",
        ),
    ),
    *module(
        "sglang.srt.speculative.spec_utils",
        takes("build_grammar_vocab_mask", "reqs tree sampling_info device barrier"),
        takes("GrammarTree.from_linear_chain", "verify_ids_2d"),
        takes("draft_pp_context", ""),
        takes("draft_tp_context", "layout"),
    ),
    *module("sglang.srt.utils", takes("async_h2d", "args dtype device")),
    *module(
        "sglang.srt.layers.logprob_processor",
        takes("compute_spec_logprobs", "batch logits_output predict accept_index chain_stride"),
    ),
    *module(
        "sglang.srt.layers.sampler",
        takes("apply_custom_logit_processor", "logits sampling_batch_info num_tokens_in_batch"),
    ),
    *module(
        "sglang.srt.managers.tp_worker",
        takes(
            "TpModelWorker",
            "server_args gpu_id nccl_port is_draft_worker req_to_token_pool "
            "token_to_kv_pool_allocator memory_pool_config is_multi_layer_eagle context_length "
            "draft_attention_backend random_seed load_group",
        ),
        takes(
            "TpModelWorker.forward_batch_generation",
            "self batch forward_batch pp_proxy_tensors is_verify skip_attn_backend_init "
            "capture_hidden_mode return_kv_loc_plan",
        ),
        takes(
            "TpModelWorker.alloc_memory_pool",
            "self memory_pool_config req_to_token_pool token_to_kv_pool_allocator draft_parallel_layout",
        ),
        takes("TpModelWorker.init_attention_backends", "self"),
    ),
    *module(
        "sglang.srt.configs.draft_parallel",
        takes("DraftParallelSpec", "tp_execution"),
        has("DraftTPExecution", "TARGET_LAYOUT"),
    ),
    *module(
        "sglang.srt.speculative.draft_parallel",
        takes("resolve_draft_parallel_layout", "model_spec collapse_cp"),
    ),
    *module(
        "sglang.srt.runtime_context",
        takes("attention_backends", ""),
        takes("get_spec", ""),
    ),
    # What passes between worker and scheduler.
    *module(
        "sglang.srt.managers.utils",
        has(
            "GenerationBatchResult",
            "logits_output next_token_ids can_run_cuda_graph speculative_num_draft_tokens accept_lens "
            "accept_index new_seq_lens next_draft_input extra_keep_alive_refs num_non_draft_tokens_per_req",
        ),
    ),
    *module(
        "sglang.srt.managers.scheduler_components.metrics_reporter",
        has("PrefillStats", "num_pending_tokens"),
        takes(
            "SchedulerMetricsReporter.update_spec_metrics",
            "self bs num_correct_drafts num_accept_tokens num_block_accept_tokens num_cap_tokens",
            hooked=True,
        ),
    ),
    *module(
        "sglang.srt.speculative.eagle_info",
        takes(
            "EagleVerifyInput",
            "draft_token custom_mask positions retrieve_index retrieve_next_token "
            "retrieve_next_sibling retrieve_cum_len spec_steps topk draft_token_num "
            "capture_hidden_mode seq_lens_sum seq_lens_cpu draft_probs prepared_out_cache_loc "
            "prepared_mrope_positions kv_loc_plan num_tokens_per_req",
        ),
        takes(
            "EagleDraftExtendInput",
            "hidden_states num_correct_drafts num_accept_tokens num_front_tokens "
            "num_accept_tokens_cpu input_ids seq_lens seq_lens_cpu req_pool_indices positions "
            "bonus_tokens capture_hidden_mode num_tokens_per_req num_tokens_for_logprob_per_req "
            "dsa_seed_topk_capture dsa_seed_topk_select select_index kv_indptr",
        ),
        takes(
            "EagleDraftInput",
            "topk_p topk_index draft_probs hidden_states capture_hidden_mode dsa_topk_indices "
            "bonus_tokens kv_indptr kv_indices window_kv_indptr window_kv_indices num_tokens_per_req "
            "num_tokens_for_logprob_per_req future_indices future_dsa_topk_indices_available "
            "cuda_graph_compatible",
        ),
        takes("EagleDraftInput.create_idle_input", "device hidden_size dtype topk capture_hidden_mode vocab_size"),
    ),
    *module(
        "sglang.srt.model_executor.forward_batch_info",
        has("CaptureHiddenMode", "FULL NULL"),
        has("ForwardMode", "DECODE DRAFT_EXTEND_V2"),
        takes(
            "ForwardBatch.init_new",
            "batch model_runner capture_hidden_mode return_hidden_states_before_norm "
            "extend_position_info spec_mrope_positions kv_loc_plan write_cols",
        ),
    ),
    *module(
        "sglang.srt.model_executor.forward_context",
        takes("ForwardContext", "attn_backend moe_num_token_non_padded"),
        takes("forward_context", "ctx forward_batch"),
    ),
)
