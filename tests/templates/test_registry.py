"""The table of known formats: what they are called, and what each writes."""

import pytest

from ochat_serve.errors import StartupError
from ochat_serve.templates.registry import (
    ALIASES,
    HF,
    MODEL_TYPES,
    TEMPLATES,
    canonical,
    model_type_of_name,
)
from ochat_serve.templates.renderer import TemplateRenderer
from ochat_serve.templates.segments import Literal, Plain
from tests.vocabularies import conversation

CHAT = conversation(
    ("system", " Be kind.\n"), ("user", "Hello"), ("assistant", "Hi"), ("user", " Bye ")
)


def _segments(name, chat):
    """Without the empty ones, which encode to nothing."""
    return [segment for segment in TEMPLATES[name].segments(chat) if segment.text]


def test_the_names_that_settings_and_openchat_json_may_use():
    assert set(TEMPLATES) == {
        "openchat_3.6",
        "openchat_3.5",
        "openchat_v3.2",
        "gemma",
        "chatml",
        "zephyr",
        "llama3_instruct",
        "gemma_it",
    }
    assert dict(ALIASES) == {
        "openchat_v3.2_mistral": "openchat_3.5",
        "openchat_3.5_gemma_new": "gemma",
        "openchat_v3.2_gemma_new": "gemma",
        "chatml_8192": "chatml",
        "zephyr_mistral": "zephyr",
    }
    assert len(MODEL_TYPES) == len(set(MODEL_TYPES)) == len(TEMPLATES) + len(ALIASES) + 1


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_every_name_leads_to_one_format(name):
    assert canonical(name) == ALIASES.get(name, name)
    assert canonical(name) in {*TEMPLATES, HF}


def test_an_unknown_name_is_no_format():
    with pytest.raises(KeyError, match=r"openchat_9\.9"):
        canonical("openchat_9.9")


@pytest.mark.parametrize(
    ("model", "model_type"),
    [
        ("openchat/openchat-3.6-8b-20240522", "openchat_3.6"),
        ("OpenChat-3.6-8B.Q8_0", "openchat_3.6"),
        ("openchat/openchat_3.5", "openchat_3.5"),
        ("openchat/openchat-3.5-1210", "openchat_3.5"),
        ("openchat/openchat-3.5-0106", "openchat_3.5"),
        ("TheBloke/openchat-3.5-0106-AWQ", "openchat_3.5"),
        # The Gemma one is a 3.5 by name, but not by format.
        ("openchat/openchat-3.5-0106-gemma", "gemma"),
        ("openchat/openchat_v3.2", "openchat_v3.2"),
        ("openchat/openchat_v3.2_super", "openchat_v3.2"),
        ("openchat/openchat", HF),
        ("meta-llama/Meta-Llama-3-8B-Instruct", HF),
        ("mistralai/Mistral-7B-Instruct-v0.3", HF),
        ("HuggingFaceH4/zephyr-7b-beta", HF),
        ("google/gemma-7b-it", HF),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", HF),
    ],
)
def test_the_model_type_that_a_name_tells(model, model_type):
    assert model_type_of_name(model) == model_type
    assert model_type_of_name(model.rpartition("/")[2]) == model_type


