"""SGLang detectors for `--reasoning-parser step3p5` and `--tool-call-parser step3p5`.

The parsing itself is in `reasoning` and `scanner`; here it meets SGLang's interfaces. Both
detectors run one scanner for streamed and for whole texts, so the two cannot differ.
"""

from collections import deque

from sglang.srt.function_call.base_format_detector import BaseFormatDetector
from sglang.srt.function_call.core_types import StreamingParseResult, ToolCallItem
from sglang.srt.parser.reasoning_parser import BaseReasoningFormatDetector
from sglang.srt.parser.reasoning_parser import StreamingParseResult as ReasoningResult
from sglang.srt.runtime_context import get_context, get_exec

from sglang_step35.parsers.reasoning import THINK, THINK_END, ReasoningSplitter
from sglang_step35.parsers.scanner import Event, ToolCallScanner
from sglang_step35.parsers.values import argument_kinds


class Step35ReasoningDetector(BaseReasoningFormatDetector):
    """Replaces DeepSeekR1Detector, stock's choice for step3p5.

    Kept: the base class's attributes, which the scheduler and the grammar backend read, and
    that the output always starts within the reasoning. Replaced: all parsing, because stock
    (0.5.23)
    - takes a `<think>` anywhere for the start of reasoning while streaming: of
      "a</think>The <think> tag" the answer is "The <think> tag" whole, "The  tag" in one chunk,
      and "The " with " tag" moved to the reasoning character by character;
    - gives the newlines of "a\\n</think>\\nb" to the texts, so that the turn, sent back, renders
      as "a\\n\\n</think>\\n\\nb" and misses the prefix cache;
    - swallows the call of "plan<tool_call>\\n<function=f>..." into the reasoning when the model
      did not write `</think>`;
    - raises TypeError when the message to continue has no content;
    - with force_nonempty_content leaves "a</think>" without an answer while streaming, though
      not for the whole text.
    """

    def __init__(
        self,
        stream_reasoning: bool = True,
        force_reasoning: bool = True,
        continue_final_message: bool = False,
        previous_content: str = "",
        force_nonempty_content: bool = False,
        tool_call_parser_active: bool = False,
    ):
        """tool_call_parser_active: the answer is parsed for calls, so a call ends reasoning."""
        previous = previous_content if isinstance(previous_content, str) else ""
        super().__init__(
            THINK,
            THINK_END,
            # The template opens <think> for every request, whatever the request says.
            force_reasoning=True,
            stream_reasoning=stream_reasoning,
            continue_final_message=continue_final_message,
            previous_content=previous,
            force_nonempty_content=force_nonempty_content,
        )
        self._calls_end_reasoning = tool_call_parser_active
        self._splitter = self._new_splitter()
        self._unsent = ""  # reasoning not streamed, with stream_reasoning False
        self._answered = False

    def _new_splitter(self) -> ReasoningSplitter:
        # The prompt of a continued message ends with the message as far as it is written.
        previous = self.previous_content
        return ReasoningSplitter(
            in_reasoning=THINK_END not in previous,
            ends_at_call=self._calls_end_reasoning,
            answer_start=previous.endswith(THINK_END),
        )

    def detect_and_parse(self, text: str) -> ReasoningResult:
        splitter = self._new_splitter()
        parts = zip(splitter.feed(text), splitter.finish(), strict=True)
        reasoning, answer = ("".join(part) for part in parts)
        if self._force_nonempty_content and not answer:
            reasoning, answer = "", reasoning
        return ReasoningResult(normal_text=answer, reasoning_text=reasoning)

    def parse_streaming_increment(self, new_text: str) -> ReasoningResult:
        return self._result(*self._splitter.feed(new_text), final=False)

    def finish(self) -> ReasoningResult:
        return self._result(*self._splitter.finish(), final=True)

    def _result(self, reasoning: str, answer: str, final: bool) -> ReasoningResult:
        self._in_reasoning = self._splitter.in_reasoning
        self._answered |= bool(answer)
        if self._force_nonempty_content:
            self._accumulated_reasoning += reasoning
        if not self.stream_reasoning:
            self._unsent += reasoning
            reasoning = ""
            if final or not self._in_reasoning:
                reasoning, self._unsent = self._unsent, ""
        if final and self._force_nonempty_content and not self._answered:
            # Streamed reasoning cannot be taken back; the answer repeats it.
            reasoning, answer = "", self._accumulated_reasoning
        return ReasoningResult(normal_text=answer, reasoning_text=reasoning)


