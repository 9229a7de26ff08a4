"""The layers of the package, in code form: who may import whom.

``broken_laws`` is a pure function from sources to sentences, so that the rules themselves are
tested too: each on a few lines that break it.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = "ochat_serve"
ROOT = Path(__file__).parents[1]

# A package stands for all of its modules.
LAYERS = (
    ("__init__", "protocol", "generation", "caller", "settings", "setting_values", "errors"),
    (
        "templates",
        "streaming",
        "completion_streaming",
        "admission",
        "limits",
        "key_file",
        "nudge",
        "key_ring",
        "failed_attempts",
        "fair_threads",
        "remembered",
        "shares",
        "detokenizing",
        "token_backend",
        "token_bytes",
        "request_log",
        "tls",
        "ending",
        "usage",
        "json_schema",
    ),
    ("engine", "tokenizer", "demo_model", "model_source", "redis_limits", "grammar"),
    (
        "clock",
        "chat_request",
        "constraint",
        "run",
        "chat",
        "chat_service",
        "token_service",
        "completion_request",
        "completion_service",
        "notes",
        "together",
        "health",
        "serving",
        "self_check",
    ),
    ("app", "routes", "middleware"),
    (
        "openai_api_server",
        "event_loop",
        "keys",
        "server",
        "front_ends",
        "loader",
        "parent",
        "meanwhile",
        "prompts",
        "show_prompt",
        "http_protocol",
        "http_bounds",
        "http_places",
        "http_refusals",
        "http_server",
        "named_keys",
        "usage_db",
        "cli",
    ),
)
LAYER_OF = {unit: level for level, units in enumerate(LAYERS) for unit in units}
L0, L1, L2, L3, L4, L5 = range(6)

# Layers that a module may import from; its own package is always open to it.
OPEN_LAYERS = {
    L0: set(),
    L1: {L0},
    L2: {L0, L1},
    L3: {L0, L1, L3},
    L4: {L0, L1, L3, L4},
    L5: {L0, L1, L2, L3, L4, L5},
}
# Sideways imports that a layer forbids in general.  All of them.
OPEN_PAIRS = {
    ("model_source", "demo_model"),
    ("settings", "setting_values"),
    ("completion_streaming", "streaming"),
}

FOREIGN = {
    L0: {"fastapi", "starlette", "uvicorn", "vllm", "ray", "time", "datetime"},
    L1: {"fastapi", "starlette", "uvicorn", "vllm", "ray", "time", "datetime"},
    L2: {"fastapi", "starlette", "uvicorn", "ray"},
    L3: {"fastapi", "starlette", "uvicorn", "vllm", "ray", "argparse"},
    L4: {"vllm", "ray", "argparse"},
    L5: set(),
}
ONLY_IN = {
    "vllm": {"engine"},
    "xgrammar": {"grammar"},
    "transformers": {"tokenizer", "demo_model", "grammar"},
    "torch": {"demo_model"},
    "redis": {"redis_limits"},
    "argparse": {"cli", "keys", "show_prompt"},
    "psycopg": {"usage"},
    "uvicorn": {"server", "http_protocol", "http_refusals", "http_server", "meanwhile"},
}
MAY_READ_ENVIRONMENT = {L2, L5}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv"}


def sources() -> dict[str, str]:
    """Dotted name -> source, of every module of the package."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        found[name] = path.read_text(encoding="utf-8")
    return found


