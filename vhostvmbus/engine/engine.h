/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the engine's source files share. See api.h for what Python sees.
 *
 * Rules: guest memory is read once, into private memory, before any of it is believed (copy, then
 * check, then use); every barrier has a comment that names its pair on the peer's side.
 */
#ifndef VVB_ENGINE_H
#define VVB_ENGINE_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "api.h"

#define VVB_PAGE_SIZE 4096u
#define VVB_PAGE_SHIFT 12

/* Loads and stores of words that the peer accesses at the same time. */
#define vvb_load(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define vvb_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define vvb_load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define vvb_store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define vvb_full_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)

/*
 * Between a copy out of guest memory and its use: the compiler must not read the source again in
 * the place of the copy.
 */
#define vvb_copied() __asm__ volatile("" ::: "memory")

/* guard.c: surviving SIGBUS. A guard watches one mapping; -errno if none is free. */
int vvb_guard_add(void *start, size_t len, size_t page_size);
void vvb_guard_del(int guard);
bool vvb_guard_lost(int guard);

/* guestmem.c */
struct vvb_region {
    uint64_t gpa;
    uint64_t size;
    char *host;
    uint64_t file_offset;
    int fd;
    int guard;
    uint64_t users;
    bool forsaken; /* see writing.c */
};

struct vvb_snapshot {
    uint64_t refs;
    uint32_t count;
    struct vvb_region *regions[];
};

/* written.c: who has to know what was written, see there */
struct vvb_written {
    pthread_rwlock_t lock;
    const struct vvb_codemap *code; /* NULL: nobody executes translated code */
};

struct vvb_memory {
    pthread_mutex_t lock;
    pthread_cond_t idle;
    struct vvb_snapshot *current;
    struct vvb_written written;
};

int vvb_written_init(struct vvb_written *written); /* 0 or an errno */
void vvb_written_destroy(struct vvb_written *written);

struct vvb_snapshot *vvb_snapshot_get(struct vvb_memory *memory);
void vvb_snapshot_put(struct vvb_memory *memory, struct vvb_snapshot *snapshot);
struct vvb_region *vvb_snapshot_find(const struct vvb_snapshot *snapshot, uint64_t gpa,
                                     struct vvb_region *hint);
int vvb_translate_in(const struct vvb_snapshot *snapshot, const uint8_t *data, uint64_t len,
                     uint32_t count, uint64_t max_bytes, uint32_t max_ranges,
                     struct vvb_segs *out, struct vvb_fault *fault);

/* codemap.c */

/* A sequentially consistent fence, then the spans' pages whose bit is set, coalesced. */
uint32_t vvb_codemap_hits(const struct vvb_codemap *map, const struct vvb_span *spans,
                          uint32_t count, struct vvb_span *out, uint32_t cap);

/* writing.c: one write of guest memory to a file, from before its first system call to the end */
struct vvb_writing {
    const struct vvb_seg *segs;
    uint32_t count;
    struct vvb_writing *next, *previous;
};

/* Has forsaken regions, vvb_region_forsake(), know of the write; -ECANCELED if one is already. */
int vvb_writing_begin(struct vvb_writing *writing);
void vvb_writing_end(struct vvb_writing *writing);

/* extdata.c: like vvb_ext_preadv() and vvb_ext_pwritev(); nowait for reading only */
int64_t vvb_file_io(const struct vvb_seg *segs, uint32_t count, uint64_t offset, uint64_t len,
                    int fd, int64_t file_offset, bool write, bool nowait);

static inline int vvb_fault_set(struct vvb_fault *fault, uint32_t error, uint32_t field,
                                uint64_t value, uint32_t offset)
{
    fault->error = error;
    fault->field = field;
    fault->value = value;
    fault->offset = offset;
    return (int)error;
}

#endif
