"""Tenants: keys, what each sees, what the admin can do, what is written down, and that nothing is left of who goes."""

from __future__ import annotations

import json
import os
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors import safe_open
from typer.testing import CliRunner

from fake_engine import ADMIN_KEY, FakeRunner, Live, live
from foreword.base import BaseModel
from foreword.cli.admin import admin
from foreword.cli.serve import serve
from foreword.cli.tenant import tenant as tenant_app
from foreword.engine import EngineRunner
from foreword.errors import ConfigError, ForewordError
from foreword.prefix import Prefix
from foreword.server.audit import Audit
from foreword.server.limits import Limits
from foreword.server.run import listen
from foreword.server.tenants import AdminKey, TenantStore
from foreword.store import PrefixStore
from serving import prefixes_for
from tiny import tiny_base


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_base("llama")


@pytest.fixture(scope="module")
def folders(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Prefix folders of different content."""
    root = tmp_path_factory.mktemp("prefixes")
    found = []
    for name, prefix in prefixes_for(base, 5).items():
        prefix.save(root / name)
        found.append(root / name)
    return found


@pytest.fixture
def server(base: BaseModel, folders: list[Path], tmp_path: Path) -> Iterator[Live]:
    """Two tenants with a prefix each, one of the same name in both, and a shared one."""
    with live(base, FakeRunner(), tmp_path / "store", needs_keys=True) as running:
        for name in ("acme", "rival"):
            running.service.tenants.add(name)
        add = running.service.store.add
        add(folders[0], "secret", "acme")
        add(folders[1], "other", "rival")
        add(folders[2], "both", "acme")
        add(folders[3], "both", "rival")
        add(folders[4], "shared")
        yield running


def key_of(server: Live, tenant: str) -> str:
    return server.service.tenants.create_key(tenant)


# Keys


def test_a_key_is_kept_as_its_hash_only(tmp_path: Path) -> None:
    tenants = TenantStore(tmp_path)
    tenants.add("acme")
    key = tenants.create_key("acme")
    assert re.fullmatch(r"fw-[0-9a-f]{12}-[A-Za-z0-9_-]{43}", key)
    assert tenants.find(key).name == "acme"
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert key.encode() not in written and key[16:].encode() not in written
    assert (tmp_path / "tenants.sqlite").stat().st_mode & 0o077 == 0


def test_only_the_very_key_fits(tmp_path: Path) -> None:
    tenants = TenantStore(tmp_path)
    tenants.add("acme")
    key, other = tenants.create_key("acme"), tenants.create_key("acme")
    mixed = key[:16] + other[16:]
    for wrong in (
        "",
        "fw-",
        key[:-1],
        key + "A",
        key.upper(),
        mixed,
        "x" + key,
        key.replace("fw-", "fw_"),
        "\ud800",
        "🙂",
    ):
        assert tenants.find(wrong) is None, wrong
    tenants.revoke_key("acme", key.split("-")[1])
    assert tenants.find(key) is None and tenants.find(other).name == "acme"
    tenants.remove("acme")
    assert tenants.find(other) is None and tenants.keys("acme") == [] and not tenants.any()


def test_what_one_process_changes_another_sees(tmp_path: Path) -> None:
    mine, other = TenantStore(tmp_path), TenantStore(tmp_path)
    mine.add("acme", Limits(1, 2, 3))
    key = other.create_key("acme")
    assert mine.find(key) == mine.get("acme") and mine.find(key).limits == Limits(1, 2, 3)
    other.change("acme", Limits(4, 5, 6))
    assert mine.find(key).limits == Limits(4, 5, 6)


def test_tenants_that_cannot_be_are_refused(tmp_path: Path) -> None:
    tenants = TenantStore(tmp_path)
    tenants.add("acme")
    for refused in (
        lambda: tenants.add("acme"), lambda: tenants.add(""), lambda: tenants.add("A b"), lambda: tenants.add("x" * 64),
        lambda: tenants.add("fine", Limits(-1)), lambda: tenants.change("none", Limits()),
        lambda: tenants.remove("none"), lambda: tenants.create_key("none"), lambda: tenants.revoke_key("acme", "none"),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            refused()
    assert [each.name for each in tenants.all()] == ["acme"]


def test_many_threads_share_a_store(tmp_path: Path) -> None:
    tenants, failed = TenantStore(tmp_path), []

    def work(number: int) -> None:
        try:
            tenants.add(f"t{number}")
            keys = [tenants.create_key(f"t{number}") for _ in range(3)]
            assert [tenants.find(key).name for key in keys] == [f"t{number}"] * 3
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(tenants.all()) == 12


def test_no_admin_key_lets_nobody_in() -> None:
    assert not AdminKey(None).fits("") and not AdminKey(None).fits("x" * 20)
    key = AdminKey("x" * 20)
    assert key.fits("x" * 20) and not key.fits("x" * 21) and "x" * 20 not in repr(vars(key))


# Who gets in


def test_without_a_key_nothing_is_told(server: Live) -> None:
    for path in (
        "/v1/models",
        "/v1/models/tiny-llama",
        "/v1/completions",
        "/tokenize",
        "/nope",
        "/v1/nope",
        "/ADMIN/x",
    ):
        for key in (None, "wrong", "fw-000000000000-" + "A" * 43, ADMIN_KEY):
            answer = server.ask("GET", path, key=key)
            assert answer.status_code == 401, (path, key)
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert server.ask("GET", path).status_code == 200


def test_the_admin_api_takes_the_admin_key_alone(server: Live) -> None:
    key = key_of(server, "acme")
    for path in ("/admin/stats", "/admin/prefixes", "/admin/tenants", "/admin", "/admin/nope"):
        for wrong in (None, key, ADMIN_KEY[:-1], ADMIN_KEY + "x"):
            assert server.ask("GET", path, key=wrong).status_code == 401
    assert server.ask("GET", "/admin/stats", key=ADMIN_KEY).status_code == 200


def test_open_is_over_when_there_is_a_tenant(base: BaseModel, tmp_path: Path) -> None:
    with live(base, FakeRunner(), tmp_path / "store") as server:
        assert server.complete().status_code == 200
        assert server.complete("any key").status_code == 200
        server.admin("POST", "/tenants", json={"name": "acme"})
        assert server.complete().status_code == 401
        assert server.complete(server.admin("POST", "/tenants/acme/keys").json()["key"]).status_code == 200


def test_a_revoked_key_is_refused_at_once(server: Live) -> None:
    key = key_of(server, "acme")
    assert server.complete(key, max_tokens=1).status_code == 200
    assert server.admin("DELETE", f"/tenants/acme/keys/{key.split('-')[1]}").status_code == 200
    assert server.complete(key, max_tokens=1).status_code == 401


# What each sees


def test_each_key_sees_its_own_and_the_shared(server: Live) -> None:
    cards = server.ask("GET", "/v1/models", key=key_of(server, "acme")).json()["data"]
    assert [card["id"] for card in cards] == [
        "tiny-llama", "tiny-llama:both", "tiny-llama:secret", "tiny-llama:shared",
    ]  # fmt: skip
    assert [card["parent"] for card in cards] == [None, *["tiny-llama"] * 3]
    assert {card["root"] for card in cards} == {"tiny-llama"} and {card["max_model_len"] for card in cards} == {64}
    assert all(card["object"] == "model" and card["owned_by"] == "foreword" for card in cards)
    assert cards[1]["created"] > 0
    rivals = server.ask("GET", "/v1/models", key=key_of(server, "rival")).json()["data"]
    assert [card["id"] for card in rivals] == ["tiny-llama", "tiny-llama:both", "tiny-llama:other", "tiny-llama:shared"]


def test_a_name_means_what_it_is_to_who_asks(server: Live) -> None:
    for tenant in ("acme", "rival"):
        assert server.complete(key_of(server, tenant), model="tiny-llama:both", max_tokens=1).status_code == 200
    own, theirs = (request.prefix for request in server.runner.requests)
    resolve = server.service.store.resolve
    assert own == resolve("both", ["acme"]).object_id != theirs == resolve("both", ["rival"]).object_id
    assert [request.tenant for request in server.runner.requests] == ["acme", "rival"]


ENDPOINTS: list[Callable[[Live, str, str], Any]] = [
    lambda server, key, model: server.complete(key, model=model),
    lambda server, key, model: server.complete(key, model=model, stream=True),
    lambda server, key, model: server.ask(
        "POST", "/v1/chat/completions", key=key, json={"model": model, "messages": [{"role": "user", "content": "x"}]}
    ),
    lambda server, key, model: server.ask("GET", f"/v1/models/{model}", key=key),
    lambda server, key, model: server.ask("POST", "/tokenize", key=key, json={"model": model, "prompt": "x"}),
    lambda server, key, model: server.ask("POST", "/detokenize", key=key, json={"model": model, "tokens": [5]}),
]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_foreign_name_is_as_a_missing_one(server: Live, endpoint: Callable[[Live, str, str], Any]) -> None:
    acme, rival = key_of(server, "acme"), key_of(server, "rival")
    foreign = endpoint(server, rival, "tiny-llama:secret")
    missing = endpoint(server, rival, "tiny-llama:nobody")
    assert foreign.status_code == missing.status_code == 404
    assert foreign.content.replace(b"secret", b"nobody") == missing.content
    headers = [{name: value for name, value in each.headers.items() if name != "date"} for each in (foreign, missing)]
    assert headers[0] == headers[1]
    assert not server.runner.requests
    # The control: who owns it does reach it, or at least gets past its name.
    assert endpoint(server, acme, "tiny-llama:secret").status_code in (200, 400)


def test_a_foreign_name_takes_as_long_as_a_missing_one(server: Live) -> None:
    caller = server.service.identify(key_of(server, "rival"), "")
    queries: dict[str, list[tuple[str, list[str]]]] = {}
    seconds: dict[str, list[float]] = {"secret": [], "nobody": []}
    resolve = server.service.store.resolve
    for _ in range(300):
        for name in seconds:
            asked: list[tuple[str, list[str]]] = []
            server.service.store.resolve = lambda text, tenants: asked.append((text, tenants)) or resolve(text, tenants)  # type: ignore[method-assign]  # noqa: B023
            start = time.perf_counter()
            with pytest.raises(Exception, match="does not exist"):
                server.service.resolve(f"tiny-llama:{name}", caller)
            seconds[name].append(time.perf_counter() - start)
            queries[name] = [(text.replace(name, "x"), tenants) for text, tenants in asked]
    assert queries["secret"] == queries["nobody"] == [("x", ["rival"]), ("x", [""])]
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    assert max(medians.values()) < 1.5 * min(medians.values()), medians


@pytest.mark.parametrize(
    "model",
    [
        "secret", "tiny-llama:", ":secret", "tiny-llama:SECRET", "tiny-llama:acme/secret", "tiny-llama:../secret",
        "tiny-llama:secret:secret", "tiny-llama:secret ", "TINY-LLAMA", "tiny-llama:" + "x" * 200, "tiny-llama:%00",
        "tiny-llama:' OR 1=1 --", "tiny-llama:é",
    ],
)  # fmt: skip
def test_names_that_are_none_are_404(server: Live, model: str) -> None:
    answer = server.complete(key_of(server, "acme"), model=model)
    assert answer.status_code == 404 and answer.json()["error"]["param"] == "model"


def test_prefixes_of_another_base_are_not_there(server: Live, tmp_path: Path) -> None:
    other = tiny_base("llama", hidden_size=16)
    Prefix.new(other, 2, init="random").save(tmp_path / "foreign")
    server.service.store.add(tmp_path / "foreign", "foreign", "acme")
    key = key_of(server, "acme")
    assert server.complete(key, model="tiny-llama:foreign").status_code == 404
    assert "tiny-llama:foreign" not in server.ask("GET", "/v1/models", key=key).text
    answer = server.admin("POST", "/prefixes", json={"name": "x", "path": str(tmp_path / "foreign")})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "path"


# The admin


def test_prefixes_come_change_and_go_without_a_restart(server: Live, folders: list[Path]) -> None:
    key = key_of(server, "acme")
    body = {"name": "new", "tenant": "acme", "path": str(folders[0])}
    assert server.complete(key, model="tiny-llama:new").status_code == 404
    first = server.admin("POST", "/prefixes", json=body).json()
    assert (first["version"], first["model"], first["fits"]) == (1, "tiny-llama:new", True)
    assert server.complete(key, model="tiny-llama:new", max_tokens=1).status_code == 200
    second = server.admin("POST", "/prefixes", json={**body, "path": str(folders[1])}).json()
    assert second["version"] == 2 and server.runner.evicted == [first["object_id"]]
    assert server.complete(key, model="tiny-llama:new", max_tokens=1).status_code == 200
    assert [request.prefix for request in server.runner.requests] == [first["object_id"], second["object_id"]]
    assert server.admin("POST", "/prefixes/new/load?tenant=acme").status_code == 200
    assert server.runner.loaded == [second["object_id"]]
    assert server.admin("POST", "/prefixes/new/unload?tenant=acme").status_code == 200
    assert server.runner.evicted[1:] == [second["object_id"]]
    listed = server.admin("GET", "/prefixes?tenant=acme").json()["prefixes"]
    assert {each["name"]: each["version"] for each in listed} == {"both": 1, "new": 2, "secret": 1}
    assert server.admin("DELETE", "/prefixes/new?tenant=acme").status_code == 200
    assert server.complete(key, model="tiny-llama:new").status_code == 404
    for path in ("/prefixes/new/load", "/prefixes/new/unload", "/prefixes/secret/load?tenant=rival"):
        assert server.admin("POST", path).status_code == 404
    assert server.admin("DELETE", "/prefixes/new?tenant=acme").status_code == 404
    events = [(line["event"], line.get("prefix"), line.get("version")) for line in server.audit()]
    for event in (
        ("publish", "new", 1),
        ("publish", "new", 2),
        ("load", "new", None),
        ("unload", "new", None),
        ("remove", "new", None),
    ):
        assert event in events


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"name": "x", "path": "/nowhere"}, 400), ({"name": "X", "path": "."}, 400),
        ({"name": "x", "path": "a\0b"}, 400), ({"name": "x", "path": "x" * 4000}, 400),
        ({"name": "x"}, 400), ({"name": "x", "path": 5}, 400),
        ({"name": "x", "path": "/nowhere", "tenant": "none"}, 404), ({"name": "", "path": "."}, 400),
    ],
)  # fmt: skip
def test_what_cannot_be_published_is_refused(server: Live, body: dict[str, Any], status: int) -> None:
    answer = server.admin("POST", "/prefixes", json=body)
    assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_prefix_that_cannot_be_loaded_harms_nobody_else(server: Live) -> None:
    key = key_of(server, "acme")
    server.runner.missing.add(server.service.store.resolve("secret", ["acme"]).object_id)
    assert server.complete(key, model="tiny-llama:secret").status_code == 500
    assert server.admin("POST", "/prefixes/secret/load?tenant=acme").status_code == 400
    assert server.complete(key, model="tiny-llama:both").status_code == 200


def test_tenants_come_change_and_go(server: Live) -> None:
    told = server.admin("POST", "/tenants", json={"name": "new", "concurrent": 3}).json()
    assert told == {"name": "new", "requests_per_minute": 600, "concurrent": 3, "queued": 128, "new": True}
    made = server.admin("POST", "/tenants/new/keys").json()
    assert server.ask("GET", "/v1/models", key=made["key"]).status_code == 200
    assert server.admin("POST", "/tenants", json={"name": "new", "requests_per_minute": 1}).json()["new"] is False
    assert [server.ask("GET", "/v1/models", key=made["key"]).status_code for _ in range(2)] == [200, 429]
    listed = {each["name"]: each for each in server.admin("GET", "/tenants").json()["tenants"]}
    assert listed["new"]["keys"] == [made["id"]] and listed["new"]["requests_per_minute"] == 1
    assert server.admin("DELETE", "/tenants/new").status_code == 200
    assert server.admin("DELETE", "/tenants/new").status_code == 404
    assert server.ask("GET", "/v1/models", key=made["key"]).status_code == 401
    assert server.admin("POST", "/tenants", json={"name": "A b"}).status_code == 400
    assert server.admin("POST", "/tenants/none/keys").status_code == 400


def test_who_is_removed_has_nothing_running(server: Live) -> None:
    key, other = key_of(server, "acme"), key_of(server, "rival")
    server.service.tenants.change("acme", Limits(0, 1, 5))
    server.runner.hold()
    answers: list[Any] = []
    asks = [lambda: server.complete(key), lambda: server.complete(key), lambda: server.complete(other)]
    threads = [threading.Thread(target=lambda ask=ask: answers.append(ask())) for ask in asks]
    for thread in threads:
        thread.start()
    while server.service.inflight_by_tenant() != {"acme": 2, "rival": 1}:
        time.sleep(0.005)
    assert server.admin("DELETE", "/tenants/acme").status_code == 200
    server.runner.release()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, 401, 503]
    assert server.service.inflight_by_tenant() == {}


def numbers_of(folder: Path) -> list[bytes]:
    """The bytes of a prefix's tensors, by which it would be known anywhere."""
    with safe_open(folder / "prefix.safetensors", "pt") as file:
        return [file.get_tensor(name).numpy().tobytes() for name in file.keys()]  # noqa: SIM118


def found_in(root: Path, numbers: list[bytes]) -> list[str]:
    return [
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and any(part in path.read_bytes() for part in numbers)
    ]


def test_nothing_is_left_of_a_tenant_that_is_removed(base: BaseModel, folders: list[Path], tmp_path: Path) -> None:
    """With the real engine: not in the store, not in the bank, not in a running row. Paired with one that stays."""
    root = tmp_path / "store"
    with live(base, EngineRunner(base, PrefixStore(root)), root, needs_keys=True) as server:
        bank, store = server.runner.engine.bank, server.service.store
        for name, folder in (("acme", folders[0]), ("rival", folders[1])):
            assert server.admin("POST", "/tenants", json={"name": name}).status_code == 200
            body = {"name": "mine", "path": str(folder), "tenant": name}
            assert server.admin("POST", "/prefixes", json=body).status_code == 200
            assert server.complete(key_of(server, name), model="tiny-llama:mine", max_tokens=4).status_code == 200
        gone, stays = (store.resolve("mine", [name]).object_id for name in ("acme", "rival"))
        assert set(bank._device.entries) == {gone, stays}
        assert found_in(root, numbers_of(folders[0])) and found_in(root, numbers_of(folders[1]))
        assert server.admin("DELETE", "/tenants/acme").status_code == 200
        assert set(bank._device.entries) == {stays}
        assert not found_in(root, numbers_of(folders[0])) and found_in(root, numbers_of(folders[1]))
        assert found_in(root, [gone.encode()]) == ["audit.jsonl"]
        server.runner.engine.cache.check()
        assert server.complete(key_of(server, "rival"), model="tiny-llama:mine", max_tokens=4).status_code == 200


# What is written down


def test_the_audit_log_tells_refusals_and_no_secrets(server: Live) -> None:
    key = key_of(server, "rival")
    server.complete(key, prompt="a private prompt", model="tiny-llama:secret")
    server.complete("fw-000000000000-" + "A" * 43, prompt="a private prompt")
    server.ask("GET", "/admin/stats", key="not the admin key at all")
    server.complete(key, prompt="a private prompt", model="tiny-llama:a name\nthat is none")
    made = server.admin("POST", "/tenants/rival/keys").json()["key"]
    lines = server.audit()
    refused = [(line["reason"], line.get("tenant"), line.get("prefix")) for line in lines if line["event"] == "refused"]
    assert refused == [
        ("model_not_found", "rival", "secret"), ("invalid_api_key", None, None), ("invalid_api_key", None, None),
        ("model_not_found", "rival", None),
    ]  # fmt: skip
    assert lines[1]["client"] == "127.0.0.1" and lines[-1]["event"] == "key_create"
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT.*\+00:00", line["time"]) for line in lines)
    written = (server.service.store.root / "audit.jsonl").read_text()
    for secret in (key, key[16:], made, made[16:], ADMIN_KEY, "private prompt", "not the admin", "A" * 43):
        assert secret not in written


def test_nobody_fills_the_disk_with_refusals(tmp_path: Path) -> None:
    now = [0.0]
    audit = Audit(tmp_path / "audit.jsonl", lambda: now[0])
    for _ in range(5000):
        audit.refusal("invalid_api_key", client="127.0.0.1")
    audit.write("publish", prefix="e2e")
    now[0] += 60
    audit.refusal("invalid_api_key")
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert len(lines) == 602 and lines[-2]["event"] == "publish" and lines[-1]["left_out_before"] == 4400
    audit.close()
    audit.write("after the end")


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    with open("/dev/full", "ab", buffering=0) as full:
        os.dup2(full.fileno(), audit._descriptor)
    audit.write("publish", prefix="e2e")
    assert "cannot be written" in caplog.text


# The command line


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., tuple[str, Any]]:
    """Call `foreword tenant` or `foreword admin`; what it prints, and its last line as JSON."""

    def call(app: Any, *words: object) -> tuple[str, Any]:
        result = CliRunner().invoke(app, [*map(str, words), "--json"])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output, json.loads(result.stdout.strip().splitlines()[-1])

    return call


