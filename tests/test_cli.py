"""From a command line, an environment and a YAML file to settings and engine flags."""

import importlib.util
import re
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from ochat_serve.cli import SECRET_VARIABLES, SECRETS, Command, parse, parser
from ochat_serve.errors import StartupError
from ochat_serve.settings import Settings

SECRET = "sk-very-secret"
RAY = (
    ("--distributed-executor-backend", "ray") if importlib.util.find_spec("ray") is not None else ()
)


def command(line: str, environ: Mapping[str, str] | None = None) -> Command:
    return parse(line.split(), environ or {})


def keys(told: Command, name: str = "api_keys") -> list[str]:
    return [key.get_secret_value() for key in getattr(told.settings, name)]


def refusal(argv: list[str], environ: Mapping[str, str] | None = None) -> str:
    """The one sentence that stops the start."""
    with pytest.raises(StartupError) as stopped:
        parse(argv, environ or {})
    sentence = str(stopped.value)
    assert re.fullmatch(r"[A-Z\-][^\n]*[^.\n]\.", sentence), sentence
    jargon = r"pydantic|https?:|\[type=|input_value|[Ss]hould|<class|_json|Traceback"
    assert not re.search(jargon, sentence), sentence
    return sentence


# Every field of Settings: arguments that set it, and what it is then.
FLAGS: dict[str, tuple[list[str], Any]] = {
    "model": (["demo"], "demo"),
    "model_type": (["hf"], "hf"),
    "served_model_name": (["a", "b"], ("a", "b")),
    "enable_sys_prompt": ([], True),
    "default_temperature": (["0.5"], 0.5),
    "stream_period": (["6"], 6),
    "tokenizer_cache_mb": (["0.5"], 0.5),
    "max_inflight": (["4"], 4),
    "max_queue": (["4"], 4),
    "max_queue_tokens": (["4"], 4),
    "queue_timeout_s": (["0.5"], 0.5),
    "request_timeout_s": (["0.5"], 0.5),
    "max_n": (["4"], 4),
    "max_body_mb": (["0.5"], 0.5),
    "ping_interval_s": (["2.5"], 2.5),
    "read_timeout_s": (["2.5"], 2.5),
    "write_timeout_s": (["2.5"], 2.5),
    "strict_parameters": ([], True),
    "stall_s": (["2.5"], 2.5),
    "drain_s": (["0"], 0),
    "self_check": (["off"], "off"),
    "host": (["::1"], "::1"),
    "port": (["0"], 0),
    "api_server_count": (["2"], 2),
    "ssl_certfile": (["a.pem", "--ssl-keyfile", "a.key"], "a.pem"),
    "ssl_keyfile": (["a.key", "--ssl-certfile", "a.pem"], "a.key"),
    "forwarded_allow_ips": (["10.0.0.0/8"], (ip_network("10.0.0.0/8"),)),
    "root_path": (["/llm"], "/llm"),
    "max_connections": (["5"], 5),
    "api_keys": (["a", "b"], ("a", "b")),
    "admin_keys": (["a"], ("a",)),
    "key_file": (["keys.json"], "keys.json"),
    "redis_url": (["redis://h/1"], SecretStr("redis://h/1")),
    "insecure_no_auth": ([], True),
    "allowed_hosts": (["a.example"], ("a.example",)),
    "allow_credentials": ([], True),
    "allowed_origins": (['["https://a.example"]'], ("https://a.example",)),
    "allowed_methods": (['["GET", "POST"]'], ("GET", "POST")),
    "allowed_headers": (["[]"], ()),
    "log_file": (["openchat.log"], "openchat.log"),
    "log_max_mb": (["1"], 1),
    "log_max_age_h": (["0.5"], 0.5),
    "log_max_count": (["2"], 2),
    "log_total_mb": (["512"], 512),
    "log_content": (["truncated"], "truncated"),
    "log_redact": (["a+", r"\d{4}"], ("a+", r"\d{4}")),
    "usage_db": (["usage.sqlite"], SecretStr("usage.sqlite")),
}


