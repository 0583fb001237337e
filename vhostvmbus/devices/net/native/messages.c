/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Reads RNDIS packet messages of the guest: the place of the frame, what stands beside it, and the
 * work that the guest left to the card. Every mistake has a name, as in ../errors.py.
 *
 * Layouts: [MS-RNDIS] 2.2; per-packet information as in Linux' hyperv_net.h. Everything here works
 * on a private copy of the packet's bytes, or of its beginning, where all headers are.
 */
#include <string.h>

#include "net.h"

/* The farthest that TCP options can reach: a 10-bit offset and a header of 60 bytes. */
#define MAX_HEADERS (1023u + 60)
/*
 * Smallest segment that a large send may be cut into, in bytes of TCP payload; no stack goes lower,
 * and a smaller one would make thousands of frames of a single packet.
 */
#define MIN_SEGMENT 48u
/*
 * Where the fields end that are in use: behind them are two reserved words, of which iPXE of 2019
 * has one. Counted as offsets are.
 */
#define FIELDS_END (36u - VVB_NET_RNDIS_HEADER_SIZE)

struct infos {
    bool checksum, large_send, vlan, hash;
    uint32_t checksum_value, large_send_value, vlan_value, hash_value;
};

bool net_wrong(struct vvb_net_fault *fault, uint32_t error, const char *field, uint64_t value,
               uint32_t offset, const char *detail)
{
    *fault = (struct vvb_net_fault){
        .value = value, .error = error, .offset = offset, .field = field, .detail = detail};
    return false;
}

static bool rndis_wrong(struct vvb_net_fault *fault, const char *field, uint64_t value,
                        uint32_t offset, const char *detail)
{
    return net_wrong(fault, VVB_NET_E_RNDIS, field, value, offset, detail);
}

static bool info_wrong(struct vvb_net_fault *fault, const char *field, uint64_t value,
                       uint32_t offset, const char *detail)
{
    return net_wrong(fault, VVB_NET_E_INFO, field, value, offset, detail);
}

static bool frame_wrong(struct vvb_net_fault *fault, const char *field, uint64_t value,
                        uint32_t offset, const char *detail)
{
    return net_wrong(fault, VVB_NET_E_FRAME, field, value, offset, detail);
}

/* ---- per-packet information ---- */

static bool parse_element(const uint8_t *element, uint32_t size, uint32_t at, struct infos *infos,
                          struct vvb_net_fault *fault)
{
    uint32_t kind = le32(element + 4), offset = le32(element + 8), *value;
    bool *seen;

    switch (kind) {
    case PPI_CHECKSUM:
        seen = &infos->checksum;
        value = &infos->checksum_value;
        break;
    case PPI_LARGE_SEND:
        seen = &infos->large_send;
        value = &infos->large_send_value;
        break;
    case PPI_VLAN:
        seen = &infos->vlan;
        value = &infos->vlan_value;
        break;
    case PPI_HASH:
        seen = &infos->hash;
        value = &infos->hash_value;
        break;
    default: /* what is not understood is passed over */
        return true;
    }
    if (size - offset < 4) {
        return info_wrong(fault, "size", size, at, "no data for this type");
    }
    if (*seen) {
        return info_wrong(fault, "type", kind, at + 4, "a second time");
    }
    *seen = true;
    *value = le32(element + offset);
    return true;
}

static bool parse_chain(const uint8_t *chain, uint32_t length, struct infos *infos,
                        struct vvb_net_fault *fault)
{
    uint32_t size;

    for (uint32_t at = 0; at < length; at += size) {
        uint32_t left = length - at, offset;

        if (left < PPI_HEADER_SIZE) {
            return info_wrong(fault, "size", left, at, "the chain ends inside an element");
        }
        size = le32(chain + at);
        offset = le32(chain + at + 8);
        if (size < PPI_HEADER_SIZE || size > left) {
            return info_wrong(fault, "size", size, at, "of an element");
        }
        if (offset < PPI_HEADER_SIZE || offset > size) {
            return info_wrong(fault, "ppi_offset", offset, at + 8, "");
        }
        if (!parse_element(chain + at, size, at, infos, fault)) {
            return false;
        }
    }
    return true;
}

/* ---- offloads ---- */

