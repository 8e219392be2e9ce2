"""From the bytes of a request's body to a request, or to what is wrong with them.

The bodies come from anyone: what is checked stops at the first fault of each list and object (see `api`), so that a
megabyte of faults costs no more than one of them.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from pydantic_core import ErrorDetails

from .api import Strict
from .gate import RefusalError

_Body = TypeVar("_Body", bound=Strict)

_REFERENCES = "#/components/schemas/{model}"
_AT_ONCE = 1 << 15
"""Bytes of a body that are read in the event loop; what is larger is read in a thread."""

_MOST_NAME = 200
"""Characters of a field's name that an error quotes."""


def body_of(model: type[_Body]) -> Callable[[Request], Awaitable[_Body]]:
    """What reads the body of a request, for FastAPI to depend on.

    FastAPI would do that by itself, but in the event loop, and with an error for every fault there is.
    """

    async def read(request: Request) -> _Body:
        raw = await request.body()
        return parse(model, raw) if len(raw) <= _AT_ONCE else await asyncio.to_thread(parse, model, raw)

    return read


def parse(model: type[_Body], raw: bytes) -> _Body:
    """The request in a body.

    Raises:
        RefusalError: if it is none; the message names the field.
    """
    try:
        value = json.loads(raw)
    except RecursionError as error:
        raise RefusalError(400, "the body is nested too deep") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RefusalError(400, f"the body is not JSON: {error}") from error
    except ValueError as error:  # the one thing that is left: Python reads no integers of thousands of digits
        raise RefusalError(400, "a number in the body has too many digits") from error
    if not isinstance(value, dict):
        raise RefusalError(400, "the body must be a JSON object")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _explained(error.errors(include_url=False, include_input=False)) from error


def described_body(model: type[Strict]) -> dict[str, Any]:
    """How OpenAPI describes an operation that takes such a body."""
    schema = {"$ref": _REFERENCES.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def schemas(*models: type[Strict]) -> dict[str, Any]:
    """The JSON schemas that `described_body` refers to, by their names."""
    _, described = models_json_schema([(model, "validation") for model in models], ref_template=_REFERENCES)
    found: dict[str, Any] = described["$defs"]
    return found


def _explained(errors: Sequence[ErrorDetails]) -> RefusalError:
    """The first thing that is wrong, by the name of its field."""
    if not errors[0]["loc"]:  # a name that has no UTF-8
        return RefusalError(400, f"the body is no JSON object of fields: {errors[0]['msg']}")
    field = errors[0]["loc"][0]
    name = str(field)[:_MOST_NAME]
    # Of a field that may be this or that, each form has an error of its own. What is of the right type and wrong in
    # another way says more than that it is not of another type.
    of_field = [error for error in errors if error["loc"][0] == field]
    first, *others = [error for error in of_field if not error["type"].endswith("_type")] or of_field
    if first["type"] == "extra_forbidden":
        *before, last = first["loc"]
        where = ".".join(filter(None, [_dotted(before), str(last)]))[:_MOST_NAME]
        return RefusalError(400, f"there is no field {where!r} here; leave it out", param=name, code="unknown_field")
    forms = dict.fromkeys(_said(error) for error in (first, *others))
    return RefusalError(400, f"{_dotted(first['loc'])}: {'; or: '.join(forms)}", param=name)


def _said(error: ErrorDetails) -> str:
    if error["type"] == "too_long" and error["ctx"]["max_length"] == 0:
        return "this server has nothing of the kind; leave it empty, or out"
    if error["type"] == "value_error":  # of a check of our own, without pydantic's words before it
        return str(error["ctx"]["error"])
    return error["msg"]


def _dotted(place: Sequence[int | str]) -> str:
    """`messages[0].role`, without the names of the forms that a field may take."""
    path = ""
    for part in place:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int"):
            path += f".{part}" if path else part
    return path[:_MOST_NAME]
