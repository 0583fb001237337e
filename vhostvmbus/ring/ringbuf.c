/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * VMBus ring buffers: attach, receive in batches, send, and when to signal the peer.
 *
 * Source of the format and of the protocol: the guest's include/linux/hyperv.h (struct
 * hv_ring_buffer) and drivers/hv/ring_buffer.c. A channel has two rings; each has one header page
 * and data pages. Whoever consumes a ring writes its read_index and interrupt_mask; whoever
 * produces writes write_index, pending_send_sz and the feature bits. Both roles share this code:
 * the host consumes the out ring and produces into the in ring, the guest the reverse.
 *
 * The index that is ours is kept in private memory and only stored to the header, never read back.
 *
 * Barriers, by pair:
 *
 *   [W] producer: packet, release write_index       | consumer: acquire write_index, packet
 *   [R] consumer: packet read, release read_index   | producer: acquire read_index, new packet
 *   [M] producer: write_index, full, interrupt_mask | consumer: interrupt_mask = 0, full,
 *                                                   |           write_index
 *   [P] producer: pending_send_sz, full, read_index | consumer: read_index, full, pending_send_sz
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine.h"

#define DESCRIPTOR_SIZE 16u
#define TRAILER_SIZE 8u
#define GPA_DIRECT_HEADER 24u
#define MAX_PACKET (0xffffu * 8)

enum {
    PKT_DATA_INBAND = 6,
    PKT_DATA_USING_XFER_PAGES = 7,
    PKT_DATA_USING_GPA_DIRECT = 9,
    PKT_CANCEL_REQUEST = 10,
    PKT_COMP = 11,
};

struct ring_header {
    uint32_t write_index;
    uint32_t read_index;
    uint32_t interrupt_mask;
    uint32_t pending_send_sz;
    uint32_t reserved[12];
    uint32_t feature_bits; /* bit 0: pending_send_sz is set and looked at */
};

struct descriptor {
    uint16_t type;
    uint16_t offset8;
    uint16_t len8;
    uint16_t flags;
    uint64_t transaction_id;
};

struct half {
    struct ring_header *header;
    uint8_t *data; /* mapped twice in a row: no packet is ever split */
    uint32_t size; /* of the data, in bytes */
    int slot;
    char *map;
    size_t map_len;
};

struct vvb_ring {
    int role;
    struct half rx, tx;
    uint32_t read_index; /* ours */
    pthread_mutex_t tx_lock;
    uint32_t write_index; /* ours, up to what is staged */
    uint32_t published;   /* ours, as the peer sees it */
    uint32_t pending;     /* what pending_send_sz says */
    uint64_t signals_sent, signals_suppressed, space_signals;
};

/* ---- attach ---- */

static void half_unmap(struct half *half)
{
    vvb_guard_del(half->slot);
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
    half->slot = vvb_guard_add(half->map, half->map_len, VVB_PAGE_SIZE);
    if (half->slot < 0) {
        return half->slot;
    }
    half->header = (struct ring_header *)half->map;
    half->data = (uint8_t *)half->map + VVB_PAGE_SIZE;
    half->size = (uint32_t)data;
    return 0;
}

static bool index_ok(uint32_t index, uint32_t size)
{
    return index < size && index % 8 == 0;
}

static uint32_t wrap_add(uint32_t index, uint32_t add, uint32_t size)
{
    index += add;
    return index >= size ? index - size : index;
}

static uint32_t distance(uint32_t from, uint32_t to, uint32_t size)
{
    return to >= from ? to - from : size - from + to;
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
    ring->role = role;
    ring->rx.slot = ring->tx.slot = -1;
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
        half_unmap(&ring->rx);
        half_unmap(&ring->tx);
        pthread_mutex_destroy(&ring->tx_lock);
        free(ring);
    }
}

int vvb_ring_lost(struct vvb_ring *ring)
{
    return vvb_guard_lost(ring->rx.slot) || vvb_guard_lost(ring->tx.slot);
}

char *vvb_ring_pages(struct vvb_ring *ring, int dir)
{
    return dir ? ring->tx.map : ring->rx.map;
}

/* ---- receive ---- */

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
    if (!batch->data || !batch->packets) {
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
        free(batch);
    }
}

void vvb_ring_mask(struct vvb_ring *ring)
{
    /* No barrier: a signal too many does no harm. */
    vvb_store(&ring->rx.header->interrupt_mask, 1u);
}

/* Bytes in the receive ring beyond ours, from one load of the peer's write_index. */
static int64_t rx_available(struct vvb_ring *ring, struct vvb_fault *fault)
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
    available = rx_available(ring, &fault);
    return vvb_guard_lost(ring->rx.slot) ? -VVB_E_LOST : available;
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