class Step35ToolCallDetector(BaseFormatDetector):
    """Replaces Qwen3CoderDetector, stock's choice for step3p5.

    Kept: the base class's bookkeeping that the server reads at the end of a stream, and with xgrammar stock's
    structural tag (same format). Replaced: all parsing, because stock (0.5.23)
    - parses whole and streamed texts by different rules: text after a call is dropped whole,
      kept streamed; the "\\n" of "</tool_call>\\n<tool_call>" is content streamed; a
      `</tool_call>` in a value cuts it whole; a repeated parameter gives {"s": "2"} whole,
      {"s": "1", "s": "2"} streamed; "write <function=f> here" is a call streamed;
    - loses text: "x <" streams as "x " (no `finish`), and of "the <tool_call> tag, then" only
      "the " is left;
    - cuts values at tags they contain: "a </parameter> b", 'x = "<parameter=n>"' (which also
      invents a parameter n), "a </function> b" (streamed: {"s": "a "}}, no JSON);
    - completes a call cut at max_tokens: "<parameter=command>\\nrm -rf /" whole gives
      {"command": "rm -rf /"}, streamed a call with no arguments; behind another call it is
      dropped whole;
    - raises TypeError while streaming an object "{1, 2}" or "..." (Python, not JSON), writes
      NaN and Infinity for "nan" and "1e999", and lone surrogates that cannot be encoded;
    - mistypes: "null" for a string is None, any text for a boolean is false, {"$ref": ...} and
      a string-or-array union are text;
    - sends the text of a chunk before its call deltas, whatever their order: the Anthropic
      endpoint drops the rest of the arguments in '...\\n</parameter>\\n...</tool_call>\\nDone'.
    """

    def __init__(self):
        super().__init__()
        self._scanner: ToolCallScanner | None = None
        self._queue: deque[Event] = deque()
        # Read by the server: a call cut off is not reported as "tool_calls" / "completed".
        self.incomplete_tool_call_indices: set[int] = set()

    def has_tool_call(self, text: str) -> bool:
        """Whether parsing is worth while; what a call is depends on the declared tools."""
        return "<function" in text

    def detect_and_parse(self, text: str, tools: list) -> StreamingParseResult:
        scanner = _scanner(tools)
        normal_text, calls = "", []
        for event in scanner.feed(text) + scanner.finish():
            if event.kind == "text":
                normal_text += event.text
            elif event.kind == "call":
                calls.append(ToolCallItem(tool_index=len(calls), name=event.text, parameters=""))
            else:
                calls[-1].parameters += event.text
        self.incomplete_tool_call_indices = {len(calls) - 1} if scanner.in_call else set()
        return StreamingParseResult(normal_text=normal_text, calls=calls)

    def parse_streaming_increment(self, new_text: str, tools: list) -> StreamingParseResult:
        if self._scanner is None:
            self._scanner = _scanner(tools)
        self._queue.extend(self._scanner.feed(new_text))
        return self._deliver(final=False)

    def finish(self, tools: list) -> StreamingParseResult:
        if self._scanner is not None:
            self._queue.extend(self._scanner.finish())
        result = self._deliver(final=True)
        if self._scanner is not None and self._scanner.in_call:
            self.incomplete_tool_call_indices.add(self.current_tool_id)
        return result

    def _deliver(self, final: bool) -> StreamingParseResult:
        """Queued events, up to text behind arguments of a call announced earlier.

        The server sends a result's text before its calls. Text ahead of a whole call does no
        harm, but text ahead of the rest of a call ends its block in the Anthropic stream and
        loses that rest. Such text, and what follows it, waits for the next increment.
        """
        text, items = "", []
        while self._queue:
            event = self._queue[0]
            if event.kind != "text":
                items.append(self._record(event))
            elif items and items[0].name is None and not final:
                break
            else:
                text += event.text
            self._queue.popleft()
        return StreamingParseResult(normal_text=text, calls=items)

    def _record(self, event: Event) -> ToolCallItem:
        """The event as SGLang's item, noted where the server checks what it has sent."""
        if event.kind == "call":
            self.current_tool_id += 1
            self.current_tool_name_sent = True
            self.prev_tool_call_arr.append({"name": event.text, "arguments": ""})
            self.streamed_args_for_tool.append("")
            return ToolCallItem(tool_index=self.current_tool_id, name=event.text, parameters="")
        # Equal on purpose: nothing is ever left for the server to send by itself.
        self.streamed_args_for_tool[-1] += event.text
        self.prev_tool_call_arr[-1]["arguments"] = self.streamed_args_for_tool[-1]
        return ToolCallItem(tool_index=self.current_tool_id, parameters=event.text)

    def structure_info(self):
        raise NotImplementedError("step3p5 is constrained by its structural tag")

    def get_structural_tag_name(self) -> str | None:
        return "qwen_3_coder" if self.supports_structural_tag() else None

    def supports_structural_tag(self) -> bool:
        """Not with llguidance, which compiles no tag of this kind (0.5.23): a call that is required is constrained to
        a JSON array then, which the server parses by itself."""
        if not get_context().is_config_namespace_published("exec"):
            return True
        return get_exec().kernel.grammar_backend != "llguidance"


def _scanner(tools: list) -> ToolCallScanner:
    declared = {}
    for tool in tools or ():
        if tool.function.name:
            declared.setdefault(tool.function.name, argument_kinds(tool.function.parameters))
    return ToolCallScanner(declared)
