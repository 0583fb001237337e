/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * From the link to the guest: frames straight into receive sections, an RNDIS header in front of
 * each, and one transfer page packet for all that go to the same channel.
 *
 * The first bytes of a frame, where everything is that is looked at, come into private memory and
 * are put into their section last.
 */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "net.h"

#define LONGEST (LONGEST_IP + ETHERNET_SIZE + VLAN_SIZE)
#define PIECES 192u
#define LOOK_EVERY 16u /* turns, before the caller's eventfd is looked at */
#define MAX_SPANS 512u
#define TRANSFER_HEADER 8u

struct taking {
    struct vvb_net *net;
    struct vvb_net_counts *counts;
    uint32_t queue;
    uint32_t room;  /* bytes of a frame in a section */
    uint32_t parts; /* sections that a frame may take */
    uint32_t reach; /* bytes of a frame that there was room for */
    uint32_t stock[VVB_NET_PARTS];
    uint32_t stocked;
    struct vvb_net_part out[VVB_NET_PARTS];
    uint32_t count;
    /* The frame in hand; it starts in stock[0]. */
    struct vnet vnet;
    uint8_t head[HEAD_SIZE + VLAN_SIZE];
    uint32_t length;
    uint32_t head_len;
};

static uint64_t section_at(const struct taking *t, uint32_t number)
{
    return (uint64_t)t->stock[number] * t->net->receive.section;
}

/* Where a byte of the frame is in the buffer; it is not in the head. */
static uint64_t frame_at(const struct taking *t, uint32_t position)
{
    return section_at(t, position / t->room) + FRAME_OFFSET + position % t->room;
}

static bool wants(const struct vvb_net_config *config, const uint8_t *destination)
{
    enum { DIRECTED = 0x01, MULTICAST = 0x02, ALL_MULTICAST = 0x04, BROADCAST = 0x08,
           PROMISCUOUS = 0x20 };
    static const uint8_t everybody[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
    uint32_t filter = config->packet_filter;

    if (filter & PROMISCUOUS) {
        return true;
    }
    if (!(destination[0] & 1)) {
        return filter & DIRECTED && (!memcmp(destination, config->addresses, 6) ||
                                     !memcmp(destination, config->addresses + 6, 6));
    }
    if (!memcmp(destination, everybody, 6)) {
        return filter & BROADCAST;
    }
    if (filter & ALL_MULTICAST) {
        return true;
    }
    for (uint32_t i = 0; filter & MULTICAST && i < config->multicast_count; i++) {
        if (!memcmp(destination, config->multicast + 6 * i, 6)) {
            return true;
        }
    }
    return false;
}

/* ---- one frame ---- */

/* Bytes read, or what readv() said. */
static ssize_t read_frame(struct taking *t, int fd)
{
    const struct buffer *buffer = &t->net->receive;
    struct iovec iov[PIECES];
    uint32_t count = 2;
    uint8_t spare; /* tells a frame that just fits from one that was cut off */
    ssize_t got;

    iov[0] = (struct iovec){&t->vnet, sizeof(t->vnet)};
    iov[1] = (struct iovec){t->head, HEAD_SIZE};
    for (uint32_t i = 0; i < t->parts; i++) {
        uint32_t skip = FRAME_OFFSET + (i ? 0 : HEAD_SIZE);

        count += net_pieces(buffer, section_at(t, i) + skip, buffer->section - skip, iov + count,
                            PIECES - 1 - count);
    }
    t->reach = 0;
    for (uint32_t i = 1; i < count; i++) {
        t->reach += (uint32_t)iov[i].iov_len;
    }
    iov[count++] = (struct iovec){&spare, 1};
    do {
        got = readv(fd, iov, (int)count);
    } while (got < 0 && errno == EINTR);
    return got;
}

static void put_byte(struct taking *t, uint32_t position, uint8_t byte)
{
    if (position < t->head_len) {
        t->head[position] = byte;
    } else {
        net_write(&t->net->receive, frame_at(t, position), &byte, 1);
    }
}

/* Puts in the checksum that the host left undone; false if what it says of it makes no sense. */
static bool complete_checksum(struct taking *t)
{
    uint32_t start = t->vnet.start, at = start + t->vnet.offset, position = start, value;
    uint64_t sum = 0;

    if (!start || start >= t->length || at + 2 > t->length) {
        return false;
    }
    if (start < t->head_len) {
        sum = net_sum(0, t->head + start, t->head_len - start, false);
        position = t->head_len;
    }
    while (position < t->length) {
        uint32_t left = t->length - position, in_section = t->room - position % t->room;
        struct iovec piece;

        left = left < in_section ? left : in_section;
        if (!net_pieces(&t->net->receive, frame_at(t, position), left, &piece, 1)) {
            return false;
        }
        sum = net_sum(sum, piece.iov_base, piece.iov_len, (position - start) & 1);
        position += (uint32_t)piece.iov_len;
    }
    value = ~fold(sum) & 0xffff;
    if (!value && t->vnet.offset == UDP_CHECKSUM) {
        value = 0xffff; /* 0 says in UDP that there is none */
    }
    put_byte(t, at, (uint8_t)(value >> 8));
    put_byte(t, at + 1, (uint8_t)value);
    return true;
}

static void put_le32(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)value;
    at[1] = (uint8_t)(value >> 8);
    at[2] = (uint8_t)(value >> 16);
    at[3] = (uint8_t)(value >> 24);
}