static bool ipv4_wrong(struct vvb_net_fault *fault, const uint8_t *head, uint32_t len,
                       uint32_t network)
{
    if (len < network + 20) {
        return frame_wrong(fault, "length", len, 0, "no IPv4 header");
    }
    return frame_wrong(fault, "version_ihl", head[network], network, "");
}

static void put_header_checksum(uint8_t *header, uint32_t size)
{
    put_be16(header + 10, 0);
    put_be16(header + 10, ~fold(net_sum(0, header, size, false)) & 0xffff);
}

/*
 * Checksums: of the IP header here, of TCP or UDP by the link. The pseudo-header's sum is in the
 * checksum field already (NDIS asks for that, Linux does it).
 */
static bool checksum_offload(const struct vvb_net_config *config, uint32_t wanted, uint8_t *head,
                             uint32_t len, struct frame *frame, struct vvb_net_fault *fault)
{
    bool ipv4 = wanted & 1, ipv6 = wanted & 2, tcp = wanted & 4, udp = wanted & 8;
    bool ip_header = wanted & 16;
    uint32_t able = config->send_offloads, start = wanted >> 16 & 0x3ff;
    uint32_t ethertype = 0, network = 0, size, ip = 40;

    if (!net_layer(head, len, &ethertype, &network)) {
        ethertype = 0;
    }
    if (ipv4 == ipv6) { /* neither or both, as Windows has it: the frame says which */
        ipv4 = ethertype == ETHERTYPE_IPV4;
        ipv6 = ethertype == ETHERTYPE_IPV6;
        if (ipv4 == ipv6 && !tcp && !udp && !ip_header) {
            return true; /* nothing is wanted */
        }
    }
    if ((ip_header && !ipv6 && !(able & VVB_NET_IP_CHECKSUM)) ||
        (tcp && !(able & (ipv6 ? VVB_NET_TCP6 : VVB_NET_TCP4))) ||
        (udp && !(able & (ipv6 ? VVB_NET_UDP6 : VVB_NET_UDP4)))) {
        return frame_wrong(fault, "transmit", wanted, 0, "the link does no checksums");
    }
    if (ipv4 == ipv6 || ethertype != (ipv4 ? ETHERTYPE_IPV4 : ETHERTYPE_IPV6)) {
        return frame_wrong(fault, "ethertype", ethertype, 12,
                           "not what the checksum is wanted for");
    }
    if (ipv4) {
        ip = net_ipv4_length(head, len, network);
        if (!ip && (ip_header || (tcp != udp && !start))) {
            return ipv4_wrong(fault, head, len, network);
        }
        if (ip_header) {
            put_header_checksum(head + network, ip);
        }
    }
    if (tcp && udp) {
        return frame_wrong(fault, "transmit", 12, 0, "both a TCP and a UDP checksum");
    }
    if (!tcp && !udp) {
        return true;
    }
    start = start ? start : network + ip;
    size = tcp ? 20 : 8;
    if (start < network + (ipv4 ? 20 : 40) || start + size > frame->length) {
        return frame_wrong(fault, "tcp_header_offset", start, 0, "");
    }
    frame->vnet.flags = VNET_NEEDS_CHECKSUM;
    frame->vnet.start = (uint16_t)start;
    frame->vnet.offset = tcp ? TCP_CHECKSUM : UDP_CHECKSUM;
    return true;
}

/* The IP header of a large send: what it says is checked, its length is put in. */
static bool large_ipv4(uint8_t *head, uint32_t len, uint32_t network, uint32_t start,
                       uint32_t length, struct vvb_net_fault *fault)
{
    uint32_t ip = net_ipv4_length(head, len, network), size = length - network;

    if (!ip) {
        return ipv4_wrong(fault, head, len, network);
    }
    if (start != network + ip) {
        return frame_wrong(fault, "tcp_header_offset", start, 0, "not behind the IPv4 header");
    }
    if (head[network + 9] != PROTOCOL_TCP) {
        return frame_wrong(fault, "protocol", head[network + 9], network + 9, "");
    }
    if (size > VVB_NET_LONGEST_IP) {
        return frame_wrong(fault, "length", size, 0, "no IP packet has this length");
    }
    put_be16(head + network + 2, size);
    put_header_checksum(head + network, ip);
    return true;
}

