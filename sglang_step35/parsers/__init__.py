"""Reasoning and tool-call parsing for Step-3.5, right for every way a stream can be cut.

With multi-token prediction several tokens arrive in one chunk; `register_parsers` puts
detectors under SGLang's own name "step3p5" that do not depend on where chunks end.
"""

PARSER_NAME = "step3p5"


def register_parsers() -> None:
    """Replace stock's step3p5 detectors in SGLang's two parser registries; idempotent.

    Raises RuntimeError when a registry does not know the name: the installed SGLang is then
    not the one we were written against.
    """
    from sglang.srt.function_call.function_call_parser import FunctionCallParser
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    from sglang_step35.parsers.detectors import Step35ReasoningDetector, Step35ToolCallDetector

    replacements = {
        "FunctionCallParser.ToolCallParserEnum": (
            FunctionCallParser.ToolCallParserEnum,
            Step35ToolCallDetector,
        ),
        "ReasoningParser.DetectorMap": (ReasoningParser.DetectorMap, Step35ReasoningDetector),
    }
    for label, (registry, _) in replacements.items():
        if PARSER_NAME not in registry:
            raise RuntimeError(f"SGLang's {label} has no parser {PARSER_NAME!r}")
    for registry, detector in replacements.values():
        registry[PARSER_NAME] = detector
