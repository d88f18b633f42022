"""The words workloads are made of."""

SUBJECTS = (
    "a hash table", "binary search", "a least-recently-used cache", "garbage collection", "the TCP handshake",
    "a bloom filter", "merge sort", "a priority queue", "database indexes", "regular expressions", "a mutex",
    "floating-point rounding", "an event loop", "virtual memory", "a trie", "consistent hashing",
    "dependency injection", "a B-tree", "Unicode normalization", "a ring buffer",
)  # fmt: skip
FORMS = (
    "Explain {} to a new colleague.",
    "Write a Python class for {}.",
    "What goes wrong most often with {}?",
    "Compare two ways to implement {}.",
    "Write a unit test about {}.",
    "When should I avoid {}?",
)
TASKS = (
    "search the repository for {} and show me the first match.",
    "write a file notes.md with one paragraph about {}.",
    "run the tests that cover {}.",
    "find every file that mentions {} and read the longest one.",
)
AGENT_STEPS = (
    "Output of `pytest {0}.py`:\nE   AssertionError: assert 3 == 4\n{0}.py:17: AssertionError\nWhat next?",
    "Output of `cat {0}.py`:\ndef count(items):\n    return len(items) - 1\nWhat next?",
    "The edit was applied to {0}.py. Run the tests again.",
    "Output of `pytest {0}.py`:\n1 passed in 0.02s\nSummarize what you changed.",
)
AGENT_RULES = """You are a careful software engineer who works in a repository through tools.
Read a file before you change it. Make the smallest change that fixes the cause, not the symptom.
Run the tests after every change and read what they print before you go on.
Never delete a test to make a run pass, never commit generated files, never touch files outside the repository.
Keep the style of the file you edit: its quotes, its indentation, its names, the length of its lines.
When a command fails, say what you expected, what happened instead, and what you will try next.
When the task is unclear, state the reading you chose in one sentence and carry on.
When you are done, summarize the change in at most three sentences and name the files you changed.
"""


def _tool(name: str, about: str, **parameters: str) -> dict:
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": schema}}


TOOLS = (
    _tool("read_file", "Read a text file of the repository.", path="path from the repository's root"),
    _tool("write_file", "Replace a text file of the repository.", path="path to write", content="the whole text"),
    _tool("search", "Search all files for a regular expression.", pattern="the expression", glob="files to search"),
    _tool("run", "Run a shell command in the repository.", command="the command line"),
)
