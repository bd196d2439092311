"""Messages of the protocol's version 1, generated from the .proto files beside this one."""

from forwardpass.v1.error_pb2 import ErrorDetail
from forwardpass.v1.management_pb2 import (
    DESCRIPTOR as MANAGEMENT_FILE,
)
from forwardpass.v1.management_pb2 import (
    DescribeModelsRequest,
    DescribeModelsResponse,
    LoadModelRequest,
    LoadModelResponse,
    ModelVersionDetail,
    ReloadModelRequest,
    ReloadModelResponse,
    UnloadModelRequest,
    UnloadModelResponse,
)
from forwardpass.v1.model_pb2 import (
    Batch,
    BatchOutput,
    Function,
    FunctionDescription,
    MetricsState,
    ModelDescription,
    ModelIdentity,
    ModelSelector,
    ModelState,
    ModelVersionStatus,
    ModelWeights,
    Vectorization,
)
from forwardpass.v1.service_pb2 import (
    DESCRIPTOR as SERVICE_FILE,
)
from forwardpass.v1.service_pb2 import (
    AnswerFrame,
    CallFrame,
    FinalizeMetricsRequest,
    FinalizeMetricsResponse,
    ForwardBackwardRequest,
    ForwardBackwardResponse,
    ForwardPassRequest,
    ForwardPassResponse,
    GetInitialWeightsRequest,
    GetInitialWeightsResponse,
    GetModelRequest,
    GetModelResponse,
    InitializeMetricsStateRequest,
    InitializeMetricsStateResponse,
    ListModelsRequest,
    ListModelsResponse,
    LossRequest,
    LossResponse,
    PipelineRequest,
    PipelineResponse,
    PredictOnBatchRequest,
    PredictOnBatchResponse,
    UpdateMetricsStateRequest,
    UpdateMetricsStateResponse,
    VjpRequest,
    VjpResponse,
)
from forwardpass.v1.session_record_pb2 import SessionRecord, SessionWriter
from forwardpass.v1.sessions_pb2 import (
    DESCRIPTOR as SESSIONS_FILE,
)
from forwardpass.v1.sessions_pb2 import (
    CloseSessionRequest,
    CloseSessionResponse,
    EvaluateRequest,
    EvaluateResponse,
    EvaluationBatch,
    EvaluationPosition,
    EvaluationStart,
    EvaluationTarget,
    ForwardPassInSessionRequest,
    ForwardPassInSessionResponse,
    GetSessionResultRequest,
    GetSessionResultResponse,
    GetSessionStateRequest,
    GetSessionStateResponse,
    MergeIntoSessionRequest,
    MergeIntoSessionResponse,
    OpenSessionRequest,
    OpenSessionResponse,
    UpdateIdentity,
    UpdateSessionRequest,
    UpdateSessionResponse,
)
from forwardpass.v1.structure_pb2 import Structure, StructureSpec, TreeDef
from forwardpass.v1.tensor_pb2 import DataType, Tensor, TensorSpec
from forwardpass.v1.training_pb2 import (
    DESCRIPTOR as TRAINING_FILE,
)
from forwardpass.v1.training_pb2 import (
    TrainingBatch,
    TrainingCheckpoint,
    TrainingPosition,
    TrainingResult,
    TrainingStart,
    TrainRequest,
    TrainResponse,
)
from forwardpass.v1.weights_pb2 import (
    DESCRIPTOR as WEIGHTS_FILE,
)
from forwardpass.v1.weights_pb2 import (
    CombineWeightsRequest,
    CombineWeightsResponse,
    DeleteWeightsRequest,
    DeleteWeightsResponse,
    DescribeWeightsRequest,
    DescribeWeightsResponse,
    DownloadTensorRequest,
    DownloadTensorResponse,
    LeaseWeightsRequest,
    LeaseWeightsResponse,
    MissingTensor,
    PutWeightsRequest,
    PutWeightsResponse,
    TensorManifest,
    UploadTensorsRequest,
    UploadTensorsResponse,
    WeightsManifest,
    WeightsTerm,
)
