# SPDX-License-Identifier: GPL-2.0-or-later
"""Can KVM here run a guest with Hyper-V's SynIC, or must QEMU translate?

Asks the kernel itself (``Documentation/virt/kvm/api.rst``): opens ``/dev/kvm``, checks the
extensions that QEMU needs for ``hv-vpindex`` and ``hv-synic``, makes a virtual machine and a
processor, and lets it take one instruction. A device file that merely exists proves nothing.
"""

import ctypes
import fcntl
import mmap
import os
import struct
from dataclasses import dataclass

from vhostvmbus.vm.errors import SetupError

KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_CHECK_EXTENSION = 0xAE03
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_API_VERSION = 12
KVM_EXIT_HLT = 5

NEEDED = {
    44: "KVM_CAP_HYPERV",
    148: "KVM_CAP_HYPERV_SYNIC2",
    149: "KVM_CAP_HYPERV_VP_INDEX",
    154: "KVM_CAP_HYPERV_EVENTFD",
}


@dataclass(frozen=True)
class Accelerator:
    """The accelerator that QEMU shall use, and the reason for it."""

    name: str
    reason: str


def kvm_problem(device: str = "/dev/kvm") -> str | None:
    """Returns why KVM cannot be used for this; ``None`` if it can."""
    if not os.path.exists(device):
        return f"there is no {device}"
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"{device}: {error.strerror}"
    try:
        version = fcntl.ioctl(fd, KVM_GET_API_VERSION)
        if version != KVM_API_VERSION:
            return f"KVM's API version is {version}"
        for number, name in NEEDED.items():
            if fcntl.ioctl(fd, KVM_CHECK_EXTENSION, number) <= 0:
                return f"KVM here lacks {name}"
        return _run_problem(fd)
    except OSError as error:
        return f"KVM does not work: {error.strerror}"
    finally:
        os.close(fd)


def _run_problem(kvm: int) -> str | None:
    """Makes a machine of one page and runs HLT in it; returns what went wrong, if anything did."""
    try:
        vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    except OSError as error:
        return f"KVM cannot make a virtual machine: {error.strerror}"
    page = mmap.mmap(-1, mmap.PAGESIZE)
    try:
        page[0] = 0xF4  # hlt
        anchor = ctypes.c_char.from_buffer(page)
        address = ctypes.addressof(anchor)
        region = struct.pack("<IIQQQ", 0, 0, 0, mmap.PAGESIZE, address)
        fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, region)
        vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
        try:
            run = mmap.mmap(vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0))
            sregs = bytearray(312)
            fcntl.ioctl(vcpu, KVM_GET_SREGS, sregs)
            sregs[0:8] = bytes(8)  # cs.base
            sregs[12:14] = bytes(2)  # cs.selector
            fcntl.ioctl(vcpu, KVM_SET_SREGS, sregs)
            regs = bytearray(144)
            regs[128:136] = bytes(8)  # rip
            regs[136:144] = struct.pack("<Q", 2)  # rflags: the bit that is always set
            fcntl.ioctl(vcpu, KVM_SET_REGS, regs)
            fcntl.ioctl(vcpu, KVM_RUN, 0)
            reason = int.from_bytes(run[8:12], "little")
            run.close()
        finally:
            os.close(vcpu)
        del anchor
        if reason != KVM_EXIT_HLT:
            return f"KVM does not run a processor here (exit reason {reason})"
    except OSError as error:
        return f"KVM does not run a processor here: {error.strerror}"
    finally:
        os.close(vm)
    return None


def choose(wanted: str) -> Accelerator:
    """Returns the accelerator for ``wanted``: ``auto``, ``tcg`` or ``kvm``.

    Raises SetupError if KVM is asked for and cannot do it.
    """
    if wanted == "auto":
        problem = kvm_problem()
        if problem is None:
            return Accelerator("kvm", "KVM works here, with Hyper-V's SynIC")
        return Accelerator("tcg", f"{problem}, so QEMU translates")
    if wanted == "kvm" and (problem := kvm_problem()):
        raise SetupError(f"KVM cannot be used: {problem}")
    return Accelerator(wanted, "as asked")
