"""From a model to its tokenizer and its prompts."""

from typing import Any

from ochat_serve.templates.hf import HfTemplate
from ochat_serve.templates.registry import TEMPLATES
from ochat_serve.templates.renderer import TemplateRenderer
from ochat_serve.tokenizer import Tokenizer


def open_prompts(path: str, model_type: str, **options: Any) -> tuple[Tokenizer, TemplateRenderer]:
    """``path`` is where the tokenizer is, ``model_type`` a row of the registry or ``hf``;
    ``options`` are ``Tokenizer.load``'s.  Blocks; raises ``StartupError``."""
    tokenizer = Tokenizer.load(path, **options)
    template = TEMPLATES.get(model_type) or HfTemplate(
        tokenizer.chat_template(), tokenizer.control_tokens
    )
    return tokenizer, TemplateRenderer(template, tokenizer)
