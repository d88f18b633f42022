"""Hooks into SGLang's HTTP server."""

from sglang_step35.hooks.hook import Hook

_ANTHROPIC = "sglang.srt.entrypoints.anthropic"
_OLLAMA = "sglang.srt.entrypoints.ollama"
_TOKENIZER_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"


def http_hooks() -> list[Hook]:
    """What a request may ask, and how each API answers."""
    from sglang_step35.http.admission import generate
    from sglang_step35.http.anthropic import CountTokensRequest, MessagesRequest, Step35AnthropicServing
    from sglang_step35.http.guards import to_internal_request
    from sglang_step35.http.middleware import install as install_error_format
    from sglang_step35.http.ollama import Step35OllamaServing
    from sglang_step35.http.ollama_protocol import OllamaChatRequest, OllamaGenerateRequest
    from sglang_step35.http.port import refuse_taken_port
    from sglang_step35.http.secrets import without_secrets

    newer_clients = "stock refuses a thinking display that only newer clients know, and Claude Code asks for one"
    loses = "stock's Ollama API loses text, tools and reasoning"
    return [
        Hook(
            f"{_TOKENIZER_MANAGER}.generate_request",
            "around",
            generate,
            why="what a request may ask is checked nowhere whole before the scheduler dies of it",
            until="SGLang checks every field before the scheduler",
        ),
        Hook(
            "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._convert_to_internal_request",
            "around",
            to_internal_request,
            why="stock passes over reasoning_effort for this model, and only there the messages are still whole",
            until="SGLang hands a request to its plug-ins before it renders it",
        ),
        Hook(
            "sglang.srt.utils.common.set_uvicorn_logging_configs",
            "after",
            install_error_format,
            why="it is the last step before the HTTP server starts; SGLang has no registry for middleware",
            until="SGLang lets a plug-in add middleware",
        ),
        Hook(
            "sglang.launch_server.run_server",
            "before",
            refuse_taken_port,
            why="stock loads the whole model first, then waits minutes for a warm-up that asks whoever has the port",
            until="SGLang opens its port before it loads",
        ),
        Hook(
            "sglang.srt.entrypoints.engine._server_args_for_logging",
            "after",
            without_secrets,
            why="the API keys stand in the log of every start",
            until="SGLang hides them",
        ),
        Hook(
            f"{_ANTHROPIC}.serving.AnthropicServing",
            "replace",
            Step35AnthropicServing,
            why="stock refuses `thinking: disabled` and reports stop sequences as end_turn",
            until="stock hides the thinking of models that always reason, and names stop sequences",
        ),
        *(
            Hook(f"{_ANTHROPIC}.protocol.{name}", "replace", ours, why=newer_clients, until="stock passes over it")
            for name, ours in (
                ("AnthropicMessagesRequest", MessagesRequest),
                ("AnthropicCountTokensRequest", CountTokensRequest),
            )
        ),
        *(
            Hook(f"{_OLLAMA}.{name}", "replace", ours, why=loses, until="stock's Ollama API serves tools and thinking")
            for name, ours in (
                ("serving.OllamaServing", Step35OllamaServing),
                ("protocol.OllamaChatRequest", OllamaChatRequest),
                ("protocol.OllamaGenerateRequest", OllamaGenerateRequest),
            )
        ),
    ]
