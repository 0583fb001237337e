/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A batch: the private copies of the packets that one receive takes, out of a ring or out of the
 * record of packets in flight. A packet is checked here, in its copy, wherever it comes from; the
 * order in which packets may be taken is in batch.h.
 */
#include <stdlib.h>
#include <string.h>

#include "batch.h"

struct vvb_batch *vvb_batch_new(struct vvb_ring *ring, uint32_t max_packets)
{
    struct vvb_batch *batch = calloc(1, sizeof(*batch));

    if (!batch) {
        return NULL;
    }
    /* Any one packet fits: a packet exceeds neither the ring nor what len8 can say. */
    batch->data_cap = ring->rx.size < MAX_PACKET ? ring->rx.size : MAX_PACKET;
    batch->packets_cap = max_packets;
    batch->data = malloc(batch->data_cap);
    batch->packets = calloc(max_packets, sizeof(*batch->packets));
    if (!batch->data || !batch->packets || !vvb_plan_room(batch, max_packets)) {
        vvb_batch_free(batch);
        return NULL;
    }
    return batch;
}

void vvb_batch_free(struct vvb_batch *batch)
{
    if (batch) {
        free(batch->data);
        free(batch->packets);
        vvb_segs_free(&batch->segs);
        vvb_plan_unroom(batch);
        free(batch);
    }
}

static bool type_known(int role, uint16_t type)
{
    switch (type) {
    case PKT_DATA_INBAND:
    case PKT_COMP:
        return true;
    case PKT_DATA_USING_GPA_DIRECT:
    case PKT_CANCEL_REQUEST:
        return role == VVB_ROLE_HOST;
    case PKT_DATA_USING_XFER_PAGES:
        return role == VVB_ROLE_GUEST;
    default:
        return false;
    }
}

/* Everything about one packet that can be wrong without losing the way to the next one. */
static int check_packet(struct vvb_ring *ring, const struct vvb_snapshot *snapshot,
                        struct vvb_batch *batch, struct vvb_packet *packet,
                        const struct vvb_limits *limits, struct vvb_fault *fault)
{
    const uint8_t *data = batch->data + packet->data_offset;
    uint32_t payload = packet->length - packet->payload_offset;
    uint32_t range_count;
    int ret;

    if (!type_known(ring->role, packet->type)) {
        return vvb_fault_set(fault, VVB_E_TYPE, VVB_F_TYPE, packet->type, 0);
    }
    if (payload > limits->max_payload) {
        return vvb_fault_set(fault, VVB_E_TOO_LARGE, VVB_F_PAYLOAD_LENGTH, payload, 4);
    }
    if (packet->type != PKT_DATA_USING_GPA_DIRECT) {
        return VVB_OK;
    }
    if (packet->payload_offset < GPA_DIRECT_HEADER) {
        return vvb_fault_set(fault, VVB_E_RANGE_TRUNCATED, VVB_F_OFFSET8,
                             packet->payload_offset / 8, 2);
    }
    memcpy(&range_count, data + DESCRIPTOR_SIZE + 4, 4);
    /*
     * The ranges may end before the payload begins: storvsc of Linux 6.1 sends its header with
     * room for 32 PFNs however few it uses.
     */
    ret = vvb_translate_in(snapshot, data + GPA_DIRECT_HEADER,
                           packet->payload_offset - GPA_DIRECT_HEADER, range_count,
                           limits->max_external, limits->max_ranges, &batch->segs, fault);
    if (ret) {
        fault->offset += fault->error == VVB_E_RANGE_COUNT ? DESCRIPTOR_SIZE + 4
                                                            : GPA_DIRECT_HEADER;
        return ret;
    }
    packet->external_length = batch->segs.total;
    packet->seg_count = batch->segs.count - packet->first_seg;
    return VVB_OK;
}

struct vvb_packet *vvb_batch_add(struct vvb_ring *ring, const struct vvb_snapshot *snapshot,
                                 struct vvb_batch *batch, const struct descriptor *descriptor,
                                 const uint8_t *body, uint32_t ring_offset,
                                 const struct vvb_limits *limits)
{
    struct vvb_packet *packet = &batch->packets[batch->count];
    struct vvb_fault *fault = &batch->fault;

    memset(packet, 0, sizeof(*packet));
    packet->transaction_id = descriptor->transaction_id;
    packet->ring_offset = ring_offset;
    packet->data_offset = batch->data_len;
    packet->length = descriptor->len8 * 8u;
    packet->payload_offset = descriptor->offset8 * 8u;
    packet->first_seg = batch->segs.count;
    packet->type = descriptor->type;
    packet->flags = descriptor->flags;
    /* The copy's descriptor is the one that was checked, not what is in the ring by now. */
    memcpy(batch->data + batch->data_len, descriptor, sizeof(*descriptor));
    memcpy(batch->data + batch->data_len + DESCRIPTOR_SIZE, body,
           packet->length - DESCRIPTOR_SIZE);
    vvb_copied();

    if (check_packet(ring, snapshot, batch, packet, limits, fault)) {
        packet->error = fault->error;
        packet->fault_field = fault->field;
        packet->fault_value = fault->value;
        packet->fault_offset = wrap_add(ring_offset, fault->offset, ring->rx.size);
        memset(fault, 0, sizeof(*fault));
    }
    batch->data_len += packet->length;
    batch->count++;
    return packet;
}

void vvb_batch_put_back(struct vvb_batch *batch)
{
    const struct vvb_packet *packet = &batch->packets[--batch->count];

    if (packet->seg_count) {
        vvb_segs_put(batch->segs.v + packet->first_seg, packet->seg_count);
    }
    batch->segs.count = packet->first_seg;
    batch->data_len = packet->data_offset;
    batch->todo_count--;
}
