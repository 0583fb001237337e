/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Guest RAM: regions, immutable snapshots of the memory map, and the translation of GPA ranges.
 *
 * A lookup takes a reference to the current snapshot; what it finds holds a *use* of its region.
 * Removing a region installs a snapshot without it, waits until nobody is left in the old one, and
 * then waits for the region's uses to end: after that no address of it is known to anybody.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"

/* Uses of all regions end here: one condition for the process, waited on by removals only. */
static pthread_mutex_t users_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t users_gone = PTHREAD_COND_INITIALIZER;
static int users_waiters;

uint64_t vvb_file_page_size(int fd)
{
    struct statfs fs;

    if (!fstatfs(fd, &fs) && fs.f_type == HUGETLBFS_MAGIC) {
        return (uint64_t)fs.f_bsize;
    }
    return (uint64_t)sysconf(_SC_PAGESIZE);
}

struct vvb_region *vvb_region_new(uint64_t gpa, uint64_t size, int fd, uint64_t offset, int *err)
{
    struct vvb_region *region = calloc(1, sizeof(*region));

    if (!region) {
        *err = ENOMEM;
        return NULL;
    }
    region->gpa = gpa;
    region->size = size;
    region->file_offset = offset;
    region->guard = -1;
    region->host = MAP_FAILED;
    region->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (region->fd < 0) {
        *err = errno;
        goto fail;
    }
    region->host = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, region->fd,
                        (off_t)offset);
    if (region->host == MAP_FAILED) {
        *err = errno;
        goto fail;
    }
    region->guard = vvb_guard_add(region->host, size, vvb_file_page_size(region->fd));
    if (region->guard < 0) {
        *err = -region->guard;
        goto fail;
    }
    return region;
fail:
    vvb_region_free(region);
    return NULL;
}

void vvb_region_free(struct vvb_region *region)
{
    if (!region) {
        return;
    }
    vvb_guard_del(region->guard);
    if (region->host != MAP_FAILED) {
        munmap(region->host, region->size);
    }
    if (region->fd >= 0) {
        close(region->fd);
    }
    free(region);
}

int vvb_region_detach(struct vvb_region *region)
{
    if (mmap(region->host, region->size, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED) {
        return -errno;
    }
    if (region->fd >= 0) {
        close(region->fd);
        region->fd = -1;
    }
    return 0;
}

int vvb_region_fd(struct vvb_region *region)
{
    return region->fd;
}

char *vvb_region_host(struct vvb_region *region)
{
    return region->host;
}

int vvb_region_lost(struct vvb_region *region)
{
    return vvb_guard_lost(region->guard);
}

uint64_t vvb_region_users(struct vvb_region *region)
{
    return __atomic_load_n(&region->users, __ATOMIC_SEQ_CST);
}

static void deadline_in(struct timespec *ts, int timeout_ms)
{
    clock_gettime(CLOCK_REALTIME, ts);
    ts->tv_sec += timeout_ms / 1000;
    ts->tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (ts->tv_nsec >= 1000000000) {
        ts->tv_sec++;
        ts->tv_nsec -= 1000000000;
    }
}

int vvb_region_wait_unused(struct vvb_region *region, int timeout_ms)
{
    struct timespec deadline;
    int ret = 0;

    deadline_in(&deadline, timeout_ms);
    pthread_mutex_lock(&users_lock);
    /* waiters, then users: pairs with users, then waiters in vvb_segs_put() (both seq_cst) */
    __atomic_add_fetch(&users_waiters, 1, __ATOMIC_SEQ_CST);
    while (vvb_region_users(region) && !ret) {
        ret = -pthread_cond_timedwait(&users_gone, &users_lock, &deadline);
    }
    if (!vvb_region_users(region)) {
        ret = 0;
    }
    __atomic_sub_fetch(&users_waiters, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&users_lock);
    return ret;
}

/* ---- snapshots ---- */

static struct vvb_snapshot *snapshot_new(struct vvb_region **regions, uint32_t count)
{
    struct vvb_snapshot *snapshot = malloc(sizeof(*snapshot) + count * sizeof(*regions));

    if (snapshot) {
        snapshot->refs = 1;
        snapshot->count = count;
        if (count) {
            memcpy(snapshot->regions, regions, count * sizeof(*regions));
        }
    }
    return snapshot;
}

struct vvb_memory *vvb_memory_new(void)
{
    struct vvb_memory *memory = calloc(1, sizeof(*memory));

    if (!memory) {
        return NULL;
    }
    memory->current = snapshot_new(NULL, 0);
    if (!memory->current || vvb_written_init(&memory->written)) {
        free(memory->current);
        free(memory);
        return NULL;
    }
    pthread_mutex_init(&memory->lock, NULL);
    pthread_cond_init(&memory->idle, NULL);
    return memory;
}

void vvb_memory_free(struct vvb_memory *memory)
{
    if (memory) {
        pthread_mutex_destroy(&memory->lock);
        pthread_cond_destroy(&memory->idle);
        vvb_written_destroy(&memory->written);
        free(memory->current);
        free(memory);
    }
}

struct vvb_snapshot *vvb_snapshot_get(struct vvb_memory *memory)
{
    struct vvb_snapshot *snapshot;

    pthread_mutex_lock(&memory->lock);
    snapshot = memory->current;
    snapshot->refs++;
    pthread_mutex_unlock(&memory->lock);
    return snapshot;
}

void vvb_snapshot_put(struct vvb_memory *memory, struct vvb_snapshot *snapshot)
{
    pthread_mutex_lock(&memory->lock);
    if (--snapshot->refs == 0) {
        pthread_cond_broadcast(&memory->idle);
    }
    pthread_mutex_unlock(&memory->lock);
}

int vvb_memory_set(struct vvb_memory *memory, struct vvb_region **regions, uint32_t count)
{
    struct vvb_snapshot *old, *fresh = snapshot_new(regions, count);

    if (!fresh) {
        return -ENOMEM;
    }
    pthread_mutex_lock(&memory->lock);
    old = memory->current;
    memory->current = fresh;
    old->refs--;
    /* Holders are inside one translation or one receive: never for long. */
    while (old->refs) {
        pthread_cond_wait(&memory->idle, &memory->lock);
    }
    pthread_mutex_unlock(&memory->lock);
    free(old);
    return 0;
}

struct vvb_region *vvb_snapshot_find(const struct vvb_snapshot *snapshot, uint64_t gpa,
                                     struct vvb_region *hint)
{
    uint32_t low = 0, high = snapshot->count;

    if (hint && gpa - hint->gpa < hint->size) {
        return hint;
    }
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        struct vvb_region *region = snapshot->regions[middle];

        if (gpa < region->gpa) {
            high = middle;
        } else if (gpa - region->gpa >= region->size) {
            low = middle + 1;
        } else {
            return region;
        }
    }
    return NULL;
}

