"""An MCP server on standard input and output with one tool, `press`, for the Claude Code tests."""

import json
import sys

TOOL = {
    "name": "press",
    "description": "Press the switch.",
    "inputSchema": {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    },
}


def answer(method: str, params: dict) -> dict:
    if method == "initialize":
        info = {"name": "switch", "version": "1"}
        return {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}}, "serverInfo": info}
    if method == "tools/list":
        return {"tools": [TOOL]}
    if method == "tools/call":
        return {"content": [{"type": "text", "text": f"switch pressed: {params['arguments']['on']}"}]}
    return {}


if __name__ == "__main__":
    for line in sys.stdin:
        message = json.loads(line)
        if "id" in message:  # the others are notifications
            result = answer(message["method"], message.get("params", {}))
            print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
