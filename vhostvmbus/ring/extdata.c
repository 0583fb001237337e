/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What is done with external data: copies, file I/O straight into or out of the guest's pages, and
 * the look-up of translated code (docs/vhost-user-vmbus.md, "Translated code").
 *
 * The caller has checked offset + len against the segments' total.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "engine.h"

#define VVB_IOV_MAX 256 /* below IOV_MAX, and small enough for any stack */

/* Walks the pieces of [offset, offset + len). */
struct walk {
    const struct vvb_seg *seg;
    const struct vvb_seg *end;
    uint64_t skip;
    uint64_t left;
};

static struct walk walk_start(const struct vvb_seg *segs, uint32_t count, uint64_t offset,
                              uint64_t len)
{
    struct walk walk = {.seg = segs, .end = segs + count, .skip = offset, .left = len};

    while (walk.seg < walk.end && walk.skip >= walk.seg->len) {
        walk.skip -= walk.seg->len;
        walk.seg++;
    }
    return walk;
}

static bool walk_next(struct walk *walk, struct iovec *piece)
{
    uint64_t here;

    if (walk->seg == walk->end || !walk->left) {
        return false;
    }
    here = walk->seg->len - walk->skip;
    if (here > walk->left) {
        here = walk->left;
    }
    piece->iov_base = walk->seg->host + walk->skip;
    piece->iov_len = here;
    walk->left -= here;
    walk->skip = 0;
    walk->seg++;
    return true;
}

int vvb_ext_lost(const struct vvb_seg *segs, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        if ((i == 0 || segs[i].region != segs[i - 1].region) && vvb_region_lost(segs[i].region)) {
            return -EFAULT;
        }
    }
    return 0;
}

int vvb_ext_read(const struct vvb_seg *segs, uint32_t count, uint64_t offset, char *dst,
                 uint64_t len)
{
    struct walk walk = walk_start(segs, count, offset, len);
    struct iovec piece;

    while (walk_next(&walk, &piece)) {
        memcpy(dst, piece.iov_base, piece.iov_len);
        dst += piece.iov_len;
    }
    return vvb_ext_lost(segs, count);
}

int vvb_ext_write(const struct vvb_seg *segs, uint32_t count, uint64_t offset, const char *src,
                  uint64_t len)
{
    struct walk walk = walk_start(segs, count, offset, len);
    struct iovec piece;

    while (walk_next(&walk, &piece)) {
        memcpy(piece.iov_base, src, piece.iov_len);
        src += piece.iov_len;
    }
    return vvb_ext_lost(segs, count);
}

int vvb_ext_fill(const struct vvb_seg *segs, uint32_t count, uint64_t offset, int byte,
                 uint64_t len)
{
    struct walk walk = walk_start(segs, count, offset, len);
    struct iovec piece;

    while (walk_next(&walk, &piece)) {
        memset(piece.iov_base, byte, piece.iov_len);
    }
    return vvb_ext_lost(segs, count);
}

static int64_t file_io(const struct vvb_seg *segs, uint32_t count, uint64_t offset, uint64_t len,
                       int fd, int64_t file_offset, bool write)
{
    uint64_t done = 0;

    while (done < len) {
        struct walk walk = walk_start(segs, count, offset + done, len - done);
        struct iovec iov[VVB_IOV_MAX];
        ssize_t moved;
        int n = 0;

        while (n < VVB_IOV_MAX && walk_next(&walk, &iov[n])) {
            n++;
        }
        if (!n) {
            break;
        }
        if (write) {
            moved = pwritev(fd, iov, n, (off_t)(file_offset + (int64_t)done));
        } else {
            moved = preadv(fd, iov, n, (off_t)(file_offset + (int64_t)done));
        }
        if (moved < 0) {
            if (errno == EINTR) {
                continue;
            }
            /* What arrived before the error counts; asking again brings the error back. */
            return done ? (int64_t)done : -errno;
        }
        if (moved == 0) {
            break;
        }
        done += (uint64_t)moved;
    }
    return (int64_t)done;
}

int64_t vvb_ext_preadv(const struct vvb_seg *segs, uint32_t count, uint64_t offset, uint64_t len,
                       int fd, int64_t file_offset)
{
    return file_io(segs, count, offset, len, fd, file_offset, false);
}

int64_t vvb_ext_pwritev(const struct vvb_seg *segs, uint32_t count, uint64_t offset, uint64_t len,
                        int fd, int64_t file_offset)
{
    return file_io(segs, count, offset, len, fd, file_offset, true);
}

/* ---- translated code ---- */

struct vvb_codemap {
    uint8_t *bits;
    uint64_t bytes;
    int slot;
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
    map->slot = -1;
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
        map->slot = vvb_guard_add(bits, map_bytes, (size_t)sysconf(_SC_PAGESIZE));
        if (map->slot < 0) {
            *err = -map->slot;
            vvb_codemap_free(map);
            return NULL;
        }
    }
    return map;
}

void vvb_codemap_free(struct vvb_codemap *map)
{
    if (map) {
        vvb_guard_del(map->slot);
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
    if (map->slot >= 0 && vvb_guard_lost(map->slot)) {
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
