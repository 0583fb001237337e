/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Hands frames in receive sections over to the guest: one transfer page packet for all that go to
 * the same channel, or one for each. And runs a queue of the link: decides what is taken, what is
 * dropped, and what its thread waits for.
 */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "net.h"

#define LOOK_EVERY 16u /* turns, before the caller's eventfd is looked at */
#define MAX_SPANS 512u
#define TRANSFER_HEADER 8u
/*
 * The milliseconds between two looks at sections that do not come back, or at a link that is gone.
 */
#define PAUSE 10

/* ---- telling ---- */

/* Reports what was written. Returns whether the front end has to discard something first. */
static bool must_discard(struct vvb_memory *memory, const struct buffer *buffer,
                         const struct vvb_net_part *parts, uint32_t count)
{
    struct vvb_span spans[MAX_SPANS], hit;
    uint32_t used = 0;

    for (uint32_t i = 0; i < count; i++) {
        used += net_spans(buffer, parts[i].byte_offset, parts[i].byte_count, spans + used,
                          MAX_SPANS - used);
    }
    return used == MAX_SPANS || vvb_memory_written(memory, spans, used, &hit, 1);
}

/* Sends one packet for these parts. Returns false if they are left to the caller. */
static bool tell(struct vvb_net *net, uint32_t channel, const struct vvb_net_part *parts,
                 uint32_t count)
{
    static const uint8_t payload[VVB_NET_NVSP_SIZE] = {
        [0] = VVB_NET_NVSP_RNDIS_PACKET, [8] = 0xff, 0xff, 0xff, 0xff /* in no section */};
    struct channel *to = &net->channels[channel];
    struct pool *pool = &net->pool;
    uint8_t data[TRANSFER_HEADER + 8 * VVB_NET_PARTS + sizeof(payload)], *header = data;
    uint32_t sections[VVB_NET_PARTS];
    struct vvb_outgoing out = {.payload_len = net->config.message_size,
                               .header_len = TRANSFER_HEADER + 8 * count,
                               .type = PKT_DATA_USING_XFER_PAGES,
                               .flags = VVB_COMPLETION_REQUESTED};
    struct vvb_sent sent;

    if (vvb_memory_watched(to->ring->memory) &&
        must_discard(to->ring->memory, &net->receive, parts, count)) {
        return false;
    }
    memset(header, 0, TRANSFER_HEADER);
    memcpy(data + out.header_len, payload, out.payload_len);
    header[0] = (uint8_t)net->set_id;
    header[1] = (uint8_t)(net->set_id >> 8);
    put_le32(header + 4, count);
    for (uint32_t i = 0; i < count; i++) {
        put_le32(header + TRANSFER_HEADER + 8 * i, parts[i].byte_count);
        put_le32(header + TRANSFER_HEADER + 8 * i + 4, parts[i].byte_offset);
        sections[i] = parts[i].section;
    }
    out.transaction_id = net_chain(pool, sections, count, channel);
    vvb_ring_send_in_turn(to->ring, &out, 1, data, out.header_len + out.payload_len, &sent);
    if (sent.signal) {
        vvb_signal(to->call_fd);
        __atomic_add_fetch(&to->told_signals, 1, __ATOMIC_RELAXED);
    }
    if (sent.count) {
        __atomic_add_fetch(&to->told, 1, __ATOMIC_RELAXED);
        return true;
    }
    /* A guest that gives back what it was not told of has lost it. */
    return !net_chain_undo(pool, out.transaction_id);
}

void net_tell(struct vvb_net *net, uint32_t queue, struct vvb_net_part *parts, uint32_t count,
              struct vvb_net_taken *taken)
{
    struct vvb_net_part group[VVB_NET_PARTS];

    for (uint32_t i = 0; i < count; i++) { /* a channel that is not open: the first one */
        if (!net->channels[parts[i].channel].ring) {
            parts[i].channel = 0;
        }
    }
    while (count) {
        uint32_t channel = parts[0].channel, grouped = 0, kept = 0;

        for (uint32_t i = 0; i < count; i++) {
            if (parts[i].channel == channel && !(net->config.singly && grouped)) {
                group[grouped++] = parts[i];
            } else {
                parts[kept++] = parts[i];
            }
        }
        count = kept;
        if (!net->channels[channel].ring) {
            net->queues[queue].counts.refused += grouped;
            for (uint32_t i = 0; i < grouped; i++) {
                net_section_give(&net->pool, group[i].section);
            }
        } else if (!tell(net, channel, group, grouped)) {
            memcpy(taken->parts + taken->left, group, grouped * sizeof(*group));
            taken->left += grouped;
        }
    }
}

