# SPDX-License-Identifier: GPL-2.0-or-later
"""In the guest: load a kernel for kexec, ``kexec_load.py now|crash KERNEL INITRAMFS CMDLINE``.

``now`` starts it at once, over the running one, whose drivers say goodbye first; ``crash`` leaves
it for a panic. Numbers: arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/linux/kexec.h,
include/uapi/linux/reboot.h.
"""

import ctypes
import os
import sys

SYS_REBOOT, SYS_KEXEC_FILE_LOAD = 169, 320
ON_CRASH = 2
REBOOT_MAGIC = (0xFEE1DEAD, 672274793)
REBOOT_KEXEC = 0x45584543

libc = ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: object) -> None:
    """A system call; OSError if it fails."""
    if libc.syscall(ctypes.c_long(number), *arguments) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def main() -> None:
    when, kernel, initramfs, command_line = sys.argv[1:]
    text = command_line.encode() + b"\0"
    with open(kernel, "rb") as image, open(initramfs, "rb") as files:
        call(
            SYS_KEXEC_FILE_LOAD,
            ctypes.c_long(image.fileno()),
            ctypes.c_long(files.fileno()),
            ctypes.c_ulong(len(text)),
            text,
            ctypes.c_ulong(ON_CRASH if when == "crash" else 0),
        )
    if when == "now":
        os.sync()
        magic = [ctypes.c_long(number) for number in REBOOT_MAGIC]
        call(SYS_REBOOT, *magic, ctypes.c_long(REBOOT_KEXEC), ctypes.c_long(0))


main()
