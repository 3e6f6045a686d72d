"""Sizes: what a new volume gets, and how one grows. A volume never shrinks."""

from dataclasses import replace

from csi_driver.errors import InvalidArgument, OutOfRange
from csi_driver.volumes import access
from csi_driver.volumes.contents import Contents
from csi_driver.volumes.images import fitting_size
from csi_driver.volumes.limits import Limits
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.lookup import find_ready
from csi_driver.volumes.model import Form
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.promises import Committed, Promises
from csi_driver.volumes.requests import DEFAULT_CAPACITY_BYTES, Capability, CapacityRange


def choose_size(capacity: CapacityRange, form: Form, least_bytes: int) -> int:
    """Return the bytes of a new volume of this form, whose content needs `least_bytes` (0: it has none). Raises OutOfRange."""
    wanted = capacity.required_bytes or least_bytes or DEFAULT_CAPACITY_BYTES
    limit = capacity.limit_bytes
    if limit and not capacity.required_bytes:
        wanted = min(wanted, limit)
    wanted = fitting_size(form, wanted)
    if limit and wanted > limit:
        raise OutOfRange(f"capacity_range asks for {wanted} bytes, but limit_bytes is {limit}")
    if wanted < least_bytes:
        raise OutOfRange(f"capacity_range asks for {wanted} bytes, but the content source needs {least_bytes}")
    return wanted


class Expansion:
    """Makes volumes larger."""

    def __init__(self, pools: Pools, locks: KeyedLocks, promises: Promises, contents: Contents, limits: Limits) -> None:
        self._pools = pools
        self._locks = locks
        self._promises = promises
        self._contents = contents
        self._limits = limits

    def expand(self, handle: str, capacity: CapacityRange, capability: Capability | None) -> int:
        """Grow a volume to `required_bytes`; a size that it has already is answered as it is. Returns bytes.

        Raises NotFound, OutOfRange (beyond limit_bytes, or more than the pool can promise), InvalidArgument (a capability that the
        volume lacks), FailedPrecondition (what holds it is switched off), OperationPending.
        """
        store, record = find_ready(self._pools, handle)
        if capability is not None and (problem := access.unsupported(capability, store.backend, record.form)):
            raise InvalidArgument(problem)
        with self._locks.hold(store, f"volume:{record.id}"):
            _, record = find_ready(self._pools, handle)
            wanted = fitting_size(record.form, capacity.required_bytes or record.capacity_bytes)
            if capacity.limit_bytes and max(wanted, record.capacity_bytes) > capacity.limit_bytes:
                raise OutOfRange(
                    f"capacity_range.limit_bytes is {capacity.limit_bytes}, but the volume has {record.capacity_bytes}: volumes never shrink"
                )
            # Also where the size is there already: a crash may have come between record and limit. And if the limiter is switched off, now
            # is the time to say so.
            self._limits.change(store, record, record.capacity_bytes)
            if wanted <= record.capacity_bytes:
                self._contents.resize(store, record)  # cut off before, it is completed
                return record.capacity_bytes
            try:
                gate = self._promises.gate(store, record.id, wanted, wanted - record.capacity_bytes)
                # The promise first: an image larger than its record would be one that nobody has accounted for.
                record = store.volumes.replace(replace(record, capacity_bytes=wanted), gate)
            except Committed as refusal:
                # Not RESOURCE_EXHAUSTED: for external-resizer that is not final, and the claim could not be given a smaller size.
                raise OutOfRange(f"expansion from {record.capacity_bytes} to {wanted} bytes: {refusal}") from refusal
            self._contents.resize(store, record)
            self._limits.change(store, record, wanted)
            return wanted
