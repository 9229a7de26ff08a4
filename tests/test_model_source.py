"""Where a model lies, what it is called and how its prompts look: known before it is loaded.

The hub is a closed port here, in an interpreter of its own: the hub's client reads its
environment once, when it is imported.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ochat_serve.errors import StartupError
from ochat_serve.model_source import ModelSource, locate
from ochat_serve.templates.registry import ALIASES, HF, MODEL_TYPES, TEMPLATES

ROOT = Path(__file__).parents[1]


def folder(place: Path, name: str = "some-model", openchat: Any = None) -> Path:
    """A model folder with as much in it as finding it needs."""
    made = place / name
    made.mkdir(parents=True)
    (made / "config.json").write_text('{"model_type": "llama"}')
    if openchat is not None:
        (made / "openchat.json").write_text(
            openchat if isinstance(openchat, str) else json.dumps(openchat)
        )
    return made


def refusal(model: Path | str, **options: Any) -> str:
    with pytest.raises(StartupError) as stopped:
        locate(str(model), **options)
    sentence = str(stopped.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def test_a_folder(tmp_path: Path):
    model = folder(tmp_path)
    source = locate(str(model))
    assert source == ModelSource(str(model), HF, (str(model), "some-model"))
    assert (source.owned_by, source.context) == ("ochat_serve", None)


def test_no_folder(tmp_path: Path):
    """A path is never looked up on the hub: the answer comes at once."""
    for model in (str(tmp_path / "none"), "./none", "~/none-such", "a/b/c"):
        assert refusal(model) == f"There is no model folder {model}."


def test_a_folder_without_a_model(tmp_path: Path):
    assert refusal(tmp_path) == f"The folder {tmp_path} is not a model: it has no config.json."


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "is not valid JSON"), ("{", "is not valid JSON"), ("[]", "is not a JSON object")],
)
@pytest.mark.parametrize("name", ["config.json", "openchat.json"])
def test_a_broken_file_is_said(tmp_path: Path, name: str, text: str, reason: str):
    """Of openchat.json, too: guessing instead would serve the wrong prompts in silence."""
    model = folder(tmp_path, "openchat-3.6", openchat={"model_type": "openchat_3.6"})
    (model / name).write_text(text)
    assert refusal(model).startswith(f"{name} of {model} {reason}")


def test_a_model_type_that_nobody_knows(tmp_path: Path):
    sentence = refusal(folder(tmp_path), model_type="gpt")
    assert sentence.startswith("--model-type gpt is unknown. Choose one of: ")
    assert all(name in sentence for name in MODEL_TYPES)


def test_an_unknown_type_in_openchat_json(tmp_path: Path):
    for number, openchat in enumerate(({"model_type": "gpt"}, {"model_type": 5}, {})):
        model = folder(tmp_path, f"m{number}", openchat=openchat)
        sentence = refusal(model)
        assert sentence.startswith(f"openchat.json of {model} names the model type ")
        assert "--model-type" in sentence
        assert locate(str(model), model_type="hf").model_type == HF


@pytest.mark.parametrize(
    ("flag", "openchat", "name", "expected"),
    [
        ("gemma", "openchat_3.5", "openchat-3.6-8b", "gemma"),
        ("hf", "openchat_3.5", "openchat-3.6-8b", "hf"),
        ("openchat_v3.2_mistral", None, "some-model", "openchat_3.5"),
        (None, "openchat_3.5", "openchat-3.6-8b", "openchat_3.5"),
        (None, "chatml_8192", "openchat-3.6-8b", "chatml"),
        (None, None, "openchat-3.6-8b-20240522", "openchat_3.6"),
        (None, None, "OpenChat_3.6", "openchat_3.6"),
        (None, None, "openchat-3.5-0106", "openchat_3.5"),
        (None, None, "openchat-3.5-0106-gemma", "gemma"),
        (None, None, "openchat_v3.2_super", "openchat_v3.2"),
        (None, None, "Meta-Llama-3-8B-Instruct", "hf"),
        (None, None, "openchat", "hf"),
    ],
)
def test_the_flag_then_openchat_json_then_the_name(
    tmp_path: Path, flag: str | None, openchat: str | None, name: str, expected: str
):
    model = folder(tmp_path, name, openchat={"model_type": openchat} if openchat else None)
    assert locate(str(model), model_type=flag).model_type == expected


def test_only_the_models_own_name_tells_its_type(tmp_path: Path):
    """Not the folder that it lies in."""
    model = folder(tmp_path / "openchat-3.6", "some-model")
    assert locate(str(model)).model_type == HF


def test_names_and_their_order(tmp_path: Path):
    """The user's own first: the first one is the default, and answers carry it."""
    model = folder(tmp_path, "openchat-3.5-0106")
    own = (str(model), "openchat-3.5-0106")
    types = ("openchat_3.5", "openchat_v3.2_mistral")
    assert locate(str(model)).names == (*types, *own)
    assert locate(str(model), served_model_name=("b", "a")).names == ("b", "a", *types, *own)
    assert locate(str(model), served_model_name=(own[1], "a", "a")).names == (
        *(own[1], "a"),
        *types,
        own[0],
    )
    # Formats of other makers' models are not names of those models.
    assert locate(str(model), model_type="chatml").names == own


