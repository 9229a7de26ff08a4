"""Grammars, tried out by xgrammar in a process of their own before the engine sees them."""

from ochat_serve.grammar.checker import TriedGrammars
from ochat_serve.grammar.trial import Trial

__all__ = ["Trial", "TriedGrammars"]