static bool large_ipv6(uint8_t *head, uint32_t len, uint32_t network, uint32_t start,
                       uint32_t length, struct vvb_net_fault *fault)
{
    uint32_t size = length - network - 40;

    if (start < network + 40 || len < start) {
        return frame_wrong(fault, "tcp_header_offset", start, 0, "");
    }
    if (!size || size > VVB_NET_LONGEST_IP) {
        return frame_wrong(fault, "length", size, 0, "no IP packet has this length");
    }
    put_be16(head + network + 4, size);
    return true;
}

/*
 * A large send of version 2. The guest leaves the IP length 0, and the pseudo-header's sum without
 * the length in the checksum field; the link wants both right.
 */
static bool large_send(const struct vvb_net_config *config, uint32_t wanted, uint8_t *head,
                       uint32_t len, struct frame *frame, struct vvb_net_fault *fault)
{
    uint32_t segment = wanted & 0xfffff, start = wanted >> 20 & 0x3ff;
    bool version2 = wanted >> 30 & 1, ipv6 = wanted >> 31;
    uint32_t ethertype = 0, network = 0, end;
    uint64_t sum;

    if (!(config->send_offloads & (ipv6 ? VVB_NET_LARGE6 : VVB_NET_LARGE4))) {
        return frame_wrong(fault, "type", wanted, 0, "the link does no large sends");
    }
    if (!version2) {
        return frame_wrong(fault, "type", 0, 0, "a large send of version 1");
    }
    if (!net_layer(head, len, &ethertype, &network)) {
        ethertype = 0;
    }
    if (ethertype != (ipv6 ? ETHERTYPE_IPV6 : ETHERTYPE_IPV4)) {
        return frame_wrong(fault, "ethertype", ethertype, 12, "not what is to be segmented");
    }
    if (!(ipv6 ? large_ipv6 : large_ipv4)(head, len, network, start, frame->length, fault)) {
        return false;
    }
    if (len < start + 20) {
        return frame_wrong(fault, "length", len, 0, "no TCP header");
    }
    end = start + (head[start + 12] >> 4) * 4u;
    if (end < start + 20 || end > len) {
        return frame_wrong(fault, "data_offset", head[start + 12], start + 12, "");
    }
    if (segment < MIN_SEGMENT) {
        return frame_wrong(fault, "mss", segment, 0, "too small");
    }
    sum = ipv6 ? net_sum(0, head + network + 8, 32, false)
               : net_sum(0, head + network + 12, 8, false);
    put_be16(head + start + TCP_CHECKSUM, fold(sum + PROTOCOL_TCP + (frame->length - start)));
    frame->vnet.flags = VNET_NEEDS_CHECKSUM;
    frame->vnet.start = (uint16_t)start;
    frame->vnet.offset = TCP_CHECKSUM;
    if (frame->length - end > segment) {
        frame->vnet.gso_type = ipv6 ? VNET_GSO_TCPV6 : VNET_GSO_TCPV4;
        frame->vnet.segment_size = (uint16_t)segment; /* less than an IP packet */
        frame->vnet.header_length = (uint16_t)end;
    }
    return true;
}

static void put_tag(struct frame *frame, uint32_t value)
{
    /* NDIS has priority in bits 0-2, CFI in bit 3, the id in bits 4-15. */
    frame->tagged = true;
    frame->tag = (uint16_t)((value & 7) << 13 | (value >> 3 & 1) << 12 | (value >> 4 & 0xfff));
    if (frame->vnet.flags) {
        frame->vnet.start += VVB_NET_VLAN;
    }
    if (frame->vnet.gso_type) {
        frame->vnet.header_length += VVB_NET_VLAN;
    }
}

/* ---- one message ---- */

struct layout {
    uint32_t length, data, info, info_size;
};

static bool no_header(const uint8_t *message, uint64_t available, struct vvb_net_fault *fault)
{
    uint32_t length;

    if (available < VVB_NET_RNDIS_HEADER_SIZE) {
        return rndis_wrong(fault, "length", available, 0, "");
    }
    length = le32(message + 4);
    if (length < VVB_NET_RNDIS_HEADER_SIZE || length > available) {
        return rndis_wrong(fault, "msg_len", length, 4, "not what is there");
    }
    return rndis_wrong(fault, "msg_len", available, 4, "less than a packet's");
}