# Those that cannot stand alone.
TOGETHER = {"ssl_certfile": {"ssl_keyfile"}, "ssl_keyfile": {"ssl_certfile"}}


def dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def test_the_table_has_every_field():
    assert FLAGS.keys() == Settings.model_fields.keys()


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("spell", [dashed, lambda name: f"--{name}"], ids=["dashes", "underscores"])
def test_every_field_has_a_flag(name: str, spell: Any):
    values, expected = FLAGS[name]
    told = parse([spell(name), *values], {})
    value = getattr(told.settings, name)
    plain = tuple(keys(told, name)) if name in SECRETS else value
    assert plain == expected
    assert expected != Settings.model_fields[name].default
    assert told.settings.model_fields_set == {name, *TOGETHER.get(name, ())}
    assert told.engine_flags == ()


@pytest.mark.parametrize("line", ["127.0.0.1,::1", "127.0.0.1 ::1", "127.0.0.1, ::1,"])
def test_gateways_may_be_separated_by_commas(line: str):
    """As uvicorn's flag of the same name has them."""
    told = command(f"--forwarded-allow-ips {line}").settings
    assert told.forwarded_allow_ips == Settings().forwarded_allow_ips
    assert command("--forwarded-allow-ips").settings.forwarded_allow_ips == ()


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_has_help(name: str):
    """Its description, whole, and its default where it has one."""
    # Lines are wrapped at hyphens, too: white space tells nothing.
    text = "".join(parser().format_help().split())
    field = Settings.model_fields[name]
    assert field.description
    assert dashed(name) in text
    assert "".join(field.description.split()) in text
    if isinstance(field.default, str | int | float) and not isinstance(field.default, bool):
        assert f"(default:{field.default})" in text


def test_the_bare_log_content_is_all_of_it(tmp_path: Path):
    """As it was when it was a switch."""
    assert command("--log-content").settings.log_content == "full"
    assert command("--log-content --port 5").settings == Settings(log_content="full", port=5)
    for value, level in {"true": "full", "false": "none", "none": "none", "null": "none"}.items():
        argv = config(tmp_path, f"log-content: {value}\nport: 5\n")
        assert parse(argv, {}).settings == Settings(log_content=level, port=5)


def test_yaml_reads_on_and_off_as_true_and_false(tmp_path: Path):
    assert command("--self-check").settings.self_check == "on"
    assert command("--self-check auto").settings.self_check == "auto"
    for value in ("on", "off", "auto", "true", "false"):
        argv = config(tmp_path, f"self-check: {value}\nport: 5\n")
        expected = {"true": "on", "false": "off"}.get(value, value)
        assert parse(argv, {}).settings == Settings(self_check=expected, port=5)


def test_patterns_add_up(tmp_path: Path):
    """One that got lost would be a secret in the log."""
    argv = config(tmp_path, "log-redact: [a, b]\n")
    told = parse([*argv, "--log-redact", "c", "--log-redact", "d e", "--port", "5"], {})
    assert told.settings.log_redact == ("a", "b", "c", "d e")


def test_asking_for_help_is_no_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        command("--help")
    assert ended.value.code == 0
    assert "--tensor-parallel-sizeN" in "".join(capsys.readouterr().out.split())
    assert command("--help=all").help_all
    assert "--log-file" in capsys.readouterr().out


# The reference's documentation has these lines; scripts of its users, too.
def test_the_shortest_line():
    told = command("--model openchat/openchat-3.6-8b-20240522")
    assert told == Command(Settings(model="openchat/openchat-3.6-8b-20240522"))
    assert told == command("")


def test_tensor_parallel_line():
    told = command("--model M --tensor-parallel-size 2")
    assert told == Command(Settings(model="M"), ("--tensor-parallel-size", "2"))


