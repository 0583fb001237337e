/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Putting packets into a ring, and deciding whether the peer has to be signalled.
 */
#include <string.h>

#include "ringbuf.h"

static void publish(struct vvb_ring *ring, int *signal)
{
    struct ring_header *header = ring->tx.header;
    uint32_t old = ring->published;

    if (old == ring->write_index) {
        return;
    }
    if (ring->record) {
        vvb_record_publish(ring);
    }
    /* [W] release: the packets come first, pairs with the consumer's acquire */
    vvb_store_release(&header->write_index, ring->write_index);
    ring->published = ring->write_index;
    /* [M] full: write_index, then mask; pairs with the consumer's mask = 0, then write_index */
    vvb_full_fence();
    /* acquire, for the order only: the mask is read before read_index */
    if (vvb_load_acquire(&header->interrupt_mask) == 0 &&
        vvb_load(&header->read_index) == old) {
        *signal = 1; /* the ring was empty, and the consumer may be asleep */
        ring->signals_sent++;
    } else {
        ring->signals_suppressed++;
    }
    if (ring->record) {
        vvb_record_published(ring);
    }
}

/* Free bytes, or -error. */
int64_t vvb_tx_free(struct vvb_ring *ring, struct vvb_fault *fault)
{
    /* [R] acquire: the consumer has read what lies below, pairs with its release */
    uint32_t read_index = vvb_load_acquire(&ring->tx.header->read_index);

    if (!index_ok(read_index, ring->tx.size)) {
        return -vvb_fault_set(fault, VVB_E_INDEX, VVB_F_READ_INDEX, read_index,
                              ring->write_index);
    }
    return ring->tx.size - distance(read_index, ring->write_index, ring->tx.size);
}

static void set_pending(struct vvb_ring *ring, uint32_t pending)
{
    if (ring->pending != pending) {
        ring->pending = pending;
        vvb_store(&ring->tx.header->pending_send_sz, pending);
    }
}

static int make_room(struct vvb_ring *ring, uint32_t total, int *signal, struct vvb_fault *fault)
{
    int64_t room = vvb_tx_free(ring, fault);

    if (room >= 0 && room <= total) {
        /* What is staged has to be seen before anybody waits for the peer to take it. */
        publish(ring, signal);
        set_pending(ring, total);
        /* [P] full: pending_send_sz, then read_index; pairs with the consumer's order */
        vvb_full_fence();
        room = vvb_tx_free(ring, fault);
        if (room >= 0 && room <= total) {
            return VVB_E_FULL;
        }
    }
    if (room < 0) {
        return (int)fault->error;
    }
    set_pending(ring, 0);
    return VVB_OK;
}

/* One packet into the ring, not yet published. Under tx_lock. */
static int put_packet(struct vvb_ring *ring, const struct vvb_outgoing *out, const char *header,
                      const char *payload, int *signal, struct vvb_fault *fault)
{
    static const uint64_t zero;
    uint64_t offset = DESCRIPTOR_SIZE + (((uint64_t)out->header_len + 7) & ~7ull);
    uint64_t length = offset + (((uint64_t)out->payload_len + 7) & ~7ull);
    struct descriptor descriptor;
    uint64_t trailer;
    uint8_t *at;
    int ret;

    if (length > MAX_PACKET || length + TRAILER_SIZE >= ring->tx.size) {
        return vvb_fault_set(fault, VVB_E_TOO_BIG, VVB_F_PAYLOAD_LENGTH, out->payload_len, 0);
    }
    ret = make_room(ring, (uint32_t)length + TRAILER_SIZE, signal, fault);
    if (ret) {
        return ret;
    }
    descriptor = (struct descriptor){
        .type = out->type,
        .offset8 = (uint16_t)(offset / 8),
        .len8 = (uint16_t)(length / 8),
        .flags = out->flags,
        .transaction_id = out->transaction_id,
    };
    trailer = (uint64_t)ring->write_index << 32; /* where this packet starts */
    at = ring->tx.data + ring->write_index;
    memcpy(at, &descriptor, sizeof(descriptor));
    if (out->header_len) {
        memcpy(at + DESCRIPTOR_SIZE, header, out->header_len);
        memcpy(at + DESCRIPTOR_SIZE + out->header_len, &zero,
               offset - DESCRIPTOR_SIZE - out->header_len);
    }
    if (out->payload_len) {
        memcpy(at + offset, payload, out->payload_len);
        memcpy(at + offset + out->payload_len, &zero, length - offset - out->payload_len);
    }
    memcpy(at + length, &trailer, sizeof(trailer));
    if (out->slot && ring->record) {
        vvb_record_completion(ring, out->slot);
    }
    ring->write_index = wrap_add(ring->write_index, (uint32_t)length + TRAILER_SIZE,
                                 ring->tx.size);
    return VVB_OK;
}

