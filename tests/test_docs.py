"""The documents say what the code does: every flag, field, route, header and code is in them."""

import re
import subprocess
from pathlib import Path
from typing import get_args

import pytest
import yaml

from ochat_serve import cli
from ochat_serve.app import create_app
from ochat_serve.caller import LogContent
from ochat_serve.chat_request import REFUSED
from ochat_serve.completion_request import REFUSED_HERE
from ochat_serve.protocol.chat import ChatCompletionRequest
from ochat_serve.protocol.completion import CompletionRequest
from ochat_serve.protocol.tokens import DetokenizeRequest, TokenizeRequest
from ochat_serve.request_log import Outcome
from ochat_serve.request_log.record import KEPT_CHARS
from ochat_serve.serving import Serving
from ochat_serve.settings import Settings
from ochat_serve.templates.registry import MODEL_TYPES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
REQUEST_LOG = (ROOT / "docs" / "request-log.md").read_text()
TEMPLATES = (ROOT / "docs" / "templates.md").read_text()
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def words_in_code(text: str) -> set[str]:
    without_blocks = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return set(re.findall(r"`([^`\n]+)`", without_blocks))


def test_every_flag_is_in_the_readme_with_its_default() -> None:
    documented = words_in_code(README)
    flags = {o for action in cli.parser()._actions for o in action.option_strings} - {
        "-h",
        "--help",
    }
    assert flags <= documented, flags - documented
    rows = dict(re.findall(r"\| `(--[a-z-]+)` \| ([^|]+) \|", README))
    for name, field in Settings.model_fields.items():
        row = rows.get("--" + name.replace("_", "-"))
        if row is not None and isinstance(field.default, int | float) and field.default is not True:
            shown = "off" if field.default is False else str(field.default)
            assert row.strip() == shown, name


def test_every_route_is_in_the_readme() -> None:
    for route in create_app(Settings(), Serving()).routes:
        path = route.path.replace("{model:path}", "{id}")
        assert any(path in word for word in words_in_code(README)), path


def test_every_field_is_in_the_api_table() -> None:
    documented = words_in_code(API)
    fields = {*ChatCompletionRequest.model_fields, *REFUSED}
    fields |= {*TokenizeRequest.model_fields, *DetokenizeRequest.model_fields}
    fields |= {*CompletionRequest.model_fields, *REFUSED_HERE}
    assert fields - {"store"} <= documented, fields - documented
    assert "`store: true`" in API


def test_every_header_and_error_code_of_the_source_is_in_the_api_tables() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "ochat_serve").rglob("*.py"))
    documented = words_in_code(API)
    headers = set(re.findall(r'"(x-ochat-[a-z-]+)"', source))
    codes = set(re.findall(r'code="([a-z_]+)"', source))
    codes |= set(re.findall(r'default_code = "([a-z_]+)"', source))
    assert headers
    assert {"loading", "invalid_api_key", "context_length_exceeded"} <= codes
    assert headers | codes <= documented, (headers | codes) - documented


def test_every_model_type_is_in_the_templates_table() -> None:
    assert set(MODEL_TYPES) <= words_in_code(TEMPLATES)


def test_every_field_and_outcome_is_in_the_logs_tables() -> None:
    source = (ROOT / "ochat_serve" / "request_log" / "record.py").read_text()
    fields = set(re.findall(r'^            "([a-z_]+)": ', source, flags=re.MULTILINE))
    assert {"time", "queue_s", "outputs"} <= fields
    words = {*get_args(Outcome), *get_args(LogContent), *fields}
    assert words <= words_in_code(REQUEST_LOG), words - words_in_code(REQUEST_LOG)
    assert str(KEPT_CHARS) in REQUEST_LOG


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads_and_is_in_the_readme(path: Path) -> None:
    command = cli.parse(["--config", str(path), "--port", "1234"])
    written = yaml.safe_load(path.read_text())
    assert command.settings.model == written["model"]
    assert command.settings.port == 1234
    engine_flags = {f"--{name}" for name in written} - {"--model"}
    assert engine_flags <= set(command.engine_flags)
    assert f"configs/{path.name}" in README


def test_vllm_knows_every_engine_flag_of_the_configs(tmp_path: Path) -> None:
    """vLLM's own parser reads them, in a process of its own: its import warns."""
    program = (
        "from ochat_serve import cli\n"
        "from ochat_serve.engine import engine_parser\n"
        f"for path in {[str(path) for path in CONFIGS]!r}:\n"
        "    engine_parser().parse_args(list(cli.parse(['--config', path]).engine_flags))\n"
        "print('all read')\n"
    )
    done = subprocess.run(
        [ROOT / ".venv/bin/python", "-c", program], capture_output=True, text=True, check=False
    )
    assert "all read" in done.stdout, done.stderr[-2000:]


def test_links_between_documents_lead_somewhere() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    assert len(documents) >= 5
    for document in documents:
        for link in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if "://" not in link:
                assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_the_commands_of_the_readme_are_read_as_they_stand() -> None:
    lines = README.replace("\\\n", " ").splitlines()
    start = "python -m ochat_serve.openai_api_server "
    commands = [line.removeprefix(start).split() for line in lines if line.startswith(start)]
    assert len(commands) >= 5
    for arguments in commands:
        assert cli.parse(arguments, {}).settings
