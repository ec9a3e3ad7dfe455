"""The admin API: prefixes are published, brought in and out of the bank and removed, tenants and keys come and go.

Changes are made one after the other, and each is in the audit log. Slow ones run beside the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse

from foreword.artifact import read_header
from foreword.errors import ForewordError, StorageError
from foreword.runs import find_prefix
from foreword.server.errors import ApiError, bad_request
from foreword.server.limits import Limits
from foreword.server.schemas import PublishRequest, TenantRequest
from foreword.server.service import Service
from foreword.store import StoredPrefix

__all__ = ["admin_routes"]

_T = TypeVar("_T")
_OfTenant = Annotated[str, Query(max_length=63, description="Whose prefix; empty: the shared one.")]


def admin_routes(service: Service) -> APIRouter:
    """The routes under `/admin`; the guard lets only the admin's key through."""
    router = APIRouter(prefix="/admin")
    _prefix_routes(router, service)
    _tenant_routes(router, service)

    @router.get("/stats")
    async def stats() -> JSONResponse:
        """What the engine and its bank have to do, and the sequences of each tenant."""
        engine = service.stats()
        told = {name: value for name, value in vars(engine).items() if name != "bank"}
        bank = vars(engine.bank)
        return JSONResponse({"engine": told, "bank": bank, "inflight": service.inflight_by_tenant()})

    return router


def _prefix_routes(router: APIRouter, service: Service) -> None:
    store, audit = service.store, service.audit

    @router.get("/prefixes")
    async def listing(tenant: _Filter = None) -> JSONResponse:
        """All prefixes, or those of a tenant; the current version of each."""
        found = await _beside(lambda: store.list(tenant=tenant))
        return JSONResponse({"prefixes": [_told(service, each) for each in found]})

    @router.post("/prefixes")
    async def publish(body: PublishRequest) -> JSONResponse:
        """Publish a folder as the next version of a name. What runs ends on the version that it began with."""
        async with service.changing:
            if body.tenant and service.tenants.get(body.tenant) is None:
                raise ApiError(404, f"There is no tenant `{body.tenant}`.", param="tenant", code="not_found")
            before = store.resolve(body.name, [body.tenant])
            added = await _beside(lambda: _publish(service, body))
            audit.write("publish", prefix=body.name, tenant=body.tenant, version=added.version, object=added.object_id)
            if before is not None and before.object_id != added.object_id:
                service.runner.evict(before.object_id)
        return JSONResponse(_told(service, added))

    @router.post("/prefixes/{name}/load")
    async def load(name: str, tenant: _OfTenant = "") -> JSONResponse:
        """Bring a prefix into the bank before it is asked for."""
        found = _find(service, name, tenant)
        try:
            await asyncio.wrap_future(service.runner.preload(found.object_id))
        except ForewordError as error:
            raise _explained(error) from None
        audit.write("load", prefix=name, tenant=tenant, object=found.object_id)
        return JSONResponse(_told(service, found))

    @router.post("/prefixes/{name}/unload")
    async def unload(name: str, tenant: _OfTenant = "") -> JSONResponse:
        """Take a prefix out of the bank; it stays in the store, and the next request brings it back."""
        found = _find(service, name, tenant)
        service.runner.evict(found.object_id)
        audit.write("unload", prefix=name, tenant=tenant, object=found.object_id)
        return JSONResponse(_told(service, found))

    @router.delete("/prefixes/{name}")
    async def remove(name: str, tenant: _OfTenant = "") -> JSONResponse:
        """Remove all versions of a prefix, from memory and from the disk."""
        async with service.changing:
            _find(service, name, tenant)
            removed = await _beside(lambda: store.remove(name, tenant))
            await _beside(store.collect_garbage)
            for each in removed:  # after that: what a waiting request had loaded in between goes too
                service.runner.evict(each.object_id)
            audit.write("remove", prefix=name, tenant=tenant, versions=len(removed))
        return JSONResponse({"removed": [_told(service, each) for each in removed]})


