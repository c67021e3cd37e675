"""Files of known size that are filled out of order."""

from __future__ import annotations

import errno
import os


def reserve(descriptor: int, size: int) -> None:
    """Take the blocks now where the file system can; a sparse file of that size elsewhere."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def write_all(descriptor: int, data: memoryview, position: int) -> None:
    """pwrite until nothing is left."""
    while data:
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written