/* An element with 4 bytes of data; the chain's new length. */
static uint32_t add_info(uint8_t *header, uint32_t length, uint32_t kind, uint32_t value)
{
    uint8_t *at = header + RNDIS_PACKET_SIZE + length;

    put_le32(at, PPI_HEADER_SIZE + 4);
    put_le32(at + 4, kind);
    put_le32(at + 8, PPI_HEADER_SIZE);
    put_le32(at + 12, value);
    return length + PPI_HEADER_SIZE + 4;
}

static void put_header(uint8_t *header, uint32_t data_offset, uint32_t size, uint32_t info)
{
    memset(header, 0, RNDIS_PACKET_SIZE);
    put_le32(header, RNDIS_PACKET);
    put_le32(header + 4, data_offset + size);
    put_le32(header + 8, data_offset - RNDIS_HEADER_SIZE);
    put_le32(header + 12, size);
    put_le32(header + 28, info ? RNDIS_PACKET_SIZE - RNDIS_HEADER_SIZE : 0);
    put_le32(header + 32, info);
}

/* Headers in front of the frame's parts, which are on the list then. */
static void hand_over(struct taking *t, uint32_t used, uint32_t channel, uint32_t shift,
                      uint8_t *header, uint32_t info)
{
    uint32_t left = t->length;

    if (used > 1) {
        t->counts->large++;
        t->net->packet_id[t->queue]++;
    }
    for (uint32_t i = 0; i < used; i++) {
        uint32_t size = left < t->room ? left : t->room, offset = FRAME_OFFSET, all = info;

        left -= size;
        if (!i) {
            offset += shift;
            size -= shift;
        }
        if (used > 1) {
            uint32_t flags = 1u | (i ? 0 : 2u) | (i + 1 < used ? 0 : 4u);

            all = add_info(header, info, PPI_PACKET_ID,
                           1u | flags << 8 | (uint32_t)t->net->packet_id[t->queue] << 16);
        }
        put_header(header, offset, size, all);
        /* The head stands behind the first part's header, at FRAME_OFFSET. */
        net_write(&t->net->receive, section_at(t, i), header,
                  i ? RNDIS_PACKET_SIZE + all : FRAME_OFFSET + t->head_len);
        t->out[t->count++] = (struct vvb_net_part){
            .channel = channel,
            .section = t->stock[i],
            .byte_count = offset + size,
            .byte_offset = (uint32_t)section_at(t, i),
        };
    }
}

