/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Filling a batch, for the two files that do: ringreceive.c from a ring, inflight.c from the record
 * of packets in flight. Both go the same way for each packet:
 *
 *   vvb_batch_add()          copies and checks it
 *   vvb_batch_keeps_order()  decides, with a plan, whether it may be taken now; else it is not
 *                            taken, and is what the next batch begins with
 *   their own step           the packet counts as taken: the ring's index, or the record's position,
 *                            moves behind it. What the packet is recorded in, and when the peer is
 *                            told, is theirs as well
 *   vvb_batch_is_burst()     decides whether the batch ends here
 */
#ifndef VVB_BATCH_H
#define VVB_BATCH_H

#include <string.h>

#include "ringbuf.h"

/* A batch ends after so many packets that a plan does: the peer is to see the first of them soon. */
#define PLAN_BURST 16u
#define PLAN_BURST_BYTES (512u << 10)

/* Empties the batch for the next receive. */
static inline void vvb_batch_start(struct vvb_batch *batch)
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
    batch->whole = NULL;
    memset(&batch->fault, 0, sizeof(batch->fault));
}

/*
 * Copies a packet into the batch and checks everything in it that can be wrong without losing the
 * way to the next one. body is what follows the descriptor; descriptor, and offset in the ring, were
 * checked. The copy fits: the caller has compared its size with data_cap.
 */
struct vvb_packet *vvb_batch_add(struct vvb_ring *ring, const struct vvb_snapshot *snapshot,
                                 struct vvb_batch *batch, const struct descriptor *descriptor,
                                 const uint8_t *body, uint32_t ring_offset,
                                 const struct vvb_limits *limits);
/* Takes the last packet out of the batch. */
void vvb_batch_put_back(struct vvb_batch *batch);

/*
 * The order of packets under a plan: what the plan does is done before the caller sees the batch, so
 * nothing that fits it may be taken behind a packet that does not and is handed up. handed_up says
 * whether there is one in the batch, false at first. Returns false, with the last packet put back,
 * if that would overtake one.
 */
static inline bool vvb_batch_keeps_order(struct vvb_batch *batch, const struct vvb_plan *plan,
                                         bool *handed_up)
{
    if (!vvb_plan_match(plan, batch, batch->count - 1)) {
        *handed_up = true;
    } else if (*handed_up) {
        vvb_batch_put_back(batch);
        return false;
    }
    return true;
}

static inline bool vvb_batch_is_burst(const struct vvb_batch *batch)
{
    return batch->todo_count == PLAN_BURST || batch->todo_bytes >= PLAN_BURST_BYTES;
}

#endif
