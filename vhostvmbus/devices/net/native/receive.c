/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * From the link to the guest: frames straight into receive sections, an RNDIS header in front of
 * each. tell.c hands them over.
 *
 * The first bytes of a frame, where everything is that is looked at, come into private memory and
 * are put into their section last.
 */
#include <string.h>

#include "net.h"

#define PIECES 192u
#define DROPPED 128u /* frames in one go, at most */
/* The bytes of a section that are not a frame's. */
#define AROUND ((uint32_t)VVB_NET_FRAME_OFFSET + VVB_NET_SECTION_TAIL)

struct taking {
    struct vvb_net *net;
    struct queue *queue;
    struct vvb_net_counts *counts;
    uint32_t room;  /* bytes of a frame in a section */
    uint32_t parts; /* sections that a frame may take */
    uint32_t reach; /* bytes of a frame that there was room for */
    uint32_t stock[VVB_NET_PARTS];
    uint32_t stocked;
    struct vvb_net_part out[VVB_NET_PARTS];
    uint32_t count;
    /* The frame in hand; it starts in stock[0]. */
    struct vnet vnet;
    uint8_t head[HEAD_SIZE + VVB_NET_VLAN];
    uint32_t length;
    uint32_t head_len;
};

static uint64_t section_at(const struct taking *t, uint32_t number)
{
    return (uint64_t)t->stock[number] * t->net->receive.section;
}

/* Returns the place in the buffer of a byte of the frame that is not in the head. */
static uint64_t frame_at(const struct taking *t, uint32_t position)
{
    return section_at(t, position / t->room) + VVB_NET_FRAME_OFFSET + position % t->room;
}

