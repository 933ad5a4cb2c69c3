"""The parts of Cog's OpenAPI document that are the same for every model: routes and envelopes.

Inputs and outputs, which depend on the model, are in `serving.schema`.
"""

from typing import Any

Json = dict[str, Any]


def title(name: str) -> str:
    """Cog's title of a parameter: `num_outputs` is `Num Outputs`."""
    return " ".join(word[:1].upper() + word[1:] for word in name.split("_"))


def ref(component: str) -> Json:
    """A reference to one of the document's components."""
    return {"$ref": f"#/components/schemas/{component}"}


def text(name: str, **more: str) -> Json:
    """A titled string."""
    return {"title": title(name), "type": "string", **more}


def record(name: str, properties: Json, required: list[str] | None = None) -> Json:
    """A titled object. OpenAPI does not allow an empty list of required properties."""
    schema: Json = {"title": name, "type": "object", "properties": properties}
    return {**schema, "required": required} if required else schema


STATUS_AND_ERRORS: Json = {
    "Status": {
        "title": "Status",
        "description": "An enumeration.",
        "type": "string",
        "enum": ["starting", "processing", "succeeded", "canceled", "failed"],
    },
    "HTTPValidationError": record(
        "HTTPValidationError",
        {"detail": {"title": "Detail", "type": "array", "items": ref("ValidationError")}},
    ),
    "ValidationError": record(
        "ValidationError",
        {
            "loc": {
                "title": "Location",
                "type": "array",
                "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
            },
            "msg": text("message"),
            "type": text("error_type"),
        },
        ["loc", "msg", "type"],
    ),
}


def envelopes(noun: str, inputs: str, output: str) -> Json:
    """The request and the reply of one mode (`Prediction` or `Training`).

    `inputs` and `output` are names of components.
    """
    texts = ("id", "version", "status", "error", "logs")
    times = ("created_at", "started_at", "completed_at")
    reply = {
        "input": ref(inputs),
        "output": ref(output),
        **{name: text(name) for name in texts},
        **{name: text(name, format="date-time") for name in times},
        "metrics": {"title": "Metrics", "type": "object"},
    }
    return {
        f"{noun}Request": record(f"{noun}Request", {"id": text("id"), "input": ref(inputs)}),
        f"{noun}Response": record(f"{noun}Response", reply),
    }


def server_routes() -> Json:
    """The routes that do not depend on the mode."""
    return {
        "/": {"get": _operation("Root", "root__get", {})},
        "/health-check": {"get": _operation("Healthcheck", "healthcheck_health_check_get", {})},
    }


def mode_routes(verb: str, noun: str) -> Json:
    """The two routes of one mode: run, and cancel by id."""
    plural, run_id = f"{noun.lower()}s", f"{noun.lower()}_id"
    run = _operation(verb.capitalize(), f"{verb}_{plural}_post", ref(f"{noun}Response"))
    run["description"] = f"Run a single {noun.lower()} on the model"
    run["requestBody"] = _json_body(ref(f"{noun}Request"))
    cancel = _operation("Cancel", f"cancel_{plural}__{run_id}__cancel_post", {})
    cancel["parameters"] = [
        {"name": run_id, "in": "path", "required": True, "schema": text(run_id)}
    ]
    for operation in (run, cancel):
        operation["responses"]["422"] = {
            "description": "Validation Error",
            **_json_body(ref("HTTPValidationError")),
        }
    return {f"/{plural}": {"post": run}, f"/{plural}/{{{run_id}}}/cancel": {"post": cancel}}


def _operation(summary: str, operation_id: str, reply: Json) -> Json:
    responses = {"200": {"description": "Successful Response", **_json_body(reply)}}
    return {"summary": summary, "operationId": operation_id, "responses": responses}


def _json_body(schema: Json) -> Json:
    return {"content": {"application/json": {"schema": schema}}}
