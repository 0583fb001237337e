/*
 * Hyper-V emulation in QEMU: what its parts share
 *
 * The values of all MSRs live in CPUX86State, where KVM keeps them too, so
 * that they migrate; here is only what derives from them.  Partition-wide MSRs
 * are those of the first vCPU.  Everything is protected by the BQL.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TARGET_I386_HYPERV_INTERNAL_H
#define TARGET_I386_HYPERV_INTERNAL_H

#include "qemu/timer.h"
#include "hyperv-emu.h"
#include "hw/hyperv/synic-backend.h"

/* The unit of all Hyper-V times is 100 ns. */
#define HYPERV_TICK_NS              100

/* Vectors below are exceptions; no SINT or timer can have one. */
#define HYPERV_FIRST_VECTOR         16

/* MSRs that designate a page: bit 0 enables it, its address is in 12 and up */
#define HYPERV_PAGE_ENABLE          (1ull << 0)
#define HYPERV_PAGE_MASK            (~0xfffull)

typedef struct HypervStimer {
    X86CPU *cpu;
    unsigned index;
    /* Runs while the timer counts. */
    QEMUTimer *timer;
    /* When it expires, or (while @due) has expired, in partition time. */
    uint64_t expiry;
    /* It has expired and the message has not got into its slot. */
    bool due;
} HypervStimer;

struct HypervEmu {
    HypervStimer stimer[HV_STIMER_COUNT];
};

/* The vCPU whose CPUX86State holds the partition-wide MSRs. */
static inline X86CPU *hyperv_partition(void)
{
    return X86_CPU(first_cpu);
}

/* Partition reference time (TLFS 12.4), in ticks. */
static inline uint64_t hyperv_time(void)
{
    return qemu_clock_get_ns(QEMU_CLOCK_VIRTUAL) / HYPERV_TICK_NS;
}

/* cpuid.c: whether the hv-* properties are there and make sense. */
bool hyperv_emu_wanted(X86CPU *cpu);
bool hyperv_emu_check_features(X86CPU *cpu, Error **errp);

/* synic.c */
extern const HvSynicBackend hyperv_emu_synic_backend;
bool hyperv_synic_rdmsr(X86CPU *cpu, uint32_t msr, uint64_t *val);
bool hyperv_synic_wrmsr(X86CPU *cpu, uint32_t msr, uint64_t val);
void hyperv_synic_restore(X86CPU *cpu);

/* stimer.c */
void hyperv_stimer_init(X86CPU *cpu);
void hyperv_stimer_fini(X86CPU *cpu);
void hyperv_stimer_reset(X86CPU *cpu);
void hyperv_stimer_restore(X86CPU *cpu);
void hyperv_stimer_eom(X86CPU *cpu);
bool hyperv_stimer_rdmsr(X86CPU *cpu, uint32_t msr, uint64_t *val);
bool hyperv_stimer_wrmsr(X86CPU *cpu, uint32_t msr, uint64_t val);

/* hypercall.c: make @gpa the hypercall page; false if it cannot be written. */
bool hyperv_write_hypercall_page(X86CPU *cpu, hwaddr gpa);

#endif
