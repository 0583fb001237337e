/*
 * Map of guest pages that hold translated code, shared with other processes
 *
 * Copyright (c) 2026 The vhostvmbus maintainers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef EXEC_TB_CODE_MAP_H
#define EXEC_TB_CODE_MAP_H

/*
 * A device that runs in another process writes to guest RAM without QEMU
 * noticing, so QEMU can't discard the translations of what it overwrites.
 * This bitmap lets such a process find out, without asking, whether a page
 * that it has just written may have been translated; only if so, it has to ask
 * QEMU for an invalidation before it lets the guest see that the data is there.
 *
 * There is one bit per target page, indexed by ram_addr_t, counted from bit 0
 * of byte 0.  It's a conservative set: a page whose bit is clear has no
 * translation and none in the making that has read any byte of the page.
 *
 *   translating vCPU                     other process
 *   ----------------                     -------------
 *   lock page
 *   set bit            (seq_cst)         write data
 *   read bytes                           fence          (seq_cst)
 *   link translation block               test bit
 *   unlock page                          if set: ask for invalidation, wait
 *                                        publish completion
 *
 * If the test misses the bit, then it comes before the setting in the total
 * order of sequentially consistent operations, hence the data were written
 * before the bytes are read, and the translation is of the new bytes.  If the
 * test sees the bit, the invalidation takes the page lock, which isn't free
 * until the translation, of whichever bytes, is linked and can be found.
 *
 * A bit is cleared under the page lock too, when no translation is left.
 */

/* Covers this much of the ram_addr_t space; pages beyond it have no bit. */
#define TB_CODE_MAP_BYTES   (64 * 1024 * 1024)
#define TB_CODE_MAP_BITS    (TB_CODE_MAP_BYTES * 8ULL)

/* NULL unless some device may need the map */
extern uint8_t *tb_code_map;

/*
 * Start maintaining the map.  To be called before any vCPU runs, with the BQL
 * held; calls after the first do nothing.
 *
 * Returns: the file descriptor of the map, which the callee keeps, or -1
 */
int tb_code_map_enable(Error **errp);

/* Call with the page's lock held. */
static inline void tb_code_map_set(uint64_t page_index)
{
    if (unlikely(tb_code_map) && page_index < TB_CODE_MAP_BITS) {
        qatomic_or(&tb_code_map[page_index / 8], 1 << (page_index % 8));
    }
}

/* Call with the page's lock held. */
static inline void tb_code_map_clear(uint64_t page_index)
{
    if (unlikely(tb_code_map) && page_index < TB_CODE_MAP_BITS) {
        qatomic_and(&tb_code_map[page_index / 8], ~(1 << (page_index % 8)));
    }
}

#endif
