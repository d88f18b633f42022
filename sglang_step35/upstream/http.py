"""Requests and answers of the HTTP APIs."""

from sglang_step35.upstream.row import has, module, plain, takes

ROWS = (
    *module(
        "sglang.srt.entrypoints.http_server",
        has(
            "app",
            "add_middleware add_exception_handler exception_handlers user_middleware",
        ),
    ),
    *module("sglang.launch_server", takes("run_server", "server_args", hooked=True)),
    *module(
        "sglang.srt.utils.common",
        takes("set_uvicorn_logging_configs", "server_args", hooked=True),
    ),
    *module(
        "sglang.srt.managers.tokenizer_manager",
        takes("TokenizerManager.generate_request", "self obj request", hooked=True),
        has("TokenizerManager", "gracefully_exit"),
    ),
    *module(
        "sglang.srt.managers.io_struct",
        takes("SessionParams", "id rid offset replace drop_previous_output"),
    ),
    *module(
        "sglang.srt.runtime_context",
        takes("RuntimeContext.override", "self source **fields"),
        takes("get_context", ""),
    ),
    # Anthropic.
    *module(
        "sglang.srt.entrypoints.anthropic.serving",
        plain("AnthropicServing", "replaced as a whole by a subclass", hooked=True),
        has("AnthropicServing", "openai_serving_chat"),
        takes("AnthropicServing._convert_to_chat_completion_request", "self anthropic_request"),
        takes("AnthropicServing._handle_non_streaming", "self chat_request anthropic_request raw_request"),
        takes("AnthropicServing._convert_response", "self response"),
        takes(
            "AnthropicServing._generate_anthropic_stream",
            "self adapted_request processed_request anthropic_request raw_request",
        ),
    ),
    *module(
        "sglang.srt.entrypoints.anthropic.protocol",
        has("AnthropicMessagesRequest", "thinking", hooked=True),
        plain("AnthropicCountTokensRequest", "replaced by a subclass that lets more values pass", hooked=True),
    ),
    # OpenAI, to whose endpoints the others translate.
    *module(
        "sglang.srt.entrypoints.openai.serving_chat",
        takes("OpenAIServingChat._convert_to_internal_request", "self request raw_request", hooked=True),
        takes("OpenAIServingChat._generate_chat_stream", "self adapted_request request raw_request"),
    ),
    *module(
        "sglang.srt.entrypoints.openai.serving_base",
        takes("OpenAIServingBase.handle_request", "self request raw_request"),
    ),
    *module(
        "sglang.srt.entrypoints.openai.protocol",
        has("ChatCompletionRequest", "custom_params messages reasoning_effort tools"),
        has("CompletionRequest", "prompt model_fields"),
    ),
    # Ollama.
    *module(
        "sglang.srt.entrypoints.ollama.serving",
        plain("OllamaServing", "replaced as a whole by a subclass", hooked=True),
        takes("OllamaServing.__init__", "self tokenizer_manager"),
        takes("OllamaServing.handle_chat", "self request raw_request"),
        takes("OllamaServing.handle_generate", "self request raw_request"),
        takes("OllamaServing.get_show", "self model"),
        takes("OllamaServing._get_timestamp", "self"),
        has("OllamaServing", "tokenizer_manager"),
    ),
    *module(
        "sglang.srt.entrypoints.ollama.protocol",
        plain("OllamaChatRequest", "replaced by a class of our own", hooked=True),
        plain("OllamaGenerateRequest", "replaced by a class of our own", hooked=True),
    ),
)