def test_tenants_from_the_command_line(
    command: Callable[..., tuple[str, Any]], folders: list[Path], tmp_path: Path
) -> None:
    store = ("--store", tmp_path / "store")
    output, made = command(tenant_app, "add", "acme", "--requests-per-minute", 5, *store)
    assert made["key"] in output
    tenants = TenantStore(tmp_path / "store")
    assert tenants.find(made["key"]).limits == Limits(5, 32, 128)
    PrefixStore(tmp_path / "store").add(folders[0], "mine", "acme")
    assert command(tenant_app, "limits", "acme", "--queued", 7, *store)[1]["queued"] == 7
    assert tenants.get("acme").limits == Limits(5, 32, 7)
    second = command(tenant_app, "key", "acme", *store)[1]
    _, listed = command(tenant_app, "list", *store)
    assert set(listed["tenants"][0]["keys"]) == {made["id"], second["id"]}
    command(tenant_app, "key", "acme", "--revoke", made["id"], *store)
    assert tenants.find(made["key"]) is None and tenants.find(second["key"]) is not None
    assert command(tenant_app, "remove", "acme", *store)[1] == {"tenant": "acme", "versions": 1, "objects": 1}
    assert not tenants.any() and not PrefixStore(tmp_path / "store").list()
    for words in (("remove", "acme"), ("key", "acme"), ("limits", "acme"), ("add", "A B")):
        with pytest.raises(ForewordError):
            command(tenant_app, *words, *store)
    events = [json.loads(line)["event"] for line in (tmp_path / "store" / "audit.jsonl").read_text().splitlines()]
    assert events == ["tenant_add", "key_create", "tenant_change", "key_create", "key_revoke", "tenant_remove"]


