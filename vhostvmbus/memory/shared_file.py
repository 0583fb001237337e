# SPDX-License-Identifier: GPL-2.0-or-later
"""Which files of a front end's are mapped: those that no access to can hang.

A page of an ordinary file comes from its file system, which may be a process of the front end's own
(FUSE) or a host that does not answer: whoever touched it, or only asked for the file's size, would
wait for that without end.
"""

import errno
import fcntl
import os


def is_shared_memory(fd: int) -> bool:
    """Tells whether ``fd`` is a memfd or a file of tmpfs or hugetlbfs; asks no file system.

    Raises :exc:`OSError` if it is not open.
    """
    if fd < 0:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # which only those have
    except OSError:
        fcntl.fcntl(fd, fcntl.F_GETFD)
        return False
    return True
