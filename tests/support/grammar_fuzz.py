"""What a server makes of the cases of `grammar_cases`, and whether that is right and the same without speculation."""

import contextlib
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import requests

from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS
from tests.support.grammar_cases import Case, Stretch, shown

# Blanks without end between tokens of JSON would be right, too.
OFF_ARGS = (
    *NANO_ARGS, "--dtype", "float32", "--chunked-prefill-size", "64", "--max-running-requests", "16",
    "--constrained-json-disable-any-whitespace", "--grammar-backend",
)  # fmt: skip
PATIENCE = 300.0  # seconds
# SGLang's own faults (0.5.23), there without speculation, too: kinds of cases that are not asked with this backend.
KNOWN_FAULTS = {
    ("llguidance", "starved"): "a grammar in error is asked for one more mask, which ends the server",
    ("llguidance", "named"): "the schema of a named call's array does not say that its items are objects",
}


@dataclass(frozen=True)
class Outcome:
    """status: finished, thinking (the model ended its turn there, perhaps by a call, where SGLang's grammars do
    not hold it), length, stopped (by a stop string), refused (4xx), failed (5xx), aborted or dead."""

    status: str
    answer: dict = field(default_factory=dict)
    text: str = ""

    @property
    def said(self) -> object:
        """What must not depend on speculation: token ids, of a chat the message and how many tokens it took."""
        if "output_ids" in self.answer:
            return self.status, self.answer["output_ids"], self.answer["text"]
        if not self.answer:
            return self.status
        message = dict(self.answer["choices"][0]["message"])
        calls = [call["function"] for call in message.pop("tool_calls", None) or ()]
        return self.status, message, calls, self.answer["usage"]["completion_tokens"]


@dataclass
class Report:
    """Totals of a server over cases; `problems` describes what is wrong."""

    cases: int = 0
    statuses: Counter = field(default_factory=Counter)
    invalid: int = 0
    differing: int = 0
    dead_servers: int = 0
    tokens: int = 0  # of greedy native answers under grammars, and the rounds they took
    rounds: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, case: Case, found: Outcome, off: Outcome | None) -> None:
        self.cases += 1
        self.statuses[found.status] += 1
        self.dead_servers += found.status == "dead"
        if not is_right(case, found):
            self.invalid += 1
            self.problems.append(f"invalid: {shown(case)}\n  {found}")
        if off is not None and differs(case, found, off):
            self.differing += 1
            self.problems.append(f"differing: {shown(case)}\n  off {off.said}\n  on  {found.said}")
        meta = found.answer.get("meta_info", {})
        if case.greedy and case.kind != "free" and "spec_verify_ct" in meta:
            self.tokens += meta["completion_tokens"] - 1  # the first is the prefill's
            self.rounds += meta["spec_verify_ct"]


def is_right(case: Case, found: Outcome) -> bool:
    if found.status == "finished":
        return case.kind != "broken" and case.fits(found.answer)
    if found.status in ("length", "stopped"):
        return case.begins(found.answer)
    if found.status == "thinking":
        return True
    expected = {"broken": ("refused",), "starved": ("refused", "failed")}.get(case.kind, ())
    return found.status in expected or (found.status == "aborted" and case.abort_after is not None)


def differs(case: Case, found: Outcome, off: Outcome) -> bool:
    """A starved request is ended by an error, whose time and text are no matter of speculation."""
    if not case.greedy or "aborted" in (found.status, off.status) or case.kind == "starved":
        return False
    return found.said != off.said


def ask(server, case: Case) -> Outcome:
    rid = f"case-{case.number}"
    timer = threading.Timer(case.abort_after or 0, _abort, (server, rid))
    leaves = case.abort_after is not None and case.number % 2 == 1  # every other one closes its connection
    if case.abort_after is not None and not leaves:
        timer.start()
    try:
        response = server.post(case.path, {**case.body, "rid": rid}, timeout=case.abort_after if leaves else PATIENCE)
    except requests.RequestException as error:
        alive = server.process.poll() is None and leaves
        return Outcome("aborted" if alive else "dead", text=str(error))
    finally:
        timer.cancel()
    return _outcome(response, bool(case.body.get("require_reasoning")))


def _abort(server, rid: str) -> None:
    with contextlib.suppress(requests.RequestException):
        server.post("/abort_request", {"rid": rid})


def _outcome(response: requests.Response, thinks: bool) -> Outcome:
    if response.status_code != 200:
        status = "failed" if response.status_code >= 500 else "refused"
        return Outcome("aborted" if "Abort" in response.text else status, text=response.text[:500])
    answer = response.json()
    if "choices" in answer:
        reason, usage = answer["choices"][0]["finish_reason"], answer["usage"]
        if reason in ("stop", "tool_calls") and usage["reasoning_tokens"] >= usage["completion_tokens"]:
            return Outcome("thinking", answer)
        return Outcome({"length": "length", "abort": "aborted"}.get(reason, "finished"), answer)
    reason = answer["meta_info"]["finish_reason"]
    if reason["type"] == "stop":
        if thinks and "</think>" not in answer["text"]:
            return Outcome("thinking", answer)
        return Outcome("stopped" if isinstance(reason["matched"], str) else "finished", answer)
    return Outcome({"length": "length", "abort": "aborted"}[reason["type"]], answer)


def healthy(server) -> bool:
    """Whether the server still answers, and holds no KV of requests that are gone."""
    try:
        return bool(server.post("/flush_cache", {}, timeout=PATIENCE).ok)
    except requests.RequestException:
        return False


def run(
    server, backend: str, parts: list[Stretch], off: dict[int, Outcome] | None = None
) -> tuple[Report, dict[int, Outcome]]:
    """Ask all cases, and the outcomes by their numbers.

    off: those of the server without speculation. That one itself answers only what can be compared.
    """
    report, found = Report(), {}
    for part in parts:
        asked = [case for case in part.cases if (backend, case.kind) not in KNOWN_FAULTS]
        cases = [case for case in asked if off is not None or case.greedy]
        with ThreadPoolExecutor(part.at_once) as pool:
            outcomes = list(pool.map(lambda case: ask(server, case), cases))
        for case, outcome in zip(cases, outcomes, strict=True):
            found[case.number] = outcome
            report.add(case, outcome, off.get(case.number) if off else None)
        if any(outcome.status == "dead" for outcome in outcomes):
            break
    report.dead_servers = int(report.dead_servers > 0 or not healthy(server))
    return report, found


def mtp_args(backend: str, width: int = 4) -> tuple[str, ...]:
    """width: chain tokens, above 4 with look-ups."""
    return (*OFF_ARGS, backend, *MTP_ARGS, "--speculative-num-draft-tokens", str(width))
