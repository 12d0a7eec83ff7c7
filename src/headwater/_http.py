"""Models over HTTP: the Open Inference Protocol, metrics, and the process that serves them.

Everything but reading and writing sockets happens elsewhere: `_oip` understands, `_serving` has the versions, `_batching` runs them.
A request has a limit at each step, in `_limits`; whatever is wrong with it is answered with {"error": reason}.
"""

from __future__ import annotations

import asyncio
import gc
import hmac
import random
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from headwater import __version__, _limits
from headwater._batching import Batcher
from headwater._errors import AddressError, HeadwaterError, RequestError, SettingError, warn
from headwater._fleet import Fleet, Member
from headwater._metrics import TYPE, Metrics
from headwater._models import ServedModel
from headwater._oip import LENGTH_HEADER, decode_request, describe, encode_answer
from headwater._serving import Follower, Resident, Residents
from headwater._versions import Versions

_SWITCH_S = 5e-4  # of threads: an update beside requests must not hold them up for Python's 5 ms
VERSION_HEADER = "X-Model-Version"
TAG_HEADER = "X-Model-Tag"
_LATENCIES_S = [1e-4 * 2**i for i in range(18)]  # 0.1 ms to 13 s


class Canary(NamedTuple):
    """A tag that answers a part of the requests that name none."""

    tag: str
    percent: float

    @classmethod
    def parse(cls, text: str) -> Canary:
        """Understand TAG:PERCENT. Raises SettingError."""
        tag, _, percent = text.rpartition(":")
        try:
            canary = cls(tag, float(percent))
        except ValueError:
            canary = cls("", -1.0)
        if not tag or not 0 <= canary.percent <= 100:
            raise SettingError(f"Expected --canary TAG:PERCENT, such as canary:5, got {text!r}.")
        return canary


