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
#include "hw/qdev-core.h"
#include "exec/tb-code-map.h"

uint8_t *tb_code_map;

int tb_code_map_enable(Error **errp)
{
    static int map_fd = -1;

    if (!tb_code_map) {
        assert(!phase_check(PHASE_MACHINE_READY));
        /* sparse: only the parts that stand for pages in use take memory */
        tb_code_map = qemu_memfd_alloc("tb-code-map", TB_CODE_MAP_BYTES,
                                       F_SEAL_GROW | F_SEAL_SHRINK, &map_fd,
                                       errp);
    }
    return map_fd;
}
