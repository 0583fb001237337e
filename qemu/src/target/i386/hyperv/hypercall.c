/*
 * Hyper-V emulation in QEMU: the hypercall interface (TLFS 3)
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "exec/address-spaces.h"
#include "internal.h"

#define HV_NOTIFY_LONG_SPIN_WAIT 0x0008

/* TLFS 3.7: the hypercall input value */
#define HCALL_CODE(input)       extract64(input, 0, 16)
#define HCALL_HEADER(input)     extract64(input, 17, 10)
#define HCALL_REPS(input)       extract64(input, 32, 28)
#define HCALL_RESERVED          (0x1full << 27 | 0xfull << 44 | 0xfull << 60)

bool hyperv_write_hypercall_page(X86CPU *cpu, hwaddr gpa)
{
    /* vmcall; ret or vmmcall; ret: what a CPU of this vendor would have */
    const uint8_t code[] = {
        0x0f, 0x01, IS_AMD_CPU(&cpu->env) ? 0xd9 : 0xc1, 0xc3
    };

    /* also drops translations of what was in the page before */
    return address_space_write(&address_space_memory, gpa,
                               MEMTXATTRS_UNSPECIFIED,
                               code, sizeof(code)) == MEMTX_OK;
}

static uint64_t hyperv_do_hypercall(X86CPU *cpu, uint64_t input, uint64_t param)
{
    bool fast = input & HV_HYPERCALL_FAST;

    if (input & HCALL_RESERVED) {
        return HV_STATUS_INVALID_HYPERCALL_INPUT;
    }

    switch (HCALL_CODE(input)) {
    case HV_NOTIFY_LONG_SPIN_WAIT:
        return HV_STATUS_SUCCESS;
    case HV_POST_MESSAGE:
    case HV_SIGNAL_EVENT:
        if (!hyperv_feat_enabled(cpu, HYPERV_FEAT_SYNIC)) {
            break;
        }
        /* neither takes a list or a variable header */
        if (HCALL_REPS(input) || HCALL_HEADER(input)) {
            return HV_STATUS_INVALID_HYPERCALL_INPUT;
        }
        return HCALL_CODE(input) == HV_POST_MESSAGE
               ? hyperv_hcall_post_message(param, fast)
               : hyperv_hcall_signal_event(param, fast);
    }
    return HV_STATUS_INVALID_HYPERCALL_CODE;
}

bool hyperv_emu_hypercall(X86CPU *cpu)
{
    CPUX86State *env = &cpu->env;
    uint64_t input, param, result;

    /*
     * Whoever the guest is, it has not asked for hypercalls before it said so,
     * and its user mode has no business here.
     */
    if (!hyperv_partition()->env.msr_hv_guest_os_id ||
        !(env->cr[0] & CR0_PE_MASK) || (env->hflags & HF_CPL_MASK)) {
        return false;
    }

    if (env->hflags & HF_CS64_MASK) {
        input = env->regs[R_ECX];
        param = env->regs[R_EDX];
    } else {
        input = deposit64(env->regs[R_EAX], 32, 32, env->regs[R_EDX]);
        param = deposit64(env->regs[R_ECX], 32, 32, env->regs[R_EBX]);
    }

    result = hyperv_do_hypercall(cpu, input, param);

    if (env->hflags & HF_CS64_MASK) {
        env->regs[R_EAX] = result;
    } else {
        env->regs[R_EAX] = (uint32_t)result;
        env->regs[R_EDX] = result >> 32;
    }
    return true;
}
