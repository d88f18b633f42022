"""CUDA graphs of the draft pass.

What `MTPGraphRunner` sets in its parent's place, and the batches that it fakes, are members here.
"""

from sglang_step35.upstream.row import has, module, plain, reads, takes

ROWS = (
    *module(
        "sglang.srt.model_executor.cuda_graph_config",
        has("Backend", "DISABLED"),
        has("Phase", "DECODE"),
        takes("check_cuda_graph_backend", "phase backend"),
    ),
    *module(
        "sglang.srt.utils",
        takes("get_available_gpu_memory", "device gpu_id distributed empty_cache cpu_group"),
        takes("require_gathered_buffer", ""),
    ),
    *module(
        "sglang.srt.model_executor.input_buffers",
        plain("ForwardInputBuffers", "base of a dataclass; tests/test_upstream_fakes.py checks what is called of it"),
    ),
    *module(
        "sglang.srt.model_executor.runner",
        takes(
            "DecodeCudaGraphRunner.__init__",
            "self model_runner attn_backend speculative_num_steps speculative_num_draft_tokens record_nolora_graph",
        ),
        takes("DecodeCudaGraphRunner.capture", "self"),
        takes(
            "DecodeCudaGraphRunner.capture_one_shape", "self size forward stream_idx variant_label attention_variant"
        ),
        takes("DecodeCudaGraphRunner.warmup", "self"),
        takes("DecodeCudaGraphRunner.model_context", "self"),
        takes("DecodeCudaGraphRunner._pad_to_bucket", "raw_size buckets"),
        has(
            "DecodeCudaGraphRunner",
            "attention_graph_variants attn_backend backend buffers capture_bs "
            "captured_req_width compile_bs device device_module enable_pdmux "
            "enable_profile_cuda_graph enable_torch_compile max_bs model_runner "
            "record_nolora_graph seq_len_fill_value",
        ),
        takes("ShapeKey", "size stream_idx variant_label attention_variant"),
        takes("get_batch_sizes_to_capture", "model_runner captured_req_width gathered_buffer_required"),
        takes("model_capture_mode", ""),
    ),
    *module(
        "sglang.srt.model_executor.runner_backend.utils",
        takes("resolve_decode_backend", "cuda_graph_runner"),
    ),
    *module(
        "sglang.srt.model_executor.runner_backend.full_cuda_graph_backend",
        takes("FullCudaGraphBackend.capture_one", "self shape_key forward_fn capture_inputs post_warmup_hook"),
        takes("FullCudaGraphBackend.replay", "self shape_key static_forward_batch **kwargs"),
    ),
    *module(
        "sglang.srt.model_executor.forward_batch_info",
        has(
            "ForwardBatch",
            "forward_mode batch_size input_ids req_pool_indices seq_lens seq_lens_cpu seq_lens_sum "
            "out_cache_loc positions return_logprob spec_algorithm spec_info capture_hidden_mode "
            "extend_seq_lens extend_seq_lens_cpu extend_start_loc extend_num_tokens "
            "global_num_token_non_padded_cpu return_hidden_states_before_norm encoder_lens "
            "mamba_track_indices",
        ),
    ),
    *module(
        "sglang.srt.mem_cache.kv_index_translator",
        takes("KVIndexTranslator.own_plan", "self forward_batch runner_slots"),
    ),
    *module(
        "sglang.srt.mem_cache.kv_loc_plan",
        takes("KVLocPlan.bind_replay", "self batch reader slots"),
    ),
    *module(
        "sglang.srt.model_executor.model_runner_components.attention_backend_setup",
        takes("get_attention_backend", "model_runner init_new_workspace"),
    ),
    *module(
        "sglang.srt.layers.attention.base_attn_backend",
        has("SharedReadEnds", "PRE_REPLAY IN_REPLAY"),
    ),
    *module(
        "sglang.srt.layers.attention",
        reads("flashattention_backend", "extend_seq_lens_tensor"),
    ),
)