def unit(module: str) -> str:
    """The name under which the table knows a module of the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(module: str, modules: Mapping[str, str]) -> Iterator[str]:
    """Dotted names that a module imports, in functions and under conditions too."""
    is_package = any(name.startswith(f"{module}.") for name in modules)
    parents = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(modules[module])):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in modules else base


def reads_environment(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            if ENVIRONMENT & {alias.name for alias in node.names}:
                return True
        elif isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT:
            return True
    return False


def broken_laws(modules: Mapping[str, str]) -> list[str]:
    broken = []
    for module, source in modules.items():
        own = unit(module)
        level = LAYER_OF.get(own)
        if level is None:
            broken.append(f"{module} stands in no layer")
            continue
        for target in imports(module, modules):
            top = target.partition(".")[0]
            if top == PACKAGE:
                broken += _inside(module, own, level, unit(target))
            elif top in FOREIGN[level] or own not in ONLY_IN.get(top, {own}):
                broken.append(f"{module} imports {top}")
        if level not in MAY_READ_ENVIRONMENT and reads_environment(source):
            broken.append(f"{module} reads the environment")
    return broken + [f"cycle: {' -> '.join(cycle)}" for cycle in cycles(modules)]


def _inside(module: str, own: str, level: int, other: str) -> list[str]:
    if other == own or other == "__init__" or (own, other) in OPEN_PAIRS:
        return []
    other_level = LAYER_OF.get(other)
    if other_level is not None and other_level in OPEN_LAYERS[level]:
        return []
    return [f"{module} imports {other}"]


def cycles(modules: Mapping[str, str]) -> list[list[str]]:
    """Import cycles between modules, each once.  The bare package is everybody's parent and
    no part of any."""
    graph = {
        module: {
            target
            for target in imports(module, modules)
            if target in modules and target not in (module, PACKAGE)
        }
        for module in modules
    }
    found: dict[frozenset[str], list[str]] = {}
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            cycle = path[path.index(module) :]
            found.setdefault(frozenset(cycle), [*cycle, module])
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return list(found.values())


def test_imports_go_down():
    assert broken_laws(sources()) == []


def test_every_name_in_the_table_is_a_module():
    """A name that stays behind when its module goes would permit what nobody checks."""
    assert {unit(module) for module in sources()} == set(LAYER_OF)
    named = set().union(*ONLY_IN.values()).union(*map(set, OPEN_PAIRS))
    assert named <= set(LAYER_OF)


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("errors", "from ochat_serve.generation import Usage", "imports generation"),
        ("protocol.chat", "from ochat_serve import errors", "imports errors"),
        ("settings", "import time", "imports time"),
        (
            "key_ring",
            "def check():\n    from ochat_serve.streaming import DONE",
            "imports streaming",
        ),
        ("streaming", "import ochat_serve.templates.turns", "imports templates"),
        ("templates.hf", "from ..key_ring import KeyRing", "imports key_ring"),
        ("request_log", "from ochat_serve import engine", "imports engine"),
        ("request_log", "from datetime import datetime", "imports datetime"),
        ("request_log", "from ochat_serve.usage import counters", "imports usage"),
        ("usage_db", "import psycopg", "imports psycopg"),
        ("key_ring", "import os\nKEY = os.environ['KEY']", "reads the environment"),
        ("key_ring", "from os import getenv", "reads the environment"),
        ("tokenizer", "from ochat_serve.engine import VllmEngine", "imports engine"),
        ("tokenizer", "from ochat_serve.chat_service import Chat", "imports chat_service"),
        ("engine", "import ray", "imports ray"),
        ("demo_model", "import fastapi", "imports fastapi"),
        ("demo_model", "import vllm.engine", "imports vllm"),
        ("limits", "import redis.asyncio", "imports redis"),
        ("engine", "from transformers import AutoTokenizer", "imports transformers"),
        ("chat_service", "from ochat_serve.tokenizer import Tokenizer", "imports tokenizer"),
        ("chat_request", "from starlette.requests import Request", "imports starlette"),
        ("serving", "if True:\n    import vllm", "imports vllm"),
        ("serving", "from ochat_serve.routes import chat", "imports routes"),
        ("app", "from ochat_serve.model_source import locate", "imports model_source"),
        ("routes.ops", "import os\nHOME = os.getenv('HOME')", "reads the environment"),
        ("middleware.auth", "import argparse", "imports argparse"),
        ("app", "from ochat_serve.server import run", "imports server"),
        ("server", "from vllm import LLM", "imports vllm"),
        ("novelty", "", "stands in no layer"),
        ("cli", "from ochat_serve.novelty import x", "imports novelty"),
    ],
)
def test_each_law_is_kept_by_the_rules(module: str, source: str, broken: str):
    name = f"{PACKAGE}.{module}"
    base = dict.fromkeys(sources(), "")
    assert f"{name} {broken}" in broken_laws(base | {name: source})


def test_cycles_are_found():
    base = dict.fromkeys(sources(), "")
    ring = {
        f"{PACKAGE}.routes.ops": f"from {PACKAGE}.routes import replies",
        f"{PACKAGE}.routes.replies": f"def late():\n    import {PACKAGE}.routes.ops",
    }
    assert any(law.startswith("cycle: ") for law in broken_laws(base | ring))
    assert broken_laws(base) == []


def loaded_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after ``statement``."""
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys\nprint(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_app_needs_no_model_libraries():
    """So most tests start in no time, and the front end stays thin."""
    loaded = loaded_after("import ochat_serve.app")
    assert "fastapi" in loaded
    heavy = {"vllm", "torch", "ray", "transformers", "tokenizers", "psycopg", "redis"}
    assert loaded.isdisjoint(heavy)


def test_the_entry_imports_next_to_nothing():
    """vLLM's engine processes import it again when they start."""
    loaded = loaded_after("import ochat_serve.openai_api_server")
    assert "ochat_serve" in loaded
    assert loaded.isdisjoint(
        {"fastapi", "starlette", "uvicorn", "pydantic", "torch", "vllm", "yaml", "transformers"}
    )


def test_no_file_names_a_machine_or_a_registry():
    """Paths and hosts of the place where it was written help nobody elsewhere."""
    # In two pieces, so that this file is not found.
    forbidden = [
        ("/ro" + "ot/").encode(),
        ("/wo" + "rk/").encode(),
        ("py" + "pi.org").encode(),
        ("python" + "hosted.org").encode(),
        ("download.py" + "torch.org").encode(),
    ]
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    files = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    assert Path(__file__) in files
    found = [
        f"{path.relative_to(ROOT)}: {word.decode()}"
        for path in files
        if path.is_file()
        for word in forbidden
        if word in path.read_bytes()
    ]
    assert found == []
