"""Versions of the formats that sparsetrace writes, and the refusal of workloads of an unknown version."""

from typing import Any, Final

from sparsetrace.core.files import InputError

# Written into a workload's manifest. Until a version is released, each change to it raises the revision instead; a
# reader refuses every pair of the two that it does not know.
WORKLOAD_VERSION: Final = 2
WORKLOAD_REVISION: Final = 0
# (version, revision) of the workloads that can be read. Version 1 had no revisions.
READABLE_WORKLOADS: Final = ((1, 0), (2, 0))
# Stored in each data file: the version that defined its layout. Files of matrices within layers are still those of 1.
LAYER_FILE_VERSION: Final = 1
MODEL_FILE_VERSION: Final = 2
DUMP_VERSION: Final = 3
MODEL_VERSION: Final = 3


def refuse_unknown_format(manifest: dict[str, Any], where: str) -> None:
    """Refuse a workload whose format this sparsetrace does not know.

    Args:
        manifest: of the workload.
        where: for the message, `<step>: <place>`.

    Raises:
        InputError: the manifest is not that of a workload, or of another version or revision.
    """
    if manifest.get("format") != "sparsetrace-workload":
        raise InputError(f"{where} must be a sparsetrace workload, got another manifest.json")
    version, revision = manifest.get("version"), manifest.get("revision", 0)
    if (version, revision) not in READABLE_WORKLOADS:
        known = " or ".join(f"{v} revision {r}" for v, r in READABLE_WORKLOADS)
        raise InputError(
            f"{where} must have format version {known}, got {version} revision {revision}: "
            "install the sparsetrace that knows it"
        )
