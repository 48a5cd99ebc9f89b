"""The target's side of the Speculate stream, as a library for any engine: what does a sequence verify next?

May be imported by every engine; needs grpcio, protobuf and nothing of ours above it: no torch. Start reading at
`pool.py`, then `handle.py`; `pairing.py` decides which speculator has which sequence.
"""

from __future__ import annotations

from specpool.algorithm.speculation_cache import LookupKind
from specpool.speculation.connection import Connection
from specpool.speculation.dense import Deliver, DenseGroup, DenseReceiver
from specpool.speculation.draft import DraftSource, NextDraft
from specpool.speculation.fingerprint import tokenizer_fingerprint
from specpool.speculation.handle import SequenceHandle
from specpool.speculation.handle_owner import SequenceEvents
from specpool.speculation.identity import PoolIdentity
from specpool.speculation.measurements import Measurements
from specpool.speculation.members import Member
from specpool.speculation.pairing import PoolEvents
from specpool.speculation.pairing_settings import PairingSettings
from specpool.speculation.pool import SpeculationPool
from specpool.speculation.trust import WaitTrust
from specpool.speculation.wait_policy import worth_waiting

__all__ = [
    "Connection",
    "Deliver",
    "DenseGroup",
    "DenseReceiver",
    "DraftSource",
    "LookupKind",
    "Measurements",
    "Member",
    "NextDraft",
    "PairingSettings",
    "PoolEvents",
    "PoolIdentity",
    "SequenceEvents",
    "SequenceHandle",
    "SpeculationPool",
    "WaitTrust",
    "tokenizer_fingerprint",
    "worth_waiting",
]
