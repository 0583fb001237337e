# SPDX-License-Identifier: GPL-2.0-or-later
"""Rights that a served device does without, given up once its images, links and sockets are open.

For good, and for what the process starts as well: no new privileges (``PR_SET_NO_NEW_PRIVS``);
system calls that no device makes are refused with ``EPERM`` (``seccomp(2)``, in all threads, if
libseccomp is installed); of root's capabilities (``capabilities(7)``) only what the device asks for
is left.
Capabilities are a thread's: the threads that serve channels begin later and have none but those,
while one that looks after a link, and may have to make its TAP again, began earlier and keeps its
own.

A device says in its ``options`` module what it cannot do without: ``CAPABILITIES`` are names of
capabilities, ``SYSTEM_CALLS`` of system calls among those that are refused otherwise.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Sequence
from typing import Any, Final

log = logging.getLogger(__name__)

CAPABILITIES: Final = {"DAC_OVERRIDE": 1, "KILL": 5, "NET_ADMIN": 12, "SYS_ADMIN": 21}
"""Numbers of the capabilities that can be kept, ``linux/capability.h``."""
KEPT: Final = ("DAC_OVERRIDE",)
"""Capabilities that every device keeps: the socket's file, in whosever folder, is removed."""
# fmt: off
REFUSED: Final = (
    "acct", "add_key", "adjtimex", "bpf", "chroot", "clock_adjtime", "clock_settime",
    "delete_module", "execve", "execveat", "finit_module", "fsconfig", "fsmount", "fsopen",
    "fspick", "init_module", "io_uring_enter", "io_uring_register", "io_uring_setup", "ioperm",
    "iopl", "kexec_file_load", "kexec_load", "keyctl", "lookup_dcookie", "mknod", "mknodat",
    "modify_ldt", "mount", "mount_setattr", "move_mount", "open_by_handle_at", "open_tree",
    "perf_event_open", "personality", "pidfd_getfd", "pivot_root", "process_vm_readv",
    "process_vm_writev", "ptrace", "quotactl", "quotactl_fd", "reboot", "request_key",
    "setdomainname", "sethostname", "setns", "settimeofday", "swapoff", "swapon", "syslog",
    "umount2", "unshare", "userfaultfd", "vhangup",
)
# fmt: on
"""The system calls that are refused unless a device asks for one."""

_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
"""``linux/prctl.h``."""
_CAPABILITY_VERSION = 0x20080522
_SCMP_ACT_ALLOW, _SCMP_ACT_EPERM = 0x7FFF0000, 0x00050001
_SCMP_FLTATR_CTL_TSYNC = 4
"""``seccomp.h`` of libseccomp."""

_libc = ctypes.CDLL(None, use_errno=True)


def enter(capabilities: Sequence[str] = (), system_calls: Sequence[str] = ()) -> dict[str, Any]:
    """Gives up all rights but these; returns what is in force, ready for JSON."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    kept = _drop_capabilities({CAPABILITIES[name] for name in (*KEPT, *capabilities)})
    try:
        refused = _refuse([name for name in REFUSED if name not in system_calls])
    except OSError as error:  # it is not installed, or we are in a sandbox without seccomp
        log.info("no system call is refused: libseccomp: %s", error.strerror or error)
        refused = 0
    return {"no_new_privs": True, "capabilities": kept, "refused_system_calls": refused}


def _call(function: str, *arguments: object) -> None:
    if getattr(_libc, function)(*arguments):
        error = ctypes.get_errno()
        raise OSError(error, f"{function}: {os.strerror(error)}")


def _drop_capabilities(wanted: set[int]) -> list[str]:
    """Drops this thread's capabilities but those ``wanted``; returns the names of what is left."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    sets = (
        ctypes.c_uint32 * 6
    )()  # effective, permitted and inheritable, of 0 to 31 and of the rest
    _call("capget", header, sets)
    had = sets[1] | sets[4] << 32
    left = had & sum(1 << number for number in wanted)
    if had:
        number = 0
        while _libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) >= 0:
            if number not in wanted:
                # Refused without CAP_SETPCAP, and of no use then: nothing can be gained by exec.
                _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
            number += 1
        _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
        low, high = left & 0xFFFFFFFF, left >> 32
        sets[:] = [low, low, 0, high, high, 0]
        _call("capset", header, sets)
    return sorted(name for name, number in CAPABILITIES.items() if left >> number & 1)


def _refuse(names: Sequence[str]) -> int:
    """Has the kernel refuse system calls; returns how many. Raises ``OSError``."""
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    library.seccomp_rule_add.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
    ]
    library.seccomp_load.argtypes = library.seccomp_release.argtypes = [ctypes.c_void_p]
    rules = library.seccomp_init(_SCMP_ACT_ALLOW)
    if not rules:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    try:
        result = library.seccomp_attr_set(rules, _SCMP_FLTATR_CTL_TSYNC, 1)
        count = 0
        for name in names:
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number >= 0:  # an older library does not know each
                result = result or library.seccomp_rule_add(rules, _SCMP_ACT_EPERM, number, 0)
                count += 1
        result = result or library.seccomp_load(rules)
    finally:
        library.seccomp_release(rules)
    if result:
        raise OSError(-result, os.strerror(-result))
    return count
