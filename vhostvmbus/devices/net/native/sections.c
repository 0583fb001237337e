/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The buffers that the guest lends, and which section of the receive buffer is whose.
 *
 * A packet to the guest hands over a chain of sections; its transaction id says which: bit 63, a
 * serial number, and the first section. A completion with another id than that of a chain which
 * the guest has, on that channel, gives nothing back.
 */
#include <string.h>
#include <sys/uio.h>

#include "net.h"

#define ID_TAG (1ull << 63)
#define ID_SECTION 0xffffffu
#define ID_SERIAL_SHIFT 24

/* ---- bytes ---- */

static uint32_t piece_at(const struct buffer *buffer, uint64_t offset)
{
    uint32_t low = 0, high = buffer->count;

    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;

        if (buffer->skips[middle] <= offset) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

uint32_t net_pieces(const struct buffer *buffer, uint64_t offset, uint64_t len, struct iovec *iov,
                    uint32_t max)
{
    uint32_t count = 0, piece = piece_at(buffer, offset);
    uint64_t skip = offset - buffer->skips[piece];

    while (len && count < max && piece < buffer->count) {
        uint64_t here = buffer->segs[piece].len - skip;

        if (here > len) {
            here = len;
        }
        iov[count++] = (struct iovec){buffer->segs[piece++].host + skip, here};
        skip = 0;
        len -= here;
    }
    return count;
}

uint32_t net_spans(const struct buffer *buffer, uint64_t offset, uint64_t len,
                   struct vvb_span *spans, uint32_t max)
{
    uint32_t count = 0, piece = piece_at(buffer, offset);
    uint64_t skip = offset - buffer->skips[piece];

    while (len && count < max && piece < buffer->count) {
        const struct vvb_seg *seg = &buffer->segs[piece++];
        uint64_t here = seg->len - skip < len ? seg->len - skip : len;

        spans[count++] = (struct vvb_span){.gpa = seg->gpa + skip, .len = here};
        skip = 0;
        len -= here;
    }
    return count;
}

void net_write(const struct buffer *buffer, uint64_t offset, const uint8_t *data, uint64_t len)
{
    struct iovec piece;

    while (len && net_pieces(buffer, offset, len, &piece, 1)) {
        memcpy(piece.iov_base, data, piece.iov_len);
        data += piece.iov_len;
        offset += piece.iov_len;
        len -= piece.iov_len;
    }
}

bool net_read(const struct buffer *buffer, uint64_t offset, uint8_t *data, uint64_t len)
{
    uint32_t first = piece_at(buffer, offset), last = first;
    struct iovec piece;

    while (len && net_pieces(buffer, offset, len, &piece, 1)) {
        memcpy(data, piece.iov_base, piece.iov_len);
        data += piece.iov_len;
        last = piece_at(buffer, offset);
        offset += piece.iov_len;
        len -= piece.iov_len;
    }
    vvb_copied();
    return !vvb_ext_lost(buffer->segs + first, last - first + 1);
}

/* ---- sections ---- */

/* Under the pool's lock. */
static void push(struct pool *pool, uint32_t section)
{
    pool->state[section] = SECTION_FREE;
    pool->next[section] = pool->top;
    pool->top = section;
    pool->free++;
}

uint32_t net_section_take(struct pool *pool)
{
    uint32_t section;

    pthread_mutex_lock(&pool->lock);
    section = pool->top;
    if (section != POOL_END) {
        pool->top = pool->next[section];
        pool->state[section] = SECTION_OUTSIDE;
        pool->free--;
    }
    pthread_mutex_unlock(&pool->lock);
    return section;
}

void net_section_give(struct pool *pool, uint32_t section)
{
    pthread_mutex_lock(&pool->lock);
    if (section < pool->count && pool->state[section] == SECTION_OUTSIDE) {
        push(pool, section);
    }
    pthread_mutex_unlock(&pool->lock);
}

/* Notes that the guest gave something back. Tells whether it is enough; under the pool's lock. */
static bool returned(struct pool *pool)
{
    bool enough = pool->awaited && pool->free >= pool->awaited;

    pool->returns++;
    if (enough) {
        pool->awaited = 0;
    }
    return enough;
}

bool net_section_return(struct pool *pool, uint32_t section)
{
    bool enough = false;

    pthread_mutex_lock(&pool->lock);
    if (section < pool->count && pool->state[section] == SECTION_OUTSIDE) {
        push(pool, section);
        enough = returned(pool);
    }
    pthread_mutex_unlock(&pool->lock);
    return enough;
}

uint64_t net_chain(struct pool *pool, const uint32_t *sections, uint32_t count, uint32_t channel)
{
    uint32_t first = sections[0];
    uint64_t id;

    pthread_mutex_lock(&pool->lock);
    for (uint32_t i = 0; i < count; i++) {
        pool->state[sections[i]] = i ? SECTION_NEXT : SECTION_FIRST;
        pool->next[sections[i]] = i + 1 < count ? sections[i + 1] : POOL_END;
    }
    pool->channel[first] = (uint8_t)channel;
    pool->serial[first] = ++pool->last_serial;
    id = ID_TAG | (uint64_t)pool->serial[first] << ID_SERIAL_SHIFT | first;
    pthread_mutex_unlock(&pool->lock);
    return id;
}

/* Under the pool's lock. */
static void chain_push(struct pool *pool, uint32_t section)
{
    while (section != POOL_END) {
        uint32_t next = pool->next[section];

        push(pool, section);
        section = next;
    }
}

/* Under the pool's lock. */
static bool chain_known(const struct pool *pool, uint64_t id)
{
    uint32_t first = id & ID_SECTION;

    return first < pool->count && pool->state[first] == SECTION_FIRST &&
           id == (ID_TAG | (uint64_t)pool->serial[first] << ID_SERIAL_SHIFT | first);
}

bool net_chain_end(struct pool *pool, uint64_t id, uint32_t channel, bool *enough)
{
    uint32_t first = id & ID_SECTION;
    bool found;

    pthread_mutex_lock(&pool->lock);
    found = chain_known(pool, id) && pool->channel[first] == channel;
    if (found) {
        chain_push(pool, first);
        *enough = returned(pool);
    }
    pthread_mutex_unlock(&pool->lock);
    return found;
}

uint64_t net_section_await(struct pool *pool, uint32_t *count)
{
    uint64_t returns;

    pthread_mutex_lock(&pool->lock);
    returns = pool->returns;
    if (pool->free >= *count) {
        *count = 0;
    } else if (!pool->awaited || pool->awaited > *count) {
        pool->awaited = *count;
    }
    pthread_mutex_unlock(&pool->lock);
    return returns;
}

bool net_chain_undo(struct pool *pool, uint64_t id)
{
    bool found;

    pthread_mutex_lock(&pool->lock);
    found = chain_known(pool, id);
    for (uint32_t i = id & ID_SECTION; found && i != POOL_END; i = pool->next[i]) {
        pool->state[i] = SECTION_OUTSIDE;
    }
    pthread_mutex_unlock(&pool->lock);
    return found;
}

void net_chains_end(struct pool *pool, uint32_t channel)
{
    pthread_mutex_lock(&pool->lock);
    for (uint32_t i = 0; i < pool->count; i++) {
        if (pool->state[i] == SECTION_FIRST && pool->channel[i] == channel) {
            chain_push(pool, i);
        }
    }
    pthread_mutex_unlock(&pool->lock);
}
