"""What each parameter of a chat request means: one row per parameter, per value that differs.

The list of parameters is the OpenAI SDK's own, so a parameter that it learns is noticed here.
"""

import json
from dataclasses import replace
from typing import Any

import pytest
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsBase,
    CompletionCreateParamsStreaming,
)

from ochat_serve.chat_request import (
    MAX_NAMED_IGNORED,
    REFUSED,
    REFUSED_IN_MESSAGES,
    Limits,
    ReplyForm,
    check_sampling,
    conversation,
    ignored_fields,
    refuse_unserved,
    reply_form,
    sampling_options,
)
from ochat_serve.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from ochat_serve.generation import ChatTurn, Conversation, SamplingOptions
from ochat_serve.protocol.chat import ChatCompletionRequest

LIMITS = Limits(
    max_model_len=100,
    vocab_size=1_000,
    max_n=8,
    max_places=8,
    default_temperature=0.7,
    template_stop_ids=(7,),
    stream_interval=3,
)
PROMPT_TOKENS = 10
ROOM = 90
# What is generated for a request that names nothing but messages.
DEFAULT = SamplingOptions(max_tokens=ROOM, temperature=0.7, stop_token_ids=(7,), stream_interval=32)
USER = [{"role": "user", "content": "hi"}]


def request(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate_json(json.dumps({"messages": USER} | fields))


def meaning(fields: dict[str, Any]) -> tuple[SamplingOptions, ReplyForm]:
    """Everything that a request is put through before its prompt exists, and after."""
    asked = request(**fields)
    refuse_unserved(asked)
    form = reply_form(asked)
    check_sampling(asked, LIMITS)
    return sampling_options(asked, LIMITS, PROMPT_TOKENS), form


def ignored(*, uses_condition: bool = True, **fields: Any) -> list[str]:
    return ignored_fields(request(**fields), uses_condition=uses_condition)


# Parameters that shape the generation: the API's defaults, then other values with their effect.
SAMPLING: dict[str, tuple[list[Any], list[tuple[Any, dict[str, Any]]]]] = {
    "frequency_penalty": ([0], [(-2, {"frequency_penalty": -2.0}), (2, {"frequency_penalty": 2})]),
    "presence_penalty": ([0], [(-2, {"presence_penalty": -2.0}), (0.5, {"presence_penalty": 0.5})]),
    "logit_bias": (
        [{}],
        [
            ({"5": -100, "6": 0.5}, {"logit_bias": {5: -100.0, 6: 0.5}}),
            ({"0": 1, "999": 1, "007": 2}, {"logit_bias": {0: 1, 999: 1, 7: 2}}),
        ],
    ),
    "logprobs": ([False], [(True, {"logprobs": 0})]),
    "top_logprobs": ([], []),  # needs logprobs: see below
    "max_tokens": ([], [(1, {"max_tokens": 1}), (ROOM, {}), (ROOM + 1, {}), (10**4000, {})]),
    "max_completion_tokens": ([], [(1, {"max_tokens": 1}), (ROOM + 1, {})]),
    "n": ([1], [(8, {"n": 8})]),
    "seed": ([], [(0, {"seed": 0}), (-1, {"seed": -1}), (2**63 - 1, {"seed": 2**63 - 1})]),
    "stop": (
        [[]],
        [
            ("x", {"stop": ("x",)}),
            (["x"], {"stop": ("x",)}),
            (["d", "c", "b", "a"], {"stop": ("d", "c", "b", "a")}),
            (" \n", {"stop": (" \n",)}),
        ],
    ),
    "temperature": ([0.7], [(0, {"temperature": 0.0}), (2, {"temperature": 2.0})]),
    # No nucleus is smaller than the likeliest token alone.
    "top_p": ([1], [(0.5, {"top_p": 0.5}), (0, {"temperature": 0.0, "top_p": 1.0})]),
    # Extensions
    "top_k": ([0, -1], [(50, {"top_k": 50})]),
    "min_p": ([0], [(0.05, {"min_p": 0.05})]),
    "repetition_penalty": ([1], [(1.1, {"repetition_penalty": 1.1})]),
    "min_tokens": ([0], [(5, {"min_tokens": 5}), (ROOM, {"min_tokens": ROOM})]),
    "ignore_eos": ([False], [(True, {"ignore_eos": True, "stop_token_ids": ()})]),
    "stop_token_ids": (
        [[], [7]],
        [([5, 7, 5, 999], {"stop_token_ids": (7, 5, 999)}), ([0], {"stop_token_ids": (7, 0)})],
    ),
    "skip_special_tokens": ([True], [(False, {"skip_special_tokens": False})]),
}
# Parameters that shape the answer's form or its log line.
FORM: dict[str, tuple[list[Any], list[tuple[Any, dict[str, Any]]]]] = {
    "stream": ([False], [(True, {"stream": True})]),
    "stream_options": ([], []),  # needs stream: see below
    "metadata": ([], [({"k": "v"}, {"metadata": {"k": "v"}}), ({}, {"metadata": {}})]),
    "model": (["any"], []),
    "service_tier": (["auto", "default", "flex", "scale", "priority", "fast"], []),
    "user": (["", "u"], []),
    "safety_identifier": (["", "s"], []),
    "condition": (["", "Math Correct"], []),
    # What they ask for is another module's: ``constraint``.
    "response_format": ([{"type": "text"}, {"type": "json_object"}], []),
    "structured_outputs": ([{"regex": "a"}], []),
}
# Parameters that are refused, and the values of each that change nothing.
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
REFUSALS: dict[str, tuple[list[Any], list[Any]]] = {
    "allowed_token_ids": ([[5], []], []),
    "audio": ([{"format": "wav", "voice": "alloy"}], []),
    "bad_words": ([["x"]], [[]]),
    "best_of": ([2, 0], [1]),
    "chat_template": (["{{ messages }}", ""], []),
    "chat_template_kwargs": ([{"enable_thinking": True}], [{}]),
    "function_call": (["auto", {"name": "f"}], ["none"]),
    "functions": ([[{"name": "f"}]], [[]]),
    "guided_choice": ([["a", "b"]], []),
    "guided_grammar": (["root ::= 'a'"], []),
    "guided_json": ([{}], []),
    "guided_regex": (["a+"], []),
    "modalities": ([["audio"], ["text", "audio"], []], [["text"]]),
    "moderation": ([{"model": "omni"}], []),
    "prompt_logprobs": ([0, 1], []),
    "reasoning_effort": (["minimal", "low", "medium", "high", "max"], ["none"]),
    "store": ([True], [False]),
    "tool_choice": (["auto", "required", TOOL], ["none"]),
    "tools": ([[TOOL], []], []),
    "use_beam_search": ([True], [False]),
    "verbosity": (["low", "high"], ["medium"]),
    "web_search_options": ([{}, {"search_context_size": "low"}], []),
}
# Parameters without effect here that do not change what an answer means: the response names them.
NAMED_AS_IGNORED: dict[str, list[Any]] = {
    "parallel_tool_calls": [True, False],
    "prediction": [{"type": "content", "content": "x"}],
    "prompt_cache_key": ["k"],
    "prompt_cache_options": [{"mode": "implicit", "ttl": "30m"}],
    "prompt_cache_retention": ["in_memory", "24h"],
}


def short(value: Any) -> str:
    return str(value)[:40]


def rows(table: dict[str, tuple[list[Any], Any]], column: int) -> list[tuple[Any, ...]]:
    return [(name, value) for name, columns in table.items() for value in columns[column]]


def test_every_parameter_of_the_sdk_has_a_place():
    sdk = CompletionCreateParamsBase.__annotations__.keys()
    sdk |= CompletionCreateParamsStreaming.__annotations__.keys()
    ours = ChatCompletionRequest.model_fields.keys()
    assert "stream" in sdk
    assert len(sdk) >= 37
    places = [ours, REFUSED.keys() | {"tools"}, NAMED_AS_IGNORED.keys()]
    assert {name: sum(name in place for place in places) for name in sdk} == dict.fromkeys(sdk, 1)
    assert NAMED_AS_IGNORED.keys() <= sdk


def test_the_tables_have_every_parameter():
    assert SAMPLING.keys() | FORM.keys() | {"messages"} == ChatCompletionRequest.model_fields.keys()
    assert REFUSALS.keys() == REFUSED.keys() | {"tools"}


def test_the_default():
    assert meaning({}) == (DEFAULT, ReplyForm())
    assert ignored() == []


@pytest.mark.parametrize("name", [*SAMPLING, *FORM, *REFUSALS, *NAMED_AS_IGNORED])
def test_null_changes_nothing(name: str):
    assert meaning({name: None}) == (DEFAULT, ReplyForm())
    assert ignored(**{name: None}) == []


@pytest.mark.parametrize(("name", "value"), rows(SAMPLING | FORM, 0), ids=short)
def test_defaults_change_nothing(name: str, value: Any):
    assert meaning({name: value}) == (DEFAULT, ReplyForm())
    assert ignored(**{name: value}) == []


@pytest.mark.parametrize(
    ("name", "value", "changed"),
    [(name, *row) for name, row in rows(SAMPLING, 1)],
    ids=short,
)
def test_sampling_parameters_arrive(name: str, value: Any, changed: dict[str, Any]):
    assert meaning({name: value}) == (replace(DEFAULT, **changed), ReplyForm())
    assert ignored(**{name: value}) == []


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({"logprobs": True, "top_logprobs": 0}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
        ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_tokens": 6}),
        ({"max_tokens": 6, "max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 1000}, {}),
        ({"max_tokens": 5, "min_tokens": 5}, {"max_tokens": 5, "min_tokens": 5}),
        ({"ignore_eos": True, "stop_token_ids": [5]}, {"ignore_eos": True, "stop_token_ids": (5,)}),
        ({"temperature": 1.5, "top_p": 0}, {"temperature": 0.0}),
        ({"stream": True}, {"stream_interval": 3}),
        ({"stream": True, "n": 2}, {"stream_interval": 3, "n": 2}),
    ],
    ids=short,
)
def test_parameters_together(fields: dict[str, Any], changed: dict[str, Any]):
    assert meaning(fields)[0] == replace(DEFAULT, **changed)


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        *(({name: value}, ReplyForm(**changed)) for name, (value, changed) in rows(FORM, 1)),
        ({"stream": True, "stream_options": {}}, ReplyForm(stream=True)),
        ({"stream": True, "stream_options": {"include_usage": None}}, ReplyForm(stream=True)),
        (
            {"stream": True, "stream_options": {"include_usage": True}},
            ReplyForm(stream=True, include_usage=True),
        ),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            ReplyForm(stream=True, include_obfuscation=True),
        ),
        (
            {"stream": True, "stream_options": {"include_usage": False}, "metadata": {"k": "v"}},
            ReplyForm(stream=True, metadata={"k": "v"}),
        ),
    ],
    ids=short,
)
def test_the_form_of_the_answer(fields: dict[str, Any], form: ReplyForm):
    assert meaning(fields)[1] == form


