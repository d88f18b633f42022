"""A reminder of date, identity and instructions inside a long dialogue's messages.

It stands at the end of every n-th user message, counted from the first one, and is put there again in each request, so
that what the prefix cache holds of a dialogue is read again as it was. Only a new day changes it.
"""

import datetime

from sglang_step35.guards.settings import Reminder


def remind(messages: list, reminder: Reminder, today: datetime.date | None = None) -> list:
    """The messages (SGLang's classes), those that get a reminder copied."""
    text = _text(messages, reminder, today or datetime.date.today())
    found, users = [], 0
    for message in messages:
        if message.role == "user":
            users += 1
            if text and users % reminder.every == 0:
                message = message.model_copy(update={"content": _with(message.content, text)})
        found.append(message)
    return found


def _text(messages: list, reminder: Reminder, today: datetime.date) -> str:
    lines = []
    if reminder.date:
        lines.append(f"Today is {today:%A}, {today:%Y-%m-%d}.")
    if reminder.identity:
        lines.append(reminder.identity)
    system = next((_plain(message.content) for message in messages if message.role == "system"), "")
    first = [line for line in system.splitlines() if line.strip()][: reminder.lines]
    if first:
        lines += ["Your instructions begin:", *first]
    return "\n".join(["[Reminder]", *lines]) if lines else ""


def _plain(content) -> str:
    if isinstance(content, str) or not content:
        return content or ""
    return "\n".join(part.text for part in content if part.type == "text")


def _with(content, text: str):
    """The content with the text after its last text."""
    if isinstance(content, str) or not content:
        return f"{content or ''}\n\n{text}"
    last = max((i for i, part in enumerate(content) if part.type == "text"), default=None)
    if last is None:
        return content
    longer = content[last].model_copy(update={"text": f"{content[last].text}\n\n{text}"})
    return [*content[:last], longer, *content[last + 1 :]]