/* Takes the packet at ring->read_index. Returns the bytes consumed, 0: batch full, < 0: -error. */
static int64_t take_packet(struct vvb_ring *ring, const struct vvb_snapshot *snapshot,
                           struct vvb_batch *batch, uint32_t available,
                           const struct vvb_limits *limits)
{
    const uint8_t *source = ring->rx.data + ring->read_index;
    struct vvb_fault *fault = &batch->fault;
    struct vvb_packet *packet;
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

    packet = &batch->packets[batch->count];
    memset(packet, 0, sizeof(*packet));
    packet->transaction_id = descriptor.transaction_id;
    packet->ring_offset = ring->read_index;
    packet->data_offset = batch->data_len;
    packet->length = length;
    packet->payload_offset = offset;
    packet->first_seg = batch->segs.count;
    packet->type = descriptor.type;
    packet->flags = descriptor.flags;
    /* The copy's descriptor is the one that was checked, not what is in the ring by now. */
    memcpy(batch->data + batch->data_len, &descriptor, sizeof(descriptor));
    memcpy(batch->data + batch->data_len + DESCRIPTOR_SIZE, source + DESCRIPTOR_SIZE,
           length - DESCRIPTOR_SIZE);
    vvb_copied();

    if (check_packet(ring, snapshot, batch, packet, limits, fault)) {
        packet->error = fault->error;
        packet->fault_field = fault->field;
        packet->fault_value = fault->value;
        packet->fault_offset = wrap_add(ring->read_index, fault->offset, ring->rx.size);
        memset(fault, 0, sizeof(*fault));
    }
    batch->data_len += length;
    batch->count++;
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
                     struct vvb_memory *memory, const struct vvb_limits *limits)
{
    struct vvb_snapshot *snapshot;
    int64_t available, taken = 0;

    batch->count = 0;
    batch->data_len = 0;
    batch->segs.count = 0;
    batch->signal = 0;
    batch->bytes = 0;
    memset(&batch->fault, 0, sizeof(batch->fault));
    if (max > batch->packets_cap) {
        max = batch->packets_cap;
    }
    available = rx_available(ring, &batch->fault);
    if (vvb_guard_lost(ring->rx.slot)) {
        /* An index of 0 may come from the zeros that stand in for a lost header page. */
        return vvb_fault_set(&batch->fault, VVB_E_LOST, VVB_F_MEMORY, 0, ring->read_index);
    }
    if (available <= 0 || !max) {
        return available < 0 ? (int)batch->fault.error : VVB_OK;
    }
    snapshot = vvb_snapshot_get(memory);
    while (available > 0 && batch->count < max) {
        taken = take_packet(ring, snapshot, batch, (uint32_t)available, limits);
        if (taken <= 0) {
            break;
        }
        ring->read_index = wrap_add(ring->read_index, (uint32_t)taken, ring->rx.size);
        batch->bytes += (uint32_t)taken;
        available -= taken;
    }
    vvb_snapshot_put(memory, snapshot);
    if (batch->bytes && release_space(ring, batch->bytes)) {
        batch->signal = 1;
        __atomic_add_fetch(&ring->space_signals, 1, __ATOMIC_RELAXED);
    }
    if (vvb_guard_lost(ring->rx.slot)) {
        return vvb_fault_set(&batch->fault, VVB_E_LOST, VVB_F_MEMORY, 0, ring->read_index);
    }
    return taken < 0 ? (int)batch->fault.error : VVB_OK;
}

/* ---- send ---- */

