"""One pass over a schema and all that is within it."""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ochat_serve.json_schema.keywords import (
    CHECKS,
    DEFINITIONS,
    DESCRIPTIVE,
    KEYWORDS_OF_TYPE,
    PLAIN_CHAR,
    TYPED,
    WHOLE,
    Path,
    SchemaError,
    at_most,
    is_of,
    must_be_object,
    types_of,
)

MAX_DEPTH = 32  # schemas within schemas; OpenAI takes 10
MAX_PROPERTIES = 5_000  # in all; OpenAI's
MAX_ENUM_VALUES = 1_000  # in all; OpenAI's
MAX_PATTERNS = 16  # in all; each is tried out like a regex of its own


class Checked(NamedTuple):
    """A schema as the compiler is to have it, and the patterns that it came with."""

    text: str
    patterns: list[str]


def checked(text: str) -> Checked:
    """``text`` is a JSON object.  Raises ``SchemaError``.  Takes time for every value in it: some
    ten milliseconds for the largest."""
    schema = json.loads(text)
    patterns = _Check(schema).run()
    return Checked(json.dumps(schema, separators=(",", ":")), patterns)


class _Check:
    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._schemas: set[int] = set()
        self._references: list[tuple[Path, Any]] = []
        self._properties = 0
        self._enum_values = 0
        self._patterns: list[str] = []

    def run(self) -> list[str]:
        todo: list[tuple[Path, Any, int]] = [((), self._root, 1)]
        choices: list[tuple[Path, list[Any]]] = []
        while todo:
            path, schema, depth = todo.pop()
            if depth > MAX_DEPTH:
                raise SchemaError(path, f"the schema is nested more than {MAX_DEPTH} levels deep")
            if schema is True:
                continue
            if not isinstance(schema, dict):
                raise SchemaError(path, "a schema must be an object")
            self._schemas.add(id(schema))
            self._one(path, schema)
            if "oneOf" in schema:
                choices.append((path, schema["oneOf"]))
            todo += [(path + way, inner, depth + 1) for way, inner in _inner(path, schema)]
        for path, target in self._references:
            if id(target) not in self._schemas and target is not True:
                raise SchemaError(path, "'$ref' does not lead to a schema")
        for path, branches in choices:
            if not _disjoint([self._resolved(branch) for branch in branches]):
                raise SchemaError(
                    path,
                    "'oneOf' is only supported between schemas of different types, or between "
                    "objects that differ in the 'const' of a required property; use 'anyOf'",
                )
        return self._patterns

    def _one(self, path: Path, schema: dict[str, Any]) -> None:
        """Everything about one schema but those within it."""
        words = schema.keys() - DESCRIPTIVE - DEFINITIONS
        whole = [word for word in WHOLE if word in words]
        if whole:
            self._alone(path, words, whole[0])
            if whole[0] == "$ref":
                self._references.append((path, self._target(path, schema["$ref"])))
        elif "enum" in words or "const" in words:
            self._values(path, schema, words)
        else:
            self._typed(path, schema, words)

    def _alone(self, path: Path, words: set[str], whole: str) -> None:
        others = sorted(words - {whole})
        if others:
            raise SchemaError(path, f"'{others[0][:64]}' beside '{whole}' is not supported")

    def _target(self, path: Path, reference: Any) -> Any:
        if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
            raise SchemaError(path, "'$ref' must begin with '#/': only this schema is known")
        found: Any = self._root
        for part in reference.split("/")[1:]:
            found = found.get(part) if isinstance(found, dict) else None
        if found is None:
            raise SchemaError(path, f"'$ref' {reference[:100]!r} does not lead to a schema")
        return found

    def _resolved(self, schema: Any) -> Any:
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or "$ref" not in schema:
                return schema
            schema = self._target((), schema["$ref"])
        return None

    def _values(self, path: Path, schema: dict[str, Any], words: set[str]) -> None:
        """``enum`` or ``const``, with ``type`` at most beside it."""
        word = "enum" if "enum" in words else "const"
        self._alone(path, words - {"type"}, word)
        values = schema["enum"] if word == "enum" else [schema["const"]]
        if not isinstance(values, list) or not values:
            raise SchemaError(path, "'enum' must be a list of values")
        self._enum_values += len(values)
        at_most(path, "values in 'enum'", self._enum_values, MAX_ENUM_VALUES)
        if "type" in schema:
            types = types_of(path, schema)
            for value in values:
                if not any(is_of(value, kind) for kind in types):
                    raise SchemaError(path, f"a value in '{word}' is not of its 'type'")

    def _typed(self, path: Path, schema: dict[str, Any], words: set[str]) -> None:
        types = types_of(path, schema)
        for word in sorted(words - {"type"}):
            if word not in TYPED:
                raise SchemaError(path, f"'{word[:64]}' is not supported")
            if not any(word in KEYWORDS_OF_TYPE[kind] for kind in types):
                kinds = [kind for kind, known in KEYWORDS_OF_TYPE.items() if word in known]
                raise SchemaError(path, f"'{word}' needs the type {' or '.join(kinds)}")
            if (check := CHECKS.get(word)) is not None:
                check(path, schema[word])
        if "string" in types:
            self._string(path, schema)
        if "object" in types:
            self._object(path, schema)

    def _string(self, path: Path, schema: dict[str, Any]) -> None:
        given = [word for word in ("pattern", "format", "minLength", "maxLength") if word in schema]
        if len(given) > 1 and given[0] in ("pattern", "format"):
            raise SchemaError(path, f"'{given[1]}' beside '{given[0]}' is not supported")
        if "pattern" in schema:
            self._patterns.append(schema["pattern"])
            at_most(path, "patterns", len(self._patterns), MAX_PATTERNS)
        elif given and given[0] != "format":
            least, most = schema.pop("minLength", 0), schema.pop("maxLength", "")
            if most != "" and least > most:
                raise SchemaError(path, "'minLength' is more than 'maxLength'")
            # The compiler's own way lets control characters into strings of a length.
            schema["pattern"] = f"{PLAIN_CHAR}{{{least},{most}}}"

    def _object(self, path: Path, schema: dict[str, Any]) -> None:
        properties = schema.get("properties", {})
        self._properties += len(properties)
        at_most(path, "properties", self._properties, MAX_PROPERTIES)
        for name in schema.get("required", ()):
            if name not in properties:
                raise SchemaError(path, f"'required' names {name[:64]!r}, which is no property")


