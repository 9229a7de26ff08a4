"""What no server should compile, and what it should not use although it compiles.

Each is a request's fields, and words of the 400 that it gets.
"""

from typing import Any

# Compiles in a millisecond; the first mask takes minutes.
SLOW = "((((([a-z]{0,50}){0,50}){0,50}){0,50}){0,50}){0,50}"
COSTLY = "more time or memory"
NO_ANSWER = "no answer fits"


def schema(inner: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "hostile", "schema": inner}}
    return {"response_format": form}


def structured(**fields: Any) -> dict[str, Any]:
    return {"structured_outputs": fields}


def string(**keywords: Any) -> dict[str, Any]:
    return schema({"type": "string", **keywords})


def nested(levels: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        inner = {"type": "object", "properties": {"a": inner}, "required": ["a"]}
    return inner


def rules(count: int) -> str:
    """A grammar whose shortest text is 2 to the power of ``count`` characters."""
    lines = [f"r{number} ::= r{number + 1} r{number + 1}" for number in range(count)]
    return "\n".join(["root ::= r0", *lines, f'r{count} ::= "z" | ""'])


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "regex: nested repetition": (structured(regex=SLOW), COSTLY),
    "regex: the same far behind": (structured(regex="[a-z]{5000}" + SLOW), COSTLY),
    "regex: optional groups": (structured(regex="((a?){40}){40}" * 20 + "a{30}b"), COSTLY),
    "regex: a thousand parentheses": (structured(regex="(" * 1500 + "a" + ")" * 1500), "Nest"),
    "regex: unbalanced": (structured(regex="(((("), "not closed"),
    "regex: lookahead": (structured(regex="(?=a)b"), "Lookahead"),
    "regex: backreference": (structured(regex=r"(a)\1"), "Backreference"),
    "regex: nothing matches": (structured(regex=r"[^\s\S]"), NO_ANSWER),
    "regex: too long": (structured(regex="a" * 5_000), "at most 4096"),
    "grammar: ambiguous recursion": (structured(grammar='root ::= "a" | root root'), COSTLY),
    "grammar: the same far behind": (
        structured(grammar='root ::= [a-z]{5000} s\ns ::= "a" | s s | s s s'),
        COSTLY,
    ),
    "grammar: doubling": (structured(grammar=rules(40)), COSTLY),
    "grammar: repeated repetition": (
        structured(grammar='root ::= ("a"{1,10000}){1,10000}'),
        COSTLY,
    ),
    "grammar: endless left recursion": (structured(grammar='root ::= root "a"'), NO_ANSWER),
    "grammar: itself": (structured(grammar="root ::= root"), NO_ANSWER),
    "grammar: undefined rule": (structured(grammar="root ::= foo"), "not defined"),
    "grammar: 1 MB": (structured(grammar='root ::= "' + "a" * 1_000_000 + '"'), "at most 32768"),
    "grammar: no grammar": (structured(grammar="::= ::="), "EBNF"),
    "grammar: Lark": (structured(grammar='start: "a"'), "EBNF"),
    "choice: 1 MB": (structured(choice=["a" * 1_000_000]), "at most 32768"),
    "schema: 1 MB": (schema({"enum": ["x" * 1_000_000]}), "at most 131072"),
    "schema: deep": (schema(nested(60)), "32 levels"),
    "schema: itself": (schema({"$ref": "#"}), NO_ANSWER),
    "schema: references in a ring": (
        schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#"}),
        NO_ANSWER,
    ),
    "schema: elsewhere": (schema({"$ref": "http://127.0.0.1/x.json"}), "'$ref'"),
    "schema: a pattern": (string(pattern=SLOW), COSTLY),
    "schema: optional properties": (
        schema({"type": "object", "properties": {f"p{n}": {} for n in range(3_000)}}),
        COSTLY,
    ),
    "schema: longer than the longest": (string(minLength=3, maxLength=2), "'minLength'"),
    "schema: less than nothing": (string(minLength=-1), "whole number"),
    "schema: unknown type": (schema({"type": "strin"}), "'type'"),
    "schema: not": (schema({"type": "integer", "not": {"const": 1}}), "'not'"),
    "schema: if": (schema({"type": "integer", "if": {"minimum": 5}, "then": {}}), "'if'"),
    "schema: uniqueItems": (schema({"type": "array", "uniqueItems": True}), "'uniqueItems'"),
    "schema: multipleOf": (schema({"type": "number", "multipleOf": 0.5}), "'multipleOf'"),
    "schema: allOf": (schema({"allOf": [{"type": "string"}, {"maxLength": 2}]}), "'allOf'"),
}
