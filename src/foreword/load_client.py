"""The client of a load: sends one request to an OpenAI-compatible server and measures how its answer comes.

Per piece of text it does little more than read it: often it shares the processor with the server under test.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from foreword.errors import ConfigError
from foreword.optional import optional

__all__ = ["WORDS", "Planned", "Sample", "Server", "WordSize", "payloads"]

# Words that most vocabularies hold as one token, so that a prompt has about as many tokens as words.
_TEXT = (
    "the of and to in is it for was on are as with they at be this from have or by one had not but what all were when "
    "we there can an your which their said if do will each about how up out them then she many some so these would "
    "other into has more her two like him see time could no make than first been its who now people my made over did "
    "down only way find use may water long little very after words called just where most know get through back much "
    "before go good new write our used me man too any day same right look think also around another came come work "
    "three word must because does part even place well such here take why things help put years different away again"
)
WORDS = _TEXT.split()


class WordSize(NamedTuple):
    """How many tokens a word of a prompt has on average, and how many a text has beside its words.

    >>> WordSize(1.25, 1.0).words(51)
    40
    """

    tokens_per_word: float = 1.0
    extra: float = 0.0

    def words(self, tokens: int) -> int:
        """How many words make about so many tokens; at least one."""
        return max(1, round((tokens - self.extra) / self.tokens_per_word))


class Planned(NamedTuple):
    """A request of the plan; `arrival` in seconds since the run began, None in a closed loop."""

    number: int
    model: str
    prompt: str
    max_tokens: int
    arrival: float | None


@dataclass
class Sample:
    """How one request went; times are in seconds since the run began.

    `times`: when each piece of text came; `tokens` are what the server counted, or the pieces. `ended` and `error`
    are None while it runs; a request that the run did not wait for stays so.

    >>> sample = Sample(0, "base", planned=1.0, sent=1.5, asked=8, times=[2.0, 2.25], ended=2.5)
    >>> sample.ttft, sample.gaps, sample.end_to_end, sample.tokens
    (1.0, [0.25], 1.5, 2)
    """

    number: int
    model: str
    planned: float | None
    sent: float
    asked: int
    times: list[float] = field(default_factory=list)
    ended: float | None = None
    error: str | None = None
    message: str = ""
    finish: str | None = None
    prompt_tokens: int | None = None
    counted: int | None = None

    @property
    def ok(self) -> bool:
        """Whether it was answered whole."""
        return self.ended is not None and self.error is None

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return len(self.times) if self.counted is None else self.counted

    @property
    def begun(self) -> float:
        """When latency counts from: the planned arrival, or the sending where none was planned."""
        return self.sent if self.planned is None else self.planned

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token; None if there was none."""
        return self.times[0] - self.begun if self.times else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between each piece of text and the one before."""
        return [after - before for before, after in zip(self.times, self.times[1:])]  # noqa: B905 - one less

    @property
    def end_to_end(self) -> float | None:
        """Seconds to the end of the answer; None if it has none."""
        return None if self.ended is None else self.ended - self.begun

    def take(self, event: Any, now: float) -> None:
        """Note what an event of the stream says; raises `_Failed` for an error of the server."""
        if event.get("error"):
            raise _Failed("error in the stream", _message(event))
        if event.get("usage"):
            self.counted = event["usage"].get("completion_tokens")
            self.prompt_tokens = event["usage"].get("prompt_tokens")
        for choice in event.get("choices") or ():
            finish = choice.get("finish_reason")
            # Without text and without an end: a token whose characters are not all there yet.
            if choice.get("text") or not finish:
                self.times.append(now)
            self.finish = finish or self.finish


def payloads(rest: bytes, data: bytes) -> tuple[list[bytes], bytes]:
    """The `data:` lines that are complete in what came so far, and the rest.

    >>> payloads(b"da", b'ta: {"a": 1}\\r\\n\\ndata: [DO')
    ([b'{"a": 1}'], b'data: [DO')
    """
    *lines, rest = (rest + data).split(b"\n")
    return [line[5:].strip() for line in lines if line.startswith(b"data:")], rest


class _Failed(Exception):
    """A request that was not answered: the kind of its failure, which is counted, and what was said."""

    def __init__(self, kind: str, message: str = "") -> None:
        super().__init__(kind)
        self.kind, self.message = kind, message[:500]


class Server:
    """An OpenAI-compatible server as a client sees it; an async context manager.

    `url` with or without `/v1`; `timeout_seconds` is for one whole request. `transport` and `clock` are for tests.
    Raises `MissingPackage` without httpx, `ConfigError` for a URL that is none.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_seconds: float = 120.0,
        transport: Any = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._httpx = httpx = optional("httpx", "serve")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout_seconds, self.clock = timeout_seconds, clock
        # Fields that not every server knows, tried in `probe`.
        self.extra: dict[str, Any] = {}
        headers = {"accept-encoding": "identity", "content-type": "application/json"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        try:
            self._client = httpx.AsyncClient(
                base_url=self.url, headers=headers, timeout=None, transport=transport,
                trust_env=False,  # a proxy is not what is to be measured
                # No queue in the client; connections are given up before usual servers do so, which is after 5 seconds.
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0),
            )  # fmt: skip
            parsed = self._client.base_url
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigError(f"server {url!r} or its key ({error})", "a URL and a key in ASCII", "change it") from None
        if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > 65535:
            raise ConfigError(f"server {url!r}", "a URL such as http://127.0.0.1:8000", "change it")

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def models(self) -> list[dict[str, Any]] | None:
        """The cards of `/v1/models`; None if the server has no such list.

        Raises `ConfigError` for a server that cannot be reached, refuses the key or answers nonsense.
        """
        status, answer = await self._ask("GET", "/v1/models")
        if status == 404:
            return None
        self._check(status, answer)
        cards = answer.get("data")
        if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
            raise ConfigError(f"{self.url}/v1/models lists no models", "an OpenAI-compatible server", "check --url")
        return cards

    async def version(self) -> str | None:
        """What `/version` says, None where there is nothing."""
        status, answer = await self._ask("GET", "/version")
        return str(answer["version"]) if status == 200 and "version" in answer else None

    async def word_size(self, model: str) -> WordSize | None:
        """The size of a prompt's words by `/tokenize`; None where the server has none."""
        counts = []
        for times in (1, 2):
            body = {"model": model, "prompt": " ".join(WORDS * times)}
            status, answer = await self._ask("POST", "/tokenize", body)
            count = answer.get("count", len(answer.get("tokens") or ())) if status == 200 else 0
            if not isinstance(count, int) or count <= 0:
                return None
            counts.append(count)
        once, twice = counts
        return WordSize((twice - once) / len(WORDS), 2 * once - twice) if twice > once else None

    async def probe(self, model: str) -> None:
        """Send one request of one token, and settle which fields the server takes.

        Raises `ConfigError` where it is refused: the key, the model.
        """
        usage = {"stream_options": {"include_usage": True}}
        for extra in ({"ignore_eos": True, **usage}, usage, {}):
            self.extra = extra
            sample = await self.complete(Planned(0, model, "the", 1, None), self.clock())
            if sample.error not in ("http 400", "http 422"):
                break
        if sample.error is not None and sample.error.startswith("http "):
            self._check(int(sample.error.removeprefix("http ")), {"message": sample.message}, model)
        if sample.error is not None:
            reason = f"{sample.error}{sample.message and ': '}{sample.message}"
            raise ConfigError(
                f"{self.url} does not complete a text ({reason})", "a stream of tokens", "check the server"
            )

    async def complete(self, request: Planned, start: float, into: list[Sample] | None = None) -> Sample:
        """Send one request and measure its answer; times count from `start` on the clock.

        The sample is put `into` the list when the request is sent. Failures are in the sample, not raised.
        """
        body = {
            "model": request.model, "prompt": request.prompt, "max_tokens": request.max_tokens, "temperature": 0,
            "stream": True, **self.extra,
        }  # fmt: skip
        content = json.dumps(body).encode()
        sample = Sample(request.number, request.model, request.arrival, self.clock() - start, request.max_tokens)
        if into is not None:
            into.append(sample)
        try:
            await asyncio.wait_for(self._stream(content, sample, start), self.timeout_seconds)
            return sample
        except (TimeoutError, asyncio.TimeoutError):
            failed = _Failed("timeout", f"not complete after {self.timeout_seconds:g} seconds")
        except _Failed as error:
            failed = error
        except self._httpx.ConnectError as error:
            failed = _Failed("no connection", str(error))
        except self._httpx.TransportError as error:
            failed = _Failed("disconnect", str(error) or type(error).__name__)
        except (ValueError, TypeError, AttributeError) as error:
            failed = _Failed("malformed stream", str(error))
        sample.ended, sample.error, sample.message = self.clock() - start, failed.kind, failed.message
        return sample

    async def _stream(self, content: bytes, sample: Sample, start: float) -> None:
        """The answer into the sample. Per piece of text little more than reading it: the server needs the cores."""
        clock, rest, ended = self.clock, b"", None
        async with self._client.stream("POST", "/v1/completions", content=content) as response:
            if response.status_code != 200:
                answer = _object(await response.aread())
                raise _Failed(f"http {response.status_code}", _message(answer))
            async for data in response.aiter_raw():
                now = clock() - start
                found, rest = payloads(rest, data)
                for payload in found:
                    if payload == b"[DONE]":
                        ended = now
                    elif ended is None:
                        sample.take(json.loads(payload), now)
        if ended is None and sample.finish is None:
            raise _Failed("disconnect", "the stream ended before the answer did")
        sample.ended = clock() - start if ended is None else ended

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Status and JSON object of a call beside the load; `ConfigError` if the server cannot be reached."""
        try:
            answer = await asyncio.wait_for(self._client.request(method, path, json=body), self.timeout_seconds)
        except (self._httpx.TransportError, self._httpx.InvalidURL, TimeoutError, asyncio.TimeoutError) as error:
            reason = str(error) or type(error).__name__
            raise ConfigError(f"{self.url} does not answer ({reason})", "a running server", "check --url") from None
        return answer.status_code, _object(answer.content)

    def _check(self, status: int, answer: Mapping[str, Any], model: str | None = None) -> None:
        """Raise `ConfigError` for a status that is no success."""
        said = _message(answer) or "no reason given"
        if status in (401, 403):
            raise ConfigError(f"{self.url} refuses the key ({status}: {said})", "a key it knows", "give --key")
        if status == 404 and model is not None:
            raise ConfigError(f"{self.url} has no model {model!r} ({said})", "one that it serves", "check --models")
        if status != 200:
            raise ConfigError(f"{self.url} answers {status} ({said})", "an OpenAI-compatible server", "check --url")


def _object(content: bytes) -> dict[str, Any]:
    """The JSON object of an answer; of anything else its beginning as a message."""
    with contextlib.suppress(ValueError):
        found = json.loads(content)
        if isinstance(found, dict):
            return found
    return {"message": " ".join(content[:200].decode(errors="replace").split())}


def _message(answer: Mapping[str, Any]) -> str:
    """What an error says, in the shape of OpenAI or any other."""
    error = answer.get("error", answer)
    said = error.get("message") or error.get("detail") or "" if isinstance(error, Mapping) else error
    return " ".join(str(said).split())
