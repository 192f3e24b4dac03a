"""JSON schemas as the grammar library takes them: what it can enforce, and nothing else.

A schema of any draft becomes one without references out of "$defs", annotations, and keywords that
JSON Schema does not know and so ignores. What cannot be enforced is refused with the place, or left
out where the caller is not strict.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from octavo.errors import InvalidArgumentError
from octavo.grammar.recursion import (
    LIST,
    MAP,
    ONE,
    cut_endless,
    ending_definitions,
    endless_part,
)
from octavo.grammar.references import Place, References

MAX_DEPTH = 64  # schemas within schemas
MAX_SCHEMAS = 10_000
MAX_PROPERTIES = 1000  # of one object; the time to compile grows with their square
MAX_VALUES = 10_000  # of an enum
MAX_MULTIPLE = 10_000  # of multipleOf, without the decimal point; the automaton has so many states

FORMATS = frozenset(
    # Others are ignored, as JSON Schema has it.
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]
)
_COUNTS = frozenset(
    ["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"]
)
_PLAIN = frozenset({"type", "required", "pattern"})
# What is not enforced, each with values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "not": (False,),
    "if": (),
    "contains": (),
    "uniqueItems": (False,),
    "propertyNames": (True, {}),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "$dynamicRef": (),
    "$recursiveRef": (),
    "extends": (),
    "disallow": (),
}
_JOINED = frozenset({"allOf", "anyOf", "oneOf", "$ref"})  # more schemas of the same value
_OLD = ("draft-03", "draft-04", "draft-06", "draft-07")  # where nothing counts beside a "$ref"


def problem_at(pointer: str, problem: str) -> InvalidArgumentError:
    """The error about a part of a schema; pointer: its JSON pointer, "" for the root."""
    place = f"at {pointer}" if pointer else "at its root"
    return InvalidArgumentError(f"the JSON schema cannot be followed {place}: {problem}")


class SchemaReader:
    """Reads one schema.

    schema: the result, in which "$ref" only names one of its "$defs". pointers: of each of its
    objects, by its `id`, the JSON pointer in the document.
    """

    def __init__(self, text: str, *, strict: bool, disable_additional_properties: bool) -> None:
        """text: JSON. Raises InvalidArgumentError with the place of what cannot be enforced."""
        document = json.loads(text)
        self.pointers: dict[int, str] = {}
        self._strict = strict
        self._closed = disable_additional_properties
        self._num_schemas = 0
        dialect = document.get("$schema") if isinstance(document, Mapping) else None
        self._is_old = isinstance(dialect, str) and any(name in dialect for name in _OLD)
        self._references = References(document)
        # Of the targets of references, by their pointer and whether they are parts of an object.
        self._names: dict[tuple[str, bool], str] = {}
        self._waiting: list[tuple[str, Place, bool]] = []
        root = self._read(self._references.root, 0)
        if root is False:
            raise problem_at("", "nothing meets false")
        self.schema: dict[str, Any] = root
        definitions: dict[str, Any] = {}
        while self._waiting:
            name, place, is_part = self._waiting.pop()
            definitions[name] = self._read(place, 0, is_part)
        if definitions:
            self.schema["$defs"] = definitions
        ending = ending_definitions(definitions)
        endless = endless_part(self.schema, ending)
        if endless is not None:
            raise problem_at(
                self.pointers.get(id(endless), ""), "its recursion has no end, so no text meets it"
            )
        cut_endless(self.schema, ending)

    def _read(self, place: Place, depth: int, is_part: bool = False) -> Any:
        """is_part: others name more members of the same object, so it stays open for them."""
        value, pointer, _ = place
        if value is False:
            return False
        if value is not True and not isinstance(value, Mapping):
            raise problem_at(pointer, f"this is {_shown(value)}; expected an object or a boolean")
        self._num_schemas += 1
        if self._num_schemas > MAX_SCHEMAS:
            raise problem_at(pointer, f"too large; expected at most {MAX_SCHEMAS} schemas")
        if depth > MAX_DEPTH:
            raise problem_at(pointer, f"nested too deeply; expected at most {MAX_DEPTH} levels")
        found: dict[str, Any] = {}
        self.pointers[id(found)] = pointer
        if value is True:
            return found
        keys = ["$ref"] if self._is_old and "$ref" in value else list(value)
        is_part = self._closed and (is_part or _is_joined(value, keys))
        for key in keys:
            self._read_keyword(found, place, key, depth + 1, is_part and key in _JOINED)
        if self._closed and not is_part and "properties" in found:
            found.setdefault("additionalProperties", False)
        return found

    def _read_keyword(
        self, found: dict[str, Any], place: Place, key: str, depth: int, is_part: bool
    ) -> None:
        item = place.value[key]
        if key in _REFUSED:
            self._refuse(place, key)
        elif key == "$ref":
            found[key] = f"#/$defs/{self._name_target(place, is_part)}"
        elif key in LIST or (key == "items" and isinstance(item, list)):
            if not isinstance(item, list):
                raise problem_at(place.pointer, f'"{key}" is {_shown(item)}; expected a list')
            parts = [self._read(place.child(key, i), depth, is_part) for i in range(len(item))]
            if key == "items":  # as it was before 2020-12
                if "additionalItems" in place.value:
                    found["items"] = self._read(place.child("additionalItems"), depth)
                key = "prefixItems"
            found[key] = parts
        elif key in ONE:
            found[key] = self._read(place.child(key), depth)
        elif key in MAP:
            if not isinstance(item, Mapping):
                raise problem_at(place.pointer, f'"{key}" is {_shown(item)}; expected an object')
            self._check_size(place, key, MAX_PROPERTIES)
            spell = exact_pattern if key == "patternProperties" else str
            found[key] = {spell(name): self._read(place.child(key, name), depth) for name in item}
        elif key in ("enum", "const"):
            if key == "enum":
                self._check_size(place, key, MAX_VALUES)
            if self._can_be_written(place, key):
                found[key] = item
        elif key == "format":
            if item in FORMATS:
                found[key] = item
        elif key in _COUNTS:
            found[key] = int(item) if isinstance(item, float) and item.is_integer() else item
        elif key == "multipleOf":
            _check_multiple(place, item)
            found[key] = item
        elif key in ("exclusiveMinimum", "exclusiveMaximum"):
            _read_exclusive(found, place.value, key)
        elif key in ("minimum", "maximum"):
            is_int64 = item == 2**63 - 1 and place.value.get("type") == "integer"
            limit = item if is_int64 else _inward(item, key)  # llguidance takes it as it is meant
            if key in found and isinstance(limit, (int, float)):  # moved there already
                limit = (max if key == "minimum" else min)(limit, found[key])
            found[key] = limit
        elif key == "pattern" and isinstance(item, str):
            found[key] = exact_pattern(item)
        elif key in _PLAIN:
            found[key] = item

    def _refuse(self, place: Place, key: str) -> None:
        value, item = place.value, place.value[key]
        is_idle = key == "if" and "then" not in value and "else" not in value
        if self._strict and not is_idle and item not in _REFUSED[key]:
            raise problem_at(
                place.pointer,
                f'"{key}" cannot be enforced; leave it out, or ask without strict to ignore it',
            )

    def _can_be_written(self, place: Place, key: str) -> bool:
        """Whether the values of an enum or a const are written as they are.

        llguidance 1.9 reads numbers as float64, and would write another one in their place.
        """
        number = next(filter(_is_rounded, _numbers_in(place.value[key])), None)
        if number is not None and self._strict:
            raise problem_at(
                place.pointer,
                f'"{key}" has {_shown(number)}, which is no float64 and would be rounded; expected '
                f"a string, or ask without strict to ignore it",
            )
        return number is None

    def _name_target(self, place: Place, is_part: bool) -> str:
        reference = place.value["$ref"]
        try:
            target = self._references.resolve(reference, place)
        except (ValueError, TypeError, AttributeError) as error:
            raise problem_at(place.pointer, f'"$ref" is {_shown(reference)}: {error}') from error
        name = self._names.get((target.pointer, is_part))
        if name is None:
            name = self._names[target.pointer, is_part] = f"s{len(self._names)}"
            self._waiting.append((name, target, is_part))
        return name

    def _check_size(self, place: Place, key: str, limit: int) -> None:
        item = place.value[key]
        if isinstance(item, (Mapping, list)) and len(item) > limit:
            raise problem_at(
                place.child(key).pointer, f"{len(item)} entries are too many; expected {limit}"
            )


def _is_joined(value: Mapping[str, Any], keys: list[str]) -> bool:
    """Whether several parts of a schema may name members of the same object."""
    all_of = value["allOf"] if "allOf" in keys else []
    has_many = isinstance(all_of, list) and len(all_of) > 1
    return has_many or sum(key in _JOINED or key == "properties" for key in keys) > 1


def exact_pattern(pattern: str) -> str:
    r"""A pattern whose classes of characters have no U+0000.

    A class that has all control characters, as [^"], is taken by llguidance 1.9 for one that has
    quotation marks and backslashes too, written as escapes.
    """
    pattern = re.sub(r"\\(x00|u0000)-", r"\\x01-", pattern)
    return re.sub(
        r"(\\.)|\[\^(\]?)",
        lambda found: found[1] or (r"[^\x00\]" if found[2] else r"[^\x00"),
        pattern,
        flags=re.DOTALL,
    )


def _check_multiple(place: Place, item: Any) -> None:
    if isinstance(item, (int, float)) and not isinstance(item, bool) and item > 0:
        digits = Decimal(str(item)).normalize().as_tuple().digits
        if int("".join(map(str, digits))) > MAX_MULTIPLE:
            raise problem_at(place.pointer, f'"multipleOf" is {item}; expected at most four digits')


def _read_exclusive(found: dict[str, Any], value: Mapping[str, Any], key: str) -> None:
    """Draft 4 has a switch beside the limit; later ones have the limit itself.

    llguidance 1.9 takes 118 for a number above 118 and below 118.5. So the limit is moved by a
    millionth where it is a whole number; numbers in between are left out.
    """
    plain = "minimum" if key == "exclusiveMinimum" else "maximum"
    limit = value[key]
    if limit is True:
        limit = value.get(plain)
    if isinstance(limit, bool) or limit is None:
        return
    limit = _inward(limit, plain)
    is_whole = isinstance(limit, (int, float)) and abs(limit) < 1e8 and limit == int(limit)
    if not is_whole or value.get("type") == "integer":
        found[key] = limit
        return
    moved = limit + (1e-6 if plain == "minimum" else -1e-6)
    other = found.get(plain, moved)
    tighter = max if plain == "minimum" else min
    found[plain] = tighter(moved, other) if isinstance(other, (int, float)) else other


def _numbers_in(value: Any) -> Iterator[int | float]:
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, (int, float)):
            yield each
        elif isinstance(each, (list, Mapping)):
            waiting += each.values() if isinstance(each, Mapping) else each


def _is_rounded(number: int | float) -> bool:
    try:
        return int(float(number)) != number if isinstance(number, int) else False
    except OverflowError:
        return True


def _inward(limit: Any, plain: str) -> Any:
    """A minimum or maximum that is a whole number, moved to a float64 on its inner side.

    llguidance 1.9 would take the nearest one, also on the outer side. It has no minimum of -2^63.
    """
    if not isinstance(limit, int) or isinstance(limit, bool):
        return limit
    most = 2**63 - 1024
    limit = min(limit, most) if plain == "maximum" else max(limit, -most)
    if abs(limit) > 10**300:
        return limit  # nothing meets it
    near = float(limit)
    if plain == "maximum" and near > limit:
        near = math.nextafter(near, -math.inf)
    if plain == "minimum" and near < limit:
        near = math.nextafter(near, math.inf)
    return int(near)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"
