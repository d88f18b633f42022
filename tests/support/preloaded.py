"""What the fork server of warm.py does before any test: import SGLang in the order of `sglang serve`.

Plug-ins come before the HTTP server, whose routes are bound to the request classes they find.
"""

import gc

from sglang.srt.plugins import load_plugins

load_plugins()

import sglang.cli.serve  # noqa: E402
import sglang.launch_server  # noqa: E402
import sglang.srt.entrypoints.http_server  # noqa: E402
import sglang.srt.managers.detokenizer_manager  # noqa: E402
import sglang.srt.managers.scheduler  # noqa: E402, F401

gc.freeze()  # what was imported stays: children need not look at it, nor copy it