def _inner(path: Path, schema: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """The schemas right within ``schema``, with the way to each."""
    for word in ("properties", *DEFINITIONS):
        if word in schema:
            must_be_object(path, word, schema[word])
            yield from (((word, name), inner) for name, inner in schema[word].items())
    for word in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if word in schema:
            inner = schema[word]
            if not isinstance(inner, list) or not inner:
                raise SchemaError(path, f"'{word}' must be a list of schemas")
            if word == "allOf" and len(inner) > 1:
                raise SchemaError(path, "'allOf' of more than one schema is not supported")
            yield from (((word, str(place)), each) for place, each in enumerate(inner))
    for word in ("items", "additionalProperties"):
        if word in schema and schema[word] is not False:
            yield ((word,), schema[word])


def _disjoint(branches: list[Any]) -> bool:
    """Whether no value can fit two of these schemas: then "one of" is "any of"."""
    if not all(isinstance(branch, dict) for branch in branches):
        return False
    types = [types_of((), branch) for branch in branches]
    if all(types):
        flat = ["number" if kind == "integer" else kind for each in types for kind in set(each)]
        if len(set(flat)) == len(flat):
            return True
    tags = [_tags(branch) for branch in branches]
    return any(
        all(name in each for each in tags) and len({each[name] for each in tags}) == len(tags)
        for name in tags[0]
    )


def _tags(schema: dict[str, Any]) -> dict[str, str]:
    """Required properties that can have one value only, and that value."""
    if types_of((), schema) != ["object"]:
        return {}
    properties = schema.get("properties", {})
    found = {}
    for name in schema.get("required", ()):
        inner = properties.get(name)
        if isinstance(inner, dict):
            values = inner.get("enum", [inner["const"]] if "const" in inner else [])
            if len(values) == 1 and isinstance(values[0], str):
                found[name] = values[0]
    return found
