"""The known prompt formats: one row each.

The OpenChat rows give the token ids of the reference (ochat 3.6.1); so do the turns of the
other rows.  Where the reference has no header for a system turn and the model's own format
has one (ChatML, Zephyr, Llama-3), ours is the model's own.
"""

import re
from types import MappingProxyType

from ochat_serve.templates.turns import OPENCHAT, Role, TurnTemplate

HF = "hf"


def _names(system: str, user: str, assistant: str) -> MappingProxyType[Role, str]:
    return MappingProxyType({"system": system, "user": user, "assistant": assistant})


_LOWER = _names("system", "user", "assistant")
_TITLE = _names("System", "User", "Assistant")
_TITLE_COLON = _names("System:", "User:", "Assistant:")

_ROWS = (
    TurnTemplate(
        name="openchat_3.6",
        before="<|start_header_id|>",
        roles=_TITLE,
        after="<|end_header_id|>\n\n",
        end_of_turn="<|eot_id|>",
        condition="GPT4 Correct",
        name_pattern=r"openchat[-_]?3\.6",
        default_temperature=0.7,
        owned_by=OPENCHAT,
    ),
    TurnTemplate(
        name="gemma",
        aliases=("openchat_3.5_gemma_new", "openchat_v3.2_gemma_new"),
        roles=_TITLE_COLON,
        end_of_turn="<end_of_turn>",
        condition="GPT4 Correct",
        system="bare",
        name_pattern=r"openchat[-_]?3\.5.*gemma",
        default_temperature=0.7,
        owned_by=OPENCHAT,
    ),
    TurnTemplate(
        name="openchat_3.5",
        aliases=("openchat_v3.2_mistral",),
        roles=_TITLE_COLON,
        end_of_turn="<|end_of_turn|>",
        condition="GPT4 Correct",
        system="bare",
        name_pattern=r"openchat[-_]?3\.5",
        default_temperature=0.7,
        owned_by=OPENCHAT,
    ),
    TurnTemplate(
        name="openchat_v3.2",
        roles=_TITLE_COLON,
        end_of_turn="<|end_of_turn|>",
        condition="GPT4",
        system="bare",
        name_pattern=r"openchat[-_]?v3\.2",
        max_model_len=4096,
        default_temperature=0.7,
        owned_by=OPENCHAT,
    ),
    TurnTemplate(
        name="chatml",
        aliases=("chatml_8192",),
        before="<|im_start|>",
        roles=_LOWER,
        after="\n",
        end_of_turn="<|im_end|>",
    ),
    TurnTemplate(
        name="zephyr",
        aliases=("zephyr_mistral",),
        before="<|",
        roles=_LOWER,
        after="|>\n",
        end_of_turn="</s>",
    ),
    TurnTemplate(
        name="llama3_instruct",
        before="<|start_header_id|>",
        roles=_LOWER,
        after="<|end_header_id|>\n\n",
        end_of_turn="<|eot_id|>",
    ),
    TurnTemplate(
        name="gemma_it",
        before="<start_of_turn>",
        roles=_names("", "user", "model"),
        after="\n",
        end_of_turn="<end_of_turn>",
        system="first_user",
    ),
)

TEMPLATES: MappingProxyType[str, TurnTemplate] = MappingProxyType({row.name: row for row in _ROWS})
ALIASES: MappingProxyType[str, str] = MappingProxyType(
    {alias: row.name for row in _ROWS for alias in row.aliases}
)
MODEL_TYPES = (*TEMPLATES, *ALIASES, HF)


def canonical(model_type: str) -> str:
    """The registry's own name for a model type.  Raises KeyError for an unknown one."""
    name = ALIASES.get(model_type, model_type)
    if name != HF and name not in TEMPLATES:
        raise KeyError(model_type)
    return name


def model_type_of_name(model: str) -> str:
    """The model type that a model's name tells, ``hf`` where it tells none."""
    for row in _ROWS:
        if row.name_pattern and re.search(row.name_pattern, model, re.IGNORECASE):
            return row.name
    return HF