@pytest.mark.parametrize(("name", "value"), rows(REFUSALS, 0), ids=short)
def test_what_would_change_the_answer_is_refused(name: str, value: Any):
    with pytest.raises(UnsupportedParameter) as refusal:
        meaning({name: value})
    error = refusal.value
    assert (error.status, error.param, error.code) == (400, name, "unsupported_parameter")
    assert error.message == f"This server does not support '{name}'."


@pytest.mark.parametrize(("name", "value"), rows(REFUSALS, 1), ids=short)
def test_harmless_values_of_refused_parameters_are_fine(name: str, value: Any):
    assert meaning({name: value}) == (DEFAULT, ReplyForm())
    assert ignored(**{name: value}) == []


def test_tools_that_may_not_be_used_are_only_named():
    fields = {"tools": [TOOL], "tool_choice": "none"}
    assert meaning(fields) == (DEFAULT, ReplyForm())
    assert ignored(**fields) == ["tools"]


@pytest.mark.parametrize("value", [[], [{"id": "1", "type": "function"}], {"name": "f"}])
@pytest.mark.parametrize("name", REFUSED_IN_MESSAGES)
def test_what_a_template_cannot_say_is_refused_in_messages(name: str, value: Any):
    messages = [*USER, {"role": "assistant", "content": "x", name: value}]
    if REFUSED_IN_MESSAGES[name](value):
        assert meaning({"messages": messages}) == (DEFAULT, ReplyForm())
        assert ignored(messages=messages) == []
        return
    with pytest.raises(UnsupportedParameter) as refusal:
        meaning({"messages": messages})
    assert refusal.value.param == f"messages.[1].{name}"


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in NAMED_AS_IGNORED.items() for value in values],
    ids=short,
)
def test_parameters_without_effect_are_named(name: str, value: Any):
    assert meaning({name: value}) == (DEFAULT, ReplyForm())
    assert ignored(**{name: value}) == [name]