/* How many sections of the stock the frame took. */
static uint32_t take_frame(struct taking *t)
{
    const struct vvb_net_config *config = &t->net->config;
    uint8_t header[FRAME_OFFSET + HEAD_SIZE];
    bool gso = t->vnet.gso_type != VNET_GSO_NONE, hashed = false;
    uint32_t info = 0, shift = 0, channel = 0, hash = 0, used, kind;

    if (t->length < ETHERNET_SIZE || (gso && t->vnet.gso_type != VNET_GSO_TCPV4 &&
                                      t->vnet.gso_type != VNET_GSO_TCPV6)) {
        t->counts->errors++;
        return 0;
    }
    if (!wants(config, t->head)) {
        t->counts->filtered++;
        return 0;
    }
    used = (t->length + t->room - 1) / t->room;
    if (t->length > t->reach) { /* or there are too many small pieces */
        t->counts->errors++;
        return 0;
    }
    if (t->vnet.flags & VNET_NEEDS_CHECKSUM && !gso && !complete_checksum(t)) {
        t->counts->errors++;
        return 0;
    }
    memset(header, 0, FRAME_OFFSET);
    if (t->vnet.flags & (VNET_NEEDS_CHECKSUM | VNET_CHECKSUM_VALID) && config->tell_checksums) {
        kind = net_transport(t->head, t->head_len);
        if (kind) {
            info = add_info(header, info, PPI_CHECKSUM,
                            kind == PROTOCOL_TCP ? PPI_TCP_VALID : PPI_UDP_VALID);
        }
    }
    if (config->table_size) {
        hashed = net_hash(config, t->head, t->head_len, &hash);
        channel = hashed ? config->table[hash % config->table_size] : 0;
    }
    net_count(t->counts, t->head, t->length);
    if (config->tagging && t->length >= ETHERNET_SIZE + VLAN_SIZE &&
        be16(t->head + 12) == ETHERTYPE_VLAN) {
        uint32_t tag = be16(t->head + 14);

        info = add_info(header, info, PPI_VLAN,
                        tag >> 13 | (tag >> 12 & 1) << 3 | (tag & 0xfff) << 4);
        memmove(t->head + VLAN_SIZE, t->head, 12);
        shift = VLAN_SIZE;
    }
    if (hashed) {
        info = add_info(header, info, PPI_HASH, hash);
    }
    memcpy(header + FRAME_OFFSET, t->head, t->head_len);
    hand_over(t, used, channel, shift, header, info);
    return used;
}

/* ---- telling the guest ---- */

/* Reports what was written; whether something has to be discarded before the guest is told. */
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

