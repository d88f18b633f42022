"""Every SGLang name we hook, override or call, with the signature we were written against.

SGLang is pinned exactly, so this table is a contract, not a compatibility layer.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Upstream:
    """One upstream name.

    path: dotted path of a module attribute or of a class member.
    parameters: parameter names in order (a leading * or ** marks variadics); None for
        names used as they are (classes, registries, instances).
    hooked: checked at every start, because a missing name would silently leave stock code
        in place; the others fail by themselves when they are imported.
    """

    path: str
    parameters: tuple[str, ...] | None = None
    hooked: bool = False


def _params(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_SRT = "sglang.srt"
_RUNNER = f"{_SRT}.model_executor.runner"
_GGUF = f"{_SRT}.utils.hf_transformers.gguf_native"
_FLASHINFER = f"{_SRT}.layers.attention.flashinfer_backend"

TABLE: tuple[Upstream, ...] = (
    # Registration.
    Upstream(
        f"{_SRT}.plugins.hook_registry.HookRegistry.register",
        _params("target hook hook_type source"),
        hooked=True,
    ),
    Upstream(f"{_SRT}.plugins.hook_registry.HookRegistry.apply_hooks", (), hooked=True),
    Upstream(f"{_SRT}.environ.envs", hooked=True),
    Upstream(
        f"{_SRT}.arg_groups.model_override_base.register_model_override",
        _params("architecture"),
        hooked=True,
    ),
    Upstream(
        f"{_SRT}.layers.attention.attention_registry.register_attention_backend",
        _params("name"),
    ),
    # Hooks.
    Upstream(
        f"{_SRT}.model_loader.utils.get_model_architecture",
        _params("model_config"),
        hooked=True,
    ),
    Upstream(
        f"{_SRT}.configs.model_config.get_hybrid_layer_ids",
        _params("model_architectures hf_text_config"),
        hooked=True,
    ),
    # Platform.
    Upstream(f"{_SRT}.platforms.interface.SRTPlatform"),
    Upstream(f"{_SRT}.platforms.interface.PlatformCapabilities"),
    Upstream(f"{_SRT}.platforms.cpu.CpuDeviceMixin"),
    Upstream(f"{_SRT}.mem_cache.memory_pool.MHATokenToKVPool"),
    Upstream(
        f"{_SRT}.mem_cache.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup",
        _params("self"),
    ),
    Upstream(
        f"{_SRT}.mem_cache.memory_pool.MHATokenToKVPool.move_kv_cache",
        _params("self tgt_loc src_loc"),
    ),
    # Prefix cache and its tree.
    Upstream(
        f"{_SRT}.mem_cache.radix_cache.RadixKey.__init__",
        _params("self token_ids extra_key is_bigram limit cache_salt"),
        hooked=True,
    ),
    Upstream(f"{_SRT}.mem_cache.radix_cache.RadixKey.match_at", _params("self other offset page_size")),
    Upstream(
        f"{_SRT}.mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint_into_tree",
        _params("self req up_to **kwargs"),
        hooked=True,
    ),
    Upstream(f"{_SRT}.mem_cache.unified_cache.unified_tree_core.UnifiedTreeCore"),
    Upstream(
        f"{_SRT}.mem_cache.unified_cache.tree_core_registry.select_tree_core_backend",
        _params("params"),
        hooked=True,
    ),
    Upstream(
        f"{_SRT}.mem_cache.unified_cache.tree_core_registry.register_tree_core_backend",
        _params("name factory"),
        hooked=True,
    ),
    Upstream(
        f"{_SRT}.mem_cache.allocation.assign_req_to_token_pool_func",
        _params("req_pool_indices req_to_token start_offset end_offset out_cache_loc batch_size"),
        hooked=True,
    ),
    Upstream(
        f"{_SRT}.mem_cache.allocation.get_last_loc",
        _params("req_to_token req_pool_indices_tensor prefix_lens_tensor"),
        hooked=True,
    ),
    Upstream(
        f"{_SRT}.sampling.sampling_batch_info.SamplingBatchInfo.adjusted_from_schedule_batch",
        _params("self batch vocab_size"),
        hooked=True,
    ),
    Upstream(f"{_SRT}.layers.sampler.murmur_hash32", _params("seed positions col_indices"), hooked=True),
    # Speculative worker.
    Upstream(
        f"{_SRT}.speculative.spec_info.SpeculativeAlgorithm.create_worker",
        _params("self server_args"),
        hooked=True,
    ),
    Upstream(
        f"{_SRT}.speculative.adaptive_spec_params.adaptive_unsupported_reason",
        _params("server_args"),
        hooked=True,
    ),
    Upstream(f"{_SRT}.speculative.base_spec_worker.BaseSpecWorker"),
    Upstream(f"{_SRT}.speculative.base_spec_worker.EagleDraftWorkerBase"),
    Upstream(
        f"{_SRT}.speculative.eagle_utils.eagle_prepare_for_verify",
        _params("verify_input req_to_token_pool batch target_worker"),
    ),
    Upstream(
        f"{_SRT}.speculative.spec_utils.build_grammar_vocab_mask",
        _params("reqs tree sampling_info device barrier"),
    ),
    Upstream(f"{_SRT}.speculative.spec_utils.GrammarTree.from_linear_chain", _params("verify_ids_2d")),
    Upstream(
        f"{_SRT}.layers.logprob_processor.compute_spec_logprobs",
        _params("batch logits_output predict accept_index chain_stride"),
    ),
    Upstream(
        f"{_SRT}.managers.tp_worker.TpModelWorker.forward_batch_generation",
        _params(
            "self batch forward_batch pp_proxy_tensors is_verify skip_attn_backend_init "
            "capture_hidden_mode return_kv_loc_plan"
        ),
    ),
    Upstream(
        f"{_SRT}.model_executor.forward_batch_info.ForwardBatch.init_new",
        _params(
            "batch model_runner capture_hidden_mode return_hidden_states_before_norm "
            "extend_position_info spec_mrope_positions kv_loc_plan write_cols"
        ),
    ),
    Upstream(f"{_SRT}.model_executor.forward_context.forward_context", _params("ctx forward_batch")),
    Upstream(f"{_SRT}.managers.utils.GenerationBatchResult"),
    Upstream(f"{_SRT}.speculative.eagle_info.EagleDraftInput"),
    Upstream(f"{_SRT}.speculative.eagle_info.EagleVerifyInput"),
    # CUDA graphs of the draft pass.
    Upstream(f"{_RUNNER}.DecodeCudaGraphRunner.capture", ("self",)),
    Upstream(
        f"{_RUNNER}.DecodeCudaGraphRunner.capture_one_shape",
        _params("self size forward stream_idx variant_label attention_variant"),
    ),
    Upstream(
        f"{_RUNNER}.get_batch_sizes_to_capture",
        _params("model_runner captured_req_width gathered_buffer_required"),
    ),
    Upstream(
        f"{_RUNNER}_backend.full_cuda_graph_backend.FullCudaGraphBackend.capture_one",
        _params("self shape_key forward_fn capture_inputs post_warmup_hook"),
    ),
    Upstream(f"{_RUNNER}_backend.utils.resolve_decode_backend", _params("cuda_graph_runner")),
    Upstream(
        f"{_SRT}.layers.attention.base_attn_backend.AttentionBackend.init_forward_metadata_out_graph",
        _params("self forward_batch in_capture"),
    ),
    # HTTP.
    Upstream(
        f"{_SRT}.managers.tokenizer_manager.TokenizerManager.generate_request",
        _params("self obj request"),
        hooked=True,
    ),
    Upstream(f"{_SRT}.utils.common.set_uvicorn_logging_configs", _params("server_args"), hooked=True),
    Upstream(f"{_SRT}.entrypoints.anthropic.serving.AnthropicServing", hooked=True),
    Upstream(
        f"{_SRT}.entrypoints.anthropic.serving.AnthropicServing._handle_non_streaming",
        _params("self chat_request anthropic_request raw_request"),
    ),
    Upstream(
        f"{_SRT}.entrypoints.openai.serving_chat.OpenAIServingChat._generate_chat_stream",
        _params("self adapted_request request raw_request"),
    ),
    Upstream(
        f"{_SRT}.entrypoints.ollama.serving.OllamaServing.__init__",
        _params("self tokenizer_manager"),
    ),
    Upstream(f"{_SRT}.entrypoints.anthropic.protocol.AnthropicMessagesRequest", hooked=True),
    Upstream(f"{_SRT}.entrypoints.anthropic.protocol.AnthropicCountTokensRequest", hooked=True),
    Upstream(f"{_SRT}.entrypoints.ollama.serving.OllamaServing", hooked=True),
    Upstream(f"{_SRT}.entrypoints.ollama.protocol.OllamaChatRequest", hooked=True),
    Upstream(f"{_SRT}.entrypoints.ollama.protocol.OllamaGenerateRequest", hooked=True),
    # FlashInfer on CUDA.
    Upstream(f"{_SRT}.layers.attention.attention_registry.create_flashinfer_backend", _params("runner")),
    Upstream(
        f"{_SRT}.speculative.draft_utils.DraftBackendFactory._create_flashinfer_prefill_backend",
        _params("self"),
        hooked=True,
    ),
    Upstream(
        f"{_FLASHINFER}.FlashInferAttnBackend.__init__",
        _params("self model_runner skip_prefill kv_indptr_buf kv_last_page_len_buf init_new_workspace"),
    ),
    Upstream(f"{_FLASHINFER}.FlashInferAttnBackend.init_forward_metadata", _params("self forward_batch")),
    Upstream(
        f"{_FLASHINFER}.FlashInferAttnBackend.init_cuda_graph_state",
        _params("self max_bs max_num_tokens kv_indices_buf"),
    ),
    Upstream(
        f"{_FLASHINFER}.FlashInferAttnBackend._create_prefill_wrappers",
        _params("self bs use_custom_mask"),
    ),
    Upstream(
        f"{_FLASHINFER}.FlashInferAttnBackend._full_cg_prefill_workspace_bytes",
        _params("num_slots max_num_tokens num_qo_heads num_kv_heads head_dim device"),
    ),
    Upstream(
        f"{_FLASHINFER}.FlashInferAttnBackend._check_kv_attention_access",
        _params("self phase access"),
    ),
    Upstream(
        f"{_FLASHINFER}.PrefillMetadata",
        _params("prefill_wrappers use_ragged extend_no_prefix multi_item_params swa_out_cache_loc"),
    ),
    Upstream(
        f"{_FLASHINFER}.FlashInferIndicesUpdaterPrefill.__init__",
        _params("self model_runner attn_backend"),
    ),
    Upstream(
        f"{_FLASHINFER}.FlashInferIndicesUpdaterPrefill.update",
        _params(
            "self req_pool_indices seq_lens seq_lens_cpu seq_lens_sum prefix_lens prefill_wrappers "
            "use_ragged encoder_lens spec_info fixed_split_size multi_item_params "
            "cross_attention_custom_mask extend_prefix_lens_cpu custom_kv_indices plan"
        ),
    ),
    Upstream(
        f"{_FLASHINFER}.FlashInferIndicesUpdaterDecode.__init__",
        _params("self model_runner attn_backend"),
    ),
    Upstream(
        f"{_FLASHINFER}.FlashInferIndicesUpdaterDecode.call_begin_forward",
        _params(
            "self wrapper paged_kernel_lens paged_kernel_lens_sum kv_indptr kv_start_idx spec_info "
            "seq_lens_cpu use_sliding_window_kv_pool fixed_split_size disable_split_kv plan "
            "req_pool_indices"
        ),
    ),
    Upstream(
        f"{_SRT}.mem_cache.kv_index_translator.KVIndexTranslator.pack_read_stream",
        _params(
            "self plan req_pool_indices seq_lens indptr out kv_start_idx kind token_mapping "
            "num_token_blocks kv_lens_sum"
        ),
    ),
    Upstream(
        f"{_SRT}.mem_cache.kv_index_translator.KVIndexTranslator.write_ids",
        _params("self forward_batch kind"),
    ),
    # GGUF files.
    Upstream(f"{_SRT}.model_loader.loader.get_model_loader", _params("load_config model_config"), hooked=True),
    Upstream(f"{_GGUF}.GGUF_NATIVE_CONFIG_BUILDERS", hooked=True),
    Upstream(f"{_GGUF}.read_gguf_architecture", _params("gguf_path"), hooked=True),
    Upstream(f"{_GGUF}.build_gguf_generation_config", _params("gguf_path"), hooked=True),
    Upstream(f"{_GGUF}.build_gguf_tokenizer", _params("gguf_path **kwargs"), hooked=True),
    Upstream(
        f"{_SRT}.model_loader.loader.GGUFModelLoader.load_model",
        _params("self model_config device_config"),
    ),
    Upstream(
        f"{_SRT}.model_loader.loader._initialize_model",
        _params("model_config load_config quant_config"),
    ),
    Upstream(
        f"{_SRT}.model_loader.loader._get_quantization_config",
        _params("model_config load_config"),
    ),
    Upstream(
        f"{_SRT}.layers.quantization.gguf.GGUFMoEMethod.apply",
        _params("self layer dispatch_output"),
    ),
    Upstream(
        f"{_SRT}.layers.quantization.gguf.fused_mul_mat_gguf",
        _params("x qweight qweight_type"),
    ),
    Upstream(
        f"{_SRT}.layers.moe.fused_moe_triton.layer.FusedMoE.materialize_gguf_weights",
        _params("self"),
    ),
    Upstream("gguf.GGUFReader._get", _params("self offset dtype count override_order")),
    Upstream("gguf.GGUFReader._get_field_parts", _params("self orig_offs raw_type")),
    Upstream("gguf.GGUFReader._build_tensors", _params("self start_offs fields")),
    # Parsers.
    Upstream(
        f"{_SRT}.function_call.function_call_parser.FunctionCallParser.ToolCallParserEnum",
        hooked=True,
    ),
    Upstream(f"{_SRT}.parser.reasoning_parser.ReasoningParser.DetectorMap", hooked=True),
    Upstream(
        f"{_SRT}.function_call.base_format_detector.BaseFormatDetector.detect_and_parse",
        _params("self text tools"),
    ),
    Upstream(
        f"{_SRT}.function_call.base_format_detector.BaseFormatDetector.parse_streaming_increment",
        _params("self new_text tools"),
    ),
    Upstream(
        f"{_SRT}.function_call.base_format_detector.BaseFormatDetector.finish",
        _params("self tools"),
    ),
    Upstream(
        f"{_SRT}.parser.reasoning_parser.BaseReasoningFormatDetector.parse_streaming_increment",
        _params("self new_text"),
    ),
)