static bool parse_layout(const uint8_t *message, uint64_t available, struct layout *layout,
                         struct frame *frame, struct vvb_net_fault *fault)
{
    uint32_t length = le32(message + 4), offset = le32(message + 8), size = le32(message + 12);
    uint32_t oob = le32(message + 16), oob_size = le32(message + 20), room;
    uint32_t info = le32(message + 28), info_size = le32(message + 32);

    if (le32(message) != VVB_NET_RNDIS_PACKET) {
        return rndis_wrong(fault, "ndis_msg_type", le32(message), 0, "not a packet");
    }
    if (length < VVB_NET_RNDIS_PACKET_SIZE || length > available) {
        return rndis_wrong(fault, "msg_len", length, 4, "not what is there");
    }
    room = length - VVB_NET_RNDIS_HEADER_SIZE; /* offsets count from behind the header */
    if (offset < FIELDS_END || offset > room) {
        return rndis_wrong(fault, "data_offset", offset, 8, "");
    }
    if (size > room - offset) {
        return rndis_wrong(fault, "data_len", size, 12, "");
    }
    if (oob_size && (oob < FIELDS_END || oob > room || oob_size > room - oob)) {
        return rndis_wrong(fault, "oob_data_len", oob_size, 20, "");
    }
    if (info_size && (info < FIELDS_END || info > room)) {
        return rndis_wrong(fault, "per_pkt_info_offset", info, 28, "");
    }
    if (info_size && info_size > room - info) {
        return rndis_wrong(fault, "per_pkt_info_len", info_size, 32, "");
    }
    if (info_size > PPI_MAX_SIZE) {
        return info_wrong(fault, "per_pkt_info_len", info_size, 32, "more than is looked at");
    }
    *layout = (struct layout){.length = length,
                              .data = VVB_NET_RNDIS_HEADER_SIZE + offset,
                              .info = VVB_NET_RNDIS_HEADER_SIZE + info,
                              .info_size = info_size};
    frame->length = size;
    return true;
}

uint32_t net_message(const struct vvb_net_config *config, struct bytes *bytes, uint32_t at,
                     struct frame *frame, struct vvb_net_fault *fault)
{
    uint8_t *message = bytes->copy + at, *head;
    uint64_t available = bytes->length - at;
    struct infos infos = {0};
    struct layout layout = {0};
    uint32_t limit, len;

    fault->error = VVB_NET_OK;
    if (available < VVB_NET_RNDIS_PACKET_SIZE) {
        if (bytes->copied == bytes->length) {
            no_header(message, available, fault);
        }
        return 0;
    }
    if (at > bytes->copied || bytes->copied - at < VVB_NET_RNDIS_PACKET_SIZE ||
        !parse_layout(message, available, &layout, frame, fault)) {
        return 0;
    }
    if (layout.info_size && (at + layout.info + layout.info_size > bytes->copied ||
                             !parse_chain(message + layout.info, layout.info_size, &infos,
                                          fault))) {
        return 0;
    }
    limit = infos.large_send ? VVB_NET_LONGEST_IP + VVB_NET_ETHERNET : config->max_frame;
    if (frame->length < VVB_NET_ETHERNET || frame->length > limit + VVB_NET_VLAN) {
        frame_wrong(fault, "data_len", frame->length, 12, "no frame has this length");
        return 0; /* a tag may be in the frame, or beside it */
    }
    frame->start = at + layout.data;
    len = frame->length < MAX_HEADERS ? frame->length : MAX_HEADERS;
    if (frame->start > bytes->copied || bytes->copied - frame->start < len) {
        return 0;
    }
    head = bytes->copy + frame->start;
    if (infos.large_send) {
        if (!large_send(config, infos.large_send_value, head, len, frame, fault)) {
            return 0;
        }
    } else if (infos.checksum &&
               !checksum_offload(config, infos.checksum_value, head, len, frame, fault)) {
        return 0;
    }
    if (infos.vlan) {
        put_tag(frame, infos.vlan_value);
    }
    return layout.length;
}