@pytest.mark.parametrize("name", [*TEMPLATES, *ALIASES])
def test_every_type_can_be_chosen(tmp_path: Path, name: str):
    source = locate(str(folder(tmp_path)), model_type=name)
    template = TEMPLATES[source.model_type]
    assert name in (template.name, *template.aliases)
    assert source.owned_by == template.owned_by
    if template.uses_condition:
        assert {template.name, *template.aliases} <= set(source.names)
        assert source.context == template.max_model_len
    else:
        assert source.context is None


def test_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``--model=~/m``: the shell leaves the tilde, and vLLM would not find it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    model = folder(tmp_path, "openchat-3.6")
    source = locate("~/openchat-3.6")
    assert (source.path, source.model_type) == (str(model), "openchat_3.6")
    assert source.names[-2:] == ("~/openchat-3.6", "openchat-3.6")


def in_fresh_interpreter(argument: str, cwd: Path, **environ: str) -> dict[str, Any]:
    """What ``locate`` says of ``argument`` where nothing answers: names and path, or an error."""
    script = (
        "import json, sys\n"
        "from ochat_serve.errors import StartupError\n"
        "from ochat_serve.model_source import locate\n"
        "try:\n"
        "    source = locate(sys.argv[1])\n"
        "    told = {'path': source.path, 'type': source.model_type, 'names': source.names}\n"
        "except StartupError as error:\n"
        "    told = {'error': str(error)}\n"
        "print(json.dumps(told))\n"
    )
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    quiet = {name: value for name, value in quiet.items() if "proxy" not in name.lower()}
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # taken, but nobody listens
        nowhere = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        done = subprocess.run(
            [sys.executable, "-c", script, argument],
            cwd=cwd,
            env=quiet | nowhere | {"PYTHONPATH": str(ROOT)} | environ,
            capture_output=True,
            text=True,
            check=True,
            timeout=15,  # the hub's client alone would try again for half a minute
        )
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("how", [{}, {"NO_PROXY": "localhost"}, {"HF_HUB_OFFLINE": "1"}], ids=str)
def test_a_hub_id_where_there_is_no_hub(tmp_path: Path, how: dict[str, str]):
    told = in_fresh_interpreter(
        "openchat/openchat-3.6-8b-20240522", tmp_path, HF_HOME=str(tmp_path), **how
    )
    assert told == {
        "error": "The model openchat/openchat-3.6-8b-20240522 was not found: it is no folder "
        "here, and the hub did not give its config.json. Check the name and the network, or try "
        "--model demo."
    }


def test_a_word_that_is_no_hub_id(tmp_path: Path):
    told = in_fresh_interpreter("no such model", tmp_path, HF_HOME=str(tmp_path))
    assert told["error"].startswith("The model no such model was not found: ")


def test_a_hub_model_in_the_cache_needs_no_hub(tmp_path: Path):
    """openchat.json is not there: its absence must not stop what a name can tell."""
    model = tmp_path / "hub" / "models--openchat--openchat-3.6-8b-20240522"
    folder(model / "snapshots", "0" * 40)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    told = in_fresh_interpreter(
        "openchat/openchat-3.6-8b-20240522", tmp_path, HF_HOME=str(tmp_path)
    )
    assert told["type"] == "openchat_3.6"
    assert told["path"] == "openchat/openchat-3.6-8b-20240522"
    assert told["names"] == [
        "openchat_3.6",
        "openchat/openchat-3.6-8b-20240522",
        "openchat-3.6-8b-20240522",
    ]


def test_the_folder_one_stands_in(tmp_path: Path):
    model = folder(tmp_path, "openchat-3.6")
    told = in_fresh_interpreter(".", model)
    assert told["path"] == str(model)
    assert told["type"] == "openchat_3.6"
    assert told["names"] == ["openchat_3.6", ".", "openchat-3.6"]
