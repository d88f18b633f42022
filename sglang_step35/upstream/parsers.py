"""Detectors of reasoning and tool calls."""

from sglang_step35.upstream.row import has, module, plain, reads, takes

ROWS = (
    *module(
        "sglang.srt.function_call.function_call_parser",
        plain(
            "FunctionCallParser.ToolCallParserEnum", "a dict of detectors by name, in which we replace one", hooked=True
        ),
    ),
    *module(
        "sglang.srt.parser.reasoning_parser",
        plain("ReasoningParser.DetectorMap", "a dict of detectors by name, in which we replace one", hooked=True),
        takes(
            "BaseReasoningFormatDetector.__init__",
            "self think_start_token think_end_token think_excluded_tokens force_reasoning "
            "stream_reasoning tool_start_token continue_final_message previous_content "
            "thinks_internally reasoning_default force_nonempty_content tool_start_at_line_start",
        ),
        takes("BaseReasoningFormatDetector.detect_and_parse", "self text"),
        takes("BaseReasoningFormatDetector.parse_streaming_increment", "self new_text"),
        takes("BaseReasoningFormatDetector.finish", "self"),
        has(
            "BaseReasoningFormatDetector",
            "_in_reasoning _accumulated_reasoning _force_nonempty_content previous_content stream_reasoning",
        ),
        takes("StreamingParseResult", "normal_text reasoning_text"),
    ),
    *module(
        "sglang.srt.function_call.base_format_detector",
        takes("BaseFormatDetector.__init__", "self"),
        takes("BaseFormatDetector.has_tool_call", "self text"),
        takes("BaseFormatDetector.detect_and_parse", "self text tools"),
        takes("BaseFormatDetector.parse_streaming_increment", "self new_text tools"),
        takes("BaseFormatDetector.finish", "self tools"),
        takes("BaseFormatDetector.structure_info", "self"),
        takes("BaseFormatDetector.get_structural_tag_name", "self"),
        takes("BaseFormatDetector.supports_structural_tag", "self"),
        has(
            "BaseFormatDetector",
            "current_tool_id current_tool_name_sent prev_tool_call_arr streamed_args_for_tool",
        ),
    ),
    *module(
        "sglang.srt.entrypoints.openai",
        reads("serving_chat", "incomplete_tool_call_indices"),
    ),
    *module(
        "sglang.srt.runtime_context",
        takes("RuntimeContext.is_config_namespace_published", "self name"),
    ),
    *module(
        "sglang.srt.function_call.core_types",
        takes("StreamingParseResult", "normal_text calls"),
        takes("ToolCallItem", "tool_index name parameters"),
    ),
)
