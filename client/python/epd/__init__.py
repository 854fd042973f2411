"""epd: expert parallelism for Mixture-of-Experts layers as a service of the node.

A rank connects to its node's daemon, joins a group with the other ranks, allocates arrays in memory it shares with the
daemon, makes plans (an op checked once and bound to arrays) and launches them::

    with epd.connect() as client:
        with client.join("layer", world_size, rank, n_experts=8, top_k=2, hidden=64, ffn=128, max_tokens=256) as group:
            x = group.alloc((256, 64))
            ...
            forward = group.moe_forward(x=x, topk_idx=idx, topk_weights=weights, w1=w1, w2=w2, out=out)
            forward()

Every error is an :class:`epd.Error` with a status and the sentence of the daemon. libepd is looked for at ``$EPD_LIBRARY``,
beside the package and where the system's loader looks.
"""

from .buffer import Buffer
from .client import Client, ClientInfo, Device, connect
from .device import DeviceArray, DeviceBuffer, MemoryRange
from .dtype import from_bf16, to_bf16
from .errors import (
    BadRouting,
    BadSplits,
    Busy,
    CapacityOverflow,
    Closed,
    Cuda,
    Disconnected,
    Draining,
    Error,
    Evicted,
    ForeignId,
    GroupMismatch,
    Internal,
    InUse,
    InvalidAlignment,
    InvalidArgument,
    InvalidDevice,
    InvalidDtype,
    InvalidShape,
    LibraryNotFound,
    Nccl,
    NoMemory,
    OutOfRange,
    PeerLost,
    Permission,
    PlanMismatch,
    Protocol,
    Quota,
    Restarted,
    SeqMismatch,
    StaleEpoch,
    System,
    Timeout,
    UnknownId,
    Unsupported,
    VersionMismatch,
)
from .group import Group, GroupInfo
from .plan import Plan, PlanInfo
from .status import Status
from .words import Activation, Backend, Crossing, DType, GemmLayout, Op, Overflow, Phase, Role, Saved

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "Backend",
    "BadRouting",
    "BadSplits",
    "Buffer",
    "Busy",
    "CapacityOverflow",
    "Client",
    "ClientInfo",
    "Closed",
    "Crossing",
    "Cuda",
    "DType",
    "Device",
    "DeviceArray",
    "DeviceBuffer",
    "Disconnected",
    "Draining",
    "Error",
    "Evicted",
    "ForeignId",
    "GemmLayout",
    "Group",
    "GroupInfo",
    "GroupMismatch",
    "InUse",
    "Internal",
    "InvalidAlignment",
    "InvalidArgument",
    "InvalidDevice",
    "InvalidDtype",
    "InvalidShape",
    "LibraryNotFound",
    "MemoryRange",
    "Nccl",
    "NoMemory",
    "Op",
    "OutOfRange",
    "Overflow",
    "PeerLost",
    "Permission",
    "Phase",
    "Plan",
    "PlanInfo",
    "PlanMismatch",
    "Protocol",
    "Quota",
    "Restarted",
    "Role",
    "Saved",
    "SeqMismatch",
    "StaleEpoch",
    "Status",
    "System",
    "Timeout",
    "UnknownId",
    "Unsupported",
    "VersionMismatch",
    "connect",
    "from_bf16",
    "to_bf16",
]
