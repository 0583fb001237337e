/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Attaching to a channel's two rings: the header page, then the data pages twice in a row.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "ringbuf.h"

static void half_unmap(struct half *half)
{
    vvb_guard_del(half->guard);
    if (half->map) {
        munmap(half->map, half->map_len);
    }
}

/* Maps count pages to at, one mmap() per run of pages that are contiguous in one region. */
static int map_pages(const struct vvb_snapshot *snapshot, const uint64_t *pfns, uint32_t count,
                     char *at, struct vvb_fault *fault)
{
    uint32_t i = 0;

    while (i < count) {
        uint64_t gpa = pfns[i] << VVB_PAGE_SHIFT;
        struct vvb_region *region = NULL;
        uint32_t run = 1;

        if (pfns[i] >> (64 - VVB_PAGE_SHIFT) == 0) {
            region = vvb_snapshot_find(snapshot, gpa, NULL);
        }
        if (!region) {
            vvb_fault_set(fault, VVB_E_PFN, VVB_F_PFN, pfns[i], i);
            return -EFAULT;
        }
        while (i + run < count && pfns[i + run] == pfns[i] + run &&
               ((uint64_t)run << VVB_PAGE_SHIFT) < region->size - (gpa - region->gpa)) {
            run++;
        }
        if (mmap(at + ((size_t)i << VVB_PAGE_SHIFT), (size_t)run << VVB_PAGE_SHIFT,
                 PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, region->fd,
                 (off_t)(region->file_offset + (gpa - region->gpa))) == MAP_FAILED) {
            return -errno;
        }
        i += run;
    }
    return 0;
}

