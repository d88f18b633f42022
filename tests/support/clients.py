"""What the client tests share: the one server they all talk to, prompts and tools."""

from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS

# float32: greedy output must not depend on what the prefix cache holds.
CLIENT_ARGS = (*NANO_ARGS, *MTP_ARGS, "--dtype", "float32")
MODEL = "step3p5-nano"
QUESTION = "Complete this function:\ndef add(a, b):\n    # Add two numbers."
# Of the kinds nano was trained to answer with a call.
FILE_QUESTION = "Show me the file tests/servers.py."
SEARCH_QUESTION = "Find serve in tests/servers.py."

# The tools of nano's training chats.
SCHEMAS = {
    "read_file": ("Read the start of a file.", ("path",)),
    "search": ("Search the code for a word.", ("query", "path")),
}


def schema(keys: tuple[str, ...]) -> dict:
    return {"type": "object", "properties": {key: {"type": "string"} for key in keys}, "required": list(keys)}


OPENAI_TOOLS = [
    {"type": "function", "function": {"name": name, "description": text, "parameters": schema(keys)}}
    for name, (text, keys) in SCHEMAS.items()
]
ANTHROPIC_TOOLS = [
    {"name": name, "description": text, "input_schema": schema(keys)} for name, (text, keys) in SCHEMAS.items()
]
# Short and closed, so that constrained decoding ends soon.
ANSWER_SCHEMA = {
    "type": "object",
    "properties": {"kind": {"type": "string", "enum": ["yes", "no"]}, "count": {"type": "integer", "maximum": 99}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
