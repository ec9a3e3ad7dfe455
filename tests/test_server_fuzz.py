"""Requests that a fuzzer makes from the server's own OpenAPI document, and raw nonsense: no crash, no leak."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from fake_engine import ADMIN_KEY, FakeRunner, Live, live
from foreword.server.limits import Limits
from tiny import tiny_base

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance,
]  # fmt: skip
ERROR = {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    store = tmp_path_factory.mktemp("fuzz") / "store"
    with live(tiny_base("llama"), FakeRunner(), store, needs_keys=True) as running:
        running.service.tenants.add("fuzz", Limits(0, 0, 0))
        yield running


def fuzz(server: Live, examples: int) -> Counter[int]:
    """So many requests to each route in each mode; statuses counted. Raises where a check fails."""
    schema = schemathesis.openapi.from_dict(server.ask("GET", "/openapi.json").json())
    statuses: Counter[int] = Counter()
    key = server.service.tenants.create_key("fuzz")
    with requests.Session() as session:
        session.trust_env = False
        for found in schema.get_all_operations():
            for mode in GenerationMode:
                fuzz_route(session, server.url, key, found.ok(), mode, examples, statuses)
    return statuses


def fuzz_route(
    session: requests.Session,
    url: str,
    key: str,
    route: Any,
    mode: GenerationMode,
    examples: int,
    statuses: Counter[int],
) -> None:
    headers = {"Authorization": f"Bearer {ADMIN_KEY if route.path.startswith('/admin') else key}"}
    chance = random.Random(0)

    @given(case=route.as_strategy(generation_mode=mode))
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    def ask(case: Any) -> None:
        wrong = any(place.value == "body" and each.mode.is_negative for place, each in case.meta.components.items())
        if isinstance(case.body, dict) and "model" in case.body and not wrong and chance.random() < 0.8:
            case.body["model"] = "tiny-llama"  # else no request comes further than its model
        answer = case.call(base_url=url, session=session, headers=headers, timeout=120)
        statuses[answer.status_code] += 1
        assert answer.status_code >= 400 or not wrong
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == ERROR
        case.validate_response(answer, checks=CHECKS)

    with contextlib.suppress(Unsatisfiable):  # a route without parameters cannot be asked wrongly
        ask()


def is_quiet(server: Live) -> bool:
    return server.runner.wait_idle() and not server.service.inflight_by_tenant() and server.service.inflight == 0


def test_no_request_of_a_fuzzer_breaks_the_server(server: Live) -> None:
    statuses = fuzz(server, 8)
    assert statuses[200] > 20 and statuses[400] > 50 and sum(statuses.values()) > 200
    assert (
        is_quiet(server) and server.complete(server.service.tenants.create_key("fuzz"), max_tokens=2).status_code == 200
    )


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_thousand_requests_leave_nothing_behind(server: Live) -> None:
    process = psutil.Process()
    fuzz(server, 20)
    threads, files, memory = threading.active_count(), process.num_fds(), process.memory_info().rss
    assert sum(fuzz(server, 400).values()) > 10_000
    assert (
        is_quiet(server) and server.complete(server.service.tenants.create_key("fuzz"), max_tokens=2).status_code == 200
    )
    assert threading.active_count() <= threads + 4 and process.num_fds() <= files + 10
    assert process.memory_info().rss < memory + (200 << 20)


RAW = [
    b"", b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 1000, b"A" * 100_000, os.urandom(5000),
    b"GET /v1/models HTTP/1.1\r\n\r\n", b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: \xff\xfe\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n123456",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    b"GET /v1/models/%zz%00%ff HTTP/1.1\r\nHost: x\r\n\r\n", b"GET http://x/v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % k for k in range(5000)) + b"\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Unsupported upgrade request")
@pytest.mark.parametrize("sent", RAW, ids=range(len(RAW)))
def test_raw_nonsense_is_refused_or_left(server: Live, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=0.3) as raw:
        answer = b""
        try:
            raw.sendall(sent)
            answer = raw.recv(4096)
        except OSError:  # it answers nothing, or has closed
            pass
    assert not answer or (answer.startswith(b"HTTP/1.1 ") and not answer.startswith(b"HTTP/1.1 5"))
    assert server.ask("GET", "/ready").status_code == 200
    assert is_quiet(server)


def test_the_document_says_what_is_sent(server: Live) -> None:
    document = server.ask("GET", "/openapi.json").json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            if not Path(path).name.startswith(("health", "ready", "version", "metrics")):
                assert {"400", "401", "413", "429", "503"} <= set(operation["responses"])
                assert operation["security"]
    assert "HTTPValidationError" not in str(document)
