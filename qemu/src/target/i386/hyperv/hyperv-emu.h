/*
 * Hyper-V emulation in QEMU: entry points for the accelerator
 *
 * KVM emulates Hyper-V in the kernel.  An accelerator that has no such help
 * calls these functions instead, and QEMU is the hypervisor that the guest
 * sees.  Used by TCG.
 *
 * References are to the Hyper-V Hypervisor Top-Level Functional Specification
 * (TLFS), version 6.0b.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TARGET_I386_HYPERV_EMU_H
#define TARGET_I386_HYPERV_EMU_H

#include "cpu.h"

/* CPUID leaves and MSRs that belong to the hypervisor interface. */
#define HYPERV_CPUID_FIRST  0x40000000
#define HYPERV_CPUID_LAST   0x400000ff
#define HYPERV_MSR_FIRST    0x40000000
#define HYPERV_MSR_LAST     0x400001ff

/* True if QEMU emulates Hyper-V on @cpu.  Constant once @cpu is realized. */
static inline bool hyperv_emu_enabled(X86CPU *cpu)
{
    return cpu->hyperv_emu;
}

static inline bool hyperv_emu_has_cpuid(X86CPU *cpu, uint32_t leaf)
{
    return hyperv_emu_enabled(cpu) &&
           leaf >= HYPERV_CPUID_FIRST && leaf <= HYPERV_CPUID_LAST;
}

static inline bool hyperv_emu_has_msr(X86CPU *cpu, uint32_t msr)
{
    return hyperv_emu_enabled(cpu) &&
           msr >= HYPERV_MSR_FIRST && msr <= HYPERV_MSR_LAST;
}

/*
 * Check the hv-* properties of @cpu, and if there are any, set up the
 * emulation.  To be called when cpu_index is known and before any device looks
 * for a SynIC.  Returns false with @errp set if a property asks for something
 * that only KVM can do, or for a feature without one that it builds upon.
 */
bool hyperv_emu_realize(X86CPU *cpu, Error **errp);
void hyperv_emu_unrealize(X86CPU *cpu);

/* To be called when @cpu is reset, also when it is new; INIT undoes it. */
void hyperv_emu_reset(X86CPU *cpu);

/*
 * To be called after all devices have been reset, so that they have let go of
 * their SINT routes.
 */
void hyperv_emu_after_reset(X86CPU *cpu);

/* Rebuild what is derived from the MSRs of @cpu. */
void hyperv_emu_post_load(X86CPU *cpu);

/*
 * The functions below need hyperv_emu_enabled(), and run in the thread of
 * @cpu without the BQL.
 */

/* CPUID @leaf, one for which hyperv_emu_has_cpuid() is true. */
void hyperv_emu_cpuid(X86CPU *cpu, uint32_t leaf, uint32_t *eax,
                      uint32_t *ebx, uint32_t *ecx, uint32_t *edx);

/*
 * Access an @msr for which hyperv_emu_has_msr() is true.  False means that the
 * guest gets #GP.
 */
bool hyperv_emu_rdmsr(X86CPU *cpu, uint32_t msr, uint64_t *val);
bool hyperv_emu_wrmsr(X86CPU *cpu, uint32_t msr, uint64_t val);

/*
 * Carry out the hypercall that the registers of @cpu describe.  False means
 * that the guest gets #UD.
 */
bool hyperv_emu_hypercall(X86CPU *cpu);

#endif
