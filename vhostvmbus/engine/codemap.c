/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The look-up of translated code: docs/vhost-user-vmbus.md, "Translated code", step 2.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine.h"

struct vvb_codemap {
    uint8_t *bits;
    uint64_t bytes;
    int guard;
    uint32_t count;
    struct vvb_code_region regions[];
};

struct vvb_codemap *vvb_codemap_new(int fd, uint64_t map_bytes,
                                    const struct vvb_code_region *regions, uint32_t count,
                                    int *err)
{
    struct vvb_codemap *map = calloc(1, sizeof(*map) + count * sizeof(*regions));

    if (!map) {
        *err = ENOMEM;
        return NULL;
    }
    map->guard = -1;
    map->bytes = map_bytes;
    map->count = count;
    if (count) {
        memcpy(map->regions, regions, count * sizeof(*regions));
    }
    if (map_bytes) {
        void *bits = mmap(NULL, map_bytes, PROT_READ, MAP_SHARED, fd, 0);

        if (bits == MAP_FAILED) {
            *err = errno;
            free(map);
            return NULL;
        }
        map->bits = bits;
        map->guard = vvb_guard_add(bits, map_bytes, (size_t)sysconf(_SC_PAGESIZE));
        if (map->guard < 0) {
            *err = -map->guard;
            vvb_codemap_free(map);
            return NULL;
        }
    }
    return map;
}

void vvb_codemap_free(struct vvb_codemap *map)
{
    if (map) {
        vvb_guard_del(map->guard);
        if (map->bits) {
            munmap(map->bits, map->bytes);
        }
        free(map);
    }
}

/* Whether the page may hold translated code. Unknown pages do: too many hits are only slow. */
static bool page_is_code(const struct vvb_codemap *map, uint64_t gpa)
{
    for (uint32_t i = 0; i < map->count; i++) {
        const struct vvb_code_region *region = &map->regions[i];

        if (gpa - region->gpa < region->size) {
            uint64_t page = (gpa - region->gpa) >> VVB_PAGE_SHIFT;
            uint64_t bit = region->first_bit + page;

            if (region->first_bit == UINT64_MAX || bit < page || bit / 8 >= map->bytes) {
                return true;
            }
            return vvb_load(&map->bits[bit / 8]) >> (bit % 8) & 1;
        }
    }
    return true;
}

uint32_t vvb_codemap_hits(const struct vvb_codemap *map, const struct vvb_span *spans,
                          uint32_t count, struct vvb_span *out, uint32_t cap)
{
    uint32_t hits = 0;

    /*
     * Our writes to guest pages before our reads of the bits: pairs with the front end's
     * sequentially consistent store of the bit before it reads the page to translate it.
     */
    vvb_full_fence();
    for (uint32_t i = 0; i < count; i++) {
        uint64_t gpa = spans[i].gpa & ~(uint64_t)(VVB_PAGE_SIZE - 1);
        uint64_t end = spans[i].gpa + spans[i].len;

        for (; gpa < end; gpa += VVB_PAGE_SIZE) {
            if (!page_is_code(map, gpa)) {
                continue;
            }
            if (hits && gpa == out[hits - 1].gpa + out[hits - 1].len) {
                out[hits - 1].len += VVB_PAGE_SIZE;
            } else if (hits && gpa == out[hits - 1].gpa + out[hits - 1].len - VVB_PAGE_SIZE) {
                continue; /* two spans share a page */
            } else if (hits < cap) {
                out[hits++] = (struct vvb_span){.gpa = gpa, .len = VVB_PAGE_SIZE};
            }
        }
    }
    if (map->guard >= 0 && vvb_guard_lost(map->guard)) {
        /* The map was truncated under us: every page is taken for code. */
        hits = 0;
        for (uint32_t i = 0; i < count && hits < cap; i++) {
            uint64_t gpa = spans[i].gpa & ~(uint64_t)(VVB_PAGE_SIZE - 1);
            uint64_t end = (spans[i].gpa + spans[i].len + VVB_PAGE_SIZE - 1) &
                           ~(uint64_t)(VVB_PAGE_SIZE - 1);

            out[hits++] = (struct vvb_span){.gpa = gpa, .len = end - gpa};
        }
    }
    return hits;
}
