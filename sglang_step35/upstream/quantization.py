"""What packed weights and GGUF files lean on: quantisation methods, the GGUF seams, loading."""

from sglang_step35.upstream.row import has, module, plain, takes

ROWS = (
    # Methods that our packed layers and experts implement.
    *module(
        "sglang.srt.layers.quantization.base_config",
        takes("QuantizationConfig.__init__", "self"),
        takes("QuantizationConfig.from_config", "config"),
        takes("QuantizationConfig.get_config_filenames", ""),
        takes("QuantizationConfig.get_min_capability", ""),
        takes("QuantizationConfig.get_name", "self"),
        takes("QuantizationConfig.get_quant_method", "self layer prefix"),
        takes("QuantizationConfig.get_scaled_act_names", "self"),
        takes("QuantizationConfig.get_supported_act_dtypes", "self"),
        takes("QuantizeMethodBase.process_weights_after_loading", "self layer"),
        takes("LinearMethodBase.apply", "self layer x bias"),
        takes(
            "LinearMethodBase.create_weights",
            "self layer input_size_per_partition output_partition_sizes input_size output_size params_dtype "
            "**extra_weight_attrs",
        ),
        takes("FusedMoEMethodBase.apply", "self layer dispatch_output"),
        takes("FusedMoEMethodBase.create_moe_runner", "self layer moe_runner_config"),
        takes(
            "FusedMoEMethodBase.create_weights",
            "self layer num_experts hidden_size intermediate_size_per_partition params_dtype **extra_weight_attrs",
        ),
    ),
    *module(
        "sglang.srt.platforms.interface",
        takes("SRTPlatform.get_quantization_config", "self quantization"),
    ),
    plain("sglang.srt.layers.quantization.QUANTIZATION_METHODS", "a dict of classes, to which we add gptq and mxfp4"),
    # How its layers are divided over the ranks.
    takes("sglang.srt.distributed.utils.get_group_rank_size", "group"),
    has("sglang.srt.layers.linear.LinearBase", "tp_group"),
    has("sglang.srt.layers.linear.QKVParallelLinear", "num_kv_head_replicas"),
    has(
        "sglang.srt.layers.moe.fused_moe_triton.FusedMoE",
        "intermediate_size_per_partition moe_ep_rank moe_tp_rank moe_tp_size num_local_experts",
    ),
    # 4-bit experts.
    *module(
        "sglang.srt.layers.quantization",
        takes("auto_round.AutoRoundConfig.get_layer_config", "self layer layer_name"),
        takes("moe_wna16.MoeWNA16Config.from_config", "config"),
        takes("moe_wna16.MoeWNA16Method", "quant_config"),
    ),
    # GGUF on CUDA.
    *module(
        "sglang.srt.layers.quantization.gguf",
        takes("GGUFConfig", "modules_to_not_convert"),
        takes("GGUFMoEMethod", "quant_config"),
        takes("GGUFMoEMethod.apply", "self layer dispatch_output"),
        has("GGUFMoEMethod", "moe_runner_config"),
        takes("fused_mul_mat_gguf", "x qweight qweight_type"),
    ),
    # Opening a GGUF file.
    *module(
        "sglang.srt.model_loader.loader",
        takes("get_model_loader", "load_config model_config", hooked=True),
        takes("GGUFModelLoader", "load_config"),
        takes("GGUFModelLoader.load_model", "self model_config device_config"),
        has("BaseModelLoader", "load_config"),
        takes("_get_quantization_config", "model_config load_config"),
        takes("_initialize_model", "model_config load_config quant_config"),
        takes("device_loading_context", "module target_device"),
    ),
    *module(
        "sglang.srt.model_loader.utils",
        takes("set_default_torch_dtype", "dtype"),
    ),
    *module(
        "sglang.srt.utils.hf_transformers.gguf_native",
        plain("GGUF_NATIVE_CONFIG_BUILDERS", "a dict of config builders by architecture, to which we add ours"),
        takes("read_gguf_architecture", "gguf_path", hooked=True),
        takes("build_gguf_generation_config", "gguf_path", hooked=True),
        takes("build_gguf_tokenizer", "gguf_path **kwargs", hooked=True),
    ),
)