static bool wants(const struct vvb_net_config *config, const uint8_t *destination)
{
    static const uint8_t everybody[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
    uint32_t filter = config->packet_filter;

    if (filter & VVB_NET_NDIS_PROMISCUOUS) {
        return true;
    }
    if (!(destination[0] & 1)) {
        return filter & VVB_NET_NDIS_DIRECTED && (!memcmp(destination, config->addresses, 6) ||
                                              !memcmp(destination, config->addresses + 6, 6));
    }
    if (!memcmp(destination, everybody, 6)) {
        return filter & VVB_NET_NDIS_BROADCAST;
    }
    if (filter & VVB_NET_NDIS_ALL_MULTICAST) {
        return true;
    }
    for (uint32_t i = 0; filter & VVB_NET_NDIS_MULTICAST && i < config->multicast_count; i++) {
        if (!memcmp(destination, config->multicast + 6 * i, 6)) {
            return true;
        }
    }
    return false;
}

/* ---- one frame ---- */

/* Takes a frame and returns its bytes; -1: none waits. */
static ssize_t read_frame(struct taking *t, struct vvb_net_port *port)
{
    const struct buffer *buffer = &t->net->receive;
    struct iovec iov[PIECES + 1];
    uint32_t count = 2;

    iov[1] = (struct iovec){t->head, HEAD_SIZE};
    for (uint32_t i = 0; i < t->parts; i++) {
        uint32_t skip = i ? 0 : HEAD_SIZE;

        count += net_pieces(buffer, section_at(t, i) + VVB_NET_FRAME_OFFSET + skip, t->room - skip,
                            iov + count, PIECES - count);
    }
    t->reach = 0;
    for (uint32_t i = 1; i < count; i++) {
        t->reach += (uint32_t)iov[i].iov_len;
    }
    return net_port_read(port, &t->vnet, iov, count);
}

static void put_byte(struct taking *t, uint32_t position, uint8_t byte)
{
    if (position < t->head_len) {
        t->head[position] = byte;
    } else {
        net_write(&t->net->receive, frame_at(t, position), &byte, 1);
    }
}

/* Puts in the checksum that the host left undone. Returns false if its header makes no sense. */
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

/* Adds an element with 4 bytes of data. Returns the chain's new length. */
static uint32_t add_info(uint8_t *header, uint32_t length, uint32_t kind, uint32_t value)
{
    uint8_t *at = header + VVB_NET_RNDIS_PACKET_SIZE + length;

    put_le32(at, PPI_HEADER_SIZE + 4);
    put_le32(at + 4, kind);
    put_le32(at + 8, PPI_HEADER_SIZE);
    put_le32(at + 12, value);
    return length + PPI_HEADER_SIZE + 4;
}

static void put_header(uint8_t *header, uint32_t data_offset, uint32_t size, uint32_t info)
{
    memset(header, 0, VVB_NET_RNDIS_PACKET_SIZE);
    put_le32(header, VVB_NET_RNDIS_PACKET);
    put_le32(header + 4, data_offset + size);
    put_le32(header + 8, data_offset - VVB_NET_RNDIS_HEADER_SIZE);
    put_le32(header + 12, size);
    put_le32(header + 28, info ? VVB_NET_RNDIS_PACKET_SIZE - VVB_NET_RNDIS_HEADER_SIZE : 0);
    put_le32(header + 32, info);
}

/* Writes headers in front of the frame's parts, and puts these on the list. */
static void hand_over(struct taking *t, uint32_t used, uint32_t channel, uint32_t shift,
                      uint8_t *header, uint32_t info)
{
    uint32_t left = t->length;

    if (used > 1) {
        t->counts->large++;
        t->queue->packet_id++;
    }
    for (uint32_t i = 0; i < used; i++) {
        uint32_t size = left < t->room ? left : t->room, offset = VVB_NET_FRAME_OFFSET, all = info;

        left -= size;
        if (!i) {
            offset += shift;
            size -= shift;
        }
        if (used > 1) {
            uint32_t flags = 1u | (i ? 0 : 2u) | (i + 1 < used ? 0 : 4u);

            all = add_info(header, info, PPI_PACKET_ID,
                           1u | flags << 8 | (uint32_t)t->queue->packet_id << 16);
        }
        put_header(header, offset, size, all);
        /* The head stands behind the first part's header, at VVB_NET_FRAME_OFFSET. */
        net_write(&t->net->receive, section_at(t, i), header,
                  i ? VVB_NET_RNDIS_PACKET_SIZE + all : VVB_NET_FRAME_OFFSET + t->head_len);
        t->out[t->count++] = (struct vvb_net_part){
            .channel = channel,
            .section = t->stock[i],
            .byte_count = offset + size,
            .byte_offset = (uint32_t)section_at(t, i),
        };
    }
}

/* Returns how many sections of the stock the frame took. */
static uint32_t take_frame(struct taking *t)
{
    const struct vvb_net_config *config = &t->net->config;
    uint8_t header[VVB_NET_FRAME_OFFSET + HEAD_SIZE];
    bool gso = t->vnet.gso_type != VNET_GSO_NONE, hashed = false;
    uint32_t info = 0, shift = 0, channel = 0, hash = 0, used, kind;

    if (t->length < VVB_NET_ETHERNET || (gso && t->vnet.gso_type != VNET_GSO_TCPV4 &&
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
    memset(header, 0, VVB_NET_FRAME_OFFSET);
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
    if (config->tagging && t->length >= VVB_NET_ETHERNET + VVB_NET_VLAN &&
        be16(t->head + 12) == ETHERTYPE_VLAN) {
        uint32_t tag = be16(t->head + 14);

        info = add_info(header, info, PPI_VLAN,
                        tag >> 13 | (tag >> 12 & 1) << 3 | (tag & 0xfff) << 4);
        memmove(t->head + VVB_NET_VLAN, t->head, 12);
        shift = VVB_NET_VLAN;
    }
    if (hashed) {
        info = add_info(header, info, PPI_HASH, hash);
    }
    memcpy(header + VVB_NET_FRAME_OFFSET, t->head, t->head_len);
    hand_over(t, used, channel, shift, header, info);
    return used;
}

/* ---- some frames ---- */

static enum net_next take(struct taking *t, struct vvb_net_port *port)
{
    for (uint32_t frames = 0; frames < VVB_NET_FRAMES; frames++) {
        ssize_t got;
        uint32_t used;

        if (t->count + t->parts > VVB_NET_PARTS) {
            break;
        }
        while (t->stocked < t->parts) {
            uint32_t section = net_section_take(&t->net->pool);

            if (section == POOL_END) {
                return NET_NO_SECTION;
            }
            t->stock[t->stocked++] = section;
        }
        got = read_frame(t, port);
        if (got < 0) {
            return NET_EMPTY;
        }
        t->length = (uint32_t)got;
        t->head_len = t->length < HEAD_SIZE ? t->length : HEAD_SIZE;
        used = take_frame(t);
        t->stocked -= used;
        memmove(t->stock, t->stock + used, t->stocked * sizeof(*t->stock));
    }
    return NET_MORE;
}

uint32_t net_frame_parts(const struct vvb_net *net)
{
    uint32_t room = net->receive.section - AROUND, parts = 1;

    if (net->config.coalesced) {
        parts = (LONGEST_FRAME + room - 1) / room;
    }
    return parts < VVB_NET_PARTS ? parts : VVB_NET_PARTS;
}

enum net_next net_take_some(struct vvb_net *net, uint32_t queue, struct vvb_net_taken *taken)
{
    struct taking t = {.net = net, .queue = &net->queues[queue]};
    enum net_next next;

    t.counts = &t.queue->counts;
    t.room = net->receive.section - AROUND;
    t.parts = net_frame_parts(net);
    next = take(&t, net->ports[queue]);
    while (t.stocked) {
        net_section_give(&net->pool, t.stock[--t.stocked]);
    }
    net_tell(net, queue, t.out, t.count, taken);
    return next;
}

enum net_next net_drop_some(struct vvb_net_port *port, uint64_t *counter)
{
    uint8_t frame[LONGEST_FRAME];
    struct vnet vnet;

    for (uint32_t i = 0; i < DROPPED; i++) {
        struct iovec iov[3] = {[1] = {frame, sizeof(frame)}};

        if (net_port_read(port, &vnet, iov, 2) < 0) {
            return NET_EMPTY;
        }
        ++*counter;
    }
    return NET_MORE;
}
