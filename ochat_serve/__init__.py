"""An OpenAI-compatible inference server for OpenChat and other chat models, on vLLM."""

__version__ = "0.1.0"
