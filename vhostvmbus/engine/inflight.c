/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The record of packets that have left a ring and are not completed: what the next back end needs
 * to go on where this one was killed.
 *
 * A part of the in-flight region belongs to one channel: a head, then slots, then for each slot the
 * bytes of a packet. The process may be killed between any two instructions; what it stored before
 * is there then, in the order of the program, and of its threads each for itself. So there are two
 * stores that count, and all else is before or after:
 *
 *   receiving: packets into free slots, with numbers above head.rx's          (nothing, so far)
 *              head.rx := the last of these numbers, with the read index behind it        [1]
 *              the ring's read index := the same
 *   sending:   completions into the ring, behind its write index
 *              their slots' done := head.tx's number + 1                    (nothing, so far)
 *              head.tx := that number, with the write index behind them                   [2]
 *              the ring's write index := the same
 *              those slots := free
 *
 * Up to [1] a packet is in the ring and its slot's number is too high to count; from then on it is
 * in its slot, and the next back end goes on reading behind it, whatever the ring's header says by
 * then. Up to [2] a completion has not happened: the next one is written in its place. From then on
 * it has: the next back end publishes it if that was still to be done. A cursor (number and index)
 * changes at once since there are two of each, and one word that says which.
 *
 * Everything that a packet needs is one copy and a few stores; all else is in private memory.
 */
#include <string.h>

#include "batch.h"
#include "inflight.h"

#ifdef VVB_STEPS
/* The tests' own: may end the process here. */
void vvb_step(void);
#else
#define vvb_step() ((void)0)
#endif

/* ---- the two stores that count ---- */

static void commit(struct cursors *cursors, uint32_t *current, uint64_t number, uint32_t index)
{
    uint32_t next = !*current;

    vvb_step();
    vvb_store(&cursors->at[next].number, number);
    vvb_step();
    vvb_store(&cursors->at[next].index, index);
    vvb_step();
    /* release: what it is about comes first, and so does the cursor itself */
    vvb_store_release(&cursors->current, next);
    *current = next;
    vvb_step();
}

/* ---- receiving ---- */

bool vvb_record_room(struct vvb_ring *ring)
{
    struct vvb_record *record = ring->record;

    if (__atomic_load_n(&record->returned_count, __ATOMIC_RELAXED)) {
        pthread_mutex_lock(&ring->tx_lock);
        memcpy(record->free + record->free_count, record->returned,
               record->returned_count * sizeof(*record->free));
        record->free_count += record->returned_count;
        vvb_store(&record->returned_count, 0u);
        pthread_mutex_unlock(&ring->tx_lock);
    }
    return record->free_count;
}

int vvb_ring_has_slot(struct vvb_ring *ring)
{
    return !ring->record || vvb_record_room(ring);
}

void vvb_record_packet(struct vvb_ring *ring, struct vvb_batch *batch, struct vvb_packet *packet)
{
    struct vvb_record *record = ring->record;
    const uint8_t *data = batch->data + packet->data_offset;
    uint32_t length = packet->length - DESCRIPTOR_SIZE;
    struct slot *slot;
    uint32_t index;

    if (!(packet->flags & VVB_COMPLETION_REQUESTED) || packet->type == PKT_COMP ||
        packet->type == PKT_CANCEL_REQUEST) {
        return;
    }
    index = record->free[--record->free_count];
    slot = &record->slots[index];
    if (length <= record->slot_bytes) {
        memcpy(record->bytes + (size_t)index * record->slot_bytes, data + DESCRIPTOR_SIZE, length);
    }
    vvb_step();
    memcpy(&slot->descriptor, data, sizeof(slot->descriptor));
    slot->ring_offset = packet->ring_offset;
    vvb_store(&slot->replays, 0u);
    vvb_store(&slot->done, (uint64_t)0);
    vvb_step();
    /* release: the slot is whole before it has a number */
    vvb_store_release(&slot->number, ++record->taken);
    vvb_step();
    record->state[index] = TAKEN;
    packet->slot = index + 1;
}

/* Everything up to ring->read_index is recorded, as far as it has to be. */
void vvb_record_taken(struct vvb_ring *ring)
{
    struct vvb_record *record = ring->record;

    commit(&record->head->rx, &record->rx_current, record->taken, ring->read_index);
}

