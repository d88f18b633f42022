"""The benchmark at real widths: its checkpoint at small ones, its arithmetic, and its clients against fake servers."""

import json
import random
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest
import requests
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file

from scripts.benchmarks.real_width import checkpoint, clients, drafted, report, traffic
from scripts.benchmarks.real_width.__main__ import megabytes, prompts
from scripts.benchmarks.real_width.cells import FORMATS, MODES, Cell, Results, cells, chosen, extras, in_turns
from scripts.benchmarks.real_width.files import written
from sglang_step35.bench.servers import Server
from tests.support import model_host
from tests.support.reference import load_reference

HEADS = {"num_attention_groups": 1, "head_dim": 64}
FIELDS = drafted.fields(
    hidden_size=256, intermediate_size=256, vocab_size=1024, moe_num_experts=8, moe_top_k=2, moe_intermediate_size=64,
    share_expert_dim=64, sliding_window=32, num_attention_heads=2, **HEADS,
    attention_other_setting={"attention_type": "sliding_attention", "num_attention_heads": 3, **HEADS},
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("drafted")
    checkpoint.write_bf16(found, FIELDS, list(drafted.entries(FIELDS)))
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    found = tmp_path_factory.mktemp("drafted-gguf") / "model.gguf"
    checkpoint.write_gguf(found, FIELDS, GGMLQuantizationType.Q4_0, list(drafted.entries(FIELDS)))
    return found


# The checkpoint.


def test_the_text_is_one_cycle():
    whole = drafted.text(1024, 5, 1024 - drafted.RESERVED)
    assert sorted(whole) == list(range(drafted.RESERVED, 1024))
    assert drafted.text(1024, 5, 2000)[1024 - drafted.RESERVED :][:9] == whole[:9]


def test_drafts_come_true_as_often_as_nanos(folder):
    """By transformers' backbone and the plain MTP layers, every row of the cycle once."""
    reference, ids = load_reference(folder), drafted.text(1024, 0, 1019)
    assert reference.logits(ids).argmax(-1).tolist() == drafted.text(1024, 1, 1019)
    right = torch.ones(1015, dtype=torch.bool)
    for layer, (logits, wanted) in enumerate(zip(reference.mtp_logits(ids), drafted.NANO, strict=True)):
        right &= logits[:1015].argmax(-1) == torch.tensor(ids[2 + layer : 1017 + layer])
        assert right.float().mean() == pytest.approx(wanted, abs=0.07)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_the_package_opens_it(form, request):
    path = request.getfixturevalue(form)
    load, ids = (model_host.load_gguf if path.is_file() else model_host.load), drafted.text(1024, 0, 300)
    backbone, mtp = load(path), load(path, draft=True)
    assert set(mtp.share_with(backbone).values()) == {"backbone"}
    assert model_host.all_logits(backbone, ids).argmax(-1).tolist() == drafted.text(1024, 1, 300)
    logits = model_host.mtp_logits(mtp, model_host.run(backbone, ids).hidden_states, ids)
    right = (logits[0][:-1].argmax(-1) == torch.tensor(ids[2:])).float().mean()
    assert right == pytest.approx(drafted.NANO[0], abs=0.12)


def test_nine_hundred_million_weights():
    assert sum(torch.Size(m.shape).numel() for m in checkpoint.matrices(drafted.fields())) == pytest.approx(
        0.9e9, rel=0.02
    )


def test_an_interrupted_write_leaves_no_file(tmp_path):
    def fail(target):
        (target / "part").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "new", fail)
    assert not (tmp_path / "new").exists()
    written(tmp_path / "new", lambda target: (target / "whole").write_text("x"))
    assert [found.name for found in (tmp_path / "new").iterdir()] == ["whole"]


# Bytes.


def test_bytes_of_a_step(folder):
    found = traffic.read(folder, FIELDS)
    weights = {name: tensor.nbytes for part in folder.glob("*.safetensors") for name, tensor in load_file(part).items()}
    assert sum(traffic.sizes(folder).values()) == sum(weights.values())
    outside = sum(size for name, size in weights.items() if name.startswith(("model.embed_tokens", "model.norm")))
    assert sum(found.dense.values()) + sum(found.routed.values()) + found.head + outside == sum(weights.values())
    assert found.routed[1] == 3 * 8 * 64 * 256 * 2 and set(found.routed) == set(range(1, 12))
    assert found.step(1) == found.head + sum(found.dense[i] + found.routed.get(i, 0) * 2 / 8 for i in range(12))
    assert found.drafts() == sum(found.dense[i] for i in (12, 13, 14)) + 3 * found.head


