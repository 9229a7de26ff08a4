"""Bodies that are no JSON, or JSON that is no chat request; now and then one that is, without a
grammar, of which the simulated executor knows nothing.  All end after some tokens.  The same ones
each time."""

import itertools
import random
from collections.abc import Iterator

from ochat_serve.chat_request import REFUSED, REFUSED_IN_MESSAGES
from ochat_serve.protocol.chat import ChatCompletionRequest

_NO_UTF8 = "\udcff"  # how Python writes a byte that is no UTF-8
# JSON as it is written, much of it wrong
VALUES = (
    "null", "true", "false", "0", "-0", "-1", "1", "2", "3.0", "1.5", "-1.5", "1e2", "1E+2",
    "1e400", "-1e400", "1e-400", "0.1e1", "NaN", "Infinity", "-Infinity", "9" * 400, "-" + "9" * 30,
    "1" + "0" * 5_000, str(2**31 - 1), str(2**31), str(2**32), str(2**53 + 1), str(2**63 - 1),
    str(2**63), str(-(2**63) - 1), str(2**64), "01", "+1", ".5", "1.", "0x10", "1_000", "--1", "1e",
    "tru", "True", "None", "undefined", "'x'", '""', '" "', '"x"', '"1"', '"true"', '"user"',
    '"auto"', '"\\u0000"', '"\\n"', '"\n"', '"\t"', '"\\x"', '"\\u12"', '"\\ud800"',
    '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"\ufeff"', '"\u202e"', '"\U0001f950"', '"<|eot_id|>"',
    '"x', 'x"', f'"{_NO_UTF8}"', '"' + "x" * 5_000 + '"', '"' + "\\u0041" * 1_000 + '"', "[]",
    "[null]", "[[]]", "[1]", "[-1]", "[1.5]", '["x"]', '["x", 1, null]', '[""]',
    '["a","b","c","d","e"]', "[" + "1," * 500 + "1]", "[1,]", "[,1]", "[1 2]",
    "[" * 150 + "]" * 150, "[" * 3_000, "]", "{}", '{"": null}', '{"x": 1}', '{"x": "y"}',
    '{"x": {"x": {"x": []}}}', '{"1": 5}', '{"-1": 5}', '{"1": 1e9}', '{"1": null}',
    '{"999999999": 1}', '{"\\ud800": 1}', '{"x": 1, "x": 2}', "{x: 1}", '{"x"}', '{"x": }',
    '{"type": "text", "text": "x"}', '[{"type": "text"}]', '[{"type": "text", "text": 1}]', "[{}]",
    '[{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]',
    '{"type": "json_schema"}', '[{"role": "user"}]', '[{"role": "user", "content": null}]',
    '[{"role": "tool", "content": "x"}]', '[{"content": "x"}]', '{"include_usage": 1}',
    '{"include_usage": true}', '{"include_usage": null, "x": 1}', '{"x":' * 150 + "1" + "}" * 150,
    "", " ", "/* x */ 1", "// x",
)  # fmt: skip
_NAMES = (
    "", " ", "x", "Messages", "messages ", "max-tokens", "__class__", "model_fields",
    "model_config", "self", "\\u006d\\u0065ssages", "\\u0000", "\\ud800", "\U0001f950", "x" * 5_000,
    "constructor", "__proto__", "$ref", "tools", "cache_salt", "priority", "echo", "best_of",
    "prompt", "input", "request_id", "chat_template",
)  # fmt: skip
FIELDS = tuple(ChatCompletionRequest.model_fields)
_IN_MESSAGE = ("role", "content", "name", "refusal", *REFUSED_IN_MESSAGES)
_IN_PART = ("type", "text", "refusal", "x")
_IN_OPTIONS = ("include_usage", "include_obfuscation", "x")
_SOUND_PART = {"type": '"text"', "text": '"x"'}
_SOUND_MESSAGE = {"role": '"user"', "content": '"x"'}
# Three ways to end soon: a change of one or two of them leaves one.
_SOUND = {"stop": '["sea"]', "max_tokens": "2", "max_completion_tokens": "2"}


def _object(pairs: dict[str, str] | list[tuple[str, str]]) -> str:
    items = pairs.items() if isinstance(pairs, dict) else pairs
    return "{" + ", ".join(f'"{name}": {value}' for name, value in items) + "}"


def _body(messages: str = f"[{_object(_SOUND_MESSAGE)}]", **fields: str) -> str:
    return _object({**_SOUND, "messages": messages, **fields})


def _of_message(**fields: str) -> str:
    return _body(f"[{_object({**_SOUND_MESSAGE, **fields})}]")


def _of_part(**fields: str) -> str:
    return _of_message(content=f"[{_object({**_SOUND_PART, **fields})}]")


def every_value_everywhere() -> Iterator[str]:
    """Each value alone, and as each field of the request and of its parts."""
    yield from VALUES
    for field, value in itertools.product(FIELDS, VALUES):
        yield _body(**{field: value})
    for field, value in itertools.product(_IN_MESSAGE, VALUES):
        yield _of_message(**{field: value})
    for field, value in itertools.product(_IN_PART, VALUES):
        yield _of_part(**{field: value})
    for field, value in itertools.product(_IN_OPTIONS, VALUES):
        yield _body(stream="true", stream_options=_object({field: value}))
    for name in _NAMES:
        yield _body(**{name: "1"})


def _mixed(rng: random.Random) -> str:
    """Some odd fields at once, some of them twice."""
    pairs = [*_SOUND.items(), ("messages", f"[{_object(_SOUND_MESSAGE)}]")]
    for _ in range(rng.randint(2, 5)):
        name = rng.choice((*FIELDS, *FIELDS, *REFUSED, *_NAMES))
        pairs.insert(rng.randint(0, len(pairs)), (name, rng.choice(VALUES)))
    # The last of a name counts.
    return _object([*pairs, *_SOUND.items()])


def _mutated(rng: random.Random) -> str:
    """A sound body, or a mixed one, with some of its characters changed."""
    text = list(_body(stream=rng.choice(("true", "false"))) if rng.random() < 0.7 else _mixed(rng))
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(text))
        text[at : at + rng.choice((0, 0, 1, 1, 8))] = rng.choice('{}[]:,"\\ \0\n0e-.tn' + _NO_UTF8)
    return "".join(text[: rng.randint(0, len(text))] if rng.random() < 0.1 else text)


def json_inputs(count: int, seed: int) -> Iterator[bytes]:
    """So many bodies: every value everywhere, as far as there is room, then mixtures."""
    rng = random.Random(seed)
    more = (rng.choice((_mixed, _mutated))(rng) for _ in itertools.count())
    for text in itertools.islice(itertools.chain(every_value_everywhere(), more), count):
        yield text.encode("utf-8", "surrogateescape")
