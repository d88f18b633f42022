"""What the model is built from: layers, experts, loading."""

from sglang_step35.upstream.row import has, module, plain, reads, takes

ROWS = (
    # Layers.
    *module(
        "sglang.kernels.fused_op",
        takes("BaseFusedOp.__init__", "self"),
        takes("BaseFusedOp._torch_compile_forward", "self num_tokens"),
        takes("BaseFusedOp.forward_native", "self *args **kwargs"),
    ),
    *module(
        "sglang.srt.layers.activation",
        takes("SiluAndMul.__init__", "self *args **kwargs"),
        takes("SiluAndMul.forward_native", "self x"),
        takes("SiluAndMul.forward_cuda", "self x"),
    ),
    *module(
        "sglang.srt.layers.layernorm",
        takes("GemmaRMSNorm.__init__", "self hidden_size eps"),
        takes("GemmaRMSNorm.refresh_gemma_weight", "self"),
        takes("GemmaRMSNorm.forward_native", "self x residual post_residual_addition"),
        has("GemmaRMSNorm", "variance_epsilon weight"),
    ),
    *module(
        "sglang.srt.layers.linear",
        takes(
            "ColumnParallelLinear",
            "input_size output_size bias gather_output skip_bias_add params_dtype quant_config "
            "output_sizes prefix use_presharded_weights skip_block_quant_check parallel_group",
        ),
        takes(
            "MergedColumnParallelLinear",
            "input_size output_sizes bias gather_output skip_bias_add params_dtype quant_config "
            "prefix use_presharded_weights parallel_group",
        ),
        takes(
            "QKVParallelLinear",
            "hidden_size head_size total_num_heads total_num_kv_heads bias skip_bias_add params_dtype "
            "quant_config prefix load_presharded_attn v_head_size skip_block_quant_check "
            "parallel_group kv_parallel_group",
        ),
        takes(
            "ReplicatedLinear",
            "input_size output_size bias skip_bias_add params_dtype quant_config prefix",
        ),
        takes(
            "RowParallelLinear",
            "input_size output_size bias input_is_parallel skip_bias_add params_dtype reduce_results "
            "quant_config prefix use_presharded_weights use_dp_attention_reduce parallel_group",
        ),
    ),
    *module(
        "sglang.srt.layers.radix_attention",
        takes(
            "RadixAttention",
            "num_heads head_dim scaling num_kv_heads layer_id logit_cap v_head_dim "
            "sliding_window_size is_cross_attention pos_encoding_mode logit_capping_method "
            "quant_config attn_type use_irope prefix use_prefill_attention_wrapper",
        ),
        has("AttentionType", "DECODER"),
    ),
    *module(
        "sglang.srt.layers.rotary_embedding",
        takes(
            "get_rope",
            "head_size rotary_dim max_position base is_neox_style rope_scaling dtype "
            "partial_rotary_factor dual_chunk_attention_config",
        ),
    ),
    *module(
        "sglang.srt.layers.vocab_parallel_embedding",
        takes(
            "ParallelLMHead",
            "num_embeddings embedding_dim bias params_dtype org_num_embeddings padding_size "
            "quant_config prefix enable_tp use_attn_tp_group use_presharded_weights",
        ),
        takes(
            "VocabParallelEmbedding",
            "num_embeddings embedding_dim params_dtype output_dtype org_num_embeddings padding_size "
            "quant_config prefix enable_tp use_attn_tp_group use_presharded_weights",
        ),
    ),
    *module(
        "sglang.srt.layers.utils",
        takes("PPMissingLayer", "*args **kwargs"),
    ),
    *module(
        "sglang.srt.layers.dp_attention",
        takes("is_dp_attention_enabled", ""),
    ),
    *module(
        "sglang.srt.layers.logits_processor",
        takes("LogitsProcessor", "config skip_all_gather logit_scale return_full_logits"),
        has("LogitsMetadata", "forward_mode capture_hidden_mode"),
        takes("LogitsMetadata.from_forward_batch", "forward_batch"),
    ),
    *module(
        "sglang.srt.layers.layer_boundary",
        takes("append_stages", "*stages prepared_from"),
        takes(
            "declare_attn",
            "read update reduction gathers_attn_tp_input output_transform tp_group attn_tp_gather "
            "in_token_order sum_impl row_transport",
        ),
        takes(
            "declare_ffn",
            "sparse read update output_transform next_layer_sparse dense_tp_size exit_rows "
            "output_complete sum_impl row_transport",
        ),
        takes("layer_stack", "previous_layers next_layers final_read"),
    ),
    *module(
        "sglang.srt.layers.layer_boundary.residual.batch",
        takes("clear", "forward_batch"),
        takes("complete_output", "hidden_states forward_batch"),
        takes(
            "final_norm",
            "hidden_states forward_batch layernorm capture finalize_norm skip_empty **read_kwargs",
        ),
        takes("snapshot", "hidden_states forward_batch"),
        takes("start", "forward_batch"),
        takes("to_pp", "hidden_states forward_batch"),
    ),
    # Experts.
    *module(
        "sglang.srt.layers.moe",
        takes("get_moe_a2a_backend", ""),
        takes("get_moe_runner_backend", ""),
        takes("should_use_flashinfer_cutlass_moe_fp4_allgather", ""),
    ),
    *module(
        "sglang.srt.layers.moe.ep_moe.layer",
        takes("get_moe_impl_class", "quant_config"),
    ),
    *module(
        "sglang.srt.layers.moe.token_dispatcher",
        takes("StandardCombineInput", "hidden_states"),
    ),
    *module(
        "sglang.srt.layers.moe.topk",
        takes(
            "TopK",
            "top_k layer_id is_draft use_grouped_topk topk_group num_expert_group renormalize "
            "custom_routing_function scoring_func correction_bias quant_config routed_scaling_factor "
            "apply_routed_scaling_factor_on_output output_format fused_shared_experts_scaling_factor "
            "is_fp4_experts allow_routed_experts_capture sqrtsoftplus_log1p fused_gate_packed_ids",
        ),
        has("TopKOutputFormat", "STANDARD"),
    ),
    *module(
        "sglang.srt.layers.moe.utils",
        has("RoutingMethodType", "SigmoidRenorm"),
        takes("draft_model_build_scope", ""),
        takes("speculative_moe_backend_context", ""),
    ),
    *module(
        "sglang.srt.layers.quantization.unquant",
        takes("UnquantizedEmbeddingMethod", ""),
        takes("UnquantizedEmbeddingMethod.apply", "self layer x bias"),
        takes("UnquantizedFusedMoEMethod.process_weights_after_loading", "self layer"),
        takes("UnquantizedFusedMoEMethod.forward_native", "self layer dispatch_output"),
    ),
    *module(
        "sglang.srt.layers.quantization.utils",
        takes("is_layer_skipped", "prefix ignored_layers fused_mapping"),
    ),
    *module(
        "sglang.srt.eplb.expert_location",
        takes("ModelConfigForExpertLocation", "num_layers num_logical_experts num_groups"),
    ),
    # Forward and loading.
    *module(
        "sglang.srt.model_executor.forward_batch_info",
        plain("PPProxyTensors", "passed through between pipeline ranks, and named in annotations"),
    ),
    *module(
        "sglang.srt.model_executor.forward_context",
        takes("get_attn_backend", ""),
    ),
    *module(
        "sglang.srt.model_loader.weight_utils",
        takes("default_weight_loader", "param loaded_weight"),
    ),
    *module(
        "sglang.srt.models.utils",
        takes("WeightsMapper", "orig_to_new_substr orig_to_new_prefix orig_to_new_suffix"),
    ),
    *module(
        "sglang.srt.runtime_context",
        takes("get_exec", ""),
        takes("get_parallel", ""),
    ),
    *module(
        "sglang.srt.utils",
        takes("add_prefix", "name prefix"),
        takes(
            "make_pp_layers",
            "num_hidden_layers layer_fn prefix return_tuple offloader_kwargs final_read stage_facts",
        ),
    ),
    # What SGLang reads of our model classes.
    *module(
        "sglang.srt",
        reads("models.registry", "EntryClass"),
        reads("model_loader.loader", "load_weights post_load_weights packed_modules_mapping hf_to_sglang_mapper"),
        reads("model_executor.model_runner_components.load_model_utils", "get_attention_sliding_window_size"),
        reads("eplb.expert_location", "get_model_config_for_expert_location"),
    ),
)
