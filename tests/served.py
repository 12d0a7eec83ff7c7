"""Models that tests serve, published versions of them, and a client of an application in this process."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from headwater._versions import Version, Versions


class Telling(torch.nn.Module):
    """Every layer multiplies by the version, so that a mixture of versions shows: y = x·v·v, and v per row."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.zeros(width))
        self.second = torch.nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        y = x * self.first * self.second
        return {"y": y if scale is None else y * scale, "first": x * 0 + self.first, "second": x * 0 + self.second}


def build() -> torch.nn.Module:
    return Telling()


def publish(store: Path, value: float, tag: str | None = None, width: int = 3) -> Version:
    """Publish a version whose weights are all one value."""
    tensors = {name: np.full(width, value, np.float32) for name in ("first", "second")}
    return Versions(store).publish(tensors, tag=tag)


class Answer(NamedTuple):
    """What an application answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


def ask(app: Any, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
    """Ask an ASGI application; underscores in names of headers stand for hyphens. The body comes in two pieces."""
    half = len(body) // 2
    pieces = [(body[:half], True), (body[half:], False)]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        piece, more = pieces.pop(0) if pieces else (b"", False)
        return {"type": "http.request", "body": piece, "more_body": more}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    lines = [(name.replace("_", "-").lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": lines,
        "http_version": "1.1", "scheme": "http", "root_path": "", "server": ("test", 80), "client": ("test", 1),
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    start, *rest = sent
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], found, b"".join(message["body"] for message in rest))


def request(x: Any = ((1.0, 2.0, 3.0),), **more: Any) -> bytes:
    """Return the body of a request to a Telling."""
    array = np.array(x, np.float32)
    tensor = {"name": "x", "shape": array.shape, "datatype": "FP32", "data": array.tolist()}
    return msgspec.json.encode({"inputs": [tensor], **more})
