/*
 * String instructions on ordinary memory, a page at a time
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * REP MOVS and REP STOS are translated to a loop that moves an element in each
 * turn.  Guests clear and copy whole pages with them, so do here what the
 * host's memmove and memset can do, and leave the rest to the loop: it also
 * raises faults, writes to pages with translated code, and does I/O.
 */

#include "qemu/osdep.h"
#include "qemu/units.h"
#include "cpu.h"
#include "exec/cpu_ldst.h"
#include "exec/helper-proto.h"

/* Bytes at a time: interrupts wait for so long. */
#define STRING_MAX (256 * KiB)

/* Whole elements from @addr to the end of its page */
static size_t elements_in_page(target_ulong addr, uint32_t ot)
{
    return -(addr | TARGET_PAGE_MASK) >> ot;
}

static void fill(char *to, uint64_t value, size_t count, uint32_t ot)
{
    size_t size = 1 << ot;

    if (ot == MO_8 || !value) {
        memset(to, value, count << ot);
        return;
    }
    value = cpu_to_le64(value);
    for (size_t i = 0; i < count; i++) {
        memcpy(to + i * size, &value, size);
    }
}

void helper_rep_stos(CPUX86State *env, uint32_t ot)
{
    target_ulong *count = &env->regs[R_ECX];
    int mmu_idx = cpu_mmu_index(env_cpu(env), false);
    size_t left = STRING_MAX >> ot;
    uint64_t value = ot == MO_64 ? env->regs[R_EAX] :
                     extract64(env->regs[R_EAX], 0, 8 << ot);

    while (env->df == 1 && left) {
        target_ulong to = env->regs[R_EDI];
        size_t n = MIN(MIN(*count, left), elements_in_page(to, ot));
        char *host = n ? tlb_vaddr_to_host(env, to, MMU_DATA_STORE, mmu_idx) :
                         NULL;

        if (!host) {
            break;
        }
        fill(host, value, n, ot);
        env->regs[R_EDI] += n << ot;
        *count -= n;
        left -= n;
    }
}

void helper_rep_movs(CPUX86State *env, uint32_t ot)
{
    target_ulong *count = &env->regs[R_ECX];
    int mmu_idx = cpu_mmu_index(env_cpu(env), false);
    size_t left = STRING_MAX >> ot;

    while (env->df == 1 && left) {
        target_ulong from = env->regs[R_ESI], to = env->regs[R_EDI];
        size_t n = MIN(MIN(*count, left), MIN(elements_in_page(from, ot),
                                              elements_in_page(to, ot)));
        char *source = n ? tlb_vaddr_to_host(env, from, MMU_DATA_LOAD,
                                             mmu_idx) : NULL;
        char *host = source ? tlb_vaddr_to_host(env, to, MMU_DATA_STORE,
                                                mmu_idx) : NULL;

        /* what is copied onto its own continuation repeats itself */
        if (!host || (host > source && host < source + (n << ot))) {
            break;
        }
        memmove(host, source, n << ot);
        env->regs[R_ESI] += n << ot;
        env->regs[R_EDI] += n << ot;
        *count -= n;
        left -= n;
    }
}