/* ---- a queue ---- */

/*
 * A boot program works off nothing until its ring is empty, and hangs when its memory is full
 * before. One with few sections has to give back all of them: its ring is empty then.
 */
static bool waits_for_all(const struct vvb_net *net)
{
    return net->config.singly && net->receive.sections <= 2 * VVB_NET_FRAMES;
}

/*
 * Lets frames wait in the link until the guest has given back enough sections for some. Drops them
 * when it has given back none for too long: whoever sends them is to know.
 */
static enum net_next starve(struct vvb_net *net, uint32_t queue)
{
    struct queue *q = &net->queues[queue];
    uint32_t half = net->receive.sections / 2, parts = net_frame_parts(net);
    uint32_t count = half < VVB_NET_FRAMES ? half : VVB_NET_FRAMES;
    uint64_t now = net_now(CLOCK_MONOTONIC), returns;

    count = waits_for_all(net) ? net->pool.ours : count > parts ? count : parts;
    returns = net_section_await(&net->pool, &count);
    if (!count) {
        q->starved_since = 0;
        return NET_MORE;
    }
    if (!q->starved_since || q->starved_at != returns) {
        q->starved_since = now;
        q->starved_at = returns;
    } else if (now - q->starved_since >= net->config.patience_ms * 1000000ull) {
        net_section_await(&net->pool, &parts);
        if (!parts) { /* the rest is lost */
            q->starved_since = 0;
            return NET_MORE;
        }
        net_drop_some(net->ports[queue], &q->counts.refused);
    }
    return NET_NO_SECTION;
}

/* Takes some frames, for the guest or for nobody. */
static enum net_next serve_some(struct vvb_net *net, uint32_t queue, struct vvb_net_taken *taken)
{
    struct queue *q = &net->queues[queue];
    enum net_next next = NET_EMPTY;

    pthread_rwlock_rdlock(&net->lock);
    if (queue >= net->port_count) {
        next = NET_NO_SECTION; /* nor is there a link */
    } else if (net->config.held) {
        q->starved_since = 0; /* the guest cannot give anything back */
        next = NET_HELD;
    } else if (!net->receive.sections || !net->config.receiving || !net->config.packet_filter) {
        next = net_drop_some(net->ports[queue], &q->counts.filtered);
    } else if (q->starved_since && waits_for_all(net)) {
        next = starve(net, queue);
    } else {
        taken->lease = net->pool.lease;
        next = net_take_some(net, queue, taken);
        if (next == NET_NO_SECTION) {
            next = starve(net, queue);
        } else {
            q->starved_since = 0;
        }
    }
    pthread_rwlock_unlock(&net->lock);
    return next;
}

void vvb_net_serve(struct vvb_net *net, uint32_t queue, int wake_fd, struct vvb_net_taken *taken)
{
    struct pollfd fds[3] = {
        {.fd = wake_fd, .events = POLLIN}, {.events = POLLIN}, {.events = POLLIN}};
    bool pause = false;
    uint64_t value;

    queue %= VVB_NET_CHANNELS;
    taken->left = taken->woken = 0;
    for (uint32_t turn = 1;; turn++) {
        enum net_next next = serve_some(net, queue, taken);
        bool held = next == NET_HELD;
        int wait = next == NET_MORE ? 0 : held || (next == NET_EMPTY && !pause) ? -1 : PAUSE;

        if (taken->left) {
            return;
        }
        if (next == NET_MORE && turn % LOOK_EVERY) {
            continue;
        }
        /* The numbers do not change as long as there are so many ports. */
        fds[1].fd = wait < 0 && !held ? vvb_net_port_fd(vvb_load(&net->ports[queue])) : -1;
        fds[2].fd = next == NET_NO_SECTION ? net->free_fd : -1;
        fds[0].revents = fds[1].revents = fds[2].revents = 0;
        /* While the descriptor cannot be waited for, it is gone, or another one by now. */
        pause = poll(fds, 3, wait) < 0 ? errno != EINTR : fds[1].revents & ~POLLIN;
        if (fds[2].revents && read(net->free_fd, &value, sizeof(value)) < 0) {
            /* another queue was faster */
        }
        if (fds[0].revents) {
            taken->woken = 1;
            return;
        }
    }
}
