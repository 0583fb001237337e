/*
 * Hyper-V emulation in QEMU: the synthetic interrupt controller (TLFS 11)
 *
 * hw/hyperv/hyperv.c has the message and event flag pages; here are the MSRs
 * and the way from a SINT to the local APIC.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/main-loop.h"
#include "internal.h"
#include "hw/i386/apic.h"
#include "target/i386/kvm/hyperv.h"

/*
 * The SINT is looked at when it is raised, not earlier: the guest may program
 * it, and SCONTROL, after devices have got their routes.
 */
static int hyperv_emu_raise_sint(CPUState *cs, uint32_t sint)
{
    X86CPU *cpu = X86_CPU(cs);
    uint64_t val = cpu->env.msr_hv_synic_sint[sint];
    uint8_t vector = val & HV_SINT_VECTOR_MASK;

    assert(bql_locked());
    if ((cpu->env.msr_hv_synic_control & HV_SYNIC_ENABLE) &&
        !(val & HV_SINT_MASKED) && vector >= HYPERV_FIRST_VECTOR) {
        /*
         * Not by an MSI, whose destination may be too narrow for the id of
         * the APIC.
         */
        apic_deliver_fixed(cpu->apic_state, vector);
    }
    return 0;
}

const HvSynicBackend hyperv_emu_synic_backend = {
    .raise_sint = hyperv_emu_raise_sint,
};

/* An auto-EOI SINT makes all interrupts of its vector end by themselves. */
static void hyperv_update_auto_eoi(X86CPU *cpu)
{
    uint32_t vectors[8] = { 0 };
    unsigned i;

    for (i = 0; i < HV_SINT_COUNT; i++) {
        uint64_t val = cpu->env.msr_hv_synic_sint[i];
        uint8_t vector = val & HV_SINT_VECTOR_MASK;

        if ((val & HV_SINT_AUTO_EOI) && !(val & HV_SINT_MASKED)) {
            vectors[vector / 32] |= BIT(vector % 32);
        }
    }
    if (cpu->apic_state) {
        apic_set_auto_eoi(cpu->apic_state, vectors);
    }
}

void hyperv_synic_restore(X86CPU *cpu)
{
    hyperv_x86_synic_update(cpu);
    hyperv_update_auto_eoi(cpu);
}

bool hyperv_synic_rdmsr(X86CPU *cpu, uint32_t msr, uint64_t *val)
{
    CPUX86State *env = &cpu->env;

    switch (msr) {
    case HV_X64_MSR_SCONTROL:
        *val = env->msr_hv_synic_control;
        return true;
    case HV_X64_MSR_SVERSION:
        *val = HV_SYNIC_VERSION;
        return true;
    case HV_X64_MSR_SIEFP:
        *val = env->msr_hv_synic_evt_page;
        return true;
    case HV_X64_MSR_SIMP:
        *val = env->msr_hv_synic_msg_page;
        return true;
    case HV_X64_MSR_EOM:
        *val = 0;
        return true;
    case HV_X64_MSR_SINT0 ... HV_X64_MSR_SINT15:
        *val = env->msr_hv_synic_sint[msr - HV_X64_MSR_SINT0];
        return true;
    default:
        return false;
    }
}

/* No page can lie beyond what the guest can address. */
static bool hyperv_page_valid(X86CPU *cpu, uint64_t val)
{
    return !(val >> cpu->phys_bits);
}

bool hyperv_synic_wrmsr(X86CPU *cpu, uint32_t msr, uint64_t val)
{
    CPUX86State *env = &cpu->env;

    switch (msr) {
    case HV_X64_MSR_SCONTROL:
        env->msr_hv_synic_control = val;
        hyperv_x86_synic_update(cpu);
        return true;
    case HV_X64_MSR_SIEFP:
        if (!hyperv_page_valid(cpu, val)) {
            return false;
        }
        env->msr_hv_synic_evt_page = val;
        hyperv_x86_synic_update(cpu);
        return true;
    case HV_X64_MSR_SIMP:
        if (!hyperv_page_valid(cpu, val)) {
            return false;
        }
        env->msr_hv_synic_msg_page = val;
        hyperv_x86_synic_update(cpu);
        return true;
    case HV_X64_MSR_EOM:
        hyperv_synic_eom();
        if (hyperv_feat_enabled(cpu, HYPERV_FEAT_STIMER)) {
            hyperv_stimer_eom(cpu);
        }
        return true;
    case HV_X64_MSR_SINT0 ... HV_X64_MSR_SINT15:
        if (!(val & HV_SINT_MASKED) &&
            (val & HV_SINT_VECTOR_MASK) < HYPERV_FIRST_VECTOR) {
            return false;
        }
        env->msr_hv_synic_sint[msr - HV_X64_MSR_SINT0] = val;
        hyperv_update_auto_eoi(cpu);
        return true;
    default:
        return false;
    }
}
