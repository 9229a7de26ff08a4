"""vLLM behind ``generation.Engine``: the only importer of vllm."""

from ochat_serve.engine.flags import engine_parser, parse_engine_flags
from ochat_serve.engine.vllm_engine import VllmEngine

__all__ = ["VllmEngine", "engine_parser", "parse_engine_flags"]
