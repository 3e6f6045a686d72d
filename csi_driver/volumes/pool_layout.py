"""The layout of a pool: what lies where in it, and how it is called.

<pool root>/
  .csi/                 0700, root only, outside whatever tenants can mount
    format.json         which pool this is, and in which format
    lock                one byte for each key that somebody holds
    promises            the mark of whoever raised promises last (promises.py)
    volumes/ snapshots/ groups/         records
    retained/ archived/                 records that no longer answer to a name
    parents/                            marks of the parents of templated directories that the driver made (parents.py)
    snapshots-data/<id>/                the content of snapshots
    manifests/<id>                      what is in a snapshot, file by file
    staging/<id>.<token>/               content that is being made
    trash/<id>.<token>/                 the data of what was deleted or given up, until the reaper has removed it
    trash/<id>.<token>.<kind>.json      the record of what is being deleted, until its data is in the trash as well
  <directory of a volume>
"""

import os
import secrets

CONTROL = ".csi"
FORMAT_VERSION = 1
VOLUMES, SNAPSHOTS, GROUPS = "volumes", "snapshots", "groups"
RETAINED, ARCHIVED = "retained", "archived"
SNAPSHOT_DATA, MANIFESTS, STAGING, TRASH = "snapshots-data", "manifests", "staging", "trash"
PARENTS = "parents"
FOLDERS = (VOLUMES, SNAPSHOTS, GROUPS, RETAINED, ARCHIVED, PARENTS, SNAPSHOT_DATA, MANIFESTS, STAGING, TRASH)
ARCHIVE_DIRECTORY = "archived"
"""Where, beside the volumes, the data of `onDelete: archive` goes."""


def new_token() -> str:
    """Draw what tells one creation, staging or deletion from the next of the same id."""
    return secrets.token_hex(8)


def archived_place(directory: str, token: str) -> str:
    """Say where the data of an archived volume lies, by its directory and its record's token."""
    return f"{ARCHIVE_DIRECTORY}/{directory.rpartition('/')[2]}.{token}"


def exists_at(parent: int, name: str) -> bool:
    """Tell whether the folder has an entry of this name, whatever it is."""
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
