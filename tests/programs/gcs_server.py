"""A local server of Google Cloud Storage: the package gcp-storage-emulator, and what it lacks.

    python gcs_server.py PORT

It holds one bucket, "bucket", in memory. The emulator knows no conditions on the generation of an
object and does not report it with the content; TensorStore, which orbax writes arrays with, needs
both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound

Handler = Callable[..., None]


def main(port: int) -> None:
    for _, handlers in server.HANDLERS:
        for method, handler in handlers.items():
            handlers[method] = with_generations(handler)
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket").run()


def with_generations(handler: Handler) -> Handler:
    """The handler of a request, which heeds and reports the generation of the object.

    https://cloud.google.com/storage/docs/request-preconditions
    """

    def handle(request: Any, response: Any, storage: Any) -> None:
        bucket = request.params.get("bucket_name")
        name = request.params.get("object_id") or request.query.get("name", [None])[0]
        live = generation(storage, bucket, name) if bucket and name else 0
        if_match = request.query.get("ifGenerationMatch", [None])[0]
        if_not_match = request.query.get("ifGenerationNotMatch", [None])[0]
        if if_match is not None and int(if_match) != live:
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
        if if_not_match is not None and live and int(if_not_match) == live:
            response.status = HTTPStatus.NOT_MODIFIED
            return
        handler(request, response, storage)
        if live and request.method == "GET":
            response["x-goog-generation"] = str(live)

    return handle


def generation(storage: Any, bucket: str, name: str) -> int:
    """The generation of an object; 0 if there is none."""
    try:
        return int(storage.get_file_obj(bucket, name)["generation"])
    except NotFound:
        return 0


if __name__ == "__main__":
    main(int(sys.argv[1]))
