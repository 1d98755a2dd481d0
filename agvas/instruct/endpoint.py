"""An OpenAI-compatible chat endpoint: one request at a time in, one reply out, with patience where patience helps.

urllib is enough: one POST, whose bytes are exactly those of --dry-run. Our own are the waits, since all workers share them: a rate limit
spaces the requests of all threads, and a Retry-After holds all of them. Redirects are not followed: they would carry the key elsewhere.
The key comes from the caller and goes into one header, never into an error, a log or a file. urllib's timeout is one of silence, which a
server that sends a byte now and then never lets end; ours is of the whole request.
"""

from __future__ import annotations

import email.utils
import http.client
import io
import json
import random
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Endpoint", "EndpointClosed", "Pace", "Reply", "RequestFailed", "RequestRefused", "Stopped"]

_PATH = "/chat/completions"
_RETRIED = frozenset({408, 409, 425, 429})  # and every 5xx
_CLOSED = {
    401: "check the key and the variable that holds it (--api-key-variable)",
    403: "the key may not use this model or endpoint; check the account",
    404: "check --endpoint (it usually ends in /v1) and --model",
}
_LONGEST_BACKOFF = 60.0
_LONGEST_RETRY_AFTER = 900.0
_SHOWN = 300  # characters of an error's body


class EndpointClosed(Exception):
    """Every further request would fail in the same way: the run stops."""


class RequestFailed(Exception):
    """This request got no reply, and asking again did not help."""


class RequestRefused(Exception):
    """This request will never be answered, as it is: a content filter, a model that is not there, a parameter that is not taken."""


class Stopped(Exception):
    """The run was interrupted while a request waited for its turn."""


@dataclass(frozen=True)
class Reply:
    """A model's answer. Token counts are None where the endpoint does not say them."""

    text: str
    finish_reason: str | None
    input_tokens: int | None
    output_tokens: int | None