def part(**extra: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": "hi"} | extra]}


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"zeta": 1, "alpha": 0, "mid": False}, ["alpha", "mid", "zeta"]),
        ({"temprature": 1, "nothing": None}, ["temprature"]),
        ({"messages": [USER[0] | {"name": "u"}, USER[0] | {"name": "v"}]}, ["messages.name"]),
        ({"messages": [USER[0] | {"name": None, "refusal": None}]}, []),
        ({"messages": [part(cache_control={"type": "x"})]}, ["messages.content.cache_control"]),
        ({"messages": [part(cache_control=None)]}, []),
        ({"stream": True, "stream_options": {"x": 1, "y": None}}, ["stream_options.x"]),
        ({"store": False, "x": 1}, ["x"]),
        # The same name elsewhere is another field.
        ({"messages": [USER[0] | {"store": False}]}, ["messages.store"]),
        ({"tool_calls": []}, ["tool_calls"]),
    ],
    ids=short,
)
def test_unknown_fields_are_named(fields: dict[str, Any], names: list[str]):
    """Silence hides typos."""
    assert ignored(**fields) == names
    assert meaning(fields)[0].temperature == DEFAULT.temperature


def test_only_so_many_are_named():
    """They go into a header."""
    fields = {f"x{number:04}": 1 for number in range(100)}
    assert ignored(**fields) == sorted(fields)[:MAX_NAMED_IGNORED]


