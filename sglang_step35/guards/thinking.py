"""Whether a request is inside `<think>`, how long it has been, and what leads it out. Pure: no SGLang import."""

from dataclasses import dataclass, replace

from sglang_step35.guards.settings import ReasoningBudget


@dataclass(frozen=True)
class Thinking:
    """State after some tokens.

    inside: within `<think>`. used: tokens generated there. forced: token ids that must follow, the last one `</think>`.
    calling: within a tool call, which the model sometimes begins before `</think>`.
    """

    inside: bool
    used: int = 0
    forced: tuple[int, ...] = ()
    calling: bool = False


@dataclass(frozen=True)
class Tags:
    """Token ids of `<think>`, `</think>` and, where they are tokens, `<tool_call>` and `</tool_call>`."""

    start: int
    end: int
    call: int | None = None
    call_end: int | None = None


def starts_inside(prompt: list[int], tags: Tags) -> bool:
    """Whether the prompt leaves a `<think>` open."""
    for token in reversed(prompt):
        if token in (tags.start, tags.end):
            return token == tags.start
    return False


def after(state: Thinking, token: int, tags: Tags) -> Thinking:
    """State after one more token."""
    if token in (tags.call, tags.call_end):
        state = replace(state, calling=token == tags.call)
    if token == tags.end:
        return replace(state, inside=False, forced=())
    if not state.inside:
        return replace(state, inside=True) if token == tags.start else state
    forced = state.forced[1:] if state.forced[:1] == (token,) else state.forced
    return replace(state, used=state.used + 1, forced=forced)


def spent(state: Thinking, budget: ReasoningBudget) -> bool:
    """Whether nothing is left of the budget."""
    return state.used >= budget.tokens
