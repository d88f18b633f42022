"""SGLang's profiler endpoints on a server: it lives on, and the trace names the parts of a round."""

import pytest

from scripts.gpu_check.trace import breakdown, read
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS
from tests.support.nano_model import generate, random_ids

pytestmark = pytest.mark.server


def test_a_trace_of_rounds(serve, tmp_path):
    server = serve(*NANO_ARGS, *MTP_ARGS)
    (ids,) = random_ids(1, 40)
    server.post("/start_profile", {"output_dir": str(tmp_path), "with_stack": False}).raise_for_status()
    generate(server, ids, 24)
    server.post("/stop_profile", {}).raise_for_status()
    (file,) = tmp_path.glob("*.trace.json.gz")
    found = breakdown(read(file))
    assert (found.source, found.rounds > 3) == ("cpu", True)
    assert min(found.verify, found.mtp) > 0 and found.verify + found.mtp < found.host < found.round
    assert len(generate(server, ids, 4)["output_ids"]) == 4