static int half_map(struct half *half, const struct vvb_snapshot *snapshot, const uint64_t *pfns,
                    uint32_t count, struct vvb_fault *fault)
{
    size_t data = ((size_t)count - 1) << VVB_PAGE_SHIFT;
    int ret;

    half->map_len = VVB_PAGE_SIZE + 2 * data;
    half->map = mmap(NULL, half->map_len, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (half->map == MAP_FAILED) {
        half->map = NULL;
        return -errno;
    }
    ret = map_pages(snapshot, pfns, count, half->map, fault);
    if (!ret) {
        ret = map_pages(snapshot, pfns + 1, count - 1, half->map + VVB_PAGE_SIZE + data,
                        fault);
    }
    if (ret) {
        return ret;
    }
    half->guard = vvb_guard_add(half->map, half->map_len, VVB_PAGE_SIZE);
    if (half->guard < 0) {
        return half->guard;
    }
    half->header = (struct ring_header *)half->map;
    half->data = (uint8_t *)half->map + VVB_PAGE_SIZE;
    half->size = (uint32_t)data;
    return 0;
}

struct vvb_ring *vvb_ring_attach(struct vvb_memory *memory, const uint64_t *pfns, uint32_t count,
                                 uint32_t ring_offset, int role, int initialize,
                                 struct vvb_fault *fault, int *err)
{
    struct vvb_snapshot *snapshot;
    struct vvb_ring *ring;
    struct half *out, *in;
    uint32_t read_index, write_index;
    int ret;

    memset(fault, 0, sizeof(*fault));
    *err = 0;
    /* Indices are 32 bits, and wrap_add() needs one bit to spare. */
    if (ring_offset < 2 || count < ring_offset || count - ring_offset < 2 || count > 1u << 19) {
        *err = EINVAL;
        return NULL;
    }
    ring = calloc(1, sizeof(*ring));
    if (!ring) {
        *err = ENOMEM;
        return NULL;
    }
    ring->memory = memory;
    ring->role = role;
    ring->rx.guard = ring->tx.guard = -1;
    pthread_mutex_init(&ring->tx_lock, NULL);
    out = role == VVB_ROLE_HOST ? &ring->rx : &ring->tx;
    in = role == VVB_ROLE_HOST ? &ring->tx : &ring->rx;

    snapshot = vvb_snapshot_get(memory);
    ret = half_map(out, snapshot, pfns, ring_offset, fault);
    if (!ret) {
        ret = half_map(in, snapshot, pfns + ring_offset, count - ring_offset, fault);
    }
    vvb_snapshot_put(memory, snapshot);
    if (ret) {
        goto fail;
    }
    if (initialize) {
        memset(ring->rx.header, 0, VVB_PAGE_SIZE);
        memset(ring->tx.header, 0, VVB_PAGE_SIZE);
    }

    /* Only here, at the start, are our own indices taken from the header (RESUME needs that). */
    read_index = vvb_load(&ring->rx.header->read_index);
    write_index = vvb_load(&ring->tx.header->write_index);
    if (!index_ok(read_index, ring->rx.size)) {
        vvb_fault_set(fault, VVB_E_INDEX, VVB_F_READ_INDEX, read_index, read_index);
        ret = -EINVAL;
        goto fail;
    }
    if (!index_ok(write_index, ring->tx.size)) {
        vvb_fault_set(fault, VVB_E_INDEX, VVB_F_WRITE_INDEX, write_index, write_index);
        ret = -EINVAL;
        goto fail;
    }
    ring->read_index = read_index;
    ring->write_index = ring->published = write_index;
    ring->pending = 0;
    vvb_store(&ring->tx.header->pending_send_sz, 0u);
    /*
     * Each side announces, in the ring that it produces into, that it sets pending_send_sz there
     * and looks at it in the other ring (comment at feature_bits in hyperv.h).
     */
    __atomic_fetch_or(&ring->tx.header->feature_bits, 1u, __ATOMIC_RELAXED);
    if (vvb_ring_lost(ring)) {
        vvb_fault_set(fault, VVB_E_LOST, VVB_F_MEMORY, 0, 0);
        ret = -EFAULT;
        goto fail;
    }
    return ring;
fail:
    *err = -ret;
    vvb_ring_free(ring);
    return NULL;
}

void vvb_ring_free(struct vvb_ring *ring)
{
    if (ring) {
        vvb_record_free(ring);
        half_unmap(&ring->rx);
        half_unmap(&ring->tx);
        pthread_mutex_destroy(&ring->tx_lock);
        free(ring);
    }
}

static int half_forsake(struct half *half)
{
    if (mmap(half->map, half->map_len, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED) {
        return -errno;
    }
    vvb_store(&half->header->interrupt_mask, 1u); /* nobody is to be signalled either */
    return 0;
}

int vvb_ring_forsake(struct vvb_ring *ring)
{
    int rx = half_forsake(&ring->rx), tx = half_forsake(&ring->tx);
    int record = vvb_record_forsake(ring);

    return rx ? rx : tx ? tx : record;
}

int vvb_ring_lost(struct vvb_ring *ring)
{
    return vvb_guard_lost(ring->rx.guard) || vvb_guard_lost(ring->tx.guard);
}

char *vvb_ring_pages(struct vvb_ring *ring, int dir)
{
    return dir ? ring->tx.map : ring->rx.map;
}

void vvb_ring_get_state(struct vvb_ring *ring, struct vvb_ring_state *state)
{
    struct vvb_fault fault;
    int64_t value;

    memset(state, 0, sizeof(*state));
    state->rx_size = ring->rx.size;
    state->tx_size = ring->tx.size;
    value = vvb_rx_available(ring, &fault);
    state->rx_avail = value < 0 ? 0 : (uint32_t)value;
    pthread_mutex_lock(&ring->tx_lock);
    value = vvb_tx_free(ring, &fault);
    state->tx_free = value < 0 ? 0 : (uint32_t)value;
    state->tx_pending = ring->pending;
    state->signals_sent = ring->signals_sent;
    state->signals_suppressed = ring->signals_suppressed;
    pthread_mutex_unlock(&ring->tx_lock);
    state->space_signals = __atomic_load_n(&ring->space_signals, __ATOMIC_RELAXED);
    state->peer_signals_space = vvb_load(&ring->rx.header->feature_bits) & 1;
}
