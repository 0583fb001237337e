/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The data path of one card: its settings, the buffers and channels that it has, and what it does
 * with packets on their way out of a ring.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "net.h"

#define MAX_SECTIONS (1u << 20)

struct net_plan {
    struct vvb_plan plan;
    struct vvb_net *net;
    uint32_t channel;
};

struct vvb_net *vvb_net_new(void)
{
    struct vvb_net *net = calloc(1, sizeof(*net));
    pthread_rwlockattr_t attributes;

    if (!net) {
        return NULL;
    }
    net->free_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (net->free_fd < 0) {
        free(net);
        return NULL;
    }
    /* Frames come without end; who changes something has to get his turn. */
    pthread_rwlockattr_init(&attributes);
    pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&net->lock, &attributes);
    pthread_rwlockattr_destroy(&attributes);
    pthread_mutex_init(&net->pool.lock, NULL);
    net->pool.top = POOL_END;
    net->wake_fd = -1;
    return net;
}

static void buffer_drop(struct buffer *buffer)
{
    free(buffer->segs);
    free(buffer->skips);
    *buffer = (struct buffer){0};
}

static void pool_drop(struct pool *pool)
{
    free(pool->next);
    free(pool->serial);
    free(pool->state);
    free(pool->channel);
    pool->next = pool->serial = NULL;
    pool->state = pool->channel = NULL;
    pool->count = pool->free = pool->awaited = 0;
    pool->lease = 0;
    pool->top = POOL_END;
}

void vvb_net_close(struct vvb_net *net)
{
    pthread_rwlock_wrlock(&net->lock); /* whoever signals it is done with it */
    if (net->free_fd >= 0) {
        close(net->free_fd);
        net->free_fd = -1;
    }
    pthread_rwlock_unlock(&net->lock);
}

void vvb_net_free(struct vvb_net *net)
{
    if (net) {
        vvb_net_close(net);
        buffer_drop(&net->send);
        buffer_drop(&net->receive);
        pool_drop(&net->pool);
        pthread_mutex_destroy(&net->pool.lock);
        pthread_rwlock_destroy(&net->lock);
        free(net);
    }
}

/* ---- settings ---- */

void vvb_net_configure(struct vvb_net *net, const struct vvb_net_config *config)
{
    pthread_rwlock_wrlock(&net->lock);
    net->config = *config;
    if (net->config.message_size < VVB_NET_NVSP_OLD_SIZE ||
        net->config.message_size > VVB_NET_NVSP_SIZE) {
        net->config.message_size = VVB_NET_NVSP_SIZE;
    }
    if (net->config.table_size > VVB_NET_TABLE) {
        net->config.table_size = VVB_NET_TABLE;
    }
    for (uint32_t i = 0; i < net->config.table_size; i++) {
        if (net->config.table[i] >= VVB_NET_CHANNELS) {
            net->config.table[i] = 0;
        }
    }
    if (net->config.multicast_count > VVB_NET_MULTICAST) {
        net->config.multicast_count = VVB_NET_MULTICAST;
    }
    pthread_rwlock_unlock(&net->lock);
}

int vvb_net_set_queue(struct vvb_net *net, uint32_t queue, struct vvb_net_port *port)
{
    if (queue >= VVB_NET_CHANNELS) {
        return EINVAL;
    }
    pthread_rwlock_wrlock(&net->lock);
    vvb_store(&net->ports[queue], port); /* vvb_net_serve() waits without the lock */
    pthread_rwlock_unlock(&net->lock);
    return 0;
}

int vvb_net_use_queues(struct vvb_net *net, uint32_t count)
{
    int ret = count > VVB_NET_CHANNELS ? EINVAL : 0;

    pthread_rwlock_wrlock(&net->lock);
    for (uint32_t i = 0; !ret && i < count; i++) {
        ret = net->ports[i] ? 0 : EINVAL;
    }
    if (!ret) {
        net->port_count = count;
    }
    pthread_rwlock_unlock(&net->lock);
    return ret;
}

/* ---- buffers ---- */

static int buffer_make(struct buffer *buffer, const void *segs, uint32_t count, uint32_t section)
{
    uint64_t length = 0;

    *buffer = (struct buffer){.count = count, .section = section};
    buffer->segs = malloc((size_t)count * sizeof(*buffer->segs));
    buffer->skips = malloc((size_t)count * sizeof(*buffer->skips));
    if (!buffer->segs || !buffer->skips) {
        buffer_drop(buffer);
        return ENOMEM;
    }
    memcpy(buffer->segs, segs, (size_t)count * sizeof(*buffer->segs));
    for (uint32_t i = 0; i < count; i++) {
        buffer->skips[i] = length;
        length += buffer->segs[i].len;
    }
    if (!section || !length || length / section > MAX_SECTIONS) {
        buffer_drop(buffer);
        return EINVAL;
    }
    buffer->sections = (uint32_t)(length / section);
    return 0;
}

