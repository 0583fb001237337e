/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * VMBus ring buffers, for the files that implement them: ringattach.c, ringreceive.c, ringsend.c.
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
#ifndef VVB_RINGBUF_H
#define VVB_RINGBUF_H

#include <pthread.h>

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
    int guard;
    char *map;
    size_t map_len;
};

/* How worthwhile it is to let packets gather: see ringserve.c. Of the thread that receives. */
struct vvb_gathering {
    uint32_t packets;  /* in the rest that was taken, else since the last one */
    uint32_t patience; /* so many before another is tried; 0: as at first */
    bool rested;
};

struct vvb_ring {
    struct vvb_memory *memory; /* that its pages are of; it outlives the ring */
    int role;
    struct half rx, tx;
    uint32_t read_index; /* ours */
    pthread_mutex_t tx_lock;
    uint32_t write_index; /* ours, up to what is staged */
    uint32_t published;   /* ours, as the peer sees it */
    uint32_t pending;     /* what pending_send_sz says */
    uint32_t held;        /* packets wait in line outside: see vvb_ring_hold() */
    uint64_t signals_sent, signals_suppressed, space_signals;
    struct vvb_record *record; /* NULL: packets are not recorded */
    struct vvb_gathering gathering;
};

static inline bool index_ok(uint32_t index, uint32_t size)
{
    return index < size && index % 8 == 0;
}

static inline uint32_t wrap_add(uint32_t index, uint32_t add, uint32_t size)
{
    index += add;
    return index >= size ? index - size : index;
}

static inline uint32_t distance(uint32_t from, uint32_t to, uint32_t size)
{
    return to >= from ? to - from : size - from + to;
}

/* Bytes to read beyond our index, from one load of the peer's; or -error. ringreceive.c */
int64_t vvb_rx_available(struct vvb_ring *ring, struct vvb_fault *fault);
/* Free bytes to send into, or -error. ringsend.c */
int64_t vvb_tx_free(struct vvb_ring *ring, struct vvb_fault *fault);

/* inflight.c, if there is a record; inflightopen.c frees it. On the thread that receives: */
bool vvb_record_room(struct vvb_ring *ring);
void vvb_record_packet(struct vvb_ring *ring, struct vvb_batch *batch, struct vvb_packet *packet);
void vvb_record_taken(struct vvb_ring *ring);
void vvb_record_replay(struct vvb_ring *ring, struct vvb_batch *batch, uint32_t max,
                       const struct vvb_snapshot *snapshot, const struct vvb_limits *limits,
                       const struct vvb_plan *plan);
/* Under tx_lock: */
void vvb_record_completion(struct vvb_ring *ring, uint32_t slot);
void vvb_record_lost_completion(struct vvb_ring *ring, uint32_t slot);
void vvb_record_publish(struct vvb_ring *ring);
void vvb_record_published(struct vvb_ring *ring);
void vvb_record_free(struct vvb_ring *ring);
/* Puts private zeros in the place of the record; its users stay harmless. 0 or -errno. */
int vvb_record_forsake(struct vvb_ring *ring);

/* A packet of the batch that a plan fits. */
struct vvb_todo {
    const struct vvb_rule *rule;
    uint64_t position;
    uint64_t length; /* bytes that will be moved, for the end of a burst */
    uint32_t packet;
};

/*
 * What a plan is to the ring. fits() looks at a whole packet without a fault, under the lock of
 * nothing; perform() does it, answers if an answer is wanted, and returns true, or leaves it.
 */
struct vvb_plan {
    bool (*fits)(const struct vvb_plan *plan, const struct vvb_batch *batch,
                 struct vvb_todo *todo);
    bool (*perform)(const struct vvb_plan *plan, struct vvb_batch *batch,
                    const struct vvb_todo *todo);
};

/* ringsend.c: vvb_ring_send_many(), but VVB_E_FULL and none if others wait in line */
int vvb_ring_send_in_turn(struct vvb_ring *ring, const void *packets, uint32_t count,
                          const void *data, uint64_t data_len, struct vvb_sent *sent);

/* plan.c: room in the batch for the answer to a packet, VVB_PLAN_BYTES at most */
uint8_t *vvb_plan_answer(struct vvb_batch *batch, const struct vvb_packet *packet,
                         uint32_t length);
/* Whether the plan fits the packet; then it is put on the batch's list of things to do. */
bool vvb_plan_match(const struct vvb_plan *plan, struct vvb_batch *batch, uint32_t index);
/* Does what is on the list, and takes what was done out of the batch's packets. */
void vvb_plan_run(const struct vvb_plan *plan, struct vvb_batch *batch);
bool vvb_plan_room(struct vvb_batch *batch, uint32_t max_packets);
void vvb_plan_unroom(struct vvb_batch *batch);

#endif
