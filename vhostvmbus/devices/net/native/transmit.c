/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * From the guest to the link: the RNDIS messages of one packet, each a frame.
 *
 * The packet's bytes are a send section, pages, or one after the other. A private copy is made of
 * the section and of the pages' beginning, where all headers are; a large send's data stays where
 * it is. All messages are looked at before a frame is sent, because a packet that is not done
 * here, whole, is done again in Python, which says what is wrong with it.
 */
#include <errno.h>
#include <string.h>
#include <sys/uio.h>

#include "net.h"

#define SMALL 16384u /* a packet up to here is copied whole */
#define HEADERS 2048u
#define MAX_SECTION 6144u
#define MAX_HEADERS (1023u + 60)
#define MAX_MESSAGES 64u
#define MIN_SEGMENT 48u
#define PIECES 256u

/* The packet's bytes: copied ones up to there, the rest in segs from skip on. */
struct bytes {
    uint8_t *copy;
    uint32_t copied;
    uint64_t length;
    const struct vvb_seg *segs;
    uint32_t seg_count;
    uint64_t section; /* bytes that are not in segs */
};

struct frame {
    struct vnet vnet;
    uint32_t start; /* in the packet's bytes */
    uint32_t length;
    bool tagged;
    uint16_t tag;
};

struct infos {
    bool checksum, large_send, vlan, hash;
    uint32_t checksum_value, large_send_value, vlan_value;
};

/* ---- what is to be sent ---- */

static bool gather(struct vvb_net *net, const struct vvb_batch *batch,
                   const struct vvb_packet *packet, struct bytes *bytes)
{
    const uint8_t *payload = batch->data + packet->data_offset + packet->payload_offset;
    uint32_t section = le32(payload + 8), size = le32(payload + 12);
    uint64_t external = packet->seg_count ? packet->external_length : 0, more;

    bytes->section = 0;
    if (section != NO_SECTION) {
        if (section >= net->send.sections || size > net->send.section || size > MAX_SECTION) {
            return false;
        }
        if (!net_read(&net->send, (uint64_t)section * net->send.section, bytes->copy, size)) {
            return false;
        }
        bytes->section = size;
    }
    bytes->length = bytes->section + external;
    bytes->segs = external ? batch->segs.v + packet->first_seg : NULL;
    bytes->seg_count = packet->seg_count;
    more = bytes->length <= SMALL ? external : HEADERS;
    if (more && vvb_ext_read(bytes->segs, bytes->seg_count, 0,
                             (char *)bytes->copy + bytes->section, more)) {
        return false;
    }
    vvb_copied();
    bytes->copied = (uint32_t)(bytes->section + more);
    return bytes->length > 0;
}

/* What is not understood is passed over; false if the chain is not as it should be. */
static bool parse_info(const uint8_t *chain, uint32_t left, struct infos *infos)
{
    while (left) {
        uint32_t size, kind, offset;
        bool *seen = NULL;

        if (left < PPI_HEADER_SIZE) {
            return false;
        }
        size = le32(chain);
        kind = le32(chain + 4);
        offset = le32(chain + 8);
        if (size < PPI_HEADER_SIZE || size > left || offset < PPI_HEADER_SIZE || offset > size) {
            return false;
        }
        switch (kind) {
        case PPI_CHECKSUM:
            seen = &infos->checksum;
            break;
        case PPI_LARGE_SEND:
            seen = &infos->large_send;
            break;
        case PPI_VLAN:
            seen = &infos->vlan;
            break;
        case PPI_HASH:
            seen = &infos->hash;
            break;
        }
        if (seen) {
            if (size - offset < 4 || *seen) {
                return false;
            }
            *seen = true;
            if (kind == PPI_CHECKSUM) {
                infos->checksum_value = le32(chain + offset);
            } else if (kind == PPI_LARGE_SEND) {
                infos->large_send_value = le32(chain + offset);
            } else if (kind == PPI_VLAN) {
                infos->vlan_value = le32(chain + offset);
            }
        }
        chain += size;
        left -= size;
    }
    return true;
}

/* ---- offloads ---- */

static void put_header_checksum(uint8_t *header, uint32_t size)
{
    put_be16(header + 10, 0);
    put_be16(header + 10, ~fold(net_sum(0, header, size, false)) & 0xffff);
}