static int pool_make(struct pool *pool, uint32_t count, uint32_t first)
{
    pool->next = calloc(count, sizeof(*pool->next));
    pool->serial = calloc(count, sizeof(*pool->serial));
    pool->state = malloc(count);
    pool->channel = calloc(count, 1);
    if (!pool->next || !pool->serial || !pool->state || !pool->channel) {
        pool_drop(pool);
        return ENOMEM;
    }
    pool->count = count;
    pool->ours = count - first;
    memset(pool->state, SECTION_NEXT, first); /* somebody else's: never given back to us */
    for (uint32_t i = count; i-- > first;) {
        pool->state[i] = SECTION_OUTSIDE;
        net_section_give(pool, i);
    }
    return 0;
}

int vvb_net_lend_send(struct vvb_net *net, const void *segs, uint32_t count, uint32_t section,
                      uint64_t lease)
{
    int ret = 0;

    pthread_rwlock_wrlock(&net->lock);
    if (segs || !lease || lease == net->send_lease) {
        buffer_drop(&net->send);
        net->send_lease = lease;
    }
    if (segs) {
        ret = buffer_make(&net->send, segs, count, section);
    }
    pthread_rwlock_unlock(&net->lock);
    return ret;
}

int vvb_net_lend_receive(struct vvb_net *net, const void *segs, uint32_t count, uint32_t section,
                         uint32_t set_id, uint32_t first, uint64_t lease)
{
    int ret = 0;

    pthread_rwlock_wrlock(&net->lock);
    if (segs || !lease || lease == net->pool.lease) {
        for (uint32_t i = 0; i < net->pool.count; i++) {
            net->channels[net->pool.channel[i]].late += net->pool.state[i] == SECTION_FIRST;
        }
        buffer_drop(&net->receive);
        pool_drop(&net->pool);
    }
    if (segs) {
        ret = section <= VVB_NET_FRAME_OFFSET + HEAD_SIZE + VVB_NET_SECTION_TAIL
                  ? EINVAL
                  : buffer_make(&net->receive, segs, count, section);
        if (!ret && first > net->receive.sections) {
            ret = EINVAL;
        }
        if (!ret) {
            ret = pool_make(&net->pool, net->receive.sections, first);
        }
        if (ret) {
            buffer_drop(&net->receive);
        } else {
            net->pool.lease = lease;
            net->set_id = set_id;
        }
    }
    pthread_rwlock_unlock(&net->lock);
    return ret;
}

uint32_t vvb_net_free_sections(struct vvb_net *net)
{
    uint32_t count;

    pthread_rwlock_rdlock(&net->lock);
    pthread_mutex_lock(&net->pool.lock);
    count = net->pool.free;
    pthread_mutex_unlock(&net->pool.lock);
    pthread_rwlock_unlock(&net->lock);
    return count;
}

int64_t vvb_net_section(struct vvb_net *net, uint64_t lease)
{
    uint32_t section = POOL_END;

    pthread_rwlock_rdlock(&net->lock);
    if (net->pool.lease == lease) {
        section = net_section_take(&net->pool);
    }
    pthread_rwlock_unlock(&net->lock);
    return section == POOL_END ? -1 : (int64_t)section;
}

void vvb_net_wake_when_free(struct vvb_net *net, int wake_fd)
{
    pthread_rwlock_wrlock(&net->lock); /* whoever has taken the one before is done with it */
    __atomic_store_n(&net->wake_fd, wake_fd, __ATOMIC_SEQ_CST);
    pthread_rwlock_unlock(&net->lock);
}

void vvb_net_give(struct vvb_net *net, uint64_t lease, uint32_t section)
{
    pthread_rwlock_rdlock(&net->lock);
    if (net->pool.lease == lease && net_section_return(&net->pool, section)) {
        vvb_signal(net->free_fd);
    }
    pthread_rwlock_unlock(&net->lock);
}

/* ---- channels ---- */

int vvb_net_connect(struct vvb_net *net, uint32_t channel, struct vvb_ring *ring, int call_fd)
{
    if (channel >= VVB_NET_CHANNELS) {
        return EINVAL;
    }
    pthread_rwlock_wrlock(&net->lock);
    net->channels[channel] = (struct channel){.ring = ring, .call_fd = call_fd};
    pthread_rwlock_unlock(&net->lock);
    return 0;
}

void vvb_net_disconnect(struct vvb_net *net, uint32_t channel)
{
    if (channel < VVB_NET_CHANNELS) {
        pthread_rwlock_wrlock(&net->lock);
        net->channels[channel].ring = NULL;
        net->channels[channel].late = 0;
        net_chains_end(&net->pool, channel);
        pthread_rwlock_unlock(&net->lock);
    }
}

