"""The JSON of BigQuery's REST API: errors, table resources, names in paths."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote

import msgspec

from tests.fakes.http1 import Reply
from tests.fakes.rows import Column
from tests.fakes.tables import Table, TableError

_PATH = re.compile(
    r"/bigquery/v2/projects/(?P<project>[^/]+)/datasets"
    r"(?:/(?P<dataset>[^/]+)(?P<tables>/tables(?:/(?P<table>[^/]+)(?P<insert>/insertAll)?)?)?)?"
)
# The call's name, as the service's documentation has it, by what the path names.
_CALLS = {
    ("datasets", "POST"): "datasets.insert",
    ("dataset", "GET"): "datasets.get",
    ("dataset", "DELETE"): "datasets.delete",
    ("tables", "GET"): "tables.list",
    ("tables", "POST"): "tables.insert",
    ("table", "GET"): "tables.get",
    ("table", "PATCH"): "tables.patch",
    ("table", "PUT"): "tables.update",
    ("table", "DELETE"): "tables.delete",
    ("insert", "POST"): "insertAll",
}
_STATUS_NAMES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ALREADY_EXISTS",
    412: "FAILED_PRECONDITION",
    413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}
# What the server writes into a resource; a client's values for these are ignored.
_OWN_KEYS = frozenset(
    {"kind", "etag", "id", "selfLink", "tableReference", "schema", "numRows", "creationTime"}
    | {"lastModifiedTime", "type", "location"}
)


class ApiError(Exception):
    """An error that the service answers with."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class Route:
    """What a request is about."""

    call: str
    project: str
    dataset: str  # project.dataset
    table: str  # project.dataset.table


def route(method: str, target: str) -> Route:
    """Find out what a request is about."""
    path = unquote(target.partition("?")[0])
    match = _PATH.fullmatch(path)
    if match is None:
        raise ApiError(404, "notFound", f"The requested URL {path} was not found.")
    depth = "datasets"
    for name in ("dataset", "tables", "table", "insert"):
        if match[name] is not None:
            depth = name
    call = _CALLS.get((depth, method))
    if call is None:
        raise ApiError(404, "notFound", f"The fake does not know {method} {path}.")
    dataset = f"{match['project']}.{match['dataset']}"
    return Route(call, match["project"], dataset, f"{dataset}.{match['table']}")


def json_object(body: bytes) -> dict[str, object]:
    """Parse a request's body."""
    try:
        parsed = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        text = f"Invalid JSON payload received. {error}"
        raise ApiError(400, "badRequest", text) from error
    if not isinstance(parsed, dict):
        raise ApiError(400, "badRequest", "Invalid JSON payload received. Not an object.")
    return parsed


def json_reply(value: object, status: int = 200) -> Reply:
    """Make an answer of a value."""
    return Reply(status, msgspec.json.encode(value))


def error_reply(error: ApiError) -> Reply:
    """Make the service's error document."""
    detail = {"message": error.message, "domain": "global", "reason": error.reason}
    document = {
        "code": error.status,
        "message": error.message,
        "errors": [detail],
        "status": _STATUS_NAMES.get(error.status, "UNKNOWN"),
    }
    return json_reply({"error": document}, error.status)


def name_in(resource: Mapping[str, object], kind: str) -> str:
    """Read datasetId or tableId from the reference in a resource."""
    reference = resource.get(f"{kind}Reference")
    name = reference.get(f"{kind}Id") if isinstance(reference, dict) else None
    if not isinstance(name, str) or not re.fullmatch(r"[\w -]{1,1024}", name):
        raise ApiError(400, "invalid", f'Invalid {kind} ID "{name}".')
    return name


def columns_in(resource: Mapping[str, object]) -> list[Column] | None:
    """Read the schema from a resource; None if it has none."""
    schema = resource.get("schema")
    if schema is None:
        return None
    fields = schema.get("fields") if isinstance(schema, dict) else None
    if not isinstance(fields, list):
        raise ApiError(400, "invalid", "Invalid schema: fields must be a list.")
    columns = []
    for entry in fields:
        if not isinstance(entry, dict) or not entry.get("name") or not entry.get("type"):
            raise ApiError(400, "invalid", f"Invalid schema: bad field {entry}.")
        mode = entry.get("mode") or "NULLABLE"
        description = entry.get("description") or ""
        columns.append(Column(entry["name"], entry["type"].upper(), mode.upper(), description))
    if len({column.name.lower() for column in columns}) != len(columns):
        raise TableError("Invalid schema: duplicate field names.")
    return columns


def extras_in(resource: Mapping[str, object]) -> dict[str, object]:
    """Read what the fake keeps of a table as it is: partitioning, clustering, labels …."""
    return {key: value for key, value in resource.items() if key not in _OWN_KEYS}


def table_resource(table: Table) -> dict[str, object]:
    """Describe a table as tables.get does."""
    project, dataset, name = table.ref.rsplit(".", 2)  # a domain-scoped project has dots
    return {
        "kind": "bigquery#table",
        "etag": table.etag,
        "id": f"{project}:{dataset}.{name}",
        "selfLink": f"/bigquery/v2/projects/{project}/datasets/{dataset}/tables/{name}",
        "tableReference": {"projectId": project, "datasetId": dataset, "tableId": name},
        "schema": {"fields": [_field(column) for column in table.columns.values()]},
        "numRows": str(table.count),
        "creationTime": str(table.created_ms),
        "type": "TABLE",
        "location": "US",
        **table.extras,
    }


def dataset_resource(ref: str) -> dict[str, object]:
    """Describe a dataset as datasets.get does."""
    project, _, name = ref.rpartition(".")
    return {
        "kind": "bigquery#dataset",
        "id": f"{project}:{name}",
        "datasetReference": {"projectId": project, "datasetId": name},
        "location": "US",
    }


def _field(column: Column) -> dict[str, str]:
    field = {"name": column.name, "type": column.type, "mode": column.mode}
    if column.description:
        field["description"] = column.description
    return field