/* Checksums: of the IP header here, of TCP or UDP by the link. */
static bool checksum_offload(const struct vvb_net_config *config, uint32_t wanted, uint8_t *head,
                             uint32_t len, struct frame *frame)
{
    bool ipv4 = wanted & 1, ipv6 = wanted & 2, tcp = wanted & 4, udp = wanted & 8;
    bool ip_header = wanted & 16;
    uint32_t able = config->send_offloads, start = wanted >> 16 & 0x3ff;
    uint32_t ethertype, network, size, ip;

    if ((ip_header && !ipv6 && !(able & VVB_NET_IP_CHECKSUM)) ||
        (tcp && !(able & (ipv6 ? VVB_NET_TCP6 : VVB_NET_TCP4))) ||
        (udp && !(able & (ipv6 ? VVB_NET_UDP6 : VVB_NET_UDP4))) || ipv4 == ipv6 ||
        !net_layer(head, len, &ethertype, &network) ||
        ethertype != (ipv4 ? ETHERTYPE_IPV4 : ETHERTYPE_IPV6) || (tcp && udp)) {
        return false;
    }
    ip = ipv4 ? net_ipv4_length(head, len, network) : 40;
    if (ip_header && ipv4) {
        if (!ip) {
            return false;
        }
        put_header_checksum(head + network, ip);
    }
    if (!tcp && !udp) {
        return true;
    }
    if (!start) {
        if (!ip) {
            return false;
        }
        start = network + ip;
    }
    size = tcp ? 20 : 8;
    if (start < network + (ipv4 ? 20 : 40) || start + size > frame->length) {
        return false;
    }
    frame->vnet.flags = VNET_NEEDS_CHECKSUM;
    frame->vnet.start = (uint16_t)start;
    frame->vnet.offset = tcp ? TCP_CHECKSUM : UDP_CHECKSUM;
    return true;
}

/*
 * A large send of version 2. The guest leaves the IP length 0, and the pseudo-header's sum without
 * the length in the checksum field; the link wants both right.
 */
static bool large_send(const struct vvb_net_config *config, uint32_t wanted, uint8_t *head,
                       uint32_t len, struct frame *frame)
{
    uint32_t segment = wanted & 0xfffff, start = wanted >> 20 & 0x3ff;
    bool version2 = wanted >> 30 & 1, ipv6 = wanted >> 31;
    uint32_t ethertype, network, ip = 0, size, end;
    uint64_t sum;

    if (!(config->send_offloads & (ipv6 ? VVB_NET_LARGE6 : VVB_NET_LARGE4)) || !version2 ||
        segment < MIN_SEGMENT || !net_layer(head, len, &ethertype, &network) ||
        ethertype != (ipv6 ? ETHERTYPE_IPV6 : ETHERTYPE_IPV4)) {
        return false;
    }
    if (ipv6) {
        if (start < network + 40 || frame->length <= network + 40 || len < start + 20) {
            return false;
        }
        size = frame->length - network - 40;
    } else {
        ip = net_ipv4_length(head, len, network);
        if (!ip || start != network + ip || head[network + 9] != PROTOCOL_TCP ||
            len < start + 20) {
            return false;
        }
        size = frame->length - network;
    }
    end = start + (head[start + 12] >> 4) * 4u;
    if (size > LONGEST_IP || end < start + 20 || end > frame->length || end > len) {
        return false;
    }
    if (ipv6) {
        put_be16(head + network + 4, size);
        sum = net_sum(0, head + network + 8, 32, false);
    } else {
        put_be16(head + network + 2, size);
        put_header_checksum(head + network, ip);
        sum = net_sum(0, head + network + 12, 8, false);
    }
    put_be16(head + start + TCP_CHECKSUM, fold(sum + PROTOCOL_TCP + (frame->length - start)));
    frame->vnet.flags = VNET_NEEDS_CHECKSUM;
    frame->vnet.start = (uint16_t)start;
    frame->vnet.offset = TCP_CHECKSUM;
    if (frame->length - end > segment) {
        frame->vnet.gso_type = ipv6 ? VNET_GSO_TCPV6 : VNET_GSO_TCPV4;
        frame->vnet.segment_size = (uint16_t)(segment > 0xffff ? 0 : segment);
        frame->vnet.header_length = (uint16_t)end;
        return frame->vnet.segment_size != 0;
    }
    return true;
}

/* ---- one message ---- */