def test_line_with_keys_and_a_log():
    told = command(
        "--model M --api-keys sk-KEY1 sk-KEY2 --disable-log-requests --disable-log-stats "
        "--log-file openchat.log"
    )
    assert keys(told) == ["sk-KEY1", "sk-KEY2"]
    assert told.settings.log_file == "openchat.log"
    assert told.engine_flags == ("--disable-log-stats",)
    assert len(told.notices) == 1  # that keys do not belong there


def test_line_with_ray():
    told = command("--model M --engine-use-ray --worker-use-ray --tensor-parallel-size 2")
    assert told.settings == Settings(model="M")
    assert told.engine_flags == (*RAY, "--tensor-parallel-size", "2")
    assert told.notices[0].startswith("--engine-use-ray: ")
    # Not silently another thing than asked for.
    assert bool(RAY) is not any(notice.startswith("--worker-use-ray") for notice in told.notices)


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("--dtype auto --model M --max-model-len 4096", "--dtype auto --max-model-len 4096"),
        ("--tensor_parallel_size=2 --a_b c_d", "--tensor-parallel-size=2 --a-b c_d"),
        ("-tp 2 -O3 -cc.mode=3 --seed -1", "-tp 2 -O3 -cc.mode=3 --seed -1"),
        ("--compilation_config.pass_config.x_y=1", "--compilation-config.pass_config.x_y=1"),
        ("--api-keys k --dtype auto --port 5 stray", "--dtype auto stray"),
        ("--no-enable-prefix-caching --enable_x", "--no-enable-prefix-caching --enable-x"),
        # Half a name of ours is not ours.
        ("--mod M --max-n 4 --max 4", "--mod M --max 4"),
        ("--revision main --dtype auto", "--dtype auto --revision main"),
        ("--enable-log-requests --disable-log-requests", ""),
    ],
)
def test_engine_flags_pass_through_in_order(line: str, flags: str):
    assert command(line).engine_flags == tuple(flags.split())


def test_values_with_spaces_and_braces_pass_through():
    argv = ["--hf-overrides", '{"a_b": "c d"}', "--x", "--y_z=a b"]
    assert parse(argv, {}).engine_flags == (argv[0], argv[1], "--x", "--y-z=a b")


@pytest.mark.parametrize(
    ("line", "environ", "expected"),
    [
        ("", {}, []),
        ("", {"OCHAT_API_KEYS": ""}, []),
        ("", {"OCHAT_API_KEYS": " , "}, []),
        ("", {"OCHAT_API_KEYS": "a"}, ["a"]),
        ("", {"OCHAT_API_KEYS": "a,"}, ["a"]),
        ("", {"OCHAT_API_KEYS": " a,b\nc ,d\t"}, ["a", "b", "c", "d"]),
        ("--api-keys x", {"OCHAT_API_KEYS": "a"}, ["x"]),
        # A flag without values must not open a server that its environment closes.
        ("--api-keys", {"OCHAT_API_KEYS": "a"}, ["a"]),
        ("--api-keys", {}, []),
        ("--api-keys x --api-keys y z", {}, ["y", "z"]),
        ("--api-key x", {}, ["x"]),
    ],
)
def test_where_keys_come_from(line: str, environ: dict[str, str], expected: list[str]):
    assert keys(command(line, environ)) == expected


def test_other_keys_in_the_environment():
    environ = {"OCHAT_ADMIN_KEYS": "a b", "OCHAT_KEY_FILE": "k.json"}
    told = command("", environ)
    assert keys(told, "admin_keys") == ["a", "b"]
    assert told.settings.key_file == "k.json"
    told = command("--admin-keys c --key-file l.json", environ)
    assert keys(told, "admin_keys") == ["c"]
    assert told.settings.key_file == "l.json"


def test_keys_on_the_command_line_are_hidden_from_it():
    """Every user of a machine can list its processes."""
    told = command("--api-keys sk-1 sk-12 --admin-keys=sk-2 --port 1")
    assert told.title == (
        "python -m ochat_serve.openai_api_server --api-keys *** *** --admin-keys=*** --port 1"
    )
    assert "can be read by every user of this machine" in told.notices[0]
    for quiet in (command("--port 1"), command("", {"OCHAT_API_KEYS": "sk-1"})):
        assert quiet.title is None
        assert quiet.notices == ()


