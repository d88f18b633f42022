"""Guards: rules a request may ask for against what the model does wrong; docs/guards.md.

They act as SGLang's grammars do (`grammar.py`): prefills, plain decode steps and verify windows apply them alike.
"""
