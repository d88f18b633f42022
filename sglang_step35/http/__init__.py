"""The HTTP side: what a request may ask, errors in each API's own format, the Ollama API.

`admission` guards the one door to the scheduler, `errors` and `middleware` shape what goes
wrong, `ollama` and `ollama_protocol` serve Ollama's clients through the chat endpoint.
"""
