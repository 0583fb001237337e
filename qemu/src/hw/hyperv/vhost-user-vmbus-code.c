/*
 * VMBus device whose back end is another process: translated code
 *
 * Copyright (c) 2026 The vhostvmbus maintainers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A back end that overwrites translated code has it discarded.  It finds out
 * where there's any in a map that it shares with the translator.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/bswap.h"
#include "qemu/lockable.h"
#include "qemu/rcu.h"
#include "exec/exec-all.h"
#include "exec/ramblock.h"
#include "exec/tb-code-map.h"
#include "hw/hyperv/vhost-user-vmbus.h"
#include "system/tcg.h"
#include "cpu.h"

typedef struct WireCodeMap {
    uint64_t map_bytes;
    uint32_t region_count;
    uint32_t reserved;
    struct {
        uint64_t gpa;
        uint64_t size;
        uint64_t first_bit;
    } QEMU_PACKED region[VUV_MAX_REGIONS];
} QEMU_PACKED WireCodeMap;

QEMU_BUILD_BUG_ON(sizeof(WireCodeMap) > VUV_MAX_PAYLOAD);

bool vuv_code_map_send(VuvMem *m, Error **errp)
{
    g_autofree WireCodeMap *w = g_new0(WireCodeMap, 1);
    uint32_t status;

    w->map_bytes = cpu_to_le64(TB_CODE_MAP_BYTES);
    w->region_count = cpu_to_le32(m->sent->len);
    for (guint i = 0; i < m->sent->len; i++) {
        const VuvRegion *r = vuv_region_at(m->sent, i);
        uint64_t bit = (memory_region_get_ram_addr(r->mr) + r->offset) >>
                       TARGET_PAGE_BITS;

        if (bit + (r->size >> TARGET_PAGE_BITS) > TB_CODE_MAP_BITS) {
            bit = UINT64_MAX;
        }
        w->region[i].gpa = cpu_to_le64(r->gpa);
        w->region[i].size = cpu_to_le64(r->size);
        w->region[i].first_bit = cpu_to_le64(bit);
    }

    if (!vuv_conn_ack(m->conn, VUV_SET_CODE_MAP, w,
                      offsetof(WireCodeMap, region[m->sent->len]),
                      &m->code_map_fd, 1, &status, errp)) {
        return false;
    }
    if (status) {
        error_setg(errp, "the back end refuses the code map: status 0x%x",
                   status);
        vuv_conn_drop(m->conn);
        return false;
    }
    return true;
}

/*
 * Discard the translations of code that the back end has overwritten.
 *
 * This needs no vCPU to stop and no BQL.  tb_invalidate_phys_range() takes the
 * locks of the pages, so it waits for a translation in progress, and then
 * finds it; a vCPU that is executing a discarded block finishes that block, as
 * it would have had the data come a moment later, but can't enter it again.
 * In-process devices rely on the same, from address_space_unmap().
 */
uint32_t vuv_mem_invalidate(VuvMem *m, const uint8_t *payload, uint32_t size)
{
    uint32_t count, i;

    if (size < 8) {
        return VUV_STATUS_INVALID_PARAMETER;
    }
    count = ldl_le_p(payload);
    if (count > VUV_MAX_INVALIDATIONS || size != 8 + count * 16) {
        return VUV_STATUS_INVALID_PARAMETER;
    }
    if (!tcg_enabled()) {
        return VUV_STATUS_SUCCESS;
    }

    /* blocks may go away with their regions, but not before we're done */
    RCU_READ_LOCK_GUARD();
    QEMU_LOCK_GUARD(&m->lock);

    for (i = 0; i < count; i++) {
        uint64_t start = ldq_le_p(payload + 8 + i * 16);
        uint64_t len = ldq_le_p(payload + 16 + i * 16);

        if (!len || start + len - 1 < start) {
            return VUV_STATUS_INVALID_PARAMETER;
        }
        for (guint j = 0; j < m->sent->len; j++) {
            const VuvRegion *r = vuv_region_at(m->sent, j);
            uint64_t from = MAX(start, r->gpa);
            uint64_t to = MIN(start + len - 1, r->gpa + r->size - 1);

            if (from <= to) {
                ram_addr_t base = memory_region_get_ram_addr(r->mr) +
                                  r->offset - r->gpa;

                tb_invalidate_phys_range(base + from, base + to);
            }
        }
    }
    return VUV_STATUS_SUCCESS;
}
