/*
 * Hyper-V emulation in QEMU: not built in, hv-* properties have no effect
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "hyperv-emu.h"

bool hyperv_emu_realize(X86CPU *cpu, Error **errp)
{
    return true;
}

void hyperv_emu_unrealize(X86CPU *cpu)
{
    g_assert_not_reached();
}

void hyperv_emu_reset(X86CPU *cpu)
{
    g_assert_not_reached();
}

void hyperv_emu_after_reset(X86CPU *cpu)
{
    g_assert_not_reached();
}

void hyperv_emu_post_load(X86CPU *cpu)
{
    g_assert_not_reached();
}

void hyperv_emu_cpuid(X86CPU *cpu, uint32_t leaf, uint32_t *eax,
                      uint32_t *ebx, uint32_t *ecx, uint32_t *edx)
{
    g_assert_not_reached();
}

bool hyperv_emu_rdmsr(X86CPU *cpu, uint32_t msr, uint64_t *val)
{
    g_assert_not_reached();
}

bool hyperv_emu_wrmsr(X86CPU *cpu, uint32_t msr, uint64_t val)
{
    g_assert_not_reached();
}

bool hyperv_emu_hypercall(X86CPU *cpu)
{
    g_assert_not_reached();
}
