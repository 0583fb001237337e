/*
 * Map of guest pages that hold translated code, shared with other processes
 *
 * Copyright (c) 2026 The vhostvmbus maintainers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/memfd.h"
#include "exec/tb-flush.h"
#include "hw/core/cpu.h"
#include "hw/qdev-core.h"
#include "exec/tb-code-map.h"

uint8_t *tb_code_map;

static void nothing(CPUState *cpu, run_on_cpu_data data)
{
}

/*
 * The guest runs already, and no page of what was translated so far is marked:
 * translate it again.  A vCPU does its work in order, so once it has done
 * nothing the flush is over.
 */
static void forget_unmarked(void)
{
    tb_flush(first_cpu);
    run_on_cpu(first_cpu, nothing, RUN_ON_CPU_NULL);
}

int tb_code_map_enable(Error **errp)
{
    static int map_fd = -1;

    if (!tb_code_map) {
        /* sparse: only the parts that stand for pages in use take memory */
        tb_code_map = qemu_memfd_alloc("tb-code-map", TB_CODE_MAP_BYTES,
                                       F_SEAL_GROW | F_SEAL_SHRINK, &map_fd,
                                       errp);
        if (tb_code_map && phase_check(PHASE_MACHINE_READY)) {
            forget_unmarked();
        }
    }
    return map_fd;
}
