"""What is sent: six workloads, each a seeded recipe for sessions of one or more dependent requests.

The same seed gives the same prompts on every endpoint, so that two runs can be compared. Each
concurrency level draws its own prompts: what one level left in a prefix cache helps no other.
"""

import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from sglang_step35.assets import HELDOUT_PROMPTS
from sglang_step35.bench.texts import AGENT_RULES, AGENT_STEPS, FORMS, SUBJECTS, TASKS, TOOLS

LEVELS, LEVEL_STRIDE = 100, 10_037  # more levels and sessions than a sweep has; prime: levels differ in code, too


@dataclass(frozen=True)
class Session:
    """Requests of one client, each sent when the one before is answered.

    `prompt` (text or token ids) asks for a plain completion; otherwise `turns` are user messages of one conversation.
    """

    turns: tuple[str, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    system: str | None = None
    tools: tuple[dict, ...] = field(default=(), repr=False)
    temperature: float = 0.0
    # A fixed number of tokens compares engines; a tool call has to end by itself to be parsed.
    ignore_eos: bool = True

    @property
    def requests(self) -> int:
        return 1 if self.prompt is not None else len(self.turns)


@dataclass(frozen=True)
class Sizes:
    long_characters: int = 8000  # of the long-context prompt; about four to a token
    random_characters: int = 240
    agent_turns: int = 4


@dataclass(frozen=True)
class Workload:
    name: str
    about: str
    build: Callable[[random.Random, int, Sizes], Session]


@cache
def _held_out() -> list[dict]:
    """Code the nano model was not trained on, as `file` and `text`."""
    entries = json.loads(HELDOUT_PROMPTS.read_text())
    return entries if isinstance(entries, list) else entries["prompts"]


def _code(chance: random.Random, index: int, sizes: Sizes) -> Session:
    entry = _held_out()[index % len(_held_out())]
    return Session(prompt=f"# {entry['file']}, part {index}\n{entry['text']}")


def _chat(chance: random.Random, index: int, sizes: Sizes) -> Session:
    form, subject = chance.choice(FORMS), chance.choice(SUBJECTS)
    return Session(turns=(f"Question {index}: {form.format(subject)}",))


def _long(chance: random.Random, index: int, sizes: Sizes) -> Session:
    """One question behind a long file; the files differ from their first line on."""
    parts, size = [f"# request {index}, {chance.getrandbits(32):08x}\n"], 0
    while size < sizes.long_characters:
        parts.append(chance.choice(_held_out())["text"] + "\n")
        size += len(parts[-1])
    text = "".join(parts)[: sizes.long_characters]
    return Session(turns=(f"{text}\n\nSummarize what this file does.",))


def _agent(chance: random.Random, index: int, sizes: Sizes) -> Session:
    """One task in several turns behind rules and tools that all sessions share."""
    name = f"module_{chance.randrange(10000)}"
    steps = [AGENT_STEPS[i % len(AGENT_STEPS)].format(name) for i in range(sizes.agent_turns - 1)]
    return Session(system=AGENT_RULES, tools=TOOLS, turns=(f"Fix the failing test of {name}.py.", *steps))


def _tools(chance: random.Random, index: int, sizes: Sizes) -> Session:
    task = chance.choice(TASKS).format(chance.choice(SUBJECTS))
    return Session(tools=TOOLS, turns=(f"Request {index}: {task}",), ignore_eos=False)


def _random(chance: random.Random, index: int, sizes: Sizes) -> Session:
    """Uniformly random characters, sampled on: nothing to predict for a draft, nothing to reuse for a cache."""
    letters = string.ascii_letters + string.digits + string.punctuation + " "
    return Session(prompt="".join(chance.choices(letters, k=sizes.random_characters)), temperature=1.0)


WORKLOADS = {
    w.name: w
    for w in (
        Workload("code", "completion of held-out code", _code),
        Workload("chat", "one short question", _chat),
        Workload("long", "a question about a long file", _long),
        Workload("agent", "several turns behind a shared prefix", _agent),
        Workload("tools", "a request that needs a tool call, ends by itself", _tools),
        Workload("random", "uniformly random characters, temperature 1: the bad case", _random),
    )
}


def parse_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown or not names:
        raise ValueError(f"unknown workload {', '.join(unknown) or repr(text)}; known: {', '.join(WORKLOADS)}")
    return names


def sessions(
    name: str, requests: int, seed: int, level: int, sizes: Sizes = Sizes(), clients: int = 1
) -> list[Session]:
    """At least `requests` requests in whole sessions, and one session for every client.

    `level` is the place in the concurrency sweep; its prompts carry numbers no other level uses.
    """
    chance = random.Random(f"{seed} {name} {level}")
    found: list[Session] = []
    while len(found) < clients or sum(s.requests for s in found) < requests:
        index = (seed * LEVELS + level) * LEVEL_STRIDE + len(found)
        found.append(WORKLOADS[name].build(chance, index, sizes))
    return found
