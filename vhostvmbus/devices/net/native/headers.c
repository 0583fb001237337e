/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Headers of Ethernet frames: RFC 791, 8200, 9293, 768, checksums RFC 1071. The Toeplitz hash:
 * "Verifying the RSS Hash Calculation" of the Windows driver documentation.
 */
#include <string.h>

#include "net.h"

uint64_t net_sum(uint64_t sum, const uint8_t *data, uint64_t len, bool odd)
{
    uint64_t words = 0;

    if (odd && len) {
        sum += *data++;
        len--;
    }
    /* The sum does not mind the byte order (section 2 B), as long as it is swapped in the end. */
    for (; len >= 4; data += 4, len -= 4) {
        uint32_t word;

        memcpy(&word, data, 4);
        words += word;
    }
    sum += __builtin_bswap16((uint16_t)fold(words));
    for (; len >= 2; data += 2, len -= 2) {
        sum += be16(data);
    }
    return len ? sum + ((uint64_t)*data << 8) : sum;
}

bool net_layer(const uint8_t *head, uint32_t len, uint32_t *ethertype, uint32_t *network)
{
    if (len < VVB_NET_ETHERNET) {
        return false;
    }
    *ethertype = be16(head + 12);
    *network = VVB_NET_ETHERNET;
    if (*ethertype == ETHERTYPE_VLAN) {
        if (len < VVB_NET_ETHERNET + VVB_NET_VLAN) {
            return false;
        }
        *ethertype = be16(head + 16);
        *network = VVB_NET_ETHERNET + VVB_NET_VLAN;
    }
    return true;
}

uint32_t net_ipv4_length(const uint8_t *head, uint32_t len, uint32_t network)
{
    uint32_t size;

    if (len < network + 20) {
        return 0;
    }
    size = (head[network] & 0x0fu) * 4;
    return head[network] >> 4 == 4 && size >= 20 && network + size <= len ? size : 0;
}

uint32_t net_transport(const uint8_t *head, uint32_t len)
{
    uint32_t ethertype, network, protocol = 0;

    if (!net_layer(head, len, &ethertype, &network)) {
        return 0;
    }
    if (ethertype == ETHERTYPE_IPV4 && len >= network + 20) {
        protocol = be16(head + network + 6) & 0x3fff ? 0 : head[network + 9];
    } else if (ethertype == ETHERTYPE_IPV6 && len >= network + 40) {
        protocol = head[network + 6];
    }
    return protocol == PROTOCOL_TCP || protocol == PROTOCOL_UDP ? protocol : 0;
}

static uint32_t toeplitz(const uint8_t *key, const uint8_t *data, uint32_t len)
{
    uint32_t window = (uint32_t)key[0] << 24 | (uint32_t)key[1] << 16 | (uint32_t)key[2] << 8 |
                      key[3];
    uint32_t value = 0;

    for (uint32_t i = 0; i < len; i++) {
        for (int bit = 7; bit >= 0; bit--) {
            value ^= data[i] >> bit & 1 ? window : 0;
            window = window << 1 | (key[i + 4] >> bit & 1);
        }
    }
    return value;
}

bool net_hash(const struct vvb_net_config *config, const uint8_t *head, uint32_t len,
              uint32_t *hash)
{
    uint32_t ethertype, network, ports, size, with_ports, without, types = config->hash_types;
    uint8_t input[36];

    if (!net_layer(head, len, &ethertype, &network)) {
        return false;
    }
    if (ethertype == ETHERTYPE_IPV4 && len >= network + 20) {
        size = 8;
        memcpy(input, head + network + 12, size);
        ports = network + (head[network] & 0x0fu) * 4;
        with_ports = VVB_NET_NDIS_HASH_TCP_IPV4;
        without = VVB_NET_NDIS_HASH_IPV4;
    } else if (ethertype == ETHERTYPE_IPV6 && len >= network + 40) {
        size = 32;
        memcpy(input, head + network + 8, size);
        ports = network + 40;
        with_ports = VVB_NET_NDIS_HASH_TCP_IPV6;
        without = VVB_NET_NDIS_HASH_IPV6;
    } else {
        return false;
    }
    if (types & with_ports && net_transport(head, len) == PROTOCOL_TCP && len >= ports + 4) {
        memcpy(input + size, head + ports, 4);
        size += 4;
    } else if (!(types & without)) {
        return false;
    }
    *hash = toeplitz(config->key, input, size);
    return true;
}

void net_count(struct vvb_net_counts *counts, const uint8_t *destination, uint64_t bytes)
{
    static const uint8_t broadcast[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

    if (!(destination[0] & 1)) {
        counts->directed_frames++;
        counts->directed_bytes += bytes;
    } else if (!memcmp(destination, broadcast, 6)) {
        counts->broadcast_frames++;
        counts->broadcast_bytes += bytes;
    } else {
        counts->multicast_frames++;
        counts->multicast_bytes += bytes;
    }
}
