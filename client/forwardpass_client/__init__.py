"""Functional models on a server, called as if they were local.

with forwardpass_client.connect("localhost:8500") as client:
    model = client.model("digits")
    output = model.forward_pass(model.initial_weights, (x, y), training=False)
"""

from typing import TYPE_CHECKING

from forwardpass.wire import errors
from forwardpass.wire.description import BatchOutput
from forwardpass.wire.specs import TensorSpec
from forwardpass_client.async_model import AsyncRemoteFunctionalModel
from forwardpass_client.calls import ModelVersion
from forwardpass_client.client import AsyncClient, Client, connect, connect_async
from forwardpass_client.credentials import Tls
from forwardpass_client.masks import MaskedPredictions, MaskMissing
from forwardpass_client.metrics_sessions import AsyncMetricsSession, MetricsSession
from forwardpass_client.model import RemoteFunctionalModel
from forwardpass_client.training_calls import TrainingResult
from forwardpass_client.weights_handles import AsyncWeightsHandle, WeightsHandle

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        # Read on request: reading the package's metadata takes a fifth of the import's time.
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib.metadata

        return importlib.metadata.version("forwardpass")


__all__ = [
    "AsyncClient",
    "AsyncMetricsSession",
    "AsyncRemoteFunctionalModel",
    "AsyncWeightsHandle",
    "BatchOutput",
    "Client",
    "MaskMissing",
    "MaskedPredictions",
    "MetricsSession",
    "ModelVersion",
    "RemoteFunctionalModel",
    "TensorSpec",
    "Tls",
    "TrainingResult",
    "WeightsHandle",
    "connect",
    "connect_async",
    "errors",
]