/* ---- translation ---- */

/* A run of segments in the same region holds one use of it: both functions agree on that. */
static bool holds_use(const struct vvb_seg *segs, uint32_t i, uint32_t first)
{
    return i == first || segs[i].region != segs[i - 1].region;
}

void vvb_segs_put(const void *opaque, uint32_t count)
{
    const struct vvb_seg *segs = opaque;
    bool last = false;

    for (uint32_t i = 0; i < count; i++) {
        if (holds_use(segs, i, 0) &&
            __atomic_sub_fetch(&segs[i].region->users, 1, __ATOMIC_SEQ_CST) == 0) {
            last = true;
        }
    }
    /* users, then waiters: pairs with waiters, then users in vvb_region_wait_unused() */
    if (last && __atomic_load_n(&users_waiters, __ATOMIC_SEQ_CST)) {
        pthread_mutex_lock(&users_lock);
        pthread_cond_broadcast(&users_gone);
        pthread_mutex_unlock(&users_lock);
    }
}

static void segs_use(const struct vvb_segs *segs, uint32_t first)
{
    for (uint32_t i = first; i < segs->count; i++) {
        if (holds_use(segs->v, i, first)) {
            __atomic_add_fetch(&segs->v[i].region->users, 1, __ATOMIC_SEQ_CST);
        }
    }
}

void vvb_segs_free(struct vvb_segs *segs)
{
    free(segs->v);
    memset(segs, 0, sizeof(*segs));
}

static bool segs_grow(struct vvb_segs *segs)
{
    uint32_t cap = segs->cap ? segs->cap * 2 : 64;
    struct vvb_seg *v = realloc(segs->v, (size_t)cap * sizeof(*v));

    if (!v) {
        return false;
    }
    segs->v = v;
    segs->cap = cap;
    return true;
}

/* Appends len bytes at gpa, which lie in region; first is where this packet's segments begin. */
static bool segs_add(struct vvb_segs *segs, uint32_t first, struct vvb_region *region,
                     uint64_t gpa, uint64_t len)
{
    struct vvb_seg *last = segs->count > first ? &segs->v[segs->count - 1] : NULL;

    segs->total += len;
    if (last && last->region == region && last->gpa + last->len == gpa) {
        last->len += len;
        return true;
    }
    if (segs->count == segs->cap && !segs_grow(segs)) {
        return false;
    }
    segs->v[segs->count++] = (struct vvb_seg){
        .gpa = gpa,
        .len = len,
        .host = region->host + (gpa - region->gpa),
        .region = region,
    };
    return true;
}

