"""A real model that is broken without any error is not served."""

import copy
import hashlib
import json
import re
from pathlib import Path

import pytest

from ochat_serve.self_check import CAPITAL, check
from tests.live import eventually
from tests.process import alive, server_process
from tests.real_model.conftest import Demo

LAYER = re.compile(r"model\.layers\.(\d+)\.")
WEIGHTS = "model.safetensors"
MANIFEST = "ochat_manifest.json"


def test_the_demo_model_passes(demo: Demo) -> None:
    served = demo.serving.chat.served
    assert served.engine.info.has_weights
    said = demo.server.call(check(served, CAPITAL, patience_s=60))
    assert said == "The capital of France is Paris."
    assert demo.unfinished() == 0


@pytest.mark.parametrize(
    ("load_format", "executor", "expected"),
    [
        ("auto", "uni", True),
        ("safetensors", "mp", True),
        ("auto", "ray", True),
        ("dummy", "uni", False),
        ("auto", "sim_executor.SimExecutor", False),
        ("auto", object, False),
    ],
)
def test_what_counts_as_weights(
    demo: Demo, load_format: str, executor: object, expected: bool
) -> None:
    from ochat_serve.engine.vllm_engine import _has_weights  # only the fixture may import vLLM

    config = copy.deepcopy(demo.engine._llm.vllm_config)
    config.load_config.load_format = load_format
    config.parallel_config.distributed_executor_backend = executor
    assert _has_weights(config) is expected


def test_a_broken_model_is_not_served(demo_folder: Path, tmp_path: Path) -> None:
    """The demo model with its layers upside down: every file is what it is said to be, vLLM loads
    it, and it speaks."""
    upside_down(demo_folder, tmp_path / demo_folder.name)
    with server_process(
        "--model", "demo",
        "--max-model-len", "1024",
        output=tmp_path / "output.txt",
        VLLM_CPU_KVCACHE_SPACE="1",
        OCHAT_CACHE=str(tmp_path),
    ) as server:  # fmt: skip
        server.wait_until_answering()
        assert eventually(server.children, within_s=60)
        children = server.children()
        assert server.process.wait(240) == 1
        assert eventually(lambda: not any(map(alive, children)), within_s=10)
    last = server.output.strip().splitlines()[-1]
    beginning = "ochat_serve: The self-check failed: asked 'What is the capital of France?', the"
    assert last.startswith(f"{beginning} model says ")
    assert last.endswith("with --self-check off it is served all the same.")
    assert "\nTraceback" not in server.output, "vLLM's own lines begin otherwise"
    assert "ready in" not in server.output


def upside_down(model: Path, target: Path) -> None:
    """A copy of the demo model whose last layer is the first one, and so on."""
    target.mkdir()
    for file in model.iterdir():
        if file.name not in (WEIGHTS, MANIFEST):
            (target / file.name).symlink_to(file)
    data = (model / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    last = max(int(layer[1]) for name in header if (layer := LAYER.match(name)))

    def opposite(name: str) -> str:
        return LAYER.sub(lambda layer: f"model.layers.{last - int(layer[1])}.", name)

    # Only where each tensor lies is told anew: the same numbers, and so the same length.
    changed = json.dumps({name: header[opposite(name)] for name in header}, separators=(",", ":"))
    weights = data[:8] + changed.encode().ljust(size) + data[8 + size :]
    (target / WEIGHTS).write_bytes(weights)
    manifest = json.loads((model / MANIFEST).read_text())
    manifest["files"][WEIGHTS] = hashlib.sha256(weights).hexdigest()
    (target / MANIFEST).write_text(json.dumps(manifest))