static void publish(struct vvb_ring *ring, int *signal)
{
    struct ring_header *header = ring->tx.header;
    uint32_t old = ring->published;

    if (old == ring->write_index) {
        return;
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
}

/* Free bytes, or -error. */
static int64_t tx_free(struct vvb_ring *ring, struct vvb_fault *fault)
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
    int64_t room = tx_free(ring, fault);

    if (room >= 0 && room <= total) {
        /* What is staged has to be seen before anybody waits for the peer to take it. */
        publish(ring, signal);
        set_pending(ring, total);
        /* [P] full: pending_send_sz, then read_index; pairs with the consumer's order */
        vvb_full_fence();
        room = tx_free(ring, fault);
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

int vvb_ring_send(struct vvb_ring *ring, uint16_t type, uint16_t flags, uint64_t transaction_id,
                  const char *header, uint32_t header_len, const char *payload,
                  uint32_t payload_len, int publish_now, int *signal, struct vvb_fault *fault)
{
    static const uint64_t zero;
    uint64_t offset = DESCRIPTOR_SIZE + (((uint64_t)header_len + 7) & ~7ull);
    uint64_t length = offset + (((uint64_t)payload_len + 7) & ~7ull);
    struct descriptor descriptor;
    uint64_t trailer;
    uint8_t *at;
    int ret;

    if (length > MAX_PACKET || length + TRAILER_SIZE >= ring->tx.size) {
        return vvb_fault_set(fault, VVB_E_TOO_BIG, VVB_F_PAYLOAD_LENGTH, payload_len, 0);
    }
    pthread_mutex_lock(&ring->tx_lock);
    ret = make_room(ring, (uint32_t)length + TRAILER_SIZE, signal, fault);
    if (ret) {
        goto out;
    }
    descriptor = (struct descriptor){
        .type = type,
        .offset8 = (uint16_t)(offset / 8),
        .len8 = (uint16_t)(length / 8),
        .flags = flags,
        .transaction_id = transaction_id,
    };
    trailer = (uint64_t)ring->write_index << 32; /* where this packet starts */
    at = ring->tx.data + ring->write_index;
    memcpy(at, &descriptor, sizeof(descriptor));
    if (header_len) {
        memcpy(at + DESCRIPTOR_SIZE, header, header_len);
        memcpy(at + DESCRIPTOR_SIZE + header_len, &zero, offset - DESCRIPTOR_SIZE - header_len);
    }
    if (payload_len) {
        memcpy(at + offset, payload, payload_len);
        memcpy(at + offset + payload_len, &zero, length - offset - payload_len);
    }
    memcpy(at + length, &trailer, sizeof(trailer));
    ring->write_index = wrap_add(ring->write_index, (uint32_t)length + TRAILER_SIZE,
                                 ring->tx.size);
    if (publish_now) {
        publish(ring, signal);
    }
    if (vvb_guard_lost(ring->tx.slot)) {
        ret = vvb_fault_set(fault, VVB_E_LOST, VVB_F_MEMORY, 0, ring->write_index);
    }
out:
    pthread_mutex_unlock(&ring->tx_lock);
    return ret;
}

void vvb_ring_publish(struct vvb_ring *ring, int *signal)
{
    pthread_mutex_lock(&ring->tx_lock);
    publish(ring, signal);
    pthread_mutex_unlock(&ring->tx_lock);
}

void vvb_ring_get_state(struct vvb_ring *ring, struct vvb_ring_state *state)
{
    struct vvb_fault fault;
    int64_t value;

    memset(state, 0, sizeof(*state));
    state->rx_size = ring->rx.size;
    state->tx_size = ring->tx.size;
    value = rx_available(ring, &fault);
    state->rx_avail = value < 0 ? 0 : (uint32_t)value;
    pthread_mutex_lock(&ring->tx_lock);
    value = tx_free(ring, &fault);
    state->tx_free = value < 0 ? 0 : (uint32_t)value;
    state->tx_pending = ring->pending;
    state->signals_sent = ring->signals_sent;
    state->signals_suppressed = ring->signals_suppressed;
    pthread_mutex_unlock(&ring->tx_lock);
    state->space_signals = __atomic_load_n(&ring->space_signals, __ATOMIC_RELAXED);
    state->peer_signals_space = vvb_load(&ring->rx.header->feature_bits) & 1;
}

/* ---- waiting ---- */

int vvb_wait(const int *fds, uint32_t count, int timeout_ms)
{
    struct pollfd poll_fds[8];
    int fired = 0;

    if (count > 8) {
        return -EINVAL;
    }
    for (uint32_t i = 0; i < count; i++) {
        poll_fds[i] = (struct pollfd){.fd = fds[i], .events = POLLIN};
    }
    if (poll(poll_fds, count, timeout_ms) < 0) {
        return errno == EINTR ? 0 : -errno;
    }
    for (uint32_t i = 0; i < count; i++) {
        if (poll_fds[i].revents) {
            uint64_t value;

            /* Nobody else reads it; EAGAIN only means that it was empty. */
            if (read(fds[i], &value, sizeof(value)) < 0 && errno != EAGAIN) {
                return -errno;
            }
            fired |= 1 << i;
        }
    }
    return fired;
}

int vvb_signal(int fd)
{
    uint64_t one = 1;

    while (write(fd, &one, sizeof(one)) < 0) {
        if (errno == EAGAIN) {
            return 0; /* the counter is at its limit: it is signalled already */
        }
        if (errno != EINTR) {
            return -errno;
        }
    }
    return 0;
}