def test_addresses_come_from_the_environment_too():
    """They may hold a password."""
    environ = {"OCHAT_REDIS_URL": "redis://:pw@h", "OCHAT_USAGE_DB": "postgresql://me:pw@h/d"}
    told = command("", environ).settings
    assert told.redis_url == SecretStr("redis://:pw@h")
    assert told.usage_db == SecretStr("postgresql://me:pw@h/d")
    assert command("--redis-url unix:///r", environ).settings.redis_url == SecretStr("unix:///r")
    assert set(environ) < set(SECRET_VARIABLES)


def test_passwords_in_addresses_are_hidden_from_the_command_line():
    told = command("--redis-url redis://:pw@h --usage-db=postgresql://me:pw@h/d --port 1")
    assert told.title is not None
    assert told.title.endswith("--redis-url *** --usage-db=*** --port 1")
    (notice,) = told.notices
    assert "OCHAT_USAGE_DB and OCHAT_REDIS_URL keep it to yourself" in notice
    plain = command("--redis-url redis://h --usage-db usage.sqlite --port 1")
    assert (plain.title, plain.notices) == (None, ())


@pytest.mark.parametrize(
    "line",
    [
        "--redis-url redis://h/0?password=sekret",
        "--redis_url=rediss://h?username=me&password=sekret",
        "--usage-db postgresql://h/d?user=u&password=sekret",
        "--usage_db=postgres:///d?password=sekret",
        # Of a flag that is given twice the last one counts, and both are shown.
        "--redis-url redis://:sekret@h --redis-url redis://h",
        "--api-keys sekret --api-keys other",
        "--api_keys=sekret --api-key other",
        "--admin-key sekret",
        "--admin_key=sekret",
    ],
)
def test_secrets_are_hidden_wherever_they_stand(line: str):
    told = command(f"{line} --port 1 -tp 2")
    assert told.title is not None
    assert "sekret" not in told.title
    assert told.title.endswith(" --port 1 -tp 2")
    assert "can be read by every user" in told.notices[0]


def test_a_key_under_another_spelling_is_not_passed_on():
    """vLLM's complaint of an unknown flag would show it."""
    for flag, name in (("--api-key", "api_keys"), ("--admin-key", "admin_keys")):
        told = command(f"{flag} {SECRET}")
        assert keys(told, name) == [SECRET]
        assert told.engine_flags == ()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("h:6379", "must begin with one of redis://, rediss://, unix://"),
        ("http://:sekret@h", "must begin with one of redis://, rediss://, unix://"),
        ("redis://:sekret@x@h", "write @ as %40, / as %2F and ? as %3F"),
    ],
)
def test_what_is_no_address_of_redis(value: str, said: str):
    told = refusal(["--redis-url", value])
    assert told.startswith(f"--redis-url: {said}")
    assert "sekret" not in told