@pytest.mark.parametrize(
    ("name", "header", "end"),
    [
        ("chatml", "<|im_start|>{}\n", "<|im_end|>"),
        ("zephyr", "<|{}|>\n", "</s>"),
        ("llama3_instruct", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
    ],
)
def test_formats_in_which_every_role_has_a_header(name, header, end):
    assert _segments(name, CHAT) == [
        Literal(header.format("system")),
        Plain("Be kind."),
        Literal(end),
        Literal(header.format("user")),
        Plain("Hello"),
        Literal(end),
        Literal(header.format("assistant")),
        Plain("Hi"),
        Literal(end),
        Literal(header.format("user")),
        Plain(" Bye "),
        Literal(end),
        Literal(header.format("assistant")),
    ]


def test_the_header_of_openchat_3_6():
    assert _segments("openchat_3.6", CHAT)[:8] == [
        Literal("<|start_header_id|>System<|end_header_id|>\n\n"),
        Plain("Be kind."),
        Literal("<|eot_id|>"),
        Literal("<|start_header_id|>"),
        Plain("GPT4 Correct User"),
        Literal("<|end_header_id|>\n\n"),
        Plain("Hello"),
        Literal("<|eot_id|>"),
    ]


@pytest.mark.parametrize(
    ("name", "condition", "end"),
    [
        ("openchat_3.5", "GPT4 Correct", "<|end_of_turn|>"),
        ("openchat_v3.2", "GPT4", "<|end_of_turn|>"),
        ("gemma", "GPT4 Correct", "<end_of_turn>"),
    ],
)
def test_formats_in_which_the_system_text_stands_bare(name, condition, end):
    assert _segments(name, CHAT) == [
        Plain("Be kind."),
        Literal(end),
        Plain(f"{condition} User:"),
        Plain("Hello"),
        Literal(end),
        Plain(f"{condition} Assistant:"),
        Plain("Hi"),
        Literal(end),
        Plain(f"{condition} User:"),
        Plain(" Bye "),
        Literal(end),
        Plain(f"{condition} Assistant:"),
    ]


def test_gemma_it_puts_the_system_text_into_the_first_user_turn():
    assert _segments("gemma_it", CHAT)[:4] == [
        Literal("<start_of_turn>user\n"),
        Plain("Be kind.\n\nHello"),
        Literal("<end_of_turn>"),
        Literal("<start_of_turn>model\n"),
    ]


def test_gemma_it_with_an_assistant_first_keeps_the_order():
    chat = conversation(("system", "Be kind."), ("assistant", "Hi"), ("user", "Hello"))
    assert _segments("gemma_it", chat)[:5] == [
        Literal("<start_of_turn>model\n"),
        Plain("Hi"),
        Literal("<end_of_turn>"),
        Literal("<start_of_turn>user\n"),
        Plain("Be kind.\n\nHello"),
    ]


def test_gemma_it_with_nobody_but_the_system_makes_it_a_user_turn():
    assert _segments("gemma_it", conversation(("system", "Be kind."))) == [
        Literal("<start_of_turn>user\n"),
        Plain("Be kind."),
        Literal("<end_of_turn>"),
        Literal("<start_of_turn>model\n"),
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_condition_is_plain_text_where_a_format_has_one_and_nothing_elsewhere(name):
    told = conversation(("user", "Hello"), condition="Math <s>")
    untold = conversation(("user", "Hello"))
    template = TEMPLATES[name]
    if template.uses_condition:
        roles = template.roles
        assert Plain(f"Math <s> {roles['user']}") in template.segments(told)
        assert Plain(f"Math <s> {roles['assistant']}") in template.segments(told)
    else:
        assert template.segments(told) == template.segments(untold)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_last_message_of_the_assistant_stays_open(name):
    chat = conversation(("user", "Hello"), ("assistant", "Well, "))
    assert TEMPLATES[name].segments(chat)[-1] == Plain("Well, ")


@pytest.mark.parametrize("name", TEMPLATES)
def test_system_messages_are_one_text_wherever_they_stand(name):
    scattered = conversation(
        ("system", " Be kind."), ("user", "Hello"), ("system", "  "), ("system", "Be brief.\n")
    )
    joined = conversation(("system", "Be kind.\n\nBe brief."), ("user", "Hello"))
    assert TEMPLATES[name].segments(scattered) == TEMPLATES[name].segments(joined)


def test_a_vocabulary_without_the_end_of_turn_stops_the_start(mistral):
    with pytest.raises(StartupError) as caught:
        TemplateRenderer(TEMPLATES["chatml"], mistral.tokenizer)
    assert str(caught.value) == (
        "The template chatml ends its turns with <|im_end|>, which this model's tokenizer does "
        "not have. Choose another --model-type."
    )


def test_the_end_of_turn_is_a_stop_token(llama3, mistral, demo):
    assert llama3.registry("openchat_3.6").stop_token_ids == (128009,)
    assert mistral.registry("openchat_3.5").stop_token_ids == (32000,)
    assert mistral.registry("zephyr").stop_token_ids == (2,)
    assert demo.registry("chatml").stop_token_ids == (demo.added["<|im_end|>"],)
