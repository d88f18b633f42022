"""One streamed answer: server-sent events in, what was measured out. Knows no network and no clock."""

import json
from dataclasses import dataclass, field


class BadStream(Exception):
    """A stream that cannot be counted; `kind` names the row in the error table."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


@dataclass(frozen=True)
class Result:
    """One request. Times are seconds since it was sent; None where the endpoint does not tell."""

    error: str | None = None
    detail: str = ""
    ttft: float | None = None
    latency: float | None = None
    tokens: int = 0
    tokens_counted: bool = True  # False: the endpoint sent no usage, chunks were counted
    chunks: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    rounds: int | None = None  # verification rounds
    accepted: int | None = None  # drafts accepted in all of them
    histogram: tuple[int, ...] | None = None  # [k]: rounds that accepted exactly k drafts
    tool_calls: int = 0
    finish: str | None = None
    text: str = field(default="", repr=False)


@dataclass
class Answer:
    """Collects the events of one answer; `result` raises what is wrong with it."""

    first: float | None = None
    last: float = 0.0
    chunks: int = 0
    done: bool = False
    finish: str | None = None
    usage: dict | None = None
    speculation: dict = field(default_factory=dict)
    text: list[str] = field(default_factory=list)
    tools: set[int] = field(default_factory=set)

    def feed(self, line: bytes, now: float) -> None:
        if not line.startswith(b"data:"):
            return  # blank lines, comments that keep a connection alive, event names
        payload = line[len(b"data:") :].strip()
        if payload == b"[DONE]":
            self.done = True
            return
        try:
            event = json.loads(payload)
        except ValueError:
            raise BadStream("malformed", repr(payload[:80])) from None
        if not isinstance(event, dict):
            raise BadStream("malformed", repr(payload[:80]))
        if event.get("error"):
            raise BadStream("error event", str(event["error"])[:200])
        self._take(event, now)

    def _take(self, event: dict, now: float) -> None:
        self.usage = event.get("usage") or self.usage
        self.speculation.update(_speculation(event))
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            thought = delta.get("reasoning_content") or delta.get("reasoning")
            shown = choice.get("text") or delta.get("content")
            self.tools.update(call.get("index", 0) for call in delta.get("tool_calls") or ())
            self.finish = choice.get("finish_reason") or self.finish
            if shown:
                self.text.append(shown)
            if shown or thought or delta.get("tool_calls"):
                self.chunks += 1
                self.first = now if self.first is None else self.first
                self.last = now
            elif choice.get("finish_reason"):
                self.last = now  # tokens that show nothing, as an end of turn, may come with it

    def result(self) -> Result:
        if not self.done and self.finish is None:
            raise BadStream("truncated", f"after {self.chunks} chunks")
        usage = self.usage or {}
        tokens = usage.get("completion_tokens", self.chunks)
        if not tokens:
            raise BadStream("empty")
        details = usage.get("prompt_tokens_details") or {}
        return Result(
            ttft=self.last if self.first is None else self.first,
            latency=self.last,
            tokens=tokens,
            tokens_counted="completion_tokens" in usage,
            chunks=self.chunks,
            prompt_tokens=usage.get("prompt_tokens"),
            cached_tokens=details.get("cached_tokens"),
            tool_calls=len(self.tools),
            finish=self.finish,
            text="".join(self.text),
            **self.speculation,
        )


def _speculation(event: dict) -> dict:
    """Rounds and accepted drafts, where the event has them.

    SGLang: `sglext.spec_tokens_details` of the last chunk. llama.cpp: `timings` of the last chunk, which
    has totals but no positions; each round yields its accepted drafts and one token.
    """
    details = (event.get("sglext") or {}).get("spec_tokens_details")
    if details and details.get("spec_verify_ct"):
        histogram = tuple(details.get("spec_correct_drafts_histogram") or ())
        return {
            "rounds": details["spec_verify_ct"],
            "accepted": details.get("spec_num_correct_drafts", 0),
            "histogram": histogram or None,
        }
    timings = event.get("timings") or {}
    if timings.get("draft_n"):
        accepted = timings.get("draft_n_accepted", 0)
        return {"rounds": timings["predicted_n"] - accepted, "accepted": accepted}
    return {}
