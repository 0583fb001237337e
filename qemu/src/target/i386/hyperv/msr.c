/*
 * Hyper-V emulation in QEMU: MSRs, and the life of the emulation
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/main-loop.h"
#include "exec/address-spaces.h"
#include "system/runstate.h"
#include "internal.h"
#include "hw/i386/apic.h"
#include "target/i386/kvm/hyperv.h"

/* APIC registers, as apic_read_current() counts them */
#define APIC_TPR    0x08
#define APIC_EOI    0x0b
#define APIC_ICR    0x30

/* Which HYPERV_FEAT_* brings the MSR; one of the values below if none does. */
enum { HYPERV_ALWAYS = 64, HYPERV_NEVER };

static unsigned hyperv_msr_feature(uint32_t msr)
{
    switch (msr) {
    case HV_X64_MSR_GUEST_OS_ID:
    case HV_X64_MSR_HYPERCALL:
    /* Linux writes it without looking at the features */
    case HV_X64_MSR_APIC_ASSIST_PAGE:
        return HYPERV_ALWAYS;
    case HV_X64_MSR_VP_INDEX:
        return HYPERV_FEAT_VPINDEX;
    case HV_X64_MSR_RESET:
        return HYPERV_FEAT_RESET;
    case HV_X64_MSR_VP_RUNTIME:
        return HYPERV_FEAT_RUNTIME;
    case HV_X64_MSR_TIME_REF_COUNT:
    case HV_X64_MSR_REFERENCE_TSC:
        return HYPERV_FEAT_TIME;
    case HV_X64_MSR_EOI:
    case HV_X64_MSR_ICR:
    case HV_X64_MSR_TPR:
        return HYPERV_FEAT_VAPIC;
    case HV_X64_MSR_SCONTROL ... HV_X64_MSR_SINT15:
        return HYPERV_FEAT_SYNIC;
    case HV_X64_MSR_STIMER0_CONFIG ... HV_X64_MSR_STIMER3_COUNT:
        return HYPERV_FEAT_STIMER;
    case HV_X64_MSR_CRASH_P0 ... HV_X64_MSR_CRASH_CTL:
        return HYPERV_FEAT_CRASH;
    default:
        return HYPERV_NEVER;
    }
}

static bool hyperv_msr_exists(X86CPU *cpu, uint32_t msr)
{
    unsigned feature = hyperv_msr_feature(msr);

    return feature == HYPERV_ALWAYS ||
           (feature != HYPERV_NEVER && hyperv_feat_enabled(cpu, feature));
}

bool hyperv_emu_rdmsr(X86CPU *cpu, uint32_t msr, uint64_t *val)
{
    CPUX86State *env = &cpu->env;

    if (!hyperv_msr_exists(cpu, msr)) {
        return false;
    }

    switch (msr) {
    /* read by guests all the time, and free from locks */
    case HV_X64_MSR_VP_INDEX:
        *val = hyperv_vp_index(CPU(cpu));
        return true;
    case HV_X64_MSR_TIME_REF_COUNT:
    case HV_X64_MSR_VP_RUNTIME:
        /* a vCPU is taken to run all the time */
        *val = hyperv_time();
        return true;
    }

    BQL_LOCK_GUARD();
    switch (msr) {
    case HV_X64_MSR_GUEST_OS_ID:
        *val = hyperv_partition()->env.msr_hv_guest_os_id;
        return true;
    case HV_X64_MSR_HYPERCALL:
        *val = hyperv_partition()->env.msr_hv_hypercall;
        return true;
    case HV_X64_MSR_REFERENCE_TSC:
        *val = hyperv_partition()->env.msr_hv_tsc;
        return true;
    case HV_X64_MSR_RESET:
        *val = 0;
        return true;
    case HV_X64_MSR_ICR:
        return !apic_read_current(APIC_ICR, val);
    case HV_X64_MSR_TPR:
        return !apic_read_current(APIC_TPR, val);
    case HV_X64_MSR_APIC_ASSIST_PAGE:
        *val = env->msr_hv_vapic;
        return true;
    case HV_X64_MSR_CRASH_P0 ... HV_X64_MSR_CRASH_P4:
        *val = env->msr_hv_crash_params[msr - HV_X64_MSR_CRASH_P0];
        return true;
    case HV_X64_MSR_CRASH_CTL:
        *val = HV_CRASH_CTL_NOTIFY;
        return true;
    case HV_X64_MSR_SCONTROL ... HV_X64_MSR_SINT15:
        return hyperv_synic_rdmsr(cpu, msr, val);
    case HV_X64_MSR_STIMER0_CONFIG ... HV_X64_MSR_STIMER3_COUNT:
        return hyperv_stimer_rdmsr(cpu, msr, val);
    default:
        /* EOI is write-only */
        return false;
    }
}

/* Zero the first word of a page that the guest shares with the hypervisor. */
static bool hyperv_clear_word(uint64_t msr_val)
{
    uint32_t zero = 0;

    return address_space_write(&address_space_memory,
                               msr_val & HYPERV_PAGE_MASK,
                               MEMTXATTRS_UNSPECIFIED,
                               &zero, sizeof(zero)) == MEMTX_OK;
}

