/*
 * Hyper-V emulation in QEMU: features and CPUID (TLFS 2.4)
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "internal.h"

typedef struct HypervFeature {
    const char *name;
    /* false: only KVM has it */
    bool emulated;
    /* HYPERV_FEAT_* bits that must be on too */
    uint32_t needs;
    /* what announces it in CPUID */
    uint32_t features_eax;
    uint32_t features_edx;
    uint32_t hints_eax;
} HypervFeature;

static const HypervFeature hyperv_features[] = {
    [HYPERV_FEAT_RELAXED] = {
        .name = "hv-relaxed", .emulated = true,
        .hints_eax = HV_RELAXED_TIMING_RECOMMENDED,
    },
    [HYPERV_FEAT_VAPIC] = {
        .name = "hv-vapic", .emulated = true,
        .features_eax = HV_APIC_ACCESS_AVAILABLE,
    },
    [HYPERV_FEAT_TIME] = {
        .name = "hv-time", .emulated = true,
        .features_eax = HV_TIME_REF_COUNT_AVAILABLE |
                        HV_REFERENCE_TSC_AVAILABLE,
    },
    [HYPERV_FEAT_CRASH] = {
        .name = "hv-crash", .emulated = true,
        .features_edx = HV_GUEST_CRASH_MSR_AVAILABLE,
    },
    [HYPERV_FEAT_RESET] = {
        .name = "hv-reset", .emulated = true,
        .features_eax = HV_RESET_AVAILABLE,
    },
    [HYPERV_FEAT_VPINDEX] = {
        .name = "hv-vpindex", .emulated = true,
        .features_eax = HV_VP_INDEX_AVAILABLE,
    },
    [HYPERV_FEAT_RUNTIME] = {
        .name = "hv-runtime", .emulated = true,
        .features_eax = HV_VP_RUNTIME_AVAILABLE,
    },
    [HYPERV_FEAT_SYNIC] = {
        .name = "hv-synic", .emulated = true,
        .needs = BIT(HYPERV_FEAT_VPINDEX),
        .features_eax = HV_SYNIC_AVAILABLE,
    },
    [HYPERV_FEAT_STIMER] = {
        .name = "hv-stimer", .emulated = true,
        .needs = BIT(HYPERV_FEAT_SYNIC) | BIT(HYPERV_FEAT_TIME),
        .features_eax = HV_SYNTIMERS_AVAILABLE,
    },
    [HYPERV_FEAT_STIMER_DIRECT] = {
        .name = "hv-stimer-direct", .emulated = true,
        .needs = BIT(HYPERV_FEAT_STIMER),
        .features_edx = HV_STIMER_DIRECT_MODE_AVAILABLE,
    },
    [HYPERV_FEAT_AVIC] = {
        .name = "hv-avic", .emulated = true,
        .hints_eax = HV_DEPRECATING_AEOI_RECOMMENDED,
    },
    /* The rate of the TSC is the host's business under TCG. */
    [HYPERV_FEAT_FREQUENCIES] = { .name = "hv-frequencies" },
    [HYPERV_FEAT_REENLIGHTENMENT] = { .name = "hv-reenlightenment" },
    [HYPERV_FEAT_TLBFLUSH] = { .name = "hv-tlbflush" },
    [HYPERV_FEAT_TLBFLUSH_EXT] = { .name = "hv-tlbflush-ext" },
    [HYPERV_FEAT_TLBFLUSH_DIRECT] = { .name = "hv-tlbflush-direct" },
    [HYPERV_FEAT_IPI] = { .name = "hv-ipi" },
    [HYPERV_FEAT_XMM_INPUT] = { .name = "hv-xmm-input" },
    [HYPERV_FEAT_EVMCS] = { .name = "hv-evmcs" },
    [HYPERV_FEAT_MSR_BITMAP] = { .name = "hv-emsr-bitmap" },
    [HYPERV_FEAT_SYNDBG] = { .name = "hv-syndbg" },
};

bool hyperv_emu_wanted(X86CPU *cpu)
{
    return cpu->hyperv_features || cpu->hyperv_passthrough ||
           cpu->hyperv_spinlock_attempts != HYPERV_SPINLOCK_NEVER_NOTIFY;
}

