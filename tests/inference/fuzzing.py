"""Malformed requests, made from a server's own OpenAPI description.

A valid request of an endpoint is drawn from its schema, and one thing in it is made wrong so that the description says
it is: a value of another type, beyond a limit, an unknown field, a field that is missing; once, or thousands of times
side by side. Besides, bodies that are no JSON, and heads that ask for what is not there.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Json = Any

JUNK: list[Json] = [
    "", "x", "\u0000", "你好", "\ud800", -1, 0, 1, 2**31, 2**63, -(2**70), 0.5, -1e308, True, False,
    [], [[]], [None], {}, {"a": 1}, [{}], "x" * 3000, [1, "a"], [[1], ["a"]], {"type": "text"},
]  # fmt: skip
WIDE = 2000
"""Faults that a wide value has side by side."""

JUNK += [
    [[]] * WIDE, [1.5] * WIDE, [{}] * WIDE, [None] * WIDE, ["a", 1] * WIDE, [1, "a"] * WIDE, [[1.5]] * WIDE,
    {f"k{number}": 1 for number in range(WIDE)}, [{f"k{number}": 1 for number in range(WIDE)}],
]  # fmt: skip
WRONG_ENDS = ["/", "x", "/../..", "%00", "/%ff"]


@dataclass
class Malformed:
    """A request that has something wrong."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    fault: str = ""