static int check_lost(struct vvb_ring *ring, struct vvb_fault *fault)
{
    if (vvb_guard_lost(ring->tx.guard)) {
        return vvb_fault_set(fault, VVB_E_LOST, VVB_F_MEMORY, 0, ring->write_index);
    }
    return VVB_OK;
}

int vvb_ring_send(struct vvb_ring *ring, uint16_t type, uint16_t flags, uint64_t transaction_id,
                  const char *header, uint32_t header_len, const char *payload,
                  uint32_t payload_len, int publish_now, int *signal, struct vvb_fault *fault)
{
    struct vvb_outgoing out = {.transaction_id = transaction_id,
                               .header_len = header_len,
                               .payload_len = payload_len,
                               .type = type,
                               .flags = flags};
    int ret;

    pthread_mutex_lock(&ring->tx_lock);
    ret = put_packet(ring, &out, header, payload, signal, fault);
    if (!ret) {
        if (publish_now) {
            publish(ring, signal);
        }
        ret = check_lost(ring, fault);
    }
    pthread_mutex_unlock(&ring->tx_lock);
    return ret;
}

/* Under tx_lock. */
static int send_many(struct vvb_ring *ring, const void *packets, uint32_t count, const void *data,
                     uint64_t data_len, struct vvb_sent *sent)
{
    const char *at = data;
    int ret = VVB_OK;

    while (sent->count < count) {
        struct vvb_outgoing out;
        uint64_t size;

        memcpy(&out, (const char *)packets + sent->count * sizeof(out), sizeof(out));
        size = (uint64_t)out.header_len + out.payload_len;
        if (size > data_len) {
            ret = vvb_fault_set(&sent->fault, VVB_E_TOO_BIG, VVB_F_PAYLOAD_LENGTH, size, 0);
            break;
        }
        ret = put_packet(ring, &out, at, at + out.header_len, &sent->signal, &sent->fault);
        if (ret) {
            if (ret == VVB_E_TOO_BIG && out.slot && ring->record) {
                vvb_record_lost_completion(ring, out.slot);
            }
            break;
        }
        at += size;
        data_len -= size;
        sent->count++;
    }
    publish(ring, &sent->signal);
    if (!ret || ret == VVB_E_FULL) {
        int lost = check_lost(ring, &sent->fault);

        ret = lost ? lost : ret;
    }
    return ret;
}

int vvb_ring_send_many(struct vvb_ring *ring, const void *packets, uint32_t count,
                       const void *data, uint64_t data_len, struct vvb_sent *sent)
{
    int ret;

    memset(sent, 0, sizeof(*sent));
    pthread_mutex_lock(&ring->tx_lock);
    ret = send_many(ring, packets, count, data, data_len, sent);
    pthread_mutex_unlock(&ring->tx_lock);
    return ret;
}

int vvb_ring_send_in_turn(struct vvb_ring *ring, const void *packets, uint32_t count,
                          const void *data, uint64_t data_len, struct vvb_sent *sent)
{
    int ret = VVB_E_FULL;

    memset(sent, 0, sizeof(*sent));
    pthread_mutex_lock(&ring->tx_lock);
    if (!ring->held) {
        ret = send_many(ring, packets, count, data, data_len, sent);
    }
    pthread_mutex_unlock(&ring->tx_lock);
    return ret;
}

void vvb_ring_hold(struct vvb_ring *ring, int held)
{
    pthread_mutex_lock(&ring->tx_lock);
    ring->held = held != 0;
    pthread_mutex_unlock(&ring->tx_lock);
}

void vvb_ring_publish(struct vvb_ring *ring, int *signal)
{
    pthread_mutex_lock(&ring->tx_lock);
    publish(ring, signal);
    pthread_mutex_unlock(&ring->tx_lock);
}