/* One packet for these parts; false if they are left to the caller. */
static bool tell(struct taking *t, uint32_t channel, const struct vvb_net_part *parts,
                 uint32_t count)
{
    static const uint8_t payload[NVSP_MESSAGE_SIZE] = {NVSP_RNDIS_PACKET, 0, 0, 0, 0,   0,
                                                       0,                 0, 0xff, 0xff, 0xff, 0xff};
    struct channel *to = &t->net->channels[channel];
    struct pool *pool = &t->net->pool;
    uint8_t data[TRANSFER_HEADER + 8 * VVB_NET_PARTS + sizeof(payload)], *header = data;
    uint32_t sections[VVB_NET_PARTS];
    struct vvb_outgoing out = {.payload_len = sizeof(payload),
                               .header_len = TRANSFER_HEADER + 8 * count,
                               .type = PKT_DATA_USING_XFER_PAGES,
                               .flags = VVB_COMPLETION_REQUESTED};
    struct vvb_sent sent;

    if (vvb_memory_watched(to->ring->memory) &&
        must_discard(to->ring->memory, &t->net->receive, parts, count)) {
        return false;
    }
    memset(header, 0, TRANSFER_HEADER);
    memcpy(data + out.header_len, payload, sizeof(payload));
    header[0] = (uint8_t)t->net->set_id;
    header[1] = (uint8_t)(t->net->set_id >> 8);
    put_le32(header + 4, count);
    for (uint32_t i = 0; i < count; i++) {
        put_le32(header + TRANSFER_HEADER + 8 * i, parts[i].byte_count);
        put_le32(header + TRANSFER_HEADER + 8 * i + 4, parts[i].byte_offset);
        sections[i] = parts[i].section;
    }
    out.transaction_id = net_chain(pool, sections, count, channel);
    vvb_ring_send_in_turn(to->ring, &out, 1, data, out.header_len + sizeof(payload), &sent);
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

static void tell_all(struct taking *t, struct vvb_net_taken *taken)
{
    struct vvb_net_part group[VVB_NET_PARTS];

    for (uint32_t i = 0; i < t->count; i++) { /* a channel that is not open: the first one */
        if (!t->net->channels[t->out[i].channel].ring) {
            t->out[i].channel = 0;
        }
    }
    while (t->count) {
        uint32_t channel = t->out[0].channel, count = 0, kept = 0;

        for (uint32_t i = 0; i < t->count; i++) {
            if (t->out[i].channel == channel) {
                group[count++] = t->out[i];
            } else {
                t->out[kept++] = t->out[i];
            }
        }
        t->count = kept;
        if (!t->net->channels[channel].ring) {
            t->counts->refused += count;
            for (uint32_t i = 0; i < count; i++) {
                net_section_give(&t->net->pool, group[i].section);
            }
        } else if (!tell(t, channel, group, count)) {
            memcpy(taken->parts + taken->left, group, count * sizeof(*group));
            taken->left += count;
        }
    }
}

/* ---- a queue ---- */

static void take(struct taking *t, int fd, struct vvb_net_taken *taken)
{
    for (uint32_t frames = 0; frames < VVB_NET_FRAMES; frames++) {
        ssize_t got;
        uint32_t used;

        if (t->count + t->parts > VVB_NET_PARTS) {
            return;
        }
        while (t->stocked < t->parts) {
            uint32_t section = net_section_take(&t->net->pool);

            if (section == POOL_END) {
                taken->state = VVB_NET_NO_SECTION;
                return;
            }
            t->stock[t->stocked++] = section;
        }
        got = read_frame(t, fd);
        if (got <= 0) { /* nothing there, or the link has just vanished: poll() will say */
            taken->state = VVB_NET_EMPTY;
            return;
        }
        if ((size_t)got < sizeof(t->vnet)) {
            t->counts->errors++;
            continue;
        }
        t->length = (uint32_t)((size_t)got - sizeof(t->vnet));
        t->head_len = t->length < HEAD_SIZE ? t->length : HEAD_SIZE;
        used = take_frame(t);
        t->stocked -= used;
        memmove(t->stock, t->stock + used, t->stocked * sizeof(*t->stock));
    }
}

/* Some frames. */
static void take_some(struct vvb_net *net, uint32_t queue, struct vvb_net_taken *taken)
{
    struct taking t = {.net = net, .queue = queue};

    taken->state = VVB_NET_MORE;
    pthread_rwlock_rdlock(&net->lock);
    if (queue >= net->ports || !net->receive.sections) {
        taken->state = VVB_NET_NO_BUFFER;
    } else {
        t.counts = &net->received[queue];
        t.room = net->receive.section - FRAME_OFFSET;
        t.parts = net->config.coalesced ? (LONGEST + t.room - 1) / t.room : 1;
        t.parts = t.parts < VVB_NET_PARTS ? t.parts : VVB_NET_PARTS;
        taken->lease = net->pool.lease;
        take(&t, net->fds[queue], taken);
        while (t.stocked) {
            net_section_give(&net->pool, t.stock[--t.stocked]);
        }
        tell_all(&t, taken);
    }
    pthread_rwlock_unlock(&net->lock);
}

void vvb_net_serve(struct vvb_net *net, uint32_t queue, int wake_fd, struct vvb_net_taken *taken)
{
    struct pollfd fds[2] = {{.fd = wake_fd, .events = POLLIN}, {.events = POLLIN}};

    taken->left = 0;
    for (uint32_t turn = 1;; turn++) {
        bool idle;

        take_some(net, queue, taken);
        if (taken->left || taken->state == VVB_NET_NO_BUFFER ||
            taken->state == VVB_NET_NO_SECTION) {
            return;
        }
        idle = taken->state == VVB_NET_EMPTY;
        if (!idle && turn % LOOK_EVERY) {
            continue;
        }
        /* The numbers do not change as long as there are so many ports; see link/__init__.py. */
        fds[1].fd = idle ? vvb_load(&net->fds[queue]) : -1;
        if (poll(fds, 2, idle ? -1 : 0) < 0 && errno != EINTR) {
            taken->state = VVB_NET_BROKEN;
            return;
        }
        if (fds[0].revents) {
            taken->state = VVB_NET_WOKEN;
            return;
        }
        if (idle && fds[1].revents & ~POLLIN) {
            taken->state = VVB_NET_BROKEN;
            return;
        }
    }
}
