"""What we read of objects that SGLang hands to us, most of which no file imports."""

from sglang_step35.upstream.row import has, module, takes

ROWS = (
    *module(
        "sglang.srt.managers.schedule_batch",
        has(
            "ScheduleBatch",
            "batch_size decoding_reqs extend_lens extend_num_tokens forward_mode has_grammar "
            "input_ids is_extend_in_batch out_cache_loc prefill_stats prefix_lens req_pool_indices reqs "
            "return_hidden_states return_logprob sampling_info seq_lens seq_lens_cpu seq_lens_sum spec_info tree_cache",
        ),
        has(
            "Req",
            "cached_tokens cached_tokens_host cached_tokens_storage custom_logit_processor customized_info "
            "eos_token_ids full_untruncated_fill_ids grammar kv origin_input_ids output_ids retraction_count rid "
            "sampling_params set_finish_with_abort spec_verify_ct to_finish tokenizer "
            "update_spec_correct_drafts_histogram",
        ),
        has("ReqKvInfo", "cache_protected_len req_pool_idx"),
    ),
    *module(
        "sglang.srt.sampling.sampling_batch_info",
        has(
            "SamplingBatchInfo",
            "device has_custom_logit_processor is_all_greedy is_any_greedy logit_bias min_ps need_min_p_sampling "
            "need_top_k_sampling need_top_p_sampling sampling_seed temperatures top_ks top_ps vocab_size",
        ),
    ),
    *module(
        "sglang.srt.constrained.base_grammar_backend",
        takes("create_grammar_backend", "server_args tokenizer vocab_size eos_token_ids think_end_ids", hooked=True),
    ),
    *module(
        "sglang.srt.sampling.sampling_params",
        has("SamplingParams", "custom_params max_new_tokens min_new_tokens sampling_seed stop_token_ids top_k"),
    ),
    *module(
        "sglang.srt.model_executor.model_runner",
        has(
            "ModelRunner",
            "attn_backend decode_attention_backend_str decode_cuda_graph_runner device dtype gpu_id "
            "graph_memory_usage init_new_workspace is_draft_worker kv_index_translator model model_config "
            "prefill_attention_backend_str req_to_token_pool shared_read_done_event sliding_window_size "
            "spec_algorithm token_to_kv_pool",
        ),
    ),
    *module(
        "sglang.srt.configs.model_config",
        has(
            "ModelConfig",
            "context_len dtype hf_config hf_text_config hidden_size is_multimodal model_path num_nextn_predict_layers "
            "quantization vocab_size",
        ),
    ),
    *module(
        "sglang.srt.managers.tp_worker",
        has("TpModelWorker", "is_hybrid_swa model_config model_runner sliding_window_size"),
    ),
    *module(
        "sglang.srt.server_args",
        has(
            "ServerArgs",
            "attention_backend attn_dp_size enable_hierarchical_cache enable_memory_saver enable_metrics ep_size "
            "numa_node disable_overlap_schedule chunked_prefill_size prefill_decode_interval "
            "prefill_decode_interval_min_bs",
        ),
        has(
            "ServerArgs",
            "context_length dp_size dtype max_running_requests max_total_tokens mem_fraction_static model_path "
            "page_size sleep_on_idle swa_full_tokens_ratio host port enable_http_worker_reuseport",
        ),
        has(
            "ServerArgs",
            "disaggregation_mode enable_dp_lm_head enable_fp32_lm_head enable_lora enable_return_routed_experts "
            "ep_num_redundant_experts expert_distribution_recorder_mode lora_paths nnodes pp_size speculative_adaptive "
            "_speculative_draft_quantization_explicitly_set speculative_draft_model_quantization "
            "speculative_algorithm speculative_eagle_topk speculative_num_draft_tokens "
            "speculative_num_steps served_model_name tp_size",
        ),
        has(
            "ServerArgs",
            "speculative_accept_threshold_acc speculative_accept_threshold_single speculative_adaptive_config "
            "speculative_draft_window_size speculative_token_map",
        ),
    ),
    *module(
        "sglang.srt.runtime_context",
        has("ParallelContext", "attn_tp_size moe_ep_rank moe_tp_rank pp_group tp_rank"),
    ),
    *module(
        "sglang.srt.layers.logits_processor",
        has("LogitsProcessorOutput", "hidden_states next_token_logits"),
    ),
    *module(
        "sglang.srt.managers.io_struct",
        has(
            "GenerateReqInput",
            "contains_mm_input input_ids logprob_start_len positional_embed_overrides rid sampling_params "
            "session_params text top_logprobs_num",
        ),
    ),
    *module(
        "sglang.srt.managers.tokenizer_manager",
        has("TokenizerManager", "model_config preferred_sampling_params sampling_params_class served_model_name"),
    ),
)