@pytest.mark.parametrize(
    ("condition", "uses_condition", "names"),
    [
        ("Math Correct", True, []),
        ("Math Correct", False, ["condition"]),
        ("", False, []),
        (None, False, []),
    ],
)
def test_a_condition_needs_a_template_that_has_one(
    condition: str | None, uses_condition: bool, names: list[str]
):
    assert ignored(condition=condition, uses_condition=uses_condition) == names


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"n": 9}, "n", "Invalid value for 'n': this server makes at most 8 choices, not 9."),
        (
            {"n": 10**4000},
            "n",
            f"Invalid value for 'n': this server makes at most 8 choices, not 1{'0' * 19}....",
        ),
        (
            {"top_logprobs": 5},
            "top_logprobs",
            "'top_logprobs' is only allowed when 'logprobs' is true.",
        ),
        (
            {"top_logprobs": 0, "logprobs": False},
            "top_logprobs",
            "'top_logprobs' is only allowed when 'logprobs' is true.",
        ),
        (
            {"max_tokens": 4, "min_tokens": 5},
            "min_tokens",
            "'min_tokens' (5) is larger than the most tokens allowed (4).",
        ),
        (
            {"max_tokens": 9, "max_completion_tokens": 4, "min_tokens": 5},
            "min_tokens",
            "'min_tokens' (5) is larger than the most tokens allowed (4).",
        ),
        (
            {"min_tokens": ROOM + 1},
            "min_tokens",
            f"'min_tokens' ({ROOM + 1}) is larger than the room left ({ROOM} tokens).",
        ),
        (
            {"stop_token_ids": [5, 1000]},
            "stop_token_ids",
            "Invalid value for 'stop_token_ids': 1000 is not a token id below 1000.",
        ),
        (
            {"stream_options": {"include_usage": True}},
            "stream_options",
            "'stream_options' is only allowed when 'stream' is true.",
        ),
        (
            {"stream_options": {}, "stream": False},
            "stream_options",
            "'stream_options' is only allowed when 'stream' is true.",
        ),
    ],
    ids=short,
)
def test_what_types_cannot_say(fields: dict[str, Any], param: str, message: str):
    with pytest.raises(InvalidRequest) as refusal:
        meaning(fields)
    assert (refusal.value.param, refusal.value.message) == (param, message)