def test_bytes_of_a_packed_file(file):
    found = traffic.read(file, FIELDS)
    assert found.head == 1024 * 256 * 18 // 32 and found.routed[5] == 3 * 8 * 64 * 256 * 18 // 32
    assert set(found.dense) == set(range(15))


def test_experts_that_rows_touch():
    made = traffic.Traffic(layers=1, experts=64, chosen=8, head=0, dense={0: 0}, routed={0: 64})
    chance = random.Random(0)
    seen = [len({e for _ in range(4) for e in chance.sample(range(64), 8)}) for _ in range(2000)]
    assert made.layer(0, 4) == pytest.approx(sum(seen) / len(seen), rel=0.01)


def test_bytes_of_a_token():
    made = traffic.Traffic(layers=1, experts=4, chosen=4, head=10**6, dense={0: 10**6, 1: 10**6}, routed={0: 10**6})
    assert megabytes(Cell("ours", "bf16", "off", 4, 512), made, None) == 0.8
    assert megabytes(Cell("ours", "bf16", "mtp", 1, 512), made, 2.5) == 2.0
    assert megabytes(Cell("ours", "bf16", "adaptive", 1, 512), made, 2.5) is None


# Pieces and results.


def test_pieces_can_be_run_one_by_one():
    names = [cell.name for cell in cells(llama=True)] + extras()
    assert len(set(names)) == len(names)
    for form in FORMATS:
        for mode in MODES:
            assert sum(chosen(name, [f"ours/{form}/{mode}"]) for name in names) == 6
    assert [name for name in names if chosen(name, ["ours/*/off/c1/p512"])] == [
        f"ours/{form}/off/c1/p512" for form in FORMATS
    ]
    assert not [name for name in names if chosen(name, ["ours/bf16/of"])]
    assert all(chosen(name, None) for name in names)
    assert not any(cell.engine == "llama.cpp" for cell in cells(llama=False))


def test_results_gather_in_one_file(tmp_path):
    path = tmp_path / "found.json"
    Results(path).add("a", 1)
    Results(path).add("b", {"decode": 2.0})
    Results(path).add("a", 3)
    assert json.loads(path.read_text()) == {"a": 3, "b": {"decode": 2.0}}


def test_clients_share_long_prompts_but_for_their_end():
    texts = prompts(Cell("ours", "bf16", "off", 16, 4096), 0, 32_768)
    assert len({tuple(text[:4032]) for text in texts}) == 1 and len({tuple(text[4032:]) for text in texts}) == 16
    short = prompts(Cell("ours", "bf16", "off", 16, 512), 0, 32_768)
    assert all(len(text) == 512 for text in short) and len({text[0] for text in short}) == 16
    assert prompts(Cell("ours", "bf16", "mtp", 16, 512), 0, 32_768) == short
    later = prompts(Cell("ours", "bf16", "off", 16, 512), 1, 32_768)
    assert not {text[0] for text in short} & {text[0] for text in later}


def test_modes_take_turns():
    """Each goes first once, and no other cell between them."""
    plan = [cell for cell in cells(llama=True) if cell.prompt == 512 and cell.form in ("bf16", "fp8")]
    groups = list(in_turns(plan, 3))
    assert [len(group) for group in groups] == [12] * 3 + [9] * 3 + [3]  # llama.cpp beside bf16; transformers
    for group in groups:
        assert len({(cell.form, cell.clients) for _, cell in group}) == 1
        assert len(set(group)) == len(group)
        firsts = [next(cell for turn, cell in group if turn == number) for number in range(3)]
        assert len(set(firsts)) == min(3, len({cell for _, cell in group}))


