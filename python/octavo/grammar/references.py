"""Where the references of a JSON schema lead, within the document: none is ever fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote, urldefrag, urljoin

_ROOT = "octavo:///schema"
# Keywords whose values may look like schemas and are none.
_DATA = frozenset({"const", "enum", "default", "examples"})


class Place(NamedTuple):
    """A part of the document: the JSON value, its JSON pointer, and the URI that it is read in."""

    value: Any
    pointer: str
    base: str

    def child(self, *keys: str | int) -> Place:
        """The place below these keys."""
        value, pointer, base = self
        for key in keys:
            value = value[key]
            pointer += f"/{escape(str(key))}"
            base = _own_base(value, base)
        return Place(value, pointer, base)


def escape(key: str) -> str:
    """A key as JSON pointers write it (RFC 6901)."""
    return key.replace("~", "~0").replace("/", "~1")


class References:
    """The resources ("$id") and anchors of one document."""

    def __init__(self, document: Any) -> None:
        self.root = Place(document, "", _own_base(document, _ROOT))
        self._resources: dict[str, Place] = {}
        self._anchors: dict[str, Place] = {}
        for place in _places(self.root):
            if not place.pointer or "$id" in place.value or "id" in place.value:
                self._resources.setdefault(place.base, place)
            for name in ("$anchor", "$dynamicAnchor", "$id", "id"):
                anchor = place.value.get(name)
                if isinstance(anchor, str):
                    anchor = f"#{anchor}" if name.endswith("nchor") else anchor
                    if anchor.startswith("#"):
                        self._anchors.setdefault(place.base + anchor, place)
        self._resources.setdefault(_ROOT, self.root)

    def resolve(self, reference: str, place: Place) -> Place:
        """Where a "$ref" at `place` leads. Raises ValueError where that is nowhere in here."""
        uri, fragment = urldefrag(urljoin(place.base, reference))
        target = self._resources.get(uri or place.base)
        if target is None:
            raise ValueError("it leads out of the schema, and nothing is fetched")
        if not fragment:
            return target
        if not fragment.startswith("/"):
            found = self._anchors.get(f"{target.base}#{fragment}")
            if found is None:
                raise ValueError("there is no such anchor")
            return found
        for key in fragment[1:].split("/"):
            key = unquote(key).replace("~1", "/").replace("~0", "~")
            is_list = isinstance(target.value, list)
            try:
                target = target.child(int(key) if is_list else key)
            except (LookupError, TypeError, ValueError):
                raise ValueError("there is nothing at this place") from None
        return target


def _own_base(value: Any, base: str) -> str:
    if not isinstance(value, Mapping):
        return base
    own = value.get("$id", value.get("id"))
    if not isinstance(own, str) or own.startswith("#"):
        return base
    return urldefrag(urljoin(base, own))[0]


def _places(root: Place) -> Iterator[Place]:
    """Every object that may be a schema."""
    left = [root] if isinstance(root.value, (Mapping, list)) else []
    while left:
        place = left.pop()
        if isinstance(place.value, Mapping):
            yield place
            keys: list[Any] = [key for key in place.value if key not in _DATA]
        else:
            keys = list(range(len(place.value)))
        children = [place.child(key) for key in keys]
        left += [each for each in children if isinstance(each.value, (Mapping, list))]
