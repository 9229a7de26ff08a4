"""Settings: frozen, safe unless told otherwise, and silent about secrets."""

import pytest
from pydantic import ValidationError

from ochat_serve.settings import Settings, is_loopback

SECRET = "sk-very-secret"


def test_the_reference_servers_defaults():
    """Command lines written for it must find the same server."""
    settings = Settings()
    assert (settings.host, settings.port) == ("localhost", 18888)
    assert (settings.log_max_mb, settings.log_max_count) == (128, 10)
    assert settings.model == "openchat/openchat-3.6-8b-20240522"
    assert settings.api_keys == ()
    assert settings.log_file is None


def test_closed_unless_opened():
    settings = Settings()
    assert settings.allowed_origins == ()
    assert not settings.insecure_no_auth
    assert settings.log_content == "none"


def test_frozen():
    with pytest.raises(ValidationError):
        Settings().port = 1


def test_unknown_names_are_refused():
    with pytest.raises(ValidationError):
        Settings(prot=1)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1"])
def test_this_machine_may_go_without_keys(host: str):
    assert is_loopback(host)
    assert Settings(host=host).api_keys == ()


PUBLIC = ["0.0.0.0", "::", "192.168.0.1", "10.0.0.1", "example.org", "localhost.example.org", ""]


@pytest.mark.parametrize("host", PUBLIC)
def test_other_machines_need_keys(host: str):
    assert not is_loopback(host)
    with pytest.raises(ValidationError, match="no API key is set"):
        Settings(host=host)
    assert Settings(host=host, api_keys=(SECRET,)).host == host
    assert Settings(host=host, insecure_no_auth=True).host == host


def test_credentials_need_named_origins():
    """Any origin with the user's cookies: no browser takes that, and nobody should want it."""
    with pytest.raises(ValidationError, match="allow-credentials"):
        Settings(allow_credentials=True, allowed_origins=("https://a.example", "*"))
    assert Settings(allow_credentials=True, allowed_origins=("https://a.example",))
    assert Settings(allowed_origins=("*",))


def test_a_certificate_needs_its_key_and_a_key_its_certificate():
    assert Settings().scheme == "http"
    assert Settings(ssl_certfile="a", ssl_keyfile="b").scheme == "https"
    for name in ("ssl_certfile", "ssl_keyfile"):
        with pytest.raises(ValidationError, match="needed together"):
            Settings.model_validate({name: "a"})


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("model", ["demo"], [""]),
        ("default_temperature", [0, 2, None], [-0.1, 2.1, float("nan")]),
        ("stream_period", ["auto", 1, 1000], [0, 1001, "", "often", "1.5", True, None, "\u0661"]),
        ("tokenizer_cache_mb", [0, 0.5, 65536], [-1, float("inf"), float("nan")]),
        ("max_n", [1, 1024], [0, 1025]),
        ("max_body_mb", [0.001, 1024], [0, 1025, float("inf"), float("nan")]),
        # Nothing can sleep for ever and still send a ping.
        ("ping_interval_s", [0.01, 3600], [0, -1, float("inf"), float("nan")]),
        ("port", [0, 65535], [-1, 65536]),
        ("api_server_count", [1, 64], [0, 65]),
        ("log_max_mb", [1], [0]),
        ("log_max_age_h", [0.001], [0, -1, float("inf"), float("nan")]),
        ("log_max_count", [1], [0]),
        ("log_total_mb", [128], [0, 127]),
        ("log_content", ["none", "truncated", "full"], ["", "all", True, None]),
    ],
)
def test_ranges(name: str, good: list[object], bad: list[object]):
    for value in good:
        assert getattr(Settings.model_validate({name: value}), name) == value
    for value in bad:
        with pytest.raises(ValidationError):
            Settings.model_validate({name: value})


@pytest.mark.parametrize(("megabytes", "size"), [(1, 2**20), (0.5, 2**19), (4, 4 * 2**20)])
def test_body_size_in_bytes(megabytes: float, size: int):
    assert Settings(max_body_mb=megabytes).max_body_bytes == size


def test_keys_are_masked():
    settings = Settings(api_keys=(SECRET,))
    told = [repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump())]
    assert not [text for text in told if SECRET in text]
    assert settings.api_keys[0].get_secret_value() == SECRET


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": "x"},
        {"allow_credentials": True, "allowed_origins": ["*"]},
        {"unknown": 1},
        {"api_keys": SECRET},
        {"api_keys": {SECRET: 1}},
    ],
)
def test_keys_are_not_in_errors_either(wrong: dict[str, object]):
    """A traceback goes to a log that others read."""
    with pytest.raises(ValidationError) as refusal:
        Settings.model_validate({"api_keys": [SECRET]} | wrong)
    assert SECRET not in str(refusal.value)
    assert SECRET not in repr(refusal.value)


def test_each_front_end_needs_a_place_in_the_engine():
    with pytest.raises(ValidationError, match="--max-inflight 1 is less than --api-server-count 2"):
        Settings(max_inflight=1, api_server_count=2)