class Pace:
    """When the next request may start: evenly spaced, and not before a hold ends. Shared by all workers."""

    def __init__(
        self,
        per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        """`sleep` waits that many seconds; the default returns early, and for good, after `stop`."""
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._clock = clock
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        self._lock = threading.Lock()
        self._next = clock()
        self._held_until = clock()

    def wait(self) -> None:
        """Return when it is this caller's turn. Raises Stopped."""
        with self._lock:
            turn = max(self._next, self._held_until, self._clock())
            self._next = turn + self._gap
        while True:
            self._pause(turn - self._clock())
            with self._lock:
                if self._held_until <= turn:
                    return
                # A hold came while this caller waited: a new turn after it, one gap behind the others that wait too.
                turn = max(self._next, self._held_until)
                self._next = turn + self._gap

    def pause(self, seconds: float) -> None:
        """Let only this caller wait. Raises Stopped."""
        self._pause(seconds)

    def hold(self, seconds: float) -> None:
        """No request starts within the next `seconds`."""
        with self._lock:
            self._held_until = max(self._held_until, self._clock() + seconds)

    def stop(self) -> None:
        """Everyone who waits, now or later, gets Stopped."""
        self._stopped.set()

    def _pause(self, seconds: float) -> None:
        if seconds > 0 and not self._stopped.is_set():
            self._sleep(seconds)
        if self._stopped.is_set():
            raise Stopped


class Endpoint:
    """POSTs chat requests to URL/chat/completions. Safe to use from several threads."""

    def __init__(self, url: str, key: str | None, pace: Pace, timeout: float = 300.0, tries: int = 6) -> None:
        """
        Args:
            url: base ("https://host/v1") or the whole address that ends in /chat/completions.
            key: sent as a bearer token; None sends none.
            timeout: seconds after which a request whose answer is not there as a whole counts as lost.
            tries: how often one request is sent before RequestFailed.

        Raises:
            ValueError: no http or https URL, or one with a user name or password in it.
        """
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"endpoint: expected a URL like http://localhost:8000/v1, got {url!r}")
        if parts.username or parts.password:
            raise ValueError("endpoint: expected a URL without user name and password; put the key into an environment variable")
        base = parts.path.rstrip("/")
        self.url = parts._replace(path=base if base.endswith(_PATH) else base + _PATH, fragment="").geturl()
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ValueError("key: expected printable ASCII characters; look for a stray line end or quote in the variable")
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "agvas-instruct"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._pace, self._timeout, self._tries = pace, timeout, tries
        self._opener = urllib.request.build_opener(_NoRedirect, _Http, _Https)
        self._lock = threading.Lock()
        self.requests_sent = 0
        self._on_their_way = 0  # requests whose answer may still come
        self._heard = False  # whether anything has ever answered there
        self._noted = False  # whether it was told that nothing has

    def ask(self, body: dict[str, Any], note: Callable[[str], None] = lambda line: None) -> Reply:
        """Send until a reply comes: again after 408, 409, 425, 429, 5xx, a lost connection or a body that is no reply.

        Waits 1, 2, 4 ... 60 seconds with jitter, or what Retry-After says if that is longer. `note` takes a line, once, before the first
        of these waits at an address where nothing has ever answered.

        Raises:
            EndpointClosed: 401, 403, 404, a redirect, a Retry-After of more than a quarter of an hour, or no reply after all tries where
                none has ever come and no other thread waits for one.
            RequestRefused: any other refusal (4xx), at once.
            RequestFailed: a fault that can pass, after all tries.
            Stopped: the run was interrupted.
        """
        data = json.dumps(body).encode()
        for attempt in range(1, self._tries + 1):
            self._pace.wait()
            with self._lock:
                self.requests_sent += 1
                self._on_their_way += 1
            try:
                try:
                    return self._post(data)
                finally:
                    with self._lock:
                        self._on_their_way -= 1
            except _Passing as fault:
                # In this order: who is no longer on the way has been heard by then.
                if attempt == self._tries and not self._on_their_way and not self._heard:
                    raise EndpointClosed(
                        f"{self.url}: {fault} ({attempt} tries), and nothing has answered there yet; start the endpoint or correct its "
                        "address, then run the same command again"
                    ) from fault
                if attempt == self._tries:
                    raise RequestFailed(f"{self.url}: {fault} ({attempt} tries)") from fault
                backoff = min(_LONGEST_BACKOFF, 2.0 ** (attempt - 1)) * random.uniform(0.75, 1.25)
                asked_for = fault.retry_after or 0.0
                if asked_for > _LONGEST_RETRY_AFTER:
                    raise EndpointClosed(
                        f"{self.url}: {fault}; it asks to wait {asked_for:.0f} s: run the same command again after that"
                    ) from fault
                self._note_silence(fault, note)
                self._pace.hold(asked_for)
                if asked_for < backoff:
                    self._pace.pause(backoff)
        raise AssertionError("unreachable")

    def _note_silence(self, fault: _Passing, note: Callable[[str], None]) -> None:
        with self._lock:
            told, self._noted = self._noted or self._heard, True
        if not told:
            note(f"{self.url}: {fault}; nothing has answered there yet, each request is sent {self._tries} times before that ends the run")

    def _post(self, data: bytes) -> Reply:
        request = urllib.request.Request(self.url, data, self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                self._heard = True
                content = response.read()
        except urllib.error.HTTPError as error:
            self._heard = True
            with error:
                raise self._judge(error) from None  # the original would carry the request, and with it the key
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            raise _Passing(f"no reply: {getattr(error, 'reason', None) or error or type(error).__name__}") from None
        return _read_reply(content)

    def _judge(self, error: urllib.error.HTTPError) -> Exception:
        try:
            said = " ".join(error.read(4096).decode("utf-8", "replace").split())[:_SHOWN]
        except (OSError, http.client.HTTPException):
            said = ""
        message = f"HTTP {error.code} {error.reason}" + (f": {said}" if said else "")
        if error.code in _RETRIED or error.code >= 500:
            return _Passing(message, _seconds(error.headers.get("Retry-After")))
        if error.code in _CLOSED:
            return EndpointClosed(f"{self.url}: {message}; {_CLOSED[error.code]}")
        if 300 <= error.code < 400:
            where = error.headers.get("Location", "an unnamed place")
            return EndpointClosed(f"{self.url}: {message}, a redirect to {where}; give that address to --endpoint if you trust it")
        return RequestRefused(message)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None: the redirect becomes an HTTPError."""


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_within_timeout(http.client.HTTPConnection), request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_within_timeout(http.client.HTTPSConnection), request)


def _within_timeout(kind: Callable[..., http.client.HTTPConnection]) -> Any:
    """Connections whose answers are read until their timeout, counted from here, is over."""

    def connect(host: str, timeout: float, **rest: Any) -> http.client.HTTPConnection:
        connection, end = kind(host, timeout=timeout, **rest), time.monotonic() + timeout

        def respond(sock: socket.socket, *args: Any, **more: Any) -> http.client.HTTPResponse:
            return http.client.HTTPResponse(_Answering(sock, timeout, end), *args, **more)  # type: ignore[arg-type]

        connection.response_class = respond  # type: ignore[assignment]
        return connection

    return connect


class _Answering:
    """What HTTPResponse asks of a socket: a file to read."""

    def __init__(self, sock: socket.socket, timeout: float, end: float) -> None:
        self._sock, self._timeout, self._end = sock, timeout, end

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_UntilEnd(self._sock, self._timeout, self._end))


class _UntilEnd(io.RawIOBase):
    """A socket's bytes, until time.monotonic() is `end`; then TimeoutError, which says what `timeout` was."""

    def __init__(self, sock: socket.socket, timeout: float, end: float) -> None:
        self._sock, self._timeout, self._end = sock, timeout, end
        self._file = sock.makefile("rb", buffering=0)  # keeps the socket open where the connection lets go of it

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._end - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            self._sock.settimeout(left)
            return self._file.readinto(buffer)  # type: ignore[attr-defined,no-any-return]
        except TimeoutError:
            raise TimeoutError(f"no whole answer within {self._timeout:g} s") from None

    def close(self) -> None:
        self._file.close()
        super().close()


class _Passing(Exception):
    """A fault that may be gone next time."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def _seconds(retry_after: str | None) -> float | None:
    """Of a Retry-After header, seconds or a date; None where there is none that can be read."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
        return seconds if 0 <= seconds < float("inf") else None
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _read_reply(content: bytes) -> Reply:
    try:
        reply = json.loads(content)
        choice = reply["choices"][0]
        text = choice["message"]["content"]
        if isinstance(text, list):  # some servers send parts
            text = "".join(part.get("text", "") for part in text)
        if text is not None and not isinstance(text, str):
            raise TypeError("content is no text")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        shown = content[:_SHOWN].decode("utf-8", "replace")
        raise _Passing(f"expected a chat completion, got {shown!r} ({type(error).__name__}: {error})") from error
    usage = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
    return Reply(text or "", choice.get("finish_reason"), _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
