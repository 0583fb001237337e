/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Taking packets out of a ring, in batches: copy, then check, then use. And telling the peer that
 * there is space again.
 */
#include <string.h>

#include "batch.h"

void vvb_ring_mask(struct vvb_ring *ring)
{
    /* No barrier: a signal too many does no harm. */
    vvb_store(&ring->rx.header->interrupt_mask, 1u);
}

/* Bytes in the receive ring beyond ours, from one load of the peer's write_index. */
int64_t vvb_rx_available(struct vvb_ring *ring, struct vvb_fault *fault)
{
    /* [W] acquire: the packets below this index are there, pairs with the producer's release */
    uint32_t write_index = vvb_load_acquire(&ring->rx.header->write_index);

    if (!index_ok(write_index, ring->rx.size)) {
        return -vvb_fault_set(fault, VVB_E_INDEX, VVB_F_WRITE_INDEX, write_index,
                              ring->read_index);
    }
    return distance(ring->read_index, write_index, ring->rx.size);
}

int64_t vvb_ring_unmask(struct vvb_ring *ring)
{
    struct vvb_fault fault;
    int64_t available;

    vvb_store(&ring->rx.header->interrupt_mask, 0u);
    /* [M] full: mask, then write_index; pairs with the producer's write_index, then mask */
    vvb_full_fence();
    available = vvb_rx_available(ring, &fault);
    return vvb_guard_lost(ring->rx.guard) ? -VVB_E_LOST : available;
}

/* Takes the packet at ring->read_index. Returns the bytes consumed, 0: batch full, < 0: -error. */
static int64_t take_packet(struct vvb_ring *ring, const struct vvb_snapshot *snapshot,
                           struct vvb_batch *batch, uint32_t available,
                           const struct vvb_limits *limits)
{
    const uint8_t *source = ring->rx.data + ring->read_index;
    struct vvb_fault *fault = &batch->fault;
    struct descriptor descriptor;
    uint32_t length, offset;

    if (available < DESCRIPTOR_SIZE + TRAILER_SIZE) {
        return -vvb_fault_set(fault, VVB_E_DESC_TRUNCATED, VVB_F_AVAILABLE, available,
                              ring->read_index);
    }
    memcpy(&descriptor, source, sizeof(descriptor));
    vvb_copied();
    length = descriptor.len8 * 8u;
    offset = descriptor.offset8 * 8u;
    if (length < DESCRIPTOR_SIZE || length > available - TRAILER_SIZE) {
        return -vvb_fault_set(fault, VVB_E_LENGTH, VVB_F_LEN8, descriptor.len8,
                              ring->read_index);
    }
    if (offset < DESCRIPTOR_SIZE || offset > length) {
        return -vvb_fault_set(fault, VVB_E_OFFSET, VVB_F_OFFSET8, descriptor.offset8,
                              ring->read_index);
    }
    if (length > batch->data_cap - batch->data_len) {
        return 0; /* fits into the next batch: data_cap is at least the ring's size, or MAX_PACKET */
    }

    vvb_batch_add(ring, snapshot, batch, &descriptor, source + DESCRIPTOR_SIZE, ring->read_index,
                  limits);
    return length + TRAILER_SIZE;
}

/* Tells the peer what is free now; true if it waits for that and has to be signalled. */
static bool release_space(struct vvb_ring *ring, uint32_t freed)
{
    struct ring_header *header = ring->rx.header;
    uint32_t pending, write_index, free_now;

    /* [R] release: our reads of the packets come first, pairs with the producer's acquire */
    vvb_store_release(&header->read_index, ring->read_index);
    if (!(vvb_load(&header->feature_bits) & 1)) {
        return false; /* the peer polls when its ring is full */
    }
    /* [P] full: read_index, then pending_send_sz; pairs with pending_send_sz, then read_index */
    vvb_full_fence();
    pending = vvb_load(&header->pending_send_sz);
    if (!pending) {
        return false;
    }
    /* acquire, for the order only: write_index is read after pending_send_sz */
    write_index = vvb_load_acquire(&header->write_index);
    if (!index_ok(write_index, ring->rx.size)) {
        return false; /* the next receive reports it */
    }
    free_now = ring->rx.size - distance(ring->read_index, write_index, ring->rx.size);
    /* Only the step from "not enough" to "enough" is signalled. A ring is never filled wholly. */
    if (free_now <= pending || (free_now > freed && free_now - freed > pending)) {
        return false;
    }
    return true;
}

int vvb_ring_receive(struct vvb_ring *ring, struct vvb_batch *batch, uint32_t max,
                     struct vvb_memory *memory, const struct vvb_limits *limits,
                     const struct vvb_plan *plan)
{
    struct vvb_snapshot *snapshot;
    int64_t available, taken = 0;
    bool handed_up = false;

    vvb_batch_start(batch);
    if (max > batch->packets_cap) {
        max = batch->packets_cap;
    }
    available = vvb_rx_available(ring, &batch->fault);
    if (vvb_guard_lost(ring->rx.guard)) {
        /* An index of 0 may come from the zeros that stand in for a lost header page. */
        return vvb_fault_set(&batch->fault, VVB_E_LOST, VVB_F_MEMORY, 0, ring->read_index);
    }
    if (available < 0 || !max) {
        return available < 0 ? (int)batch->fault.error : VVB_OK;
    }
    if (vvb_ring_to_replay(ring)) {
        snapshot = vvb_snapshot_get(memory);
        vvb_record_replay(ring, batch, max, snapshot, limits, plan);
        vvb_snapshot_put(memory, snapshot);
        vvb_plan_run(plan, batch);
        return VVB_OK;
    }
    if (!available) {
        return VVB_OK;
    }
    snapshot = vvb_snapshot_get(memory);
    while (available > 0 && batch->count < max) {
        if (ring->record && !vvb_record_room(ring)) {
            batch->no_slot = 1;
            break;
        }
        taken = take_packet(ring, snapshot, batch, (uint32_t)available, limits);
        if (taken <= 0) {
            break;
        }
        if (plan && !vvb_batch_keeps_order(batch, plan, &handed_up)) {
            break; /* it stays in the ring after all */
        }
        if (ring->record) {
            vvb_record_packet(ring, batch, &batch->packets[batch->count - 1]);
        }
        ring->read_index = wrap_add(ring->read_index, (uint32_t)taken, ring->rx.size);
        batch->bytes += (uint32_t)taken;
        available -= taken;
        if (vvb_batch_is_burst(batch)) {
            break;
        }
    }
    vvb_snapshot_put(memory, snapshot);
    if (batch->bytes && ring->record) {
        vvb_record_taken(ring);
    }
    if (batch->bytes && release_space(ring, batch->bytes)) {
        batch->signal = 1;
        __atomic_add_fetch(&ring->space_signals, 1, __ATOMIC_RELAXED);
    }
    /* The snapshot is let go, the regions are in use: this may take as long as the host's disk. */
    vvb_plan_run(plan, batch);
    if (vvb_guard_lost(ring->rx.guard)) {
        return vvb_fault_set(&batch->fault, VVB_E_LOST, VVB_F_MEMORY, 0, ring->read_index);
    }
    return taken < 0 ? (int)batch->fault.error : VVB_OK;
}