def _tenant_routes(router: APIRouter, service: Service) -> None:
    tenants, audit = service.tenants, service.audit

    @router.get("/tenants")
    async def listing() -> JSONResponse:
        """All tenants with their limits and the ids of their keys."""
        told = [
            {"name": each.name, **each.limits._asdict(), "keys": [key.id for key in tenants.keys(each.name)]}
            for each in tenants.all()
        ]
        return JSONResponse({"tenants": told})

    @router.post("/tenants")
    async def put(body: TenantRequest) -> JSONResponse:
        """A new tenant, or other limits for one that is there."""
        limits = Limits(body.requests_per_minute, body.concurrent, body.queued)
        async with service.changing:
            known = tenants.get(body.name) is not None
            await _beside(lambda: tenants.change(body.name, limits) if known else tenants.add(body.name, limits))
            audit.write("tenant_change" if known else "tenant_add", tenant=body.name, **limits._asdict())
        return JSONResponse({"name": body.name, **limits._asdict(), "new": not known})

    @router.delete("/tenants/{name}")
    async def remove(name: str) -> JSONResponse:
        """Remove a tenant with its keys, what it has running, and its prefixes on the disk and in memory."""
        async with service.changing:
            if tenants.get(name) is None:
                raise ApiError(404, f"There is no tenant `{name}`.", param="name", code="not_found")
            await _beside(lambda: tenants.remove(name))
            service.expel(name)
            removed = await _beside(lambda: service.store.remove_tenant(name))
            # The objects too: of versions that were removed before, and may still be in memory.
            for object_id in {*(each.object_id for each in removed.versions), *removed.freed.objects}:
                service.runner.evict(object_id)
            gone = {"versions": len(removed.versions), "objects": len(removed.freed.objects)}
            audit.write("tenant_remove", tenant=name, **gone)
        return JSONResponse({"name": name, "removed": [_told(service, each) for each in removed.versions]})

    @router.post("/tenants/{name}/keys")
    async def create_key(name: str) -> JSONResponse:
        """A new key: it is told once, here."""
        async with service.changing:
            key = await _beside(lambda: tenants.create_key(name))
            key_id = key.split("-")[1]
            audit.write("key_create", tenant=name, key=key_id)
        return JSONResponse({"id": key_id, "tenant": name, "key": key})

    @router.delete("/tenants/{name}/keys/{key_id}")
    async def revoke_key(name: str, key_id: str) -> JSONResponse:
        """Let a key be valid no longer."""
        async with service.changing:
            await _beside(lambda: tenants.revoke_key(name, key_id))
            audit.write("key_revoke", tenant=name, key=key_id)
        return JSONResponse({"id": key_id, "tenant": name})


_Filter = Annotated[str | None, Query(max_length=63, description="Only this tenant's; empty: the shared ones.")]


def _publish(service: Service, body: PublishRequest) -> StoredPrefix:
    """Add a folder to the store, if this server can use it."""
    folder = find_prefix(Path(body.path))
    header = read_header(folder)
    if header["base"]["fingerprint"] != service.fingerprint:
        raise bad_request(f"The prefix was made for {header['base']['name']!r}, not for this model.", "path")
    if header.get("head") is not None:
        raise bad_request("The prefix has a head, which predicts labels; one that writes text is needed.", "path")
    return service.store.add(folder, body.name, body.tenant)


def _find(service: Service, name: str, tenant: str) -> StoredPrefix:
    found = service.store.resolve(name, [tenant])
    if found is None:
        of = f" of tenant `{tenant}`" if tenant else ""
        raise ApiError(404, f"There is no prefix `{name}`{of}.", param="name", code="not_found")
    return found


def _told(service: Service, each: StoredPrefix) -> dict[str, Any]:
    """A prefix as the admin sees it."""
    return {**each._asdict(), "model": f"{service.name}:{each.name}", "fits": each.fingerprint == service.fingerprint}


async def _beside(work: Callable[[], _T]) -> _T:
    """What the work gives, done beside the event loop; its errors are told to the admin, who is trusted."""
    try:
        return await asyncio.to_thread(work)
    except ForewordError as error:
        raise _explained(error) from None
    except OSError as error:
        raise bad_request(f"{error.filename or 'A file'} cannot be read ({error.strerror}).") from None


def _explained(error: ForewordError) -> ApiError:
    text = str(error)
    message = f"{text[0].upper()}{text[1:]}."
    return ApiError(500, message, code="storage_error") if isinstance(error, StorageError) else bad_request(message)
