"""Grammars, as which guards act: what SGLang asks of one, and where a request gets its own."""

from sglang_step35.upstream.row import has, module, takes

ROWS = (
    *module(
        "sglang.srt.constrained.base_grammar_backend",
        takes("BaseGrammarObject.__init__", "self"),
        takes("BaseGrammarObject.accept_token", "self token"),
        takes("BaseGrammarObject.rollback", "self k"),
        takes("BaseGrammarObject.is_terminated", "self"),
        takes("BaseGrammarObject.allocate_vocab_mask", "self vocab_size batch_size device"),
        takes("BaseGrammarObject.fill_vocab_mask", "self vocab_mask idx"),
        takes("BaseGrammarObject.move_vocab_mask", "vocab_mask device"),
        takes("BaseGrammarObject.apply_vocab_mask", "logits vocab_mask"),
        has("BaseGrammarObject", "_finished current_token finished"),
    ),
    *module(
        "sglang.srt.constrained.xgrammar_backend",
        takes("XGrammarGrammar.apply_vocab_mask", "self logits vocab_mask"),
    ),
    *module(
        "sglang.srt.constrained.grammar_manager",
        takes("GrammarManager.process_req_with_grammar", "self req", hooked=True),
        takes("GrammarManager.get_ready_grammar_requests", "self", hooked=True),
        has("GrammarManager", "scheduler"),
    ),
    *module("sglang.srt.managers.scheduler", has("Scheduler", "model_config tokenizer")),
    *module("sglang.srt.utils.common", takes("is_pin_memory_available", "device")),
    *module("sglang.srt.runtime_context", takes("get_serving", "")),
)
