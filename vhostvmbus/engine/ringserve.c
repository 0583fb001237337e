/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A channel's work as long as it is all its plan's: wait, receive, answer, signal, again. Whatever
 * is not, is left to the caller as vvb_ring_receive() would have left it.
 */
#include <poll.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "ringbuf.h"

#define LOOK_EVERY 16u /* turns, before the caller's eventfds are looked at */

#define GATHER_LEAST 2u     /* packets that make a rest worth it */
#define PATIENCE_LEAST 16u  /* packets between two tries of a rest, if the last one was not */
#define PATIENCE_MOST 4096u

/*
 * Whether to rest before the ring, which is empty and masked, is looked at again. A rest that
 * brings several packets spares the guest as many signals, and both sides the waking; one that
 * does not has only made a packet late, so the next try comes later, up to a limit.
 */
static bool rest_pays(struct vvb_gathering *gathering)
{
    bool rested = gathering->rested;
    uint32_t patience = gathering->patience ? gathering->patience : PATIENCE_LEAST;
    bool pays = gathering->packets >= (rested ? GATHER_LEAST : patience);

    if (rested) {
        patience = pays ? PATIENCE_LEAST : patience * 2;
        gathering->patience = patience < PATIENCE_MOST ? patience : PATIENCE_MOST;
    }
    if (rested || pays) {
        gathering->packets = 0;
    }
    gathering->rested = pays;
    return pays;
}

static void rest(uint32_t microseconds)
{
    struct timespec time = {microseconds / 1000000, microseconds % 1000000 * 1000};

    nanosleep(&time, NULL); /* a signal may end it early */
}

/* Whether the guest's signal is all that came; without waiting, or once something has. */
static bool only_kicked(const struct vvb_serving *serving, int timeout_ms,
                        struct vvb_served *served)
{
    int fds[] = {serving->kick_fd, serving->stop_fd, serving->wake_fd};
    int found = vvb_wait(fds, 3, timeout_ms);

    if (found < 0) {
        served->error = -found;
        return false;
    }
    served->fired = (uint32_t)found;
    return !(found & ~1);
}

/* Sends the batch's answers. VVB_OK if all of them are in the ring, or what is wrong with it. */
static int answer(struct vvb_ring *ring, struct vvb_batch *batch,
                   const struct vvb_serving *serving, struct vvb_served *served)
{
    struct vvb_span hit;
    struct vvb_sent sent;
    int ret;

    if (vvb_memory_written(ring->memory, batch->spans, batch->span_count, &hit, 1)) {
        return VVB_E_FULL; /* not yet */
    }
    ret = vvb_ring_send_in_turn(ring, batch->outgoing, batch->answer_count, batch->answers,
                                batch->answers_len, &sent);
    if (sent.signal) {
        vvb_signal(serving->call_fd);
        served->signals++;
    }
    served->answers += sent.count;
    served->answered = sent.count;
    if (ret == VVB_E_LOST) {
        batch->fault = sent.fault; /* whatever went into it, nobody will see it */
    }
    return ret;
}

int vvb_ring_serve(struct vvb_ring *ring, struct vvb_batch *batch, uint32_t max,
                   struct vvb_memory *memory, const struct vvb_limits *limits,
                   const struct vvb_plan *plan, const struct vvb_serving *serving,
                   struct vvb_served *served)
{
    memset(served, 0, sizeof(*served));
    for (uint32_t turn = 1;; turn++) {
        bool looked = false; /* at the caller's eventfds, in this turn */
        int ret = vvb_ring_receive(ring, batch, max, memory, limits, plan);

        served->answered = 0;
        if (batch->signal) {
            vvb_signal(serving->call_fd);
            served->signals++;
            batch->signal = 0;
        }
        if (batch->done_count) {
            served->packets += batch->done_count;
            served->wanted += batch->answer_count;
            served->payload += batch->done_payload;
            served->external += batch->done_external;
            served->batches++;
            ring->gathering.packets += batch->done_count;
            if (batch->done_count > served->max_batch) {
                served->max_batch = batch->done_count;
            }
        }
        if (batch->answer_count) {
            int sent = answer(ring, batch, serving, served);

            if (sent) {
                /* What is not in the ring is the caller's to send, and he sees why it is not. */
                return sent == VVB_E_LOST ? sent : ret;
            }
        }
        if (ret || batch->count || batch->replayed || (batch->no_slot && !batch->done_count)) {
            return ret;
        }
        if (!batch->done_count && serving->gather_us && rest_pays(&ring->gathering)) {
            served->rests++;
            rest(serving->gather_us);
        } else if (!batch->done_count) {
            bool empty = !vvb_ring_unmask(ring);
            bool go_on = !empty || only_kicked(serving, -1, served);

            served->wakeups += empty;
            vvb_ring_mask(ring);
            if (!go_on) {
                return VVB_OK;
            }
            looked = empty;
        }
        /* Whatever the turn was: no mixture of work and rests may keep the caller waiting. */
        if (looked) {
            turn = 0;
        } else if (turn >= LOOK_EVERY) {
            if (!only_kicked(serving, 0, served)) {
                return VVB_OK;
            }
            turn = 0;
        }
    }
}
