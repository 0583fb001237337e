/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What was written to guest memory, for those who have to know before the guest is told of it.
 *
 * This is the one place that everybody who writes reports to: a plan's transfers, a device's C, and
 * Python for external data and GPADL mappings. Who listens is known here alone: today the map of
 * translated code.
 *
 * The lock is held for reading during a report, and for writing while a listener changes. So a
 * change returns when nobody looks at the one before any more, and no report waits for another.
 */
#include "engine.h"

int vvb_written_init(struct vvb_written *written)
{
    written->code = NULL;
    return pthread_rwlock_init(&written->lock, NULL);
}

void vvb_written_destroy(struct vvb_written *written)
{
    pthread_rwlock_destroy(&written->lock);
}

void vvb_memory_use_codemap(struct vvb_memory *memory, const struct vvb_codemap *map)
{
    pthread_rwlock_wrlock(&memory->written.lock);
    vvb_store(&memory->written.code, map);
    pthread_rwlock_unlock(&memory->written.lock);
}

int vvb_memory_watched(const struct vvb_memory *memory)
{
    return vvb_load(&memory->written.code) != NULL;
}

uint32_t vvb_memory_written(struct vvb_memory *memory, const struct vvb_span *spans,
                            uint32_t count, struct vvb_span *out, uint32_t cap)
{
    uint32_t hits = 0;

    if (!count || !vvb_memory_watched(memory)) {
        return 0;
    }
    pthread_rwlock_rdlock(&memory->written.lock);
    if (memory->written.code) {
        hits = vvb_codemap_hits(memory->written.code, spans, count, out, cap);
    }
    pthread_rwlock_unlock(&memory->written.lock);
    return hits;
}