int vvb_translate_in(const struct vvb_snapshot *snapshot, const uint8_t *data, uint64_t len,
                     uint32_t count, uint64_t max_bytes, uint32_t max_ranges,
                     struct vvb_segs *out, struct vvb_fault *fault)
{
    struct vvb_region *region = NULL;
    uint32_t first = out->count;
    uint64_t at = 0, total = 0;

    out->total = 0;
    if (count == 0 || count > max_ranges || count > len / 8) {
        return vvb_fault_set(fault, VVB_E_RANGE_COUNT, VVB_F_RANGE_COUNT, count, 0);
    }
    for (uint32_t range = 0; range < count; range++) {
        uint32_t byte_count, byte_offset;
        uint64_t pages, left, skip;

        if (len - at < 8) {
            vvb_fault_set(fault, VVB_E_RANGE_TRUNCATED, VVB_F_BYTE_COUNT, len - at, (uint32_t)at);
            goto fail;
        }
        memcpy(&byte_count, data + at, 4);
        memcpy(&byte_offset, data + at + 4, 4);
        if (byte_count == 0) {
            vvb_fault_set(fault, VVB_E_RANGE_EMPTY, VVB_F_BYTE_COUNT, 0, (uint32_t)at);
            goto fail;
        }
        total += byte_count;
        if (total > max_bytes) {
            vvb_fault_set(fault, VVB_E_RANGE_TOO_LONG, VVB_F_BYTE_COUNT, total, (uint32_t)at);
            goto fail;
        }
        /* 64 bits: no sum of two u32 can overflow here */
        pages = ((uint64_t)byte_offset + byte_count + VVB_PAGE_SIZE - 1) >> VVB_PAGE_SHIFT;
        if ((len - at - 8) / 8 < pages) {
            vvb_fault_set(fault, VVB_E_RANGE_TRUNCATED, VVB_F_PFN_COUNT, pages, (uint32_t)at);
            goto fail;
        }
        at += 8;
        left = byte_count;
        skip = byte_offset;
        for (uint64_t i = 0; i < pages; i++, at += 8) {
            uint64_t pfn, gpa, here;

            memcpy(&pfn, data + at, 8);
            gpa = pfn << VVB_PAGE_SHIFT;
            if (pfn >> (64 - VVB_PAGE_SHIFT) == 0) {
                region = vvb_snapshot_find(snapshot, gpa, region);
            } else {
                region = NULL;
            }
            if (!region) {
                vvb_fault_set(fault, VVB_E_PFN, VVB_F_PFN, pfn, (uint32_t)at);
                goto fail;
            }
            if (skip >= VVB_PAGE_SIZE) {
                skip -= VVB_PAGE_SIZE; /* an offset of a page or more: this page is not used */
                continue;
            }
            here = VVB_PAGE_SIZE - skip;
            if (here > left) {
                here = left;
            }
            if (!segs_add(out, first, region, gpa + skip, here)) {
                vvb_fault_set(fault, VVB_E_NOMEM, VVB_F_PFN_COUNT, pages, (uint32_t)at);
                goto fail;
            }
            left -= here;
            skip = 0;
        }
    }
    segs_use(out, first);
    return VVB_OK;
fail:
    out->count = first;
    out->total = 0;
    return (int)fault->error;
}

int vvb_translate(struct vvb_memory *memory, const char *data, uint64_t len, uint32_t count,
                  uint64_t max_bytes, uint32_t max_ranges, struct vvb_segs *out,
                  struct vvb_fault *fault)
{
    struct vvb_snapshot *snapshot = vvb_snapshot_get(memory);
    int ret = vvb_translate_in(snapshot, (const uint8_t *)data, len, count, max_bytes, max_ranges,
                               out, fault);

    vvb_snapshot_put(memory, snapshot);
    return ret;
}

int vvb_translate_span(struct vvb_memory *memory, uint64_t gpa, uint64_t len, struct vvb_segs *out)
{
    struct vvb_snapshot *snapshot = vvb_snapshot_get(memory);
    uint32_t first = out->count;
    int ret = VVB_OK;

    out->total = 0;
    while (len) {
        struct vvb_region *region = vvb_snapshot_find(snapshot, gpa, NULL);
        uint64_t here;

        if (!region) {
            ret = VVB_E_PFN;
            break;
        }
        here = region->size - (gpa - region->gpa);
        if (here > len) {
            here = len;
        }
        if (!segs_add(out, first, region, gpa, here)) {
            ret = VVB_E_NOMEM;
            break;
        }
        gpa += here;
        len -= here;
    }
    if (ret) {
        out->count = first;
        out->total = 0;
    } else {
        segs_use(out, first);
    }
    vvb_snapshot_put(memory, snapshot);
    return ret;
}
