"""What `GET /openapi.json` says: FastAPI's document, with the bodies that are parsed by hand.

Route.body, .query, .reply, .describe.body ─► requestBody, parameters, responses ─► clients
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from raywards.schemas import ErrorBody
from raywards.serve.dialects import Route

_REF = "#/components/schemas/{model}"
_KEY = "key"
_ERROR_STATUSES = (400, 401, 404, 408, 413, 415, 422, 424, 429, 500, 503, 504)


def described(sharing: Sequence[Route]) -> dict[str, Any]:
    """What FastAPI is told of the routes that share a path: keywords of `add_api_route`."""
    bodies = [{"$ref": _REF.format(model=route.body.__name__)} for route in sharing]
    extra: dict[str, Any] = {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": bodies[0] if len(bodies) == 1 else {"oneOf": bodies}}
            },
        }
    }
    parameters = [one for route in sharing if route.query for one in _parameters(route.query)]
    if parameters:
        extra["parameters"] = parameters
    told: dict[str, Any] = {
        "model": reduce(or_, (route.reply for route in sharing)),
        "description": "The rewards.",
    }
    if any(route.lines for route in sharing):
        told["content"] = {"application/x-ndjson": {"schema": {"type": "string"}}}
    # The last describes what is wrong before it is known whose body it is.
    error = reduce(or_, dict.fromkeys(route.describe.body for route in sharing))
    return {
        "description": "\n\n".join(route.answer.__doc__ or "" for route in sharing),
        "responses": {200: told, **{status: {"model": error} for status in _ERROR_STATUSES}},
        "openapi_extra": extra,
    }


def keyless() -> dict[str, Any]:
    """`openapi_extra` of a route that never asks for a key."""
    return {"security": []}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that is no dialect's."""
    return {status: {"model": ErrorBody} for status in statuses}


def document(app: FastAPI, routes: Sequence[Route], *, with_key: bool) -> dict[str, Any]:
    """The whole of it, made once; `with_key`: a key is asked for."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            servers=app.servers,
        )
        components = schema.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        for route in routes:
            body = route.body.model_json_schema(ref_template=_REF)
            schemas.update(body.pop("$defs", {}))
            schemas[route.body.__name__] = _nullable(body) if route.null_is_absent else body
        components["securitySchemes"] = {_KEY: {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = schema
    return app.openapi_schema | ({"security": [{_KEY: []}]} if with_key else {})


def _nullable(body: dict[str, Any]) -> dict[str, Any]:
    """With null for every field that may be left out."""
    required = body.get("required", ())
    properties = {
        name: one if name in required else _or_null(one) for name, one in body["properties"].items()
    }
    return body | {"properties": properties}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    null = {"type": "null"}
    if null in schema.get("anyOf", ()) or not {"type", "anyOf", "$ref", "const"} & set(schema):
        return schema
    about = {"default", "description", "title"} & set(schema)
    rest = {key: value for key, value in schema.items() if key not in about}
    return {"anyOf": [rest, null]} | {key: schema[key] for key in sorted(about)}


def _parameters(query: type[BaseModel]) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in query.model_json_schema()["properties"].items()
    ]