bool hyperv_emu_check_features(X86CPU *cpu, Error **errp)
{
    unsigned i, j;

    if (cpu->hyperv_passthrough) {
        error_setg(errp, "hv-passthrough needs KVM");
        return false;
    }

    if (!(cpu->env.features[FEAT_1_EDX] & CPUID_APIC) &&
        (hyperv_feat_enabled(cpu, HYPERV_FEAT_VAPIC) ||
         hyperv_feat_enabled(cpu, HYPERV_FEAT_SYNIC))) {
        error_setg(errp, "hv-vapic and hv-synic require an APIC");
        return false;
    }

    for (i = 0; i < ARRAY_SIZE(hyperv_features); i++) {
        const HypervFeature *f = &hyperv_features[i];

        if (!hyperv_feat_enabled(cpu, i)) {
            continue;
        }
        if (!f->emulated) {
            error_setg(errp, "%s needs KVM", f->name);
            return false;
        }
        for (j = 0; j < ARRAY_SIZE(hyperv_features); j++) {
            if ((f->needs & BIT(j)) && !hyperv_feat_enabled(cpu, j)) {
                error_setg(errp, "%s requires %s", f->name,
                           hyperv_features[j].name);
                return false;
            }
        }
    }
    return true;
}

void hyperv_emu_cpuid(X86CPU *cpu, uint32_t leaf, uint32_t *eax,
                      uint32_t *ebx, uint32_t *ecx, uint32_t *edx)
{
    HypervFeature on = { 0 };
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(hyperv_features); i++) {
        if (hyperv_feat_enabled(cpu, i)) {
            on.features_eax |= hyperv_features[i].features_eax;
            on.features_edx |= hyperv_features[i].features_edx;
            on.hints_eax |= hyperv_features[i].hints_eax;
        }
    }

    *eax = *ebx = *ecx = *edx = 0;
    switch (leaf) {
    case HV_CPUID_VENDOR_AND_MAX_FUNCTIONS:
        *eax = HV_CPUID_IMPLEMENT_LIMITS;
        *ebx = cpu->hyperv_vendor_id[0];
        *ecx = cpu->hyperv_vendor_id[1];
        *edx = cpu->hyperv_vendor_id[2];
        break;
    case HV_CPUID_INTERFACE:
        *eax = cpu->hyperv_interface_id[0];
        *ebx = cpu->hyperv_interface_id[1];
        *ecx = cpu->hyperv_interface_id[2];
        *edx = cpu->hyperv_interface_id[3];
        break;
    case HV_CPUID_VERSION:
        *eax = cpu->hyperv_ver_id_build;
        *ebx = deposit32(cpu->hyperv_ver_id_minor, 16, 16,
                         cpu->hyperv_ver_id_major);
        *ecx = cpu->hyperv_ver_id_sp;
        *edx = deposit32(cpu->hyperv_ver_id_sn, 24, 8, cpu->hyperv_ver_id_sb);
        break;
    case HV_CPUID_FEATURES:
        *eax = on.features_eax | HV_HYPERCALL_AVAILABLE;
        if (hyperv_feat_enabled(cpu, HYPERV_FEAT_SYNIC)) {
            *ebx = HV_POST_MESSAGES | HV_SIGNAL_EVENTS;
        }
        *edx = on.features_edx | HV_CPU_DYNAMIC_PARTITIONING_AVAILABLE;
        break;
    case HV_CPUID_ENLIGHTMENT_INFO:
        *eax = on.hints_eax;
        if (hyperv_feat_enabled(cpu, HYPERV_FEAT_VAPIC) &&
            !hyperv_feat_enabled(cpu, HYPERV_FEAT_AVIC)) {
            *eax |= HV_APIC_ACCESS_RECOMMENDED;
        }
        if (cpu->hyperv_no_nonarch_cs == ON_OFF_AUTO_ON) {
            *eax |= HV_NO_NONARCH_CORESHARING;
        }
        *ebx = cpu->hyperv_spinlock_attempts;
        break;
    case HV_CPUID_IMPLEMENT_LIMITS:
        *eax = cpu->hv_max_vps;
        *ebx = cpu->hyperv_limits[0];
        *ecx = cpu->hyperv_limits[1];
        *edx = cpu->hyperv_limits[2];
        break;
    }
}
