"""Which ways of use a pool can serve, in which form a volume is made for them, and which two uses of one volume get along."""

from collections.abc import Iterable

from csi_driver.backends.base import PoolBackend
from csi_driver.errors import FailedPrecondition, InvalidArgument, quoted
from csi_driver.linux import image_filesystems
from csi_driver.linux.bind_flags import parse_bind_flags
from csi_driver.volumes.model import AccessMode, AccessType, Form, Layout, NodePublication, Ownership
from csi_driver.volumes.requests import Capability

_FLAGS = "volume_capability.mount.mount_flags"


def form_for(layout: Layout | None, capabilities: Iterable[Capability], source: Form | None = None) -> Form:
    """Choose the form of a volume that shall have these capabilities: what its class says, else its source's, else a directory.

    Raw block is an image always, so that a claim with `volumeMode: Block` works with any class. Raises InvalidArgument for what no form
    can be: block in a directory, block and mount at once, an unknown filesystem, or content of another form.
    """
    wanted = tuple(capabilities)
    types = {capability.access_type for capability in wanted} or {AccessType.MOUNT}
    if len(types) > 1:
        raise InvalidArgument("volume_capabilities ask for `block` and `mount` at once: a volume is one of them")
    access_type = types.pop()
    inherited = source.layout if source is not None else Layout.DIRECTORY
    chosen = layout or (Layout.IMAGE if access_type is AccessType.BLOCK else inherited)
    if chosen is Layout.DIRECTORY:
        if access_type is AccessType.BLOCK:
            raise InvalidArgument(
                "volume_capability.block: parameters.layout is `directory`, and a directory is no block device; use a class with "
                "`layout: image`, or without `layout`"
            )
        form = Form()
    elif access_type is AccessType.BLOCK:
        form = Form(Layout.IMAGE, AccessType.BLOCK)
    else:
        given = {capability.fs_type for capability in wanted if capability.fs_type}
        if len(given) > 1:
            raise InvalidArgument(
                f"volume_capabilities ask for several filesystems ({', '.join(sorted(given))}): a volume has one"
            )
        inherited_type = source.fs_type if source is not None else ""
        form = Form(Layout.IMAGE, AccessType.MOUNT, next(iter(given), inherited_type or image_filesystems.DEFAULT))
        if form.fs_type not in image_filesystems.KINDS:
            raise InvalidArgument.field(
                "volume_capability.mount.fs_type", form.fs_type, f"an image can have {' or '.join(image_filesystems.KINDS)}"
            )
    if source is not None and source != form:
        raise InvalidArgument(
            f"volume_content_source holds {described(source)}, and what is asked for is {described(form)}: content keeps its layout, volume "
            "mode and filesystem"
        )
    return form


def has_form(form: Form, layout: Layout | None, capabilities: Iterable[Capability]) -> bool:
    """Tell whether a volume of this form is what a class with `layout` and these capabilities ask for."""
    if layout is not None and layout is not form.layout:
        return False
    return all(
        wanted.access_type is form.access_type and (form.layout is Layout.DIRECTORY or wanted.fs_type in ("", form.fs_type))
        for wanted in capabilities
    )


def described(form: Form) -> str:
    """Name a form in a message."""
    if form.layout is Layout.DIRECTORY:
        return "a directory"
    return "raw block" if form.access_type is AccessType.BLOCK else f"an image with {form.fs_type}"


def unsupported(capability: Capability, pool: PoolBackend, form: Form) -> str | None:
    """Say why `pool` cannot serve `capability` with a volume of this form; None where it can."""
    if capability.access_type is not form.access_type:
        return f"volume_capability.{capability.access_type}: the volume is {described(form)}"
    if form.layout is Layout.IMAGE:
        return _unsupported_image(capability, form)
    if pool.node_local and not capability.access_mode.single_node:
        return (
            f"volume_capability.access_mode is {capability.access_mode}: pool {pool.name} lives on one node; allowed are the SINGLE_NODE "
            "modes (ReadWriteOnce, ReadWriteOncePod); several nodes need an NFS pool, or `shared = true` on a directory that is shared"
        )
    try:
        pool.check_flags(capability.mount_flags, _FLAGS)
    except InvalidArgument as error:
        return str(error)
    return None


def _unsupported_image(capability: Capability, form: Form) -> str | None:
    if not capability.access_mode.single_node:
        return (
            f"volume_capability.access_mode is {capability.access_mode}: an image is on one node at a time; allowed are the SINGLE_NODE modes "
            "(ReadWriteOnce, ReadWriteOncePod); several nodes need `layout: directory`"
        )
    if capability.fs_type and capability.fs_type != form.fs_type:
        return f"volume_capability.mount.fs_type is {quoted(capability.fs_type)}: the volume is {described(form)}"
    try:
        parse_bind_flags(capability.mount_flags, _FLAGS)
    except InvalidArgument as error:
        return str(error)
    return None


def check_ownership(wanted: Ownership, pool: PoolBackend) -> None:
    """Raise FailedPrecondition where a class asks for an owner and the pool's server lets nobody give files away."""
    if pool.squashed_to is not None and (wanted.uid is not None or wanted.gid is not None):
        raise FailedPrecondition(
            f"parameters ask for a uid or gid, but the server of pool {pool.name} squashes root to uid {pool.squashed_to}: export it to "
            "the controller with `no_root_squash`, or ask for a `mode` only"
        )


def is_writer(publication: NodePublication) -> bool:
    """Tell whether a node with this publication may write."""
    return not (publication.readonly or publication.access_mode.reader_only)


def check_compatible(handle: str, wanted: NodePublication, others: Iterable[NodePublication]) -> None:
    """Raise FailedPrecondition, naming the node, where `wanted` and what other nodes have of the volume exclude each other."""
    for other in others:
        if wanted.access_mode.single_node or other.access_mode.single_node:
            raise FailedPrecondition(
                f"volume {handle} is published to node {other.node_id} with {other.access_mode}: it can be on one node at a time; it "
                f"comes to {wanted.node_id} once it has been unpublished there"
            )
        one_writer = AccessMode.MULTI_NODE_SINGLE_WRITER in (wanted.access_mode, other.access_mode)
        if one_writer and is_writer(wanted) and is_writer(other):
            raise FailedPrecondition(f"volume {handle} has its one writer on node {other.node_id} ({other.access_mode})")
