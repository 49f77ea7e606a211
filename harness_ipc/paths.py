"""The former name of `_registry.files` and `_registry.namespace`."""

from ._registry.files import (
    check_private_dir,
    create_private_dir,
    open_log_for_reading,
    open_private_log,
    read_private_file,
    write_private_file,
)
from ._registry.files import file_fingerprint as private_file_stamp
from ._registry.files import retry_on_sharing_violation as retry_sharing
from ._registry.namespace import check_name, is_name, private_temporary_dir
from ._registry.namespace import runtime_root as runtime_location

__all__ = [
    "check_name",
    "check_private_dir",
    "create_private_dir",
    "is_name",
    "open_log_for_reading",
    "open_private_log",
    "private_file_stamp",
    "private_temporary_dir",
    "read_private_file",
    "retry_sharing",
    "runtime_location",
    "write_private_file",
]
