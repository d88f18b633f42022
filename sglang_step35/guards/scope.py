"""Where an answer quotes: code, quotations and tool calls, in which any script may stand. Pure.

A Markdown reader of one pass: fences of three backticks, inline code, quotation marks in pairs, lines that begin with
`>`. What should close and does not ends with its line, fences and calls excepted.
"""

from dataclasses import dataclass, replace

_PAIRS = {'"': '"', "“": "”", "„": "“", "«": "»", "‹": "›", "「": "」", "『": "』", "《": "》"}
_FENCE, _CODE, _LINE, _CALL = "```", "`", ">", "call"
_LASTING = (_FENCE, _CALL)
_MARKS = frozenset("`\n>").union(_PAIRS, _PAIRS.values())


@dataclass(frozen=True)
class Scope:
    """open: what the text is inside of, or what closes it. ticks: backticks at the end. fresh: a line begins."""

    open: str = ""
    ticks: int = 0
    fresh: bool = True

    @property
    def quotes(self) -> bool:
        """Whether what comes next is quoted."""
        return bool(_settled(self).open)

    def after(self, text: str) -> "Scope":
        """Further by this text."""
        if not self.ticks and _MARKS.isdisjoint(text):  # as almost all is
            return replace(self, fresh=False) if self.fresh and text.strip(" \t") else self
        scope = self
        for char in text:
            scope = replace(scope, ticks=scope.ticks + 1) if char == "`" else _next(_settled(scope), char)
        return scope

    def call(self, opens: bool) -> "Scope":
        """A tag of a tool call came."""
        return Scope(_CALL if opens else "", fresh=False)


def _settled(scope: Scope) -> Scope:
    """With the backticks read as what they open or close."""
    if not scope.ticks:
        return scope
    opened = scope.open
    if scope.ticks >= 3:
        opened = "" if opened == _FENCE else opened or _FENCE
    elif opened in ("", _CODE):
        opened = "" if opened else _CODE
    return Scope(opened, fresh=False)


def _next(scope: Scope, char: str) -> Scope:
    if char == "\n":
        return Scope(scope.open if scope.open in _LASTING else "", fresh=True)
    opened = scope.open
    if opened and opened == char and opened != _LINE:
        opened = ""
    elif not opened:
        opened = _LINE if char == ">" and scope.fresh else _PAIRS.get(char, "")
    return Scope(opened, fresh=scope.fresh and char in " \t")
