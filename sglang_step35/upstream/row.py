"""One row of the table of SGLang names, and how the tables spell it."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Upstream:
    """One upstream name; each row says at least one of the fields below.

    path: dotted path of a module attribute or of a class member.
    parameters: names in order, of a function or of a class's constructor (a leading * or ** marks variadics). All of
        them, because a new one may need a value from us, and a renamed one was passed by name.
    members: attributes, fields or enum members that we read, pass, set or fake; what else there is may change.
    mentions: names that a module's source reads of objects of ours, so that nothing fails when it stops reading them.
    reason: why nothing of it is listed.
    hooked: checked at every start, because a missing name would silently leave stock code in place; the others fail
        by themselves when they are imported.
    """

    path: str
    parameters: tuple[str, ...] | None = None
    members: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()
    reason: str = ""
    hooked: bool = False


def takes(path: str, parameters: str, hooked: bool = False) -> Upstream:
    """A function, method or class that we call, override or hook, with its parameters."""
    return Upstream(path, parameters=tuple(parameters.split()), hooked=hooked)


def has(path: str, members: str, hooked: bool = False) -> Upstream:
    """A class, instance or enum of which we use these members."""
    return Upstream(path, members=tuple(members.split()), hooked=hooked)


def reads(path: str, names: str) -> Upstream:
    """A module that reads these names of our objects."""
    return Upstream(path, mentions=tuple(names.split()))


def plain(path: str, reason: str, hooked: bool = False) -> Upstream:
    """A name used as it is."""
    return Upstream(path, reason=reason, hooked=hooked)


def module(name: str, *rows: Upstream) -> tuple[Upstream, ...]:
    """Rows whose paths begin with this module's name."""
    return tuple(replace(row, path=f"{name}.{row.path}") for row in rows)