bool hyperv_emu_wrmsr(X86CPU *cpu, uint32_t msr, uint64_t val)
{
    CPUX86State *env = &cpu->env;
    CPUX86State *partition = &hyperv_partition()->env;

    if (!hyperv_msr_exists(cpu, msr)) {
        return false;
    }

    BQL_LOCK_GUARD();
    switch (msr) {
    case HV_X64_MSR_GUEST_OS_ID:
        partition->msr_hv_guest_os_id = val;
        if (!val) {
            partition->msr_hv_hypercall &= ~(uint64_t)HV_HYPERCALL_ENABLE;
        }
        return true;
    case HV_X64_MSR_HYPERCALL:
        if (!partition->msr_hv_guest_os_id) {
            /* TLFS 3.13: nobody can enable it before identifying itself */
            val &= ~(uint64_t)HV_HYPERCALL_ENABLE;
        }
        if ((val & HV_HYPERCALL_ENABLE) &&
            !hyperv_write_hypercall_page(cpu, val & HYPERV_PAGE_MASK)) {
            return false;
        }
        partition->msr_hv_hypercall = val;
        return true;
    case HV_X64_MSR_REFERENCE_TSC:
        /*
         * A sequence of 0 in the page says that the TSC cannot be used and
         * the guest has to read TIME_REF_COUNT: how fast the TSC runs under
         * TCG is not known.
         */
        if ((val & HYPERV_PAGE_ENABLE) && !hyperv_clear_word(val)) {
            return false;
        }
        partition->msr_hv_tsc = val;
        return true;
    case HV_X64_MSR_RESET:
        if (val & 1) {
            qemu_system_reset_request(SHUTDOWN_CAUSE_GUEST_RESET);
        }
        return true;
    case HV_X64_MSR_EOI:
        return !apic_write_current(APIC_EOI, 0);
    case HV_X64_MSR_ICR:
        return !apic_write_current(APIC_ICR, val);
    case HV_X64_MSR_TPR:
        return !apic_write_current(APIC_TPR, val & 0xff);
    case HV_X64_MSR_APIC_ASSIST_PAGE:
        /* its first word says that the next EOI may be left out: never */
        if ((val & HYPERV_PAGE_ENABLE) && !hyperv_clear_word(val)) {
            return false;
        }
        env->msr_hv_vapic = val;
        return true;
    case HV_X64_MSR_CRASH_P0 ... HV_X64_MSR_CRASH_P4:
        env->msr_hv_crash_params[msr - HV_X64_MSR_CRASH_P0] = val;
        return true;
    case HV_X64_MSR_CRASH_CTL:
        if (val & HV_CRASH_CTL_NOTIFY) {
            qemu_system_guest_panicked(cpu_get_crash_info(CPU(cpu)));
        }
        return true;
    case HV_X64_MSR_SCONTROL ... HV_X64_MSR_SINT15:
        return hyperv_synic_wrmsr(cpu, msr, val);
    case HV_X64_MSR_STIMER0_CONFIG ... HV_X64_MSR_STIMER3_COUNT:
        return hyperv_stimer_wrmsr(cpu, msr, val);
    default:
        /* VP_INDEX, VP_RUNTIME, TIME_REF_COUNT are read-only */
        return false;
    }
}

bool hyperv_emu_realize(X86CPU *cpu, Error **errp)
{
    if (!hyperv_emu_wanted(cpu)) {
        return true;
    }
    if (!hyperv_emu_check_features(cpu, errp)) {
        return false;
    }

    cpu->hyperv_emu = g_new0(struct HypervEmu, 1);
    hyperv_stimer_init(cpu);
    if (hyperv_feat_enabled(cpu, HYPERV_FEAT_SYNIC)) {
        hyperv_synic_add(CPU(cpu), &hyperv_emu_synic_backend);
    }
    if (hyperv_feat_enabled(cpu, HYPERV_FEAT_STIMER) &&
        hyperv_feat_enabled(cpu, HYPERV_FEAT_VAPIC) &&
        hyperv_feat_enabled(cpu, HYPERV_FEAT_RUNTIME)) {
        hyperv_set_vmbus_recommended_features_enabled();
    }
    return true;
}

void hyperv_emu_unrealize(X86CPU *cpu)
{
    hyperv_stimer_fini(cpu);
    g_clear_pointer(&cpu->hyperv_emu, g_free);
}

void hyperv_emu_reset(X86CPU *cpu)
{
    unsigned i;

    for (i = 0; i < HV_SINT_COUNT; i++) {
        cpu->env.msr_hv_synic_sint[i] = HV_SINT_MASKED;
    }
}

void hyperv_emu_after_reset(X86CPU *cpu)
{
    hyperv_stimer_reset(cpu);
    hyperv_synic_reset(CPU(cpu));
    hyperv_synic_restore(cpu);
}

void hyperv_emu_post_load(X86CPU *cpu)
{
    hyperv_synic_restore(cpu);
    hyperv_stimer_restore(cpu);
}