def test_keys_in_the_environment_open_a_public_address():
    assert command("--host 0.0.0.0", {"OCHAT_API_KEYS": "a"}).settings.host == "0.0.0.0"
    assert command("--host 0.0.0.0 --insecure-no-auth").settings.host == "0.0.0.0"
    for environ in ({}, {"OCHAT_API_KEYS": " , "}):
        assert refusal(["--host", "0.0.0.0"], environ) == (
            "--host 0.0.0.0 can be reached from other machines but no API key is set. Set "
            "OCHAT_API_KEYS or --key-file, or pass --insecure-no-auth if that is what you want."
        )


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_loopback_needs_no_keys(host: str):
    assert command(f"--host {host}").settings.host == host


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--port", "99999"], "--port 99999: must be less than or equal to 65535."),
        (
            ["--port", ""],
            "--port '': must be a valid integer, unable to parse string as an integer.",
        ),
        (["--port"], "Argument --port: expected one argument."),
        (["--model", ""], "--model '': must have at least 1 character."),
        (
            ["--default-temperature", "3"],
            "--default-temperature 3: must be less than or equal to 2.",
        ),
        (["--ping-interval-s", "inf"], "--ping-interval-s inf: must be a finite number."),
        (["--max-n", "1.5"], None),
        (["--log-max-mb", "0"], "--log-max-mb 0: must be greater than or equal to 1."),
        (["--strict-parameters=1"], None),
        (
            ["--log-content", "some"],
            "--log-content some: must be 'none', 'truncated' or 'full'.",
        ),
        (["--log-max-age-h", "0"], "--log-max-age-h 0: must be greater than 0."),
        (
            ["--log-total-mb", "100"],
            "--log-total-mb 100 is less than --log-max-mb 128: a rotated file might not fit.",
        ),
        (
            ["--log-redact", "a+", "(b"],
            "--log-redact '(b': is not a regular expression: missing ) at position 2.",
        ),
        (
            ["--log-redact", "a*"],
            "--log-redact 'a*': must not match the empty text: it would match everywhere.",
        ),
        (
            ["--allowed-origins", "*"],
            "Argument --allowed-origins: '*' is not a JSON list of strings.",
        ),
        (["--allowed-origins", "[1]"], None),
        (["--allowed-origins", '"*"'], None),
        (
            ["--allow-credentials", "--allowed-origins", '["*"]'],
            '--allow-credentials needs named --allowed-origins, not "*".',
        ),
        (["--forwarded-allow-ips", "*"], None),
        (["--forwarded-allow-ips", "::1", "gateway.example"], None),
        (
            ["--forwarded-allow-ips", "10.0.0.1/8"],
            "--forwarded-allow-ips 10.0.0.1/8: must be an address or a network: "
            "10.0.0.1/8 has host bits set.",
        ),
        (["--self-check", "yes"], "--self-check yes: must be 'auto', 'on' or 'off'."),
        (["--root-path", "llm"], "--root-path llm: must be a path such as /llm."),
        (["--root-path", "/a?b"], None),
        (["--root-path", "/a//b"], None),
    ],
    ids=str,
)
def test_bad_values_are_one_sentence_with_the_flag(argv: list[str], sentence: str | None):
    told = refusal([*argv, "--api-keys", SECRET] if argv[-1] != "--port" else argv)
    assert argv[0].partition("=")[0] in told
    assert sentence is None or told == sentence


@pytest.mark.parametrize(
    "argv",
    [
        ["--port", "x"],
        ["--allow-credentials", "--allowed-origins", '["*"]'],
        ["--allowed-origins", "x"],
    ],
)
def test_no_secret_in_an_error_or_its_cause(argv: list[str]):
    with pytest.raises(StartupError) as stopped:
        parse([*argv, "--api-keys", SECRET], {"OCHAT_API_KEYS": SECRET})
    error: BaseException | None = stopped.value
    while error is not None:
        assert SECRET not in f"{error} {error!r}"
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
    ("line", "environ"),
    [(f"--api-keys {SECRET}", {}), (f"--api-keys={SECRET}", {}), ("", {"OCHAT_API_KEYS": SECRET})],
)
def test_no_secret_in_what_is_printed(line: str, environ: dict[str, str]):
    told = command(line, environ)
    assert keys(told) == [SECRET]
    assert SECRET not in f"{told} {told!r} {told.settings} {told.settings!r}"


def config(folder: Path, text: str) -> list[str]:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return ["--config", str(file)]


