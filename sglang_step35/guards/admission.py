"""Where a request gets its guards: when SGLang has settled its grammar, before it waits for its prefill."""

from sglang_step35.guards import settings
from sglang_step35.names import GUARDS_PARAM


def guard_request(queued, grammar_manager, req) -> None:
    """After `GrammarManager.process_req_with_grammar`; a request whose grammar is being compiled comes back later."""
    if not queued:
        _guard(grammar_manager, req)


def guard_ready_requests(ready, grammar_manager) -> None:
    """After `GrammarManager.get_ready_grammar_requests`."""
    for req in ready:
        _guard(grammar_manager, req)


def _guard(grammar_manager, req) -> None:
    given = (req.sampling_params.custom_params or {}).get(GUARDS_PARAM)
    if given is None or req.to_finish is not None:
        return
    try:
        guards = settings.parse(given)
        if guards.act_on_tokens:
            req.grammar = _guarded(guards, grammar_manager.scheduler, req)
            req.customized_info = {GUARDS_PARAM: req.grammar.events}
    except settings.GuardError as error:
        req.set_finish_with_abort(str(error))


def _guarded(guards: settings.Guards, scheduler, req):
    """The request's grammar with these guards around it; raises GuardError where there can be none."""
    from sglang.srt.runtime_context import get_exec

    from sglang_step35.guards.grammar import GuardedGrammar
    from sglang_step35.guards.rules import Rules
    from sglang_step35.guards.vocabulary import vocabulary_of

    if scheduler.tokenizer is None:
        raise settings.GuardError("guards need the tokenizer: start the server without --skip-tokenizer-init")
    # Its masks have another layout, and a batch has one mask for all grammars.
    if get_exec().kernel.grammar_backend == "outlines":
        raise settings.GuardError("guards need --grammar-backend xgrammar, llguidance or none, not outlines")
    vocabulary = vocabulary_of(scheduler.tokenizer, scheduler.model_config.vocab_size)
    return GuardedGrammar(Rules(guards, vocabulary, req.origin_input_ids), req.grammar)
