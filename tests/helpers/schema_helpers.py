"""Random JSON schemas whose texts are short, whatever a model prefers."""

from __future__ import annotations

import random
from typing import Any

WORDS = ["name", "age", "city", "tags", 'é "quoted"', "x/y~z", "größe", "a\\b", "🎉", "_id"]
# Not "date": RFC 3339 has a year 0000, which Python, and so jsonschema, has not.
FORMATS = ["ipv4", "ipv6", "uuid", "email", "time"]
PATTERNS = [
    "^[a-z]{2,5}$",
    "^\\d{3}-\\d{2}$",
    "^(yes|no)\\.?$",
    '^[^"\\\\x]{1,4}$',
    "^é?[A-F0-9]+z$",
]
VALUES: list[Any] = [0, -7, 1.5, True, None, "", "é\n", "🎉", [1, "a"], {"k": [None]}, 'a"b\\c']


def random_schema(rng: random.Random) -> dict[str, Any]:
    """A schema that some text meets, whose texts have a few hundred characters at most."""
    definitions: dict[str, Any] = {}
    schema = _schema(rng, 0, definitions)
    if schema.get("type") != "object" and rng.random() < 0.7:
        schema = _closed({"type": "object", "properties": {"it": schema}, "required": ["it"]})
    return {**schema, "$defs": definitions} if definitions else schema


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "additionalProperties": False}


def _schema(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    simple = [_string, _number, _integer, _fixed]
    makers = simple if depth >= 3 else [*simple, _object, _object, _array, _any_of, _all_of, _ref]
    found = rng.choice(makers)(rng, depth + 1, definitions)
    if rng.random() < 0.2:
        found["description"] = 'with ::= and "quotes" in it'
    return found


def _string(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "string", "format": rng.choice(FORMATS), "maxLength": 40}
    if kind == 1:
        return {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 12}
    low = rng.randrange(4)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(9)}


def _number(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    low = round(rng.uniform(-1000, 1000), rng.randrange(4))
    found: dict[str, Any] = {"type": "number", rng.choice(["minimum", "exclusiveMinimum"]): low}
    found[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.choice([0.5, 3, 1e4])
    return found


def _integer(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    low = rng.randrange(-500, 500)
    found = {"type": "integer", "minimum": low, "maximum": low + rng.choice([2, 60, 10**6])}
    if rng.random() < 0.3:
        found["multipleOf"] = rng.choice([1, 2, 3])
    return found


def _fixed(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    kind = rng.randrange(4)
    if kind == 0:
        return {"const": rng.choice(VALUES)}
    if kind == 1:
        return {"type": rng.choice([["null", "boolean"], "boolean", "null"])}
    return {"enum": rng.sample(VALUES, rng.randrange(1, 5))}


def _object(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randrange(5))
    found: dict[str, Any] = {
        "unknown": "to JSON Schema",
        "type": "object",
        "properties": {name: _schema(rng, depth, definitions) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
    }
    # No names at will: a model that draws at random would never end one.
    if rng.random() < 0.3 and len(found["required"]) == len(names):
        found["patternProperties"] = {"^zz[0-9]$": _integer(rng, depth, definitions)}
        found["maxProperties"] = len(names) + 1
    return _closed(found)


def _array(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    low = rng.randrange(3)
    found = {"type": "array", "minItems": low, "maxItems": low + rng.randrange(3)}
    found["items"] = _schema(rng, depth, definitions)
    if rng.random() < 0.3:
        found["prefixItems"] = [_schema(rng, depth, definitions) for _ in range(2)]
    return found


def _any_of(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    if rng.random() < 0.3:  # disjoint, so that they can be told apart
        return {"oneOf": [{"type": "null"}, _string(rng, depth, definitions), {"type": "boolean"}]}
    return {"anyOf": [_schema(rng, depth, definitions) for _ in range(rng.randrange(1, 4))]}


def _all_of(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    parts = [
        {
            "type": "object",
            "properties": {name: _schema(rng, depth + 1, definitions)},
            "required": [name],
        }
        for name in rng.sample(WORDS, 2)
    ]
    return {"allOf": parts, "maxProperties": 2}


def _ref(rng: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    """A list that is linked: each of its objects may hold the next."""
    name = f"node {len(definitions)}/~"
    pointer = "#/$defs/" + name.replace("~", "~0").replace("/", "~1").replace(" ", "%20")
    definitions[name] = {}
    properties = {
        "value": _integer(rng, depth, definitions),
        "next": {"anyOf": [{"type": "null"}, {"type": "null"}, {"$ref": pointer}]},
    }
    definitions[name] = _closed({"type": "object", "properties": properties, "required": ["value"]})
    return {"$ref": pointer}
