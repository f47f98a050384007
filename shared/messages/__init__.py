"""Every message on the wire: a file for each recipient, and `parts` for what they are made of.

Commands are imperative, events past tense. All are plain frozen values; `shared.codec` turns them
into msgpack and back. Each is idempotent for its receiver: redelivery, reordering and restarts are
settled by `attempt`, `step_index`, `seq` and `epoch`, never by trust in exactly-once transport.

Fields that most messages have are explained here, the others where they stand:
    request_id: one image. job_id: one HTTP request, of n images with consecutive seeds.
    attempt: an opaque token "EPOCH-NUMBER"; a request's record names the current one.
    epoch: a scheduler's life; workers ignore commands of an older one.
    incarnation: a worker process's life; its streams are named after it.
    step_index: the next UNet forward of a request, from 0 to its num_forwards.
    seq: the number of a slot on one UNet worker, ascending within an incarnation.
Instants (`*_at`) are seconds since the Unix epoch; durations carry their unit.
"""

from shared.messages.parts import (
    NO_ROOM,
    HeldRequest,
    ImageParameters,
    ModelInfo,
    RequestProgress,
    RowFailure,
    RowReport,
    SlotRow,
    SlotShape,
    TensorHandle,
    WorkerInfo,
)
from shared.messages.to_any_worker import BeginEpoch, LeaveWhenDone, RefuseWorker, ToAnyWorker
from shared.messages.to_gateway import RequestFinished, RequestsProgressed, ToGateway
from shared.messages.to_scheduler import (
    ChunksDecoded,
    ChunksMeasured,
    CommitRefused,
    GenerateImage,
    HandleLost,
    ImageDecoded,
    LatentsFinished,
    RequestAdmitted,
    RequestCancelled,
    RequestFailed,
    RequestHandedBack,
    SlotDenoised,
    SlotMeasured,
    ToScheduler,
    WorkerAnnounced,
    WorkerDraining,
    WorkerLost,
    WorkerRegistered,
)
from shared.messages.to_unet_worker import (
    AdmitRequest,
    DenoiseSlot,
    MeasureSlot,
    ReleaseLatents,
    ReleaseRequest,
    ToUnetWorker,
)
from shared.messages.to_vae_worker import (
    CancelDecode,
    DecodeLatents,
    GrantChunks,
    MeasureChunks,
    ToVaeWorker,
)

Message = ToScheduler | ToUnetWorker | ToVaeWorker | ToGateway

__all__ = [
    "NO_ROOM",
    "AdmitRequest",
    "BeginEpoch",
    "CancelDecode",
    "ChunksDecoded",
    "ChunksMeasured",
    "CommitRefused",
    "DecodeLatents",
    "DenoiseSlot",
    "GenerateImage",
    "GrantChunks",
    "HandleLost",
    "HeldRequest",
    "ImageDecoded",
    "ImageParameters",
    "LatentsFinished",
    "LeaveWhenDone",
    "MeasureChunks",
    "MeasureSlot",
    "Message",
    "ModelInfo",
    "RefuseWorker",
    "ReleaseLatents",
    "ReleaseRequest",
    "RequestAdmitted",
    "RequestCancelled",
    "RequestFailed",
    "RequestFinished",
    "RequestHandedBack",
    "RequestProgress",
    "RequestsProgressed",
    "RowFailure",
    "RowReport",
    "SlotDenoised",
    "SlotMeasured",
    "SlotRow",
    "SlotShape",
    "TensorHandle",
    "ToAnyWorker",
    "ToGateway",
    "ToScheduler",
    "ToUnetWorker",
    "ToVaeWorker",
    "WorkerAnnounced",
    "WorkerDraining",
    "WorkerInfo",
    "WorkerLost",
    "WorkerRegistered",
]
