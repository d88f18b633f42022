"""Synthetic chats, rendered with the chat template, so that the model closes </think> and ends its turns."""

from __future__ import annotations

import ast
import random

from transformers import PreTrainedTokenizerFast

MAX_SOURCE = 900  # characters


def tool(name: str, description: str, *keys: str) -> dict:
    properties = {key: {"type": "string"} for key in keys}
    schema = {"type": "object", "properties": properties, "required": list(keys)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    tool("read_file", "Read the start of a file.", "path"),
    tool("search", "Search the code for a word.", "query", "path"),
]


def functions(texts: dict[str, str]) -> list[tuple[str, ast.FunctionDef, str]]:
    """(path, node, source) of every documented top-level function of moderate length."""
    found = []
    for path, text in sorted(texts.items()):
        try:
            nodes = ast.parse(text).body
        except SyntaxError:
            continue
        for node in nodes:
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                source = ast.get_source_segment(text, node)
                if len(source) <= MAX_SOURCE:
                    found.append((path, node, source))
    return found


def thought(node: ast.FunctionDef) -> str:
    names = ", ".join(a.arg for a in node.args.args) or "no arguments"
    first = ast.get_docstring(node).splitlines()[0]
    return f"The function {node.name} takes {names}. {first} I write it in Python."


def completion_chat(node: ast.FunctionDef, source: str) -> list[dict]:
    head = source.splitlines()[0]
    doc = ast.get_docstring(node).splitlines()[0]
    return [
        {"role": "user", "content": f"Complete this function:\n{head}\n    # {doc}"},
        {"role": "assistant", "reasoning_content": thought(node), "content": f"```python\n{source}\n```"},
    ]


def call(name: str, **arguments: str) -> list[dict]:
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


def tool_chat(path: str, node: ast.FunctionDef, source: str, rng: random.Random) -> list[dict]:
    """A call, its result, and an answer; two kinds of call."""
    if rng.random() < 0.5:
        ask, calls = f"Show me the file {path}.", call("read_file", path=path)
        plan = f"I read the file {path} first."
    else:
        ask, calls = f"Find {node.name} in {path}.", call("search", query=node.name, path=path)
        plan = f"I search for {node.name} in {path}."
    first = source.splitlines()[0]
    return [
        {"role": "user", "content": ask},
        {"role": "assistant", "reasoning_content": plan, "content": "", "tool_calls": calls},
        {"role": "tool", "content": source[:300]},
        {"role": "assistant", "reasoning_content": f"The result has {node.name}.", "content": f"It holds `{first}`."},
    ]


def build(texts: dict[str, str], tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> list[str]:
    """`count` rendered chats, one in four with tools."""
    rng, sources, chats = random.Random(seed), functions(texts), []
    for _ in range(count):
        path, node, source = rng.choice(sources)
        with_tools = rng.random() < 0.25
        messages = tool_chat(path, node, source, rng) if with_tools else completion_chat(node, source)
        tools = TOOLS if with_tools else None
        chats.append(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
    return chats
