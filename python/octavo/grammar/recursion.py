"""The schemas in a schema, and those that demand themselves again and again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Keywords whose values are a schema, a list of them, and a mapping of them.
ONE = frozenset({"additionalProperties", "items"})
LIST = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
MAP = frozenset({"properties", "patternProperties"})


def children(schema: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The schemas right below one, definitions first: of each what it is in, and its key there."""
    for key, item in sorted(schema.items(), key=lambda each: each[0] != "$defs"):
        if key in LIST:
            yield from ((item, index) for index in range(len(item)))
        elif key in MAP or key == "$defs":
            yield from ((item, name) for name in item)
        elif key in ONE:
            yield schema, key


def ending_definitions(definitions: Mapping[str, Any]) -> set[str]:
    """The definitions that some finite text meets, collected from the simple ones upwards."""
    ending: set[str] = set()
    while True:
        more = {n for n, s in definitions.items() if n not in ending and _ends(s, ending)}
        if not more:
            return ending
        ending |= more


def endless_part(root: Mapping[str, Any], ending: set[str]) -> Mapping[str, Any] | None:
    """A schema that demands itself again and again, so that no finite text meets it; or None."""
    schema: Any = root
    while not _ends(schema, ending):
        below = [child for child in _demanded(schema) if not _ends(child, ending)]
        if not below:
            return schema if isinstance(schema, Mapping) and "$ref" in schema else None
        schema = below[0]
    return None


def cut_endless(root: Mapping[str, Any], ending: set[str]) -> None:
    """Write false for references to what no finite text meets, so that no text begins it."""
    definitions = root.get("$defs", {})
    met = {f"#/$defs/{name}" for name in ending if definitions[name] is not False}
    waiting: list[Any] = [root]
    while waiting:
        for holder, key in children(waiting.pop()):
            below = holder[key]
            if isinstance(below, Mapping) and "$ref" in below and below["$ref"] not in met:
                holder[key] = False
            elif isinstance(below, Mapping):
                waiting.append(below)


def _ends(schema: Any, ending: set[str]) -> bool:
    if not isinstance(schema, Mapping):
        return True  # that nothing meets false is another error
    reference = schema.get("$ref")
    if reference is not None and reference.removeprefix("#/$defs/") not in ending:
        return False
    choices = [schema[key] for key in ("anyOf", "oneOf") if schema.get(key)]
    if not all(any(_ends(each, ending) for each in choice) for choice in choices):
        return False
    return all(_ends(child, ending) for child in _demanded(schema))


def _demanded(schema: Mapping[str, Any]) -> list[Any]:
    """Schemas that some part of every text must meet, as far as is plain to see."""
    found = list(schema.get("allOf", ()))
    if schema.get("type") in ("object", ["object"]):
        properties, required = schema.get("properties", {}), schema.get("required", ())
        found += [properties[name] for name in required if name in properties]
    count = schema.get("minItems", 0)
    if schema.get("type") in ("array", ["array"]) and isinstance(count, int) and count > 0:
        first = schema.get("prefixItems", [])
        found += first[:count]
        if count > len(first) and "items" in schema:
            found.append(schema["items"])
    return found
