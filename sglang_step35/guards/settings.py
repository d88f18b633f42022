"""What a request's guards are: `custom_params` {"guards": {NAME: {...} or true or false}}, checked on admission."""

import json
from dataclasses import dataclass, fields

from sglang_step35.guards.scripts import NAMES

LONGEST_LINE = 2000  # characters of a closing line
LARGEST = 2**31 - 1


class GuardError(ValueError):
    """A request's guards are not what they may be; names the key."""


@dataclass(frozen=True)
class ReasoningBudget:
    """After `tokens` generated tokens inside `<think>` follow `line` and `</think>`; 0: `</think>` at once."""

    tokens: int
    line: str = "I have used up my thinking budget, so I answer now."

    def __post_init__(self):
        _check_range("reasoning.tokens", self.tokens, 0, LARGEST)
        _check_line("reasoning.line", self.line)


@dataclass(frozen=True)
class LoopGuard:
    """An n-gram of `tokens` or more (`longest` at most) that stands `times` times in a row.

    Inside `<think>` follow `line` and `</think>`; elsewhere the token that would go on with it is forbidden.
    """

    tokens: int = 20
    times: int = 3
    longest: int = 1024
    line: str = "I am repeating myself, so I answer now."

    def __post_init__(self):
        _check_range("loop.tokens", self.tokens, 1, 4096)
        _check_range("loop.times", self.times, 2, 1000)
        _check_range("loop.longest", self.longest, self.tokens, 4096)
        _check_line("loop.line", self.line)


@dataclass(frozen=True)
class LanguageGuard:
    """Letters of these Unicode scripts only; None: those of the last user message, Latin and Greek."""

    scripts: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.scripts is None:
            return
        if not isinstance(self.scripts, list | tuple) or not self.scripts:
            raise GuardError("guards: language.scripts must be a list of names of Unicode's scripts, or left out")
        for name in self.scripts:
            if name not in NAMES:
                raise GuardError(f"guards: language.scripts: {str(name)[:80]!r} is none of Unicode's, as Latin or Han")
        object.__setattr__(self, "scripts", tuple(self.scripts))


@dataclass(frozen=True)
class Reminder:
    """In every `every`-th user message: the date, `identity`, and the first `lines` lines of the system prompt."""

    every: int = 8
    lines: int = 3
    date: bool = True
    identity: str = ""

    def __post_init__(self):
        _check_range("reminder.every", self.every, 1, LARGEST)
        _check_range("reminder.lines", self.lines, 0, 1000)
        if not isinstance(self.date, bool):
            raise GuardError("guards: reminder.date must be true or false")
        _check_line("reminder.identity", self.identity)


@dataclass(frozen=True)
class Guards:
    """A request's guards; None: off."""

    reasoning: ReasoningBudget | None = None
    loop: LoopGuard | None = None
    language: LanguageGuard | None = None
    reminder: Reminder | None = None

    @property
    def act_on_tokens(self) -> bool:
        """Whether any has something to do while tokens are generated."""
        return any((self.reasoning, self.loop, self.language))


_KINDS = {"reasoning": ReasoningBudget, "loop": LoopGuard, "language": LanguageGuard, "reminder": Reminder}


def parse(given: object) -> Guards:
    """From a JSON object, or the text of one, which is how it travels to the scheduler; raises GuardError."""
    given = as_object(given)
    _refuse_unknown("", given, _KINDS)
    return Guards(**{name: _guard(name, value) for name, value in given.items()})


def as_object(given: object) -> dict:
    """The JSON object that `guards` holds."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise GuardError(f"guards: {error}") from error
    if not isinstance(given, dict):
        raise GuardError(f"guards must be an object with some of {', '.join(_KINDS)}, got {str(given)[:80]}")
    return given


def _guard(name: str, value: object):
    if value is None or value is False:
        return None
    if value is True:
        value = {}
    if not isinstance(value, dict):
        raise GuardError(f"guards: {name} must be an object, true or false, got {str(value)[:80]}")
    kind = _KINDS[name]
    _refuse_unknown(f"{name}.", value, [field.name for field in fields(kind)])
    if kind is ReasoningBudget and "tokens" not in value:
        raise GuardError("guards: reasoning.tokens is missing: how many tokens the model may think")
    return kind(**value)


def _refuse_unknown(prefix: str, given: dict, known) -> None:
    for key in given:
        if key not in known:
            raise GuardError(f"guards: {prefix}{str(key)[:80]} is unknown, use {', '.join(known)}")


def _check_range(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise GuardError(f"guards: {name} must be an integer in [{low}, {high}], got {str(value)[:80]}")


def _check_line(name: str, value: object) -> None:
    if not isinstance(value, str) or len(value) > LONGEST_LINE:
        raise GuardError(f"guards: {name} must be a text of at most {LONGEST_LINE} characters")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise GuardError(f"guards: {name} is not valid Unicode: {error.reason}") from error