class Service:
    """One model as an ASGI application.

    tag: whose version answers what names none. member: of a fleet; what it is told must come with the token.
    """

    def __init__(
        self,
        name: str,
        residents: Residents,
        batcher: Batcher,
        metrics: Metrics,
        *,
        tag: str,
        canary: Canary | None = None,
        token: str = "",
        body_bytes: int = _limits.REQUEST_BYTES,
        member: Member | None = None,
        choose: Callable[[], float] = random.random,
    ) -> None:
        self.name, self.is_stopping = name, False
        self._residents, self._batcher, self._metrics = residents, batcher, metrics
        self._tag, self._canary, self._token, self._body_bytes = tag, canary, token, body_bytes
        self._why_not, self._choose = (member.why_not if member is not None else lambda: ""), choose
        self._requests = metrics.counter("headwater_requests_total", "Requests to the model.", "version", "status")
        self._latency = metrics.histogram(
            "headwater_request_seconds", "From a request's headers to its answer, where it was answered.", _LATENCIES_S
        )
        metrics.gauge("headwater_ready", "Whether requests are answered.", lambda: float(not self._unready()))
        told = {} if member is None else {"/fleet/prepare": member.prepare, "/fleet/decide": member.decide}
        model = "/v2/models/{model}"
        version = model + "/versions/{version}"
        self.app = Starlette(
            routes=[
                _route("/v2", self._about_server),
                _route("/v2/health/live", _say_nothing),
                _route("/v2/health/ready", self._say_ready),
                *(_route(path, self._about_model) for path in (model, version)),
                *(_route(f"{path}/ready", self._say_model_ready) for path in (model, version)),
                *(_route(f"{path}/infer", self._infer, "POST") for path in (model, version)),
                _route("/metrics", self._show_metrics),
                *(_route(path, self._guarded(act), "POST") for path, act in told.items()),
            ],
            exception_handlers={HTTPException: _refuse_path, HeadwaterError: _refuse, Exception: _refuse},
        )

    def _unready(self) -> str:
        """Say why requests without a version would not be answered; "": they would."""
        if self.is_stopping:
            return "The server is stopping."
        if self._residents.current(self._tag) is None:
            return f"No version of the tag {self._tag!r} is there yet; /metrics says whether updates fail."
        return self._why_not()

    async def _about_server(self, request: Request) -> Response:
        return _json({"name": "headwater", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def _say_ready(self, request: Request) -> Response:
        why = self._unready()
        return _json({"error": why}, 503) if why else Response()

    async def _about_model(self, request: Request) -> Response:
        resident = await self._take(request)
        try:
            model = resident.model
            return _json(describe(self.name, self._residents.versions(), model.platform, model.inputs, model.outputs))
        finally:
            self._residents.release(resident)

    async def _say_model_ready(self, request: Request) -> Response:
        version = self._version_of(request)
        if version is None:
            return await self._say_ready(request)
        if version in self._residents.versions():
            return Response()
        return _json({"error": f"Version {version} is not in memory; a request for it fetches it if it is kept."}, 503)

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=TYPE)

    def _version_of(self, request: Request) -> int | None:
        """Return the version that the path pins. Raises RequestError for another model, or what is no version."""
        model, version = request.path_params["model"], request.path_params.get("version")
        if model != self.name:
            raise RequestError(f"Expected the model {self.name!r}, got {model[:80]!r}.", 404)
        if version is None:
            return None
        if not (version.isascii() and version.isdigit() and len(version) < 19):
            raise RequestError(f"Expected a version's number, got {version[:80]!r}.", 404)
        return int(version)

    async def _take(self, request: Request) -> Resident:
        """Acquire the version that a request is for; raises RequestError."""
        version = self._version_of(request)
        if version is not None:
            resident = self._residents.acquire_version(version)
            if resident is None:
                resident = await asyncio.to_thread(self._residents.load_version, version)
            return resident
        tag = request.headers.get(TAG_HEADER)
        if tag is None:
            is_canary = self._canary is not None and 100 * self._choose() < self._canary.percent
            tag = self._canary.tag if self._canary is not None and is_canary else self._tag
        elif tag not in (self._tag, self._canary.tag if self._canary is not None else self._tag):
            raise RequestError(f"Expected a tag that is served here in {TAG_HEADER}, got {tag[:80]!r}.", 404)
        if tag == self._tag and (why := self._why_not()):
            raise RequestError(why, 503)
        return self._residents.acquire(tag)

    async def _infer(self, request: Request) -> Response:
        start = time.perf_counter()
        version, status = "none", 500
        try:
            body = await self._body(request)
            inference = decode_request(body, request.headers.get(LENGTH_HEADER))
            resident = await self._take(request)
            version = str(resident.version)
            try:
                resident.model.check(inference.inputs)
            except RequestError:
                self._residents.release(resident)
                raise
            answer = self._batcher.submit(resident.model, inference.inputs, lambda: self._residents.release(resident))
            try:
                async with asyncio.timeout(_limits.ANSWER_S):
                    outputs = await asyncio.wrap_future(answer)
            except TimeoutError:
                raise RequestError(
                    f"Expected an answer of the model within {_limits.ANSWER_S:g} s, got none.", 504
                ) from None
            pieces, json_bytes = encode_answer(self.name, version, inference, outputs)
            status = 200
            headers = {VERSION_HEADER: version}
            if json_bytes is not None:
                headers[LENGTH_HEADER] = str(json_bytes)
            kind = "application/json" if json_bytes is None else "application/octet-stream"
            self._latency.add(time.perf_counter() - start)
            return Response(b"".join(pieces), headers=headers, media_type=kind)
        except Exception as error:  # noqa: BLE001 - counted, too
            response = await _refuse(request, error)
            status = response.status_code
            if version != "none":
                response.headers[VERSION_HEADER] = version
            return response
        finally:
            self._requests.add(version, str(status))

    async def _body(self, request: Request) -> bytes:
        """Return the body. Raises RequestError where it is too large, comes too slowly, or is compressed."""
        encoding = request.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise RequestError(f"Expected a body that is not compressed, got {encoding[:40]!r}.", 415)
        claimed = request.headers.get("Content-Length", "0")
        limit = self._body_bytes
        if claimed.isdigit() and (len(claimed) > 18 or int(claimed) > limit):
            raise RequestError(f"Expected a body of at most {limit} bytes, got one of {claimed[:40]}.", 413)
        pieces, size = [], 0
        try:
            async with asyncio.timeout(_limits.BODY_S):
                async for piece in request.stream():
                    size += len(piece)
                    if size > limit:
                        raise RequestError(f"Expected a body of at most {limit} bytes, got more.", 413)
                    pieces.append(piece)
        except ClientDisconnect:
            raise RequestError(f"Expected the whole body, got {size} bytes and the connection's end.") from None
        except TimeoutError:
            raise RequestError(f"Expected the whole body within {_limits.BODY_S:g} s, got {size} bytes.", 408) from None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _guarded(self, act: Callable[[bytes], Any]) -> Callable[[Request], Awaitable[Response]]:
        """Return what carries out a request of somebody who shows the token, in a thread of its own."""

        async def carry_out(request: Request) -> Response:
            shown = request.headers.get("Authorization", "").encode()
            if self._token and not hmac.compare_digest(shown, f"Bearer {self._token}".encode()):
                return _json({"error": "Expected the fleet's token, got another or none: set HEADWATER_TOKEN."}, 401)
            if (
                request.headers.get("Content-Type") != "application/json"
            ):  # a web page in a browser cannot send it unasked
                return _json({"error": "Expected application/json."}, 415)
            try:
                return _json(await asyncio.to_thread(act, await self._body(request)))
            except (HeadwaterError, msgspec.DecodeError) as error:
                return await _refuse(request, error)

        return carry_out

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve; a client that does not read its answer is let go."""

        async def send_soon(message: Any) -> None:
            async with asyncio.timeout(_limits.UNREAD_S):
                await send(message)

        await self.app(scope, receive, send_soon)


def _route(path: str, endpoint: Callable[[Request], Awaitable[Response]], method: str = "GET") -> Route:
    return Route(path, endpoint, methods=[method])


async def _say_nothing(request: Request) -> Response:
    return Response()


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def _refuse(request: Request, error: Exception) -> Response:
    """Answer what cannot be answered otherwise."""
    if isinstance(error, RequestError):
        status = error.status
    elif isinstance(error, msgspec.DecodeError):
        status = 400
    elif isinstance(error, HeadwaterError):
        status = 503
    else:
        status = 500
        warn(f"Our bug, please report it: {request.method} {request.url.path} raised {error!r}")
    response = _json(
        {"error": str(error) if status != 500 else f"Our bug, please report it: {type(error).__name__}"}, status
    )
    if status in (408, 413, 415):  # the rest of the body is not read
        response.headers["Connection"] = "close"
    return response


async def _refuse_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"error": f"{error.detail}: {request.method} {request.url.path[:200]}"}, error.status_code)


class _Protocol(HttpToolsProtocol):
    """uvicorn's, with limits for the time and the size of what comes before a body."""

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(_limits.HEAD_S, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(_limits.HEAD_S, self.timeout_keep_alive_handler)

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer, self._head_bytes = None, 0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > _limits.REQUEST_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(f"Expected headers of at most {_limits.REQUEST_HEAD_BYTES} bytes, got more.")

    def send_400_response(self, msg: str) -> None:
        body = msgspec.json.encode({"error": msg})
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn's; when it is asked to stop it first says that it is not ready, and the signal is not raised again."""

    service: Service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.is_stopping:
            self.force_exit = self.should_exit = True
        self.service.is_stopping = True

    async def on_tick(self, counter: int) -> bool:
        if self.service.is_stopping and not self.should_exit:
            loop = asyncio.get_running_loop()
            self._closes_s = getattr(self, "_closes_s", loop.time() + _limits.DRAIN_S)
            self.should_exit = loop.time() >= self._closes_s
        return await super().on_tick(counter)


def listen(url: str, token: str) -> socket.socket:
    """Listen at http://HOST:PORT; port 0 takes a free one. Raises SettingError, AddressError."""
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if parts.scheme != "http" or not host or port is None or parts.path.strip("/"):
        raise SettingError(f"Expected --listen http://HOST:PORT, got {url!r}.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        is_local = host == "localhost" or address[0] == "::1" or str(address[0]).startswith("127.")
        if not is_local and not token:
            raise SettingError(
                "Expected HEADWATER_TOKEN in the environment, got none: other machines could reach this server."
            )
        sock = socket.create_server(address, family=family, backlog=_limits.CLIENTS)
        sock.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
        )  # connections have it from here: an answer is two writes
        return sock
    except OSError as error:
        raise AddressError(f"Cannot listen at {url}: {error.strerror or error}. Choose another address.") from error


def url_of(sock: socket.socket) -> str:
    """Return where a socket listens."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class ModelServer:
    """A server of one model's versions: what `headwater serve` runs.

    make: returns a new instance of the model. fleet_url: be a replica of the fleet of this tag, which reaches this server there. rows and
    wait_s are Batcher's, pins Residents', body_bytes the most that a request may have. A store that has no version yet is fine.
    Others may add to `metrics` before it runs.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], ServedModel],
        versions: Versions,
        *,
        tag: str,
        canary: Canary | None = None,
        fleet_url: str = "",
        token: str = "",
        pins: int = 2,
        rows: int = 64,
        wait_s: float = 0.0,
        body_bytes: int = _limits.REQUEST_BYTES,
    ) -> None:
        self.metrics = metrics = Metrics()
        self._residents = Residents(make, versions, pins=pins, metrics=metrics)
        self._member = Member(Fleet(versions, tag), self._residents, fleet_url) if fleet_url else None
        self.follower = Follower(
            self._residents,
            [tag] if canary is None or canary.tag == tag else [tag, canary.tag],
            metrics,
            resolve=versions.resolve if self._member is None else self._member.wanted,
            flip=self._residents.flip if self._member is None else self._member.flip,
            look_s=versions.look_s,
        )
        self._batcher = Batcher(metrics, rows=rows, wait_s=wait_s)
        self.service = Service(
            name,
            self._residents,
            self._batcher,
            metrics,
            tag=tag,
            canary=canary,
            token=token,
            body_bytes=body_bytes,
            member=self._member,
        )

    def run(self, sock: socket.socket) -> None:
        """Serve until SIGTERM or Ctrl+C; then what has begun is finished, and limits hold. Call it from the main thread.

        The socket is closed at the end. Raises HeadwaterError where the fleet's store cannot be reached.
        """
        try:
            if self._member is not None:
                self._member.start()
            self.follower.step()
            self.follower.start()
            _serve(self.service, sock)
        finally:
            self.close()
            sock.close()

    def close(self) -> None:
        """Stop following and running models; a second time does nothing."""
        self.follower.close()
        self._batcher.close()
        if self._member is not None:
            self._member.close()


def _serve(service: Service, sock: socket.socket) -> None:
    config = uvicorn.Config(
        service,
        http=_Protocol,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        backlog=_limits.CLIENTS,
        limit_concurrency=_limits.CLIENTS,
        timeout_keep_alive=int(_limits.IDLE_S),
        timeout_graceful_shutdown=int(_limits.CLOSE_S),
    )
    sys.setswitchinterval(_SWITCH_S)
    gc.freeze()  # a framework's objects stay: going through all of them now and then takes 50 ms
    server = _Server(config)
    server.service = service
    server.run(sockets=[sock])
