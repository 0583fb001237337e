/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Taking packets out of a ring, in batches: copy, then check, then use. And telling the peer that
 * there is space again.
 */
#include <stdlib.h>
#include <string.h>

#include "ringbuf.h"

struct vvb_batch *vvb_batch_new(struct vvb_ring *ring, uint32_t max_packets)
{
    struct vvb_batch *batch = calloc(1, sizeof(*batch));

    if (!batch) {
        return NULL;
    }
    /* Any one packet fits: a packet exceeds neither the ring nor what len8 can say. */
    batch->data_cap = ring->rx.size < MAX_PACKET ? ring->rx.size : MAX_PACKET;
    batch->packets_cap = max_packets;
    batch->data = malloc(batch->data_cap);
    batch->packets = calloc(max_packets, sizeof(*batch->packets));
    if (!batch->data || !batch->packets || !vvb_plan_room(batch, max_packets)) {
        vvb_batch_free(batch);
        return NULL;
    }
    return batch;
}

void vvb_batch_free(struct vvb_batch *batch)
{
    if (batch) {
        free(batch->data);
        free(batch->packets);
        vvb_segs_free(&batch->segs);
        vvb_plan_unroom(batch);
        free(batch);
    }
}

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

static bool type_known(int role, uint16_t type)
{
    switch (type) {
    case PKT_DATA_INBAND:
    case PKT_COMP:
        return true;
    case PKT_DATA_USING_GPA_DIRECT:
    case PKT_CANCEL_REQUEST:
        return role == VVB_ROLE_HOST;
    case PKT_DATA_USING_XFER_PAGES:
        return role == VVB_ROLE_GUEST;
    default:
        return false;
    }
}

/* Everything about one packet that can be wrong without losing the way to the next one. */
static int check_packet(struct vvb_ring *ring, const struct vvb_snapshot *snapshot,
                        struct vvb_batch *batch, struct vvb_packet *packet,
                        const struct vvb_limits *limits, struct vvb_fault *fault)
{
    const uint8_t *data = batch->data + packet->data_offset;
    uint32_t payload = packet->length - packet->payload_offset;
    uint32_t range_count;
    int ret;

    if (!type_known(ring->role, packet->type)) {
        return vvb_fault_set(fault, VVB_E_TYPE, VVB_F_TYPE, packet->type, 0);
    }
    if (payload > limits->max_payload) {
        return vvb_fault_set(fault, VVB_E_TOO_LARGE, VVB_F_PAYLOAD_LENGTH, payload, 4);
    }
    if (packet->type != PKT_DATA_USING_GPA_DIRECT) {
        return VVB_OK;
    }
    if (packet->payload_offset < GPA_DIRECT_HEADER) {
        return vvb_fault_set(fault, VVB_E_RANGE_TRUNCATED, VVB_F_OFFSET8,
                             packet->payload_offset / 8, 2);
    }
    memcpy(&range_count, data + DESCRIPTOR_SIZE + 4, 4);
    /*
     * The ranges may end before the payload begins: storvsc of Linux 6.1 sends its header with
     * room for 32 PFNs however few it uses.
     */
    ret = vvb_translate_in(snapshot, data + GPA_DIRECT_HEADER,
                           packet->payload_offset - GPA_DIRECT_HEADER, range_count,
                           limits->max_external, limits->max_ranges, &batch->segs, fault);
    if (ret) {
        fault->offset += fault->error == VVB_E_RANGE_COUNT ? DESCRIPTOR_SIZE + 4
                                                            : GPA_DIRECT_HEADER;
        return ret;
    }
    packet->external_length = batch->segs.total;
    packet->seg_count = batch->segs.count - packet->first_seg;
    return VVB_OK;
}

struct vvb_packet *vvb_batch_add(struct vvb_ring *ring, const struct vvb_snapshot *snapshot,
                                 struct vvb_batch *batch, const struct descriptor *descriptor,
                                 const uint8_t *body, uint32_t ring_offset,
                                 const struct vvb_limits *limits)
{
    struct vvb_packet *packet = &batch->packets[batch->count];
    struct vvb_fault *fault = &batch->fault;

    memset(packet, 0, sizeof(*packet));
    packet->transaction_id = descriptor->transaction_id;
    packet->ring_offset = ring_offset;
    packet->data_offset = batch->data_len;
    packet->length = descriptor->len8 * 8u;
    packet->payload_offset = descriptor->offset8 * 8u;
    packet->first_seg = batch->segs.count;
    packet->type = descriptor->type;
    packet->flags = descriptor->flags;
    /* The copy's descriptor is the one that was checked, not what is in the ring by now. */
    memcpy(batch->data + batch->data_len, descriptor, sizeof(*descriptor));
    memcpy(batch->data + batch->data_len + DESCRIPTOR_SIZE, body,
           packet->length - DESCRIPTOR_SIZE);
    vvb_copied();

    if (check_packet(ring, snapshot, batch, packet, limits, fault)) {
        packet->error = fault->error;
        packet->fault_field = fault->field;
        packet->fault_value = fault->value;
        packet->fault_offset = wrap_add(ring_offset, fault->offset, ring->rx.size);
        memset(fault, 0, sizeof(*fault));
    }
    batch->data_len += packet->length;
    batch->count++;
    return packet;
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

static void batch_start(struct vvb_batch *batch)
{
    batch->count = 0;
    batch->data_len = 0;
    batch->segs.count = 0;
    batch->signal = 0;
    batch->bytes = 0;
    batch->no_slot = 0;
    batch->replayed = 0;
    batch->todo_bytes = 0;
    batch->todo_count = 0;
    batch->done_count = 0;
    batch->answer_count = 0;
    batch->done_payload = 0;
    batch->done_external = 0;
    batch->answers_len = 0;
    batch->span_count = 0;
    memset(&batch->fault, 0, sizeof(batch->fault));
}

void vvb_batch_put_back(struct vvb_batch *batch)
{
    const struct vvb_packet *packet = &batch->packets[--batch->count];

    if (packet->seg_count) {
        vvb_segs_put(batch->segs.v + packet->first_seg, packet->seg_count);
    }
    batch->segs.count = packet->first_seg;
    batch->data_len = packet->data_offset;
    batch->todo_count--;
}

int vvb_ring_receive(struct vvb_ring *ring, struct vvb_batch *batch, uint32_t max,
                     struct vvb_memory *memory, const struct vvb_limits *limits,
                     const struct vvb_plan *plan)
{
    struct vvb_snapshot *snapshot;
    int64_t available, taken = 0;
    bool others = false; /* a packet that fits no rule has been taken: nothing may overtake it */

    batch_start(batch);
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
        if (plan) {
            if (!vvb_plan_match(plan, batch, batch->count - 1)) {
                others = true;
            } else if (others) {
                vvb_batch_put_back(batch); /* it stays in the ring after all */
                break;
            }
        }
        if (ring->record) {
            vvb_record_packet(ring, batch, &batch->packets[batch->count - 1]);
        }
        ring->read_index = wrap_add(ring->read_index, (uint32_t)taken, ring->rx.size);
        batch->bytes += (uint32_t)taken;
        available -= taken;
        if (batch->todo_count == PLAN_BURST || batch->todo_bytes >= PLAN_BURST_BYTES) {
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