class Description:
    """The part of JSON schema that OpenAPI descriptions of this server use."""

    def __init__(self, openapi: Json, model: str) -> None:
        self._openapi, self._model = openapi, model
        self.bodies = {
            path: self._resolved(methods["post"]["requestBody"]["content"]["application/json"]["schema"])
            for path, methods in openapi["paths"].items()
            if "post" in methods
        }

    def _resolved(self, schema: Json) -> Json:
        if "$ref" in schema:
            return self._openapi["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        return schema

    def accepts(self, schema: Json, value: Json) -> bool:
        """Whether a value is of a schema."""
        schema = self._resolved(schema)
        if "anyOf" in schema:
            return any(self.accepts(one, value) for one in schema["anyOf"])
        if "const" in schema:
            return value == schema["const"]
        if "enum" in schema:
            return value in schema["enum"]
        kind = schema.get("type")
        if kind is None:
            return True
        if kind == "null":
            return value is None
        if kind == "boolean":
            return isinstance(value, bool)
        if kind in ("integer", "number"):
            return self._is_number(schema, value)
        if kind == "string":
            length = len(value) if isinstance(value, str) else -1
            return schema.get("minLength", 0) <= length <= schema.get("maxLength", length)
        if kind == "array":
            return (
                isinstance(value, list)
                and schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
                and all(self.accepts(schema.get("items", {}), one) for one in value)
            )
        assert kind == "object", schema
        return self._is_object(schema, value)

    def _is_number(self, schema: Json, value: Json) -> bool:
        kinds = int if schema["type"] == "integer" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        return (
            value >= schema.get("minimum", value)
            and value <= schema.get("maximum", value)
            and value > schema.get("exclusiveMinimum", value - 1)
            and value < schema.get("exclusiveMaximum", value + 1)
        )

    def _is_object(self, schema: Json, value: Json) -> bool:
        if not isinstance(value, dict) or not set(schema.get("required", ())) <= set(value):
            return False
        if len(value) > schema.get("maxProperties", len(value)):
            return False
        fields, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        for name, one in value.items():
            if name in fields:
                if not self.accepts(fields[name], one):
                    return False
            elif others is False or (others is not True and not self.accepts(others, one)):
                return False
        return True

    def draw(self, schema: Json, random_: random.Random) -> Json:
        """A value of a schema, small."""
        schema = self._resolved(schema)
        if "anyOf" in schema:
            return self.draw(random_.choice(schema["anyOf"]), random_)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return random_.choice(schema["enum"])
        match schema.get("type"):
            case "boolean":
                return random_.random() < 0.5
            case "integer" | "number":
                return max(schema.get("minimum", 1), 1) if "exclusiveMinimum" not in schema else 1
            case "string":
                return "word"
            case "array":
                count = random_.randint(schema.get("minItems", 0), min(2, schema.get("maxItems", 2)))
                return [self.draw(schema.get("items", {}), random_) for _ in range(count)]
            case "object":
                required = schema.get("required", [])
                fields = schema.get("properties", {})
                return {
                    name: self._model if name == "model" else self.draw(one, random_)
                    for name, one in fields.items()
                    if name in required or random_.random() < 0.2
                }
        return None

    def malformed(self, seed: int) -> Iterator[Malformed]:
        """Requests without end."""
        random_ = random.Random(seed)
        while True:
            path = random_.choice(sorted(self.bodies))
            make = random_.choices([self._wrong_value, _broken_text, self._wrong_head], [8, 2, 1])[0]
            request = make(path, random_)
            if request is not None:
                yield request

    def _wrong_value(self, path: str, random_: random.Random) -> Malformed | None:
        schema = self.bodies[path]
        body = self.draw(schema, random_)
        fault = random_.choice(["value", "value", "value", "unknown", "unknowns", "missing", "deep"])
        if fault == "value":
            name = random_.choice(sorted(schema["properties"]))
            body[name] = copy.deepcopy(random_.choice(JUNK))
        elif fault == "unknown":
            body[random_.choice(["echo", "tools", "", "\ud800", "prompt ", "__proto__", "x" * 500])] = 1
        elif fault == "unknowns":
            body |= {f"k{number}": 1 for number in range(WIDE)}
        elif fault == "missing":
            del body[random_.choice(schema["required"])]
        else:
            _replace_within(body, random_)
        if self.accepts(schema, body):
            return None
        return Malformed("POST", path, json.dumps(body).encode(), fault=fault)

    def _wrong_head(self, path: str, random_: random.Random) -> Malformed:
        body = json.dumps(self.draw(self.bodies[path], random_)).encode()
        kind = {"content-type": "application/json"}
        return random_.choice(
            [
                Malformed("POST", path, body, {"content-type": "text/plain"}, "type"),
                Malformed("POST", path, body, {}, "type"),
                Malformed("POST", path, body, {**kind, "origin": "http://evil.example"}, "origin"),
                Malformed("POST", path, body, {**kind, "host": "evil.example"}, "host"),
                Malformed("POST", path, body, {**kind, "content-encoding": "gzip"}, "encoding"),
                Malformed(random_.choice(["GET", "PUT", "DELETE", "PATCH"]), path, b"", {}, "method"),
                Malformed("POST", path + random_.choice(WRONG_ENDS), body, kind, "path"),
            ]
        )  # fmt: skip


def _replace_within(value: Json, random_: random.Random) -> None:
    """Put junk somewhere into the lists and objects of a value."""
    places = value if isinstance(value, dict) else range(len(value))
    if not places:
        return
    place = random_.choice(sorted(places) if isinstance(value, dict) else list(places))
    if isinstance(value[place], dict | list) and value[place] and random_.random() < 0.8:
        _replace_within(value[place], random_)
    else:
        value[place] = copy.deepcopy(random_.choice(JUNK))


def _broken_text(path: str, random_: random.Random) -> Malformed:
    body = b'{"model": "m", "prompt": "a", "messages": [{"role": "user", "content": "b"}]}'
    made = random_.choice(
        [
            lambda: body[: random_.randrange(len(body))],
            lambda: bytes(random_.randrange(256) for _ in range(random_.randrange(50))),
            lambda: b"[" * random_.randrange(1, 50_000),
            lambda: b'{"a":' * random_.randrange(1, 50_000),
            lambda: body + b"}",
            lambda: body.replace(b'"a"', random_.choice([b"NaN", b"-Infinity", b"1e999", b"0x1", b"'a'", b"9" * 5000])),
            lambda: b"\xef\xbb\xbf" + body[:-1],
        ]
    )()
    return Malformed("POST", path, made, fault="text")