@pytest.mark.parametrize(
    "token",
    ["-1", "1000", "٣", "５", "²", "+1", "1.0", "1e2", "0x1", "1_0", "Hi", "", " 1", "1 ", "\n"]
    + [digit * 5_000 for digit in "09"],
    ids=short,
)
def test_biases_are_for_token_ids(token: str):
    """Whatever Python's ``int`` makes of it: only ASCII digits name a token."""
    with pytest.raises(InvalidRequest) as refusal:
        meaning({"logit_bias": {"5": 1, token: 1}})
    assert refusal.value.param == "logit_bias"
    assert refusal.value.message.endswith("is not a token id below 1000.")
    assert len(refusal.value.message) < 150


@pytest.mark.parametrize(("prompt_tokens", "room"), [(0, 100), (10, 90), (99, 1)])
def test_the_rest_of_the_context_is_the_room(prompt_tokens: int, room: int):
    assert sampling_options(request(), LIMITS, prompt_tokens).max_tokens == room
    asked = request(max_tokens=room + 1)
    assert sampling_options(asked, LIMITS, prompt_tokens).max_tokens == room


@pytest.mark.parametrize("prompt_tokens", [100, 101, 123_456])
def test_a_prompt_without_room_for_an_answer(prompt_tokens: int):
    with pytest.raises(ContextLengthExceeded) as refusal:
        sampling_options(request(max_tokens=1), LIMITS, prompt_tokens)
    error = refusal.value
    assert (error.status, error.param, error.code) == (400, "messages", "context_length_exceeded")
    # OpenAI's words: clients look for them.
    assert error.message.startswith("This model's maximum context length is 100 tokens. However, ")
    assert f" {prompt_tokens} tokens" in error.message


def turn(role: Any, text: str) -> ChatTurn:
    return ChatTurn(role, text)


@pytest.mark.parametrize(
    ("messages", "turns"),
    [
        ([("user", "hi")], [turn("user", "hi")]),
        ([("user", "")], [turn("user", "")]),
        ([("user", [])], [turn("user", "")]),
        ([("developer", "be brief")], [turn("system", "be brief")]),
        (
            [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v")],
            [turn("system", "s"), turn("user", "u"), turn("assistant", "a"), turn("user", "v")],
        ),
        (
            [("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
            [turn("user", "a\nb")],
        ),
        ([("assistant", [{"type": "refusal", "refusal": "no"}])], [turn("assistant", "no")]),
        (
            [("user", [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}])],
            [turn("user", "a\nb")],
        ),
        ([("user", "<|eot_id|> \n")], [turn("user", "<|eot_id|> \n")]),
    ],
    ids=short,
)
def test_messages_become_turns(messages: list[tuple[str, Any]], turns: list[ChatTurn]):
    asked = request(messages=[{"role": role, "content": content} for role, content in messages])
    assert conversation(asked) == Conversation(tuple(turns))


@pytest.mark.parametrize(
    ("condition", "rendered"), [(None, ""), ("", ""), ("Math Correct", "Math Correct")]
)
def test_the_condition_goes_with_the_conversation(condition: str | None, rendered: str):
    assert conversation(request(condition=condition)).condition == rendered


@pytest.mark.parametrize("message", [{"content": None}, {}, {"content": None, "tool_calls": []}])
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_message_without_text_has_no_meaning(role: str, message: dict[str, Any]):
    """The reference answered 500."""
    with pytest.raises(InvalidRequest) as refusal:
        conversation(request(messages=[*USER, {"role": role} | message]))
    assert refusal.value.param == "messages.[1].content"
    assert refusal.value.message == (
        "Invalid value for 'messages.[1].content': must be a string or a list of text parts, "
        "not null."
    )