def test_a_server_that_cannot_be_is_refused_before_its_model_is_loaded(tmp_path: Path) -> None:
    TenantStore(PrefixStore(tmp_path / "store").root).add("acme")
    app = typer.Typer()
    app.command()(serve)
    (tmp_path / "short").write_text("short\n")
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        for words, message in (
            (["--open"], "has tenants"), (["--admin-key-file", tmp_path / "short"], "an admin key of 5 characters"),
            (["--admin-key-file", tmp_path / "none"], "cannot be read"), (["--request-timeout", "0"], "correct it"),
            (["--port", taken.getsockname()[1]], "another --port"), (["--host", "256.0.0.1"], "256.0.0.1"),
            (["--store", tmp_path], "and no store"), (["--max-tokens", 16], "base model 'nowhere'"),
        ):  # fmt: skip
            asked = ["--base", "nowhere", "--store", tmp_path / "store", "--port", 0, *words]
            result = CliRunner().invoke(app, [str(word) for word in asked])
            assert isinstance(result.exception, ForewordError) and message in str(result.exception), words


def test_a_server_from_the_command_line(
    server: Live, command: Callable[..., tuple[str, Any]], folders: list[Path]
) -> None:
    where = ("--url", server.url, "--key", ADMIN_KEY)
    assert command(admin, "publish", "new", folders[0], "--tenant", "acme", *where)[1]["version"] == 1
    assert command(admin, "replace", "new", folders[1], "--tenant", "acme", *where)[1]["version"] == 2
    output, listed = command(admin, "list", "--tenant", "acme", *where)
    assert "tiny-llama:new" in output and len(listed["prefixes"]) == 3
    command(admin, "load", "new", "--tenant", "acme", *where)
    command(admin, "unload", "new", "--tenant", "acme", *where)
    assert len(command(admin, "remove", "new", "--tenant", "acme", *where)[1]["removed"]) == 2
    made = command(admin, "add-tenant", "third", "--concurrent", 1, *where)[1]
    assert server.ask("GET", "/v1/models", key=made["key"]).status_code == 200
    assert command(admin, "add-tenant", "third", *where)[1]["new"] is False
    assert command(admin, "stats", *where)[1]["bank"]["hits"] == 4
    assert command(admin, "remove-tenant", "third", *where)[1]["name"] == "third"
    assert server.ask("GET", "/v1/models", key=made["key"]).status_code == 401


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("load", "none"), "There is no prefix"), (("list", "--key", "wrong"), "needs the admin key"),
        (("list", "--key", ""), "no admin key"), (("list", "--url", "http://127.0.0.1:9"), "gives no answer"),
        (("list", "--url", "nonsense"), "gives no answer"), (("publish", "x", "/nowhere"), "refuses"),
    ],
)  # fmt: skip
def test_the_admin_is_told_what_is_wrong(
    server: Live, command: Callable[..., tuple[str, Any]], words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        command(admin, *words[:1], "--url", server.url, "--key", ADMIN_KEY, *words[1:])