def test_a_config_file_is_a_command_line(tmp_path: Path):
    argv = config(
        tmp_path,
        """
        # Names with dashes or underscores, as the flags.
        model: M
        max_n: 4
        port: 5
        served-model-name: [a, b]
        api-keys: [k1, k2]
        allowed-origins: ["https://a.example"]
        log-content: true
        strict-parameters: false
        log-file: null
        worker-use-ray: false
        engine_use_ray: false
        disable-log-requests: false
        tensor-parallel-size: 2
        gpu_memory_utilization: 0.8
        enforce-eager: true
        enable-prefix-caching: false
        max-model-len: null
        compilation-config: {mode: 3, pass_config: {x_y: true}}
        cudagraph-capture-sizes: [1, 2]
        dtype: 数
        """,
    )
    told = parse(argv, {})
    assert told.settings == Settings(
        model="M",
        max_n=4,
        port=5,
        served_model_name=("a", "b"),
        api_keys=("k1", "k2"),
        allowed_origins=("https://a.example",),
        log_content="full",
    )
    assert told.engine_flags == (
        *("--tensor-parallel-size", "2"),
        *("--gpu-memory-utilization", "0.8"),
        "--enforce-eager",
        "--no-enable-prefix-caching",
        *("--compilation-config", '{"mode": 3, "pass_config": {"x_y": true}}'),
        *("--cudagraph-capture-sizes", "1", "2"),
        *("--dtype", "数"),
    )
    assert told.notices == ()


def test_the_command_line_wins(tmp_path: Path):
    """For engine flags, too: vLLM takes the last one."""
    argv = config(
        tmp_path,
        "port: 5\nmodel: M\nserved-model-name: [a]\napi-keys: [k]\ntensor-parallel-size: 2\n",
    )
    flags = ["--port", "6", "--served_model_name", "b", "--tensor-parallel-size", "4"]
    for line in ([*argv, *flags], [*flags, *argv]):
        told = parse(line, {"OCHAT_API_KEYS": "env"})
        assert (told.settings.port, told.settings.model) == (6, "M")
        assert told.settings.served_model_name == ("b",)
        assert keys(told) == ["k"]
        assert told.engine_flags[-2:] == ("--tensor-parallel-size", "4")


@pytest.mark.parametrize("text", ["", "# nothing\n", "null\n", "{}\n", "api-keys: []\n"])
def test_an_empty_config_file_changes_nothing(tmp_path: Path, text: str):
    environ = {"OCHAT_API_KEYS": "a"}
    assert parse(config(tmp_path, text), environ) == parse([], environ)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", "is not valid YAML"),
        ("a: b: c", "is not valid YAML"),
        ("!!python/object:os.system {}", "is not valid YAML"),
        ("- a\n- b", "must be a mapping of flags to values"),
        ("just words", "must be a mapping of flags to values"),
        ("5", "must be a mapping of flags to values"),
    ],
)
def test_a_config_file_that_is_none(tmp_path: Path, text: str, reason: str):
    argv = config(tmp_path, text)
    assert refusal(argv).startswith(f"--config {argv[1]} {reason}")


@pytest.mark.parametrize("items", ["[null]", "[k, ~]", "\n- k\n-\n", "[[k]]", "[{k: v}]"])
@pytest.mark.parametrize("name", ["api-keys", "admin_keys", "served-model-name", "made-up"])
def test_an_item_in_a_config_file_that_is_no_value(tmp_path: Path, name: str, items: str):
    """An empty one would be the key "None"."""
    flag = "--" + name.replace("_", "-")
    assert refusal(config(tmp_path, f"{name}: {items}")) == (
        f"{flag} has an item in the file that is no plain value."
    )


def test_a_config_file_that_cannot_be_read(tmp_path: Path):
    missing = str(tmp_path / "none.yaml")
    assert refusal(["--config", missing]) == (
        f"--config {missing} cannot be read: No such file or directory."
    )
    assert refusal(["--config", str(tmp_path)]).startswith(f"--config {tmp_path} cannot be read")
    (tmp_path / "latin").write_bytes(b"model: \xff")
    assert "is not valid YAML" in refusal(["--config", str(tmp_path / "latin")])


def test_bad_values_in_a_config_file_name_the_flag(tmp_path: Path):
    assert refusal(config(tmp_path, "port: 99999")).startswith("--port 99999: must be ")
    assert "--allowed-origins" in refusal(config(tmp_path, 'allowed-origins: "*"'))
    assert "--host 0.0.0.0" in refusal(config(tmp_path, "host: 0.0.0.0"))
