"""The methods of ManagementService."""

from __future__ import annotations

from forwardpass import v1
from forwardpass.wire import errors, fields
from forwardpass_server.catalog.management import Management, VersionDetail
from forwardpass_server.rpc.selectors import checked
from forwardpass_server.rpc.servicer import version_status


class ManagementServicer:
    """Each method has the name of its RPC; it takes and returns bytes."""

    def __init__(self, management: Management) -> None:
        self._management = management

    async def LoadModel(self, data: bytes, context: object) -> bytes:
        model = checked(fields.parse(v1.LoadModelRequest, data).model)
        loaded = await self._management.load(model.name, model.version, model.label)
        return v1.LoadModelResponse(model=_detail(loaded)).SerializeToString()

    async def UnloadModel(self, data: bytes, context: object) -> bytes:
        model = _one_version(fields.parse(v1.UnloadModelRequest, data).model)
        await self._management.unload(model.name, model.version, model.label)
        return b""

    async def ReloadModel(self, data: bytes, context: object) -> bytes:
        model = _one_version(fields.parse(v1.ReloadModelRequest, data).model)
        loaded = await self._management.reload(model.name, model.version, model.label)
        return v1.ReloadModelResponse(model=_detail(loaded)).SerializeToString()

    async def DescribeModels(self, data: bytes, context: object) -> bytes:
        fields.parse(v1.DescribeModelsRequest, data)
        found = await self._management.describe()
        return v1.DescribeModelsResponse(models=map(_detail, found)).SerializeToString()


def _one_version(model: v1.ModelSelector) -> v1.ModelSelector:
    """The selector. Raises InvalidRequest without a version or label: the server does not choose a version here."""
    if not checked(model).label and model.version < 1:
        raise errors.InvalidRequest(place="model.version", expected="an integer from 1 on", found=str(model.version))
    return model


def _detail(found: VersionDetail) -> v1.ModelVersionDetail:
    entry = found.entry
    if entry is None:
        status = v1.ModelVersionStatus(name=found.source.name, version=found.source.version, labels=found.labels)
    else:
        status = version_status(entry, found.labels)
    described = entry.servable.model.description if entry is not None and entry.servable is not None else None
    return v1.ModelVersionDetail(
        status=status,
        is_loadable=found.is_loadable,
        format=described.format if described else "",
        unbatchable_reason=described.unbatchable_reason if described else "",
    )
