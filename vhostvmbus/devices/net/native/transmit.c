/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * From the guest to the link: the RNDIS messages of one packet, each a frame.
 *
 * The packet's bytes are a send section, pages, or one after the other. A private copy is made of
 * the section and of the pages' beginning, where all headers are; a large send's data stays where
 * it is. All messages are looked at before a frame is sent, because a packet that is not done
 * here, whole, goes up: vvb_net_send() does it then, with a copy of everything.
 */
#include <errno.h>
#include <string.h>

#include "net.h"

#define SMALL 16384u /* a packet up to here is copied whole */
#define HEADERS 2048u

static bool gather(struct vvb_net *net, const struct vvb_batch *batch,
                   const struct vvb_packet *packet, struct bytes *bytes)
{
    const uint8_t *payload = batch->data + packet->data_offset + packet->payload_offset;
    uint32_t section = le32(payload + 8), size = le32(payload + 12);
    uint64_t external = packet->seg_count ? packet->external_length : 0, more;

    bytes->section = 0;
    if (section != VVB_NET_NVSP_NO_SECTION) {
        if (section >= net->send.sections || size > net->send.section ||
            size > VVB_NET_SEND_SECTION) {
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

/* Lists the pieces of a frame that were not copied. Returns 0 if there are too many. */
static uint32_t add_rest(const struct bytes *bytes, uint64_t skip, uint64_t left,
                         struct iovec *iov, uint32_t count)
{
    for (uint32_t i = 0; left && i < bytes->seg_count; i++) {
        uint64_t len = bytes->segs[i].len;

        if (skip >= len) {
            skip -= len;
            continue;
        }
        len = len - skip < left ? len - skip : left;
        if (count == NET_PIECES) {
            return 0;
        }
        iov[count++] = (struct iovec){bytes->segs[i].host + skip, len};
        left -= len;
        skip = 0;
    }
    return count;
}

static bool send_frame(struct vvb_net_port *port, const struct bytes *bytes,
                       const struct frame *frame)
{
    uint8_t *head = bytes->copy + frame->start, tag[VVB_NET_VLAN];
    uint32_t here = bytes->copied - frame->start, count = 1, length = frame->length;
    struct iovec iov[NET_PIECES];

    if (here > frame->length) {
        here = frame->length;
    }
    if (frame->tagged) {
        put_be16(tag, ETHERTYPE_VLAN);
        put_be16(tag + 2, frame->tag);
        iov[count++] = (struct iovec){head, 2 * VVB_NET_ADDRESS};
        iov[count++] = (struct iovec){tag, sizeof(tag)};
        iov[count++] = (struct iovec){head + 2 * VVB_NET_ADDRESS, here - 2 * VVB_NET_ADDRESS};
        length += VVB_NET_VLAN;
    } else {
        iov[count++] = (struct iovec){head, here};
    }
    if (here < frame->length) {
        count = add_rest(bytes, frame->start + here - bytes->section, frame->length - here, iov,
                         count);
    }
    return count && net_port_write(port, &frame->vnet, iov, count, length);
}

static void send_counted(struct vvb_net *net, uint32_t channel, const struct bytes *bytes,
                         const struct frame *frame)
{
    struct vvb_net_counts *counts = &net->channels[channel].counts;

    if (net->port_count &&
        send_frame(net->ports[channel % net->port_count], bytes, frame)) {
        net_count(counts, bytes->copy + frame->start, frame->length);
        counts->large += frame->vnet.gso_type != 0;
    } else {
        counts->refused++;
    }
}

bool net_transmit(struct vvb_net *net, uint32_t channel, const struct vvb_batch *batch,
                  const struct vvb_packet *packet)
{
    uint8_t copy[SMALL + HEADERS];
    struct frame frames[VVB_NET_RNDIS_MESSAGES];
    struct bytes bytes = {.copy = copy};
    struct vvb_net_fault fault;
    uint32_t count = 0, at = 0;

    if (!net->config.active || !gather(net, batch, packet, &bytes)) {
        return false;
    }
    while (at < bytes.length) {
        uint32_t length;

        if (count == VVB_NET_RNDIS_MESSAGES) {
            return false;
        }
        memset(&frames[count], 0, sizeof(frames[count]));
        length = net_message(&net->config, &bytes, at, &frames[count], &fault);
        if (!length) {
            return false;
        }
        at += length;
        count++;
    }
    for (uint32_t i = 0; i < count; i++) {
        send_counted(net, channel, &bytes, &frames[i]);
    }
    return true;
}

void vvb_net_send(struct vvb_net *net, uint32_t channel, void *data, uint32_t length,
                  struct vvb_net_fault *fault)
{
    struct bytes bytes = {.copy = data, .copied = length, .length = length};
    uint32_t count = 0, at = 0;

    fault->error = VVB_NET_OK;
    channel %= VVB_NET_CHANNELS;
    if (!length) {
        net_wrong(fault, VVB_NET_E_RNDIS, "length", 0, 0, "no message");
    }
    pthread_rwlock_rdlock(&net->lock);
    while (at < length) {
        struct frame frame = {0};
        uint32_t taken;

        if (++count > VVB_NET_RNDIS_MESSAGES) {
            net_wrong(fault, VVB_NET_E_RNDIS, "messages", count, at, "more than announced");
            break;
        }
        taken = net_message(&net->config, &bytes, at, &frame, fault);
        if (!taken) {
            break;
        }
        send_counted(net, channel, &bytes, &frame);
        at += taken;
    }
    pthread_rwlock_unlock(&net->lock);
}