/* The message at that place; its length, or 0 if it is not done here. */
static uint32_t parse_message(const struct vvb_net_config *config, struct bytes *bytes,
                              uint32_t at, struct frame *frame)
{
    uint8_t *message = bytes->copy + at, *head;
    uint64_t available = bytes->length - at;
    uint32_t length, room, offset, info_offset, info_size, limit, len;
    struct infos infos = {0};

    if (at > bytes->copied || bytes->copied - at < RNDIS_PACKET_SIZE ||
        le32(message) != RNDIS_PACKET) {
        return 0;
    }
    length = le32(message + 4);
    if (length < RNDIS_PACKET_SIZE || length > available) {
        return 0;
    }
    room = length - RNDIS_HEADER_SIZE; /* offsets count from behind the header */
    offset = le32(message + 8);
    frame->length = le32(message + 12);
    info_offset = le32(message + 28);
    info_size = le32(message + 32);
    if (offset < RNDIS_PACKET_SIZE - RNDIS_HEADER_SIZE || offset > room ||
        frame->length > room - offset || le32(message + 20)) {
        return 0; /* or there is out-of-band data: nobody sends that */
    }
    if (info_size) {
        if (info_offset < RNDIS_PACKET_SIZE - RNDIS_HEADER_SIZE || info_offset > room ||
            info_size > room - info_offset || info_size > PPI_MAX_SIZE ||
            at + RNDIS_HEADER_SIZE + info_offset + info_size > bytes->copied ||
            !parse_info(message + RNDIS_HEADER_SIZE + info_offset, info_size, &infos)) {
            return 0;
        }
    }
    limit = infos.large_send ? LONGEST_IP + ETHERNET_SIZE : config->max_frame;
    if (frame->length < ETHERNET_SIZE || frame->length > limit + VLAN_SIZE) {
        return 0;
    }
    frame->start = at + RNDIS_HEADER_SIZE + offset;
    len = frame->length < MAX_HEADERS ? frame->length : MAX_HEADERS;
    if (frame->start > bytes->copied || bytes->copied - frame->start < len) {
        return 0;
    }
    head = bytes->copy + frame->start;
    if (infos.large_send) {
        if (!large_send(config, infos.large_send_value, head, len, frame)) {
            return 0;
        }
    } else if (infos.checksum &&
               !checksum_offload(config, infos.checksum_value, head, len, frame)) {
        return 0;
    }
    if (infos.vlan) {
        uint32_t value = infos.vlan_value;

        frame->tagged = true;
        frame->tag = (uint16_t)((value & 7) << 13 | (value >> 3 & 1) << 12 | (value >> 4 & 0xfff));
        if (frame->vnet.flags) {
            frame->vnet.start += VLAN_SIZE;
        }
        if (frame->vnet.gso_type) {
            frame->vnet.header_length += VLAN_SIZE;
        }
    }
    return length;
}

/* ---- sending ---- */

static bool send_frame(int fd, struct bytes *bytes, struct frame *frame)
{
    uint8_t *head = bytes->copy + frame->start;
    uint32_t here = bytes->copied - frame->start, count = 0;
    uint64_t beyond = 0;
    uint8_t tag[VLAN_SIZE];
    struct iovec iov[PIECES];
    ssize_t sent;

    if (here > frame->length) {
        here = frame->length;
    }
    iov[count++] = (struct iovec){&frame->vnet, sizeof(frame->vnet)};
    if (frame->tagged) {
        put_be16(tag, ETHERTYPE_VLAN);
        put_be16(tag + 2, frame->tag);
        iov[count++] = (struct iovec){head, 12};
        iov[count++] = (struct iovec){tag, sizeof(tag)};
        iov[count++] = (struct iovec){head + 12, here - 12};
    } else {
        iov[count++] = (struct iovec){head, here};
    }
    if (here < frame->length) {
        uint64_t skip = frame->start + here - bytes->section;

        beyond = frame->length - here;
        for (uint32_t i = 0; beyond && i < bytes->seg_count; i++) {
            uint64_t len = bytes->segs[i].len;

            if (skip >= len) {
                skip -= len;
                continue;
            }
            len = len - skip < beyond ? len - skip : beyond;
            if (count == PIECES) {
                return false;
            }
            iov[count++] = (struct iovec){bytes->segs[i].host + skip, len};
            beyond -= len;
            skip = 0;
        }
    }
    do {
        sent = writev(fd, iov, (int)count);
    } while (sent < 0 && errno == EINTR);
    return sent >= 0;
}

bool net_transmit(struct vvb_net *net, uint32_t channel, const struct vvb_batch *batch,
                  const struct vvb_packet *packet)
{
    struct vvb_net_counts *counts = &net->channels[channel].counts;
    uint8_t copy[SMALL + HEADERS];
    struct frame frames[MAX_MESSAGES];
    struct bytes bytes = {.copy = copy};
    uint32_t count = 0, at = 0;

    if (!net->config.active || !net->ports || !gather(net, batch, packet, &bytes)) {
        return false;
    }
    while (at < bytes.length) {
        uint32_t length;

        if (count == MAX_MESSAGES) {
            return false;
        }
        memset(&frames[count], 0, sizeof(frames[count]));
        length = parse_message(&net->config, &bytes, at, &frames[count]);
        if (!length) {
            return false;
        }
        at += length;
        count++;
    }
    for (uint32_t i = 0; i < count; i++) {
        struct frame *frame = &frames[i];

        if (send_frame(net->fds[channel % net->ports], &bytes, frame)) {
            net_count(counts, copy + frame->start, frame->length);
            counts->large += frame->vnet.gso_type != 0;
        } else {
            counts->refused++;
        }
    }
    return true;
}
