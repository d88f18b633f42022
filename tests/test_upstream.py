"""The table of SGLang names: complete, without dead rows, and true of the installed version."""

import inspect
import pkgutil
from collections import Counter
from functools import cache

import pytest

from sglang_step35 import hooks, upstream
from sglang_step35.upstream import __main__ as command
from sglang_step35.upstream.check import declares
from tests.support.sglang_uses import is_sglang, package_uses, reads_of_variables, subclasses

# Objects that SGLang hands to us, by the names that variables and attributes have throughout the package.
OBJECTS = {
    "batch": "sglang.srt.managers.schedule_batch.ScheduleBatch",
    "info": "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo",
    "kv": "sglang.srt.managers.schedule_batch.ReqKvInfo",
    "logits_output": "sglang.srt.layers.logits_processor.LogitsProcessorOutput",
    "manager": "sglang.srt.managers.tokenizer_manager.TokenizerManager",
    "model_config": "sglang.srt.configs.model_config.ModelConfig",
    "model_runner": "sglang.srt.model_executor.model_runner.ModelRunner",
    "obj": "sglang.srt.managers.io_struct.GenerateReqInput",
    "req": "sglang.srt.managers.schedule_batch.Req",
    "runner": "sglang.srt.model_executor.model_runner.ModelRunner",
    "sampling_info": "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo",
    "server_args": "sglang.srt.server_args.ServerArgs",
    "target_worker": "sglang.srt.managers.tp_worker.TpModelWorker",
    "tokenizer_manager": "sglang.srt.managers.tokenizer_manager.TokenizerManager",
}


@pytest.fixture(scope="module")
def uses():
    return package_uses()


@cache
def rows(table: tuple[upstream.Upstream, ...]) -> frozenset[str]:
    """Every path of the table and of its members."""
    found = set()
    for row in table:
        found |= {row.path, *(f"{row.path}.{name}" for name in (*row.members, *row.mentions))}
    return frozenset(found | {canonical(path) for path in found})


@cache
def canonical(path: str) -> str:
    """The path of a class member by the SGLang class that defines it; any other path unchanged."""
    owner, _, name = path.rpartition(".")
    try:
        cls = pkgutil.resolve_name(owner)
    except (ImportError, AttributeError):
        return path
    return defining_path(cls, name) or path if isinstance(cls, type) else path


def defining_path(cls: type, name: str) -> str | None:
    for base in cls.__mro__:
        if is_sglang(base) and declares(base, name):
            return f"{base.__module__}.{base.__qualname__}.{name}"
    return None


def unlisted(found, table=upstream.TABLE) -> list[str]:
    """Those without a row; a class is listed by its members' rows too."""
    listed = rows(table)
    owners = {row.path.rpartition(".")[0] for row in table}
    return sorted(path for path in found if canonical(path) not in listed and path not in listed | owners)


def overridden() -> set[str]:
    """What classes of ours define, assign or read of SGLang's classes that they extend."""
    subs = subclasses()
    paths = {defining_path(sub.cls, name) for sub in subs for name in sub.body | sub.read | sub.stored}
    return paths - {None}


def all_hooks() -> list[hooks.Hook]:
    """The hooks of every platform."""
    return [*hooks.all_hooks(), *hooks.portable_hooks(), *hooks.model.cuda_hooks()]


def test_every_imported_name_has_a_row(uses):
    assert len(uses.names) > 100
    assert unlisted(uses.names) == []


def test_every_member_of_an_imported_name_has_a_row(uses):
    assert unlisted(uses.members) == []


def test_every_member_we_override_or_inherit_has_a_row():
    assert unlisted(overridden()) == []


def test_every_attribute_of_an_object_handed_to_us_has_a_row():
    assert unlisted(reads_of_variables(OBJECTS)) == []


def test_a_missing_row_is_noticed(uses):
    gone = {"sglang.srt.utils.make_pp_layers", "sglang.srt.mem_cache.radix_cache.RadixKey.match_at"}
    table = tuple(row for row in upstream.TABLE if row.path not in gone)
    assert unlisted([*uses.names, *overridden()], table) == sorted(gone)
    batch = next(row for row in upstream.TABLE if row.path == OBJECTS["batch"])
    table = tuple(row for row in upstream.TABLE if row is not batch)
    assert f"{OBJECTS['batch']}.reqs" in unlisted(reads_of_variables(OBJECTS), table)


def test_every_path_in_a_string_leads_to_a_row(uses):
    paths = [row.path for row in upstream.TABLE]
    lost = [text for text in uses.strings if not any(f"{path}.".startswith(f"{text}.") for path in paths)]
    assert lost == []


def test_every_call_binds(uses):
    """The signature of the installed SGLang takes the arguments that the package passes."""
    mentioned = {f"{row.path}.{name}" for row in upstream.TABLE for name in row.mentions}
    for call in uses.calls:
        if None not in call.keywords and call.path not in mentioned:
            signature = inspect.signature(pkgutil.resolve_name(call.path))
            try:
                signature.bind(*[None] * call.size, **dict.fromkeys(call.keywords))
            except TypeError as error:
                pytest.fail(f"{call.file} calls {call.path}: {error}")


def test_no_row_is_dead(uses):
    used = {*uses.names, *uses.members, *overridden(), *(hook.target for hook in all_hooks())}
    used |= {canonical(path) for path in used} | {path.rpartition(".")[0] for path in used}
    dead = []
    for row in upstream.TABLE:
        known = row.path in used or canonical(row.path) in used
        names = row.members or row.mentions or (() if known else (row.path.rpartition(".")[2],))
        dead += [f"{row.path} {name}" for name in names if name not in uses.attributes]
    assert dead == []


def test_no_row_stands_twice():
    members = Counter(f"{row.path}.{name}" for row in upstream.TABLE for name in row.members)
    signatures = Counter(row.path for row in upstream.TABLE if not row.members)
    assert [path for path, count in (members + signatures).items() if count > 1] == []


@pytest.mark.parametrize("row", upstream.TABLE, ids=lambda row: row.path)
def test_row_is_true_of_the_installed_version(row):
    assert row.parameters is not None or row.members or row.mentions or row.reason
    upstream.check(row)


def test_every_hook_says_why_and_until_and_has_a_hooked_row():
    hooked = {row.path for row in upstream.TABLE if row.hooked}
    for hook in all_hooks():
        assert hook.why.strip() and hook.until.strip(), hook.target
        assert hook.target in hooked or f"{hook.target}.__init__" in hooked, hook.target


def test_the_command_prints_every_difference(monkeypatch, capsys):
    taken = upstream.Upstream("sglang.srt.model_loader.utils.get_model_architecture", ("model_config", "more"))
    gone = upstream.Upstream("sglang.srt.model_loader.utils.no_such_function", ())
    silent = upstream.Upstream("sglang.srt.models.registry", mentions=("NoSuchClass",))
    monkeypatch.setattr(command, "TABLE", (taken, gone, silent, upstream.TABLE[0]))
    assert command.main() == 1
    out = capsys.readouterr().out
    assert "no_such_function" in out and "no longer reads NoSuchClass" in out and "3 of 4 rows differ" in out
    assert "gone: more" in out