def test_ratios_are_of_one_turn():
    """The machine halves its pace after the first turn; MTP is better in median."""
    rates = {"off": [10.0, 5.0, 5.0], "mtp": [11.0, 6.0, 6.0], "adaptive": [12.1, 6.6, 6.0]}
    found = {f"ours/bf16/{mode}/c1/p512": {"turns": {"prefill": [2.0], "decode": v}} for mode, v in rates.items()}
    found["ours/bf16/off/c4/p512"] = {"turns": {"prefill": [], "decode": [1.0]}}
    found["transformers/bf16/off/c1/p512"] = {"decode": 1.0}
    assert report.ratios(found) == {
        "ours/bf16/c1/p512": {
            "MTP over off": 1.2,
            "adaptive over the better": 1.1,
            "prefill, MTP over off": 1.0,
        }
    }
    for mode in ("mtp", "adaptive"):
        found[f"ours/bf16/{mode}/c4/p512"] = {"turns": {"prefill": [], "decode": [0.5]}}
    assert report.ratios(found)["ours/bf16/c4/p512"] == {"MTP over off": 0.5, "adaptive over the better": 0.5}
    wholes = {"off": [4.0, 2.0], "mtp": [3.0, 2.0], "adaptive": [4.4, 2.2]}
    for mode, whole in wholes.items():
        found[f"ours/bf16/{mode}/c1/p512"]["turns"]["whole"] = whole
    compared = report.ratios(found)["ours/bf16/c1/p512"]
    assert compared["whole answers: MTP over off"] == 0.875
    assert compared["whole answers: adaptive over the better"] == 1.1
    found["llama.cpp/bf16/off/c1/p512"] = {"turns": {"prefill": [1.0], "decode": [10.0, 4.0, 5.0]}}
    assert report.ratios(found)["ours/bf16/c1/p512"]["over llama.cpp"] == 1.2
    assert report.ratios(found)["ours/bf16/c1/p512"]["prefill over llama.cpp"] == 2.0


def test_table_and_projection():
    cell = {"prefill": 51.2, "decode": 15.2, "whole": 8.1, "accept": None, "mb_per_token": 500.0}
    step = {"ms": [10.0, 20.0, 30.0], "mb": [100.0, 200.0, 300.0], "bandwidth": 25.0}
    lines = list(report.table({"bandwidth": 20.0, "ours/bf16/off/c1/p512": cell, "layers/Q4_K": {"1": step}}))
    assert lines[2].split() == ["ours/bf16/off/c1/p512", "51.2", "15.2", "8.1", "-", "500", "0.38"]
    assert "Q4_K expert layer, 1 rows: 20.00 ms, 200.0 MB, 0.40 of the bandwidth" in lines
    ms, rate = report.project(step, 20.0, 120.0)
    assert ms == pytest.approx((3 * 10 + 42 * 20 + 30) / 6) and rate == pytest.approx(1000 / ms)
    assert sum("PROJECTED, not measured" in line for line in lines) == 2


# Clients.


def test_rate_of_whole_answers():
    """512 tokens at 256 a second, then 160 at 80."""
    assert clients.answer_rate(512, 160, 256.0, 80.0) == 40.0


def test_rate_while_all_decode():
    """Second 2 to 4: one token a second, and two."""
    slow = clients.Stream([(1.0, 1), (5.0, 5)], {})
    fast = clients.Stream([(2.0, 1), (3.0, 3), (4.0, 5)], {})
    assert clients.together([slow, fast]) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="more tokens"):
        clients.together([clients.Stream([(1.0, 1), (2.0, 2)], {}), clients.Stream([(3.0, 1), (4.0, 2)], {})])


@pytest.fixture
def fake():
    """A server that streams the given events and records what it was asked."""
    made = SimpleNamespace(asked=[], events=[])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            made.asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(200)
            self.end_headers()
            for event in made.events:
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    made.url = url
    made.post = lambda path, body, **options: requests.post(url + path, json=body, **options)
    made.stream = partial(Server.stream, made)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_sglang_streams(fake):
    fake.events = [{"meta_info": {"completion_tokens": n, "spec_verify_ct": r}} for n, r in [(1, 0), (4, 1), (6, 2)]]
    found = clients.ask_sglang(fake, [3, 4], 6, 0)
    assert [count for _, count in found.arrivals] == [1, 4, 6] and clients.accept_length([found]) == 2.5
    [(path, body)] = fake.asked
    assert path == "/generate" and body["input_ids"] == [3, 4] and body["sampling_params"]["max_new_tokens"] == 6


def test_what_llama_streams(fake):
    fake.events = [{"tokens": [5]}, {"tokens": [6, 7]}, {"tokens": [], "stop": True}]
    found = clients.ask_llama(fake, [3, 4], 3, 9)
    assert [count for _, count in found.arrivals] == [1, 3] and clients.accept_length([found]) is None
    [(path, body)] = fake.asked
    assert path == "/completion" and body["prompt"] == [3, 4] and body["id_slot"] == 9 and body["cache_prompt"]


def test_an_error_in_a_stream(fake):
    fake.events = [{"error": {"message": "too long"}}]
    with pytest.raises(RuntimeError, match="too long"):
        clients.ask_sglang(fake, [3], 1, 0)
