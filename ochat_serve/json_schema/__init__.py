"""Whether a JSON Schema is one that a grammar can keep every promise of.

The compiler of grammars (xgrammar) passes over what it does not know: a keyword that it ignores
would be a promise that the answer may break.  What ``keywords`` lists was tried on it, and what it
does not list is refused by name.  Strictly narrower is fine (a pattern matches the whole string,
properties come in the schema's order): such an answer still fits the schema.
"""

from ochat_serve.json_schema.check import Checked, checked
from ochat_serve.json_schema.keywords import SchemaError

__all__ = ["Checked", "SchemaError", "checked"]