const struct vvb_net_counts *vvb_net_sent(struct vvb_net *net, uint32_t channel)
{
    return &net->channels[channel % VVB_NET_CHANNELS].counts;
}

void vvb_net_take_news(struct vvb_net *net, uint32_t index, struct vvb_net_news *news)
{
    struct channel *channel = &net->channels[index % VVB_NET_CHANNELS];

    news->told = __atomic_exchange_n(&channel->told, 0, __ATOMIC_RELAXED);
    news->signals = __atomic_exchange_n(&channel->told_signals, 0, __ATOMIC_RELAXED);
    news->bad_returns = __atomic_exchange_n(&channel->bad_returns, 0, __ATOMIC_RELAXED);
}

const struct vvb_net_counts *vvb_net_received(struct vvb_net *net, uint32_t queue)
{
    return &net->queues[queue % VVB_NET_CHANNELS].counts;
}

/* ---- packets of the guest ---- */

static const uint8_t *payload_of(const struct vvb_batch *batch, const struct vvb_packet *packet)
{
    return batch->data + packet->data_offset + packet->payload_offset;
}

static bool fits(const struct vvb_plan *plan, const struct vvb_batch *batch,
                 struct vvb_todo *todo)
{
    const struct vvb_packet *packet = &batch->packets[todo->packet];
    const uint8_t *payload = payload_of(batch, packet);
    uint32_t length = packet->length - packet->payload_offset;

    (void)plan;
    switch (packet->type) {
    case PKT_COMP:
        return packet->transaction_id >> 63;
    case PKT_DATA_INBAND:
    case PKT_DATA_USING_GPA_DIRECT:
        todo->length = packet->external_length;
        return packet->flags & VVB_COMPLETION_REQUESTED && length >= 16 &&
               le32(payload) == VVB_NET_NVSP_RNDIS_PACKET &&
               le32(payload + 4) == VVB_NET_NVSP_DATA;
    default:
        return false;
    }
}

/* Takes back what a packet held: the guest is done with it, of this buffer or of one before. */
static bool returned(struct vvb_net *net, uint32_t channel, uint64_t id)
{
    struct channel *from = &net->channels[channel];
    bool enough = false;

    if (net_chain_end(&net->pool, id, channel, &enough)) {
        if (enough) {
            vvb_signal(net->free_fd);
        }
        return true;
    }
    if (!from->late) {
        return false;
    }
    from->late--;
    return true;
}

static bool perform(const struct vvb_plan *plan, struct vvb_batch *batch,
                    const struct vvb_todo *todo)
{
    const struct net_plan *mine = (const struct net_plan *)plan;
    const struct vvb_packet *packet = &batch->packets[todo->packet];
    const uint8_t *payload = payload_of(batch, packet);
    struct vvb_net *net = mine->net;
    bool done;

    pthread_rwlock_rdlock(&net->lock);
    if (packet->type == PKT_COMP) {
        uint32_t length = packet->length - packet->payload_offset;

        done = returned(net, mine->channel, packet->transaction_id);
        /* The id says it all: iPXE sends nothing with it. */
        if (done && length &&
            (length < 8 || le32(payload) != VVB_NET_NVSP_RNDIS_PACKET_COMPLETE)) {
            __atomic_add_fetch(&net->channels[mine->channel].bad_returns, 1, __ATOMIC_RELAXED);
        }
        /* full: the section, then the wish; pairs with the wish, then a look for a section */
        if (done && __atomic_load_n(&net->wake_fd, __ATOMIC_SEQ_CST) >= 0) {
            int wake_fd = __atomic_exchange_n(&net->wake_fd, -1, __ATOMIC_SEQ_CST);

            if (wake_fd >= 0) {
                vvb_signal(wake_fd);
            }
        }
    } else {
        done = net_transmit(net, mine->channel, batch, packet);
        if (done) {
            static const uint8_t success[VVB_NET_NVSP_SIZE] = {
                [0] = VVB_NET_NVSP_RNDIS_PACKET_COMPLETE, [4] = VVB_NET_NVSP_SUCCESS};
            uint32_t size = net->config.message_size;

            memcpy(vvb_plan_answer(batch, packet, size), success, size);
        }
    }
    pthread_rwlock_unlock(&net->lock);
    return done;
}

struct vvb_plan *vvb_net_plan(struct vvb_net *net, uint32_t channel)
{
    struct net_plan *plan = channel < VVB_NET_CHANNELS ? malloc(sizeof(*plan)) : NULL;

    if (!plan) {
        return NULL;
    }
    *plan = (struct net_plan){.plan = {.fits = fits, .perform = perform},
                              .net = net,
                              .channel = channel};
    return &plan->plan;
}