/* ---- sending ---- */

/* The completion of the packet in slot, counted from 1, is in the ring, not yet published. */
void vvb_record_completion(struct vvb_ring *ring, uint32_t slot)
{
    struct vvb_record *record = ring->record;

    if (slot > record->count || record->state[slot - 1] != TAKEN) {
        return;
    }
    record->state[slot - 1] = MARKED;
    record->marked[record->marked_count++] = slot - 1;
    vvb_step();
    vvb_store(&record->slots[slot - 1].done, record->sent + 1);
    vvb_step();
}

/* There will be no completion: nobody can put it into the ring. */
void vvb_record_lost_completion(struct vvb_ring *ring, uint32_t slot)
{
    struct vvb_record *record = ring->record;

    if (slot > record->count || record->state[slot - 1] != TAKEN) {
        return;
    }
    record->state[slot - 1] = FREE;
    vvb_store(&record->slots[slot - 1].number, (uint64_t)0);
    record->returned[record->returned_count] = slot - 1;
    vvb_store(&record->returned_count, record->returned_count + 1);
}

/* Before the write index is stored. */
void vvb_record_publish(struct vvb_ring *ring)
{
    struct vvb_record *record = ring->record;

    commit(&record->head->tx, &record->tx_current, ++record->sent, ring->write_index);
}

/* After that. */
void vvb_record_published(struct vvb_ring *ring)
{
    struct vvb_record *record = ring->record;

    vvb_step();
    for (uint32_t i = 0; i < record->marked_count; i++) {
        uint32_t index = record->marked[i];

        vvb_store(&record->slots[index].number, (uint64_t)0);
        vvb_step();
        record->state[index] = FREE;
        record->returned[record->returned_count + i] = index;
    }
    if (record->marked_count) {
        vvb_store(&record->returned_count, record->returned_count + record->marked_count);
        record->marked_count = 0;
    }
}

/* ---- giving packets again ---- */

uint32_t vvb_ring_to_replay(struct vvb_ring *ring)
{
    return ring->record ? ring->record->again_count - ring->record->again_next : 0;
}

/* Like taking packets from the ring: parsed and translated anew, done by the plan if that fits. */
void vvb_record_replay(struct vvb_ring *ring, struct vvb_batch *batch, uint32_t max,
                       const struct vvb_snapshot *snapshot, const struct vvb_limits *limits,
                       const struct vvb_plan *plan)
{
    struct vvb_record *record = ring->record;
    bool handed_up = false;

    while (batch->count < max && record->again_next < record->again_count) {
        const struct again *again = &record->again[record->again_next];
        struct descriptor descriptor = again->descriptor;
        uint32_t length = descriptor.len8 * 8u - DESCRIPTOR_SIZE;
        struct vvb_packet *packet;

        if (length > record->slot_bytes) {
            descriptor.len8 = descriptor.offset8 = DESCRIPTOR_SIZE / 8; /* the rest is lost */
        }
        if (descriptor.len8 * 8u > batch->data_cap - batch->data_len) {
            break;
        }
        packet = vvb_batch_add(ring, snapshot, batch, &descriptor,
                               record->bytes + (size_t)again->slot * record->slot_bytes,
                               again->ring_offset, limits);
        packet->slot = again->slot + 1;
        packet->replayed = 1;
        if (length > record->slot_bytes) {
            packet->error = VVB_E_TOO_LARGE;
            packet->fault_field = VVB_F_PAYLOAD_LENGTH;
            packet->fault_value = length;
            packet->fault_offset = again->ring_offset;
        } else if (again->replays > MOST_REPLAYS) {
            vvb_segs_put(batch->segs.v + packet->first_seg, packet->seg_count);
            batch->segs.count = packet->first_seg;
            packet->seg_count = 0;
            packet->external_length = 0;
            packet->error = VVB_E_REPLAYED;
            packet->fault_field = VVB_F_REPLAYS;
            packet->fault_value = again->replays;
            packet->fault_offset = again->ring_offset;
        }
        if (plan && !vvb_batch_keeps_order(batch, plan, &handed_up)) {
            break; /* it is the first of the next batch */
        }
        record->again_next++;
        batch->replayed++;
        if (vvb_batch_is_burst(batch)) {
            break;
        }
    }
}
