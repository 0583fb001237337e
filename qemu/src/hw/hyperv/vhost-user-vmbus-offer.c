/*
 * VMBus device whose back end is another process: offers that come and go
 *
 * Copyright (c) 2026 The vhostvmbus maintainers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The back end's requests come in the connection's thread.  The main loop may
 * just then wait for an answer of the back end, which may give it only after it
 * has got ours: so the thread takes note and answers, and a bottom half does
 * what was asked for, in the order in which it was.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/bswap.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "hw/hyperv/vhost-user-vmbus.h"
#include "trace.h"

typedef struct VuvChange {
    uint32_t request;
    uint16_t channel;
} VuvChange;

uint32_t vuv_offers_request(VHostUserVMBus *s, uint32_t request,
                            const uint8_t *payload, uint32_t size)
{
    VuvOffers *o = &s->offers;
    VuvChange change = { .request = request };
    uint32_t status = VUV_STATUS_SUCCESS;
    uint32_t channel;

    if (size != 8 || ldl_le_p(payload + 4)) {
        return VUV_STATUS_INVALID_PARAMETER;
    }
    channel = ldl_le_p(payload);

    WITH_QEMU_LOCK_GUARD(&o->lock) {
        if (channel >= o->max_channels) {
            status = VUV_STATUS_INVALID_PARAMETER;
        } else if (o->changes->len >= VUV_MAX_CHANGES) {
            status = VUV_STATUS_INSUFFICIENT_RESOURCES;
        } else {
            change.channel = channel;
            g_array_append_val(o->changes, change);
        }
    }
    if (!status) {
        qemu_bh_schedule(o->bh);
    }
    return status;
}

/* Somebody has decided; whoever does so later comes too late. */
static void unplug_ends(VHostUserVMBus *s)
{
    timer_del(s->offers.unplug_timer);
    s->offers.unplug_waits = false;
}

void vuv_offers_apply(VHostUserVMBus *s)
{
    VMBusDevice *vdev = VMBUS_DEVICE(s);
    g_autoptr(GArray) changes = NULL;

    /* the bus's part of the device comes after the first connection */
    if (!vdev->channels) {
        return;
    }
    WITH_QEMU_LOCK_GUARD(&s->offers.lock) {
        changes = s->offers.changes;
        s->offers.changes = g_array_new(false, false, sizeof(VuvChange));
    }
    for (guint i = 0; i < changes->len; i++) {
        VuvChange *change = &g_array_index(changes, VuvChange, i);
        Error *err = NULL;

        trace_vhost_user_vmbus_change(change->request, change->channel);
        if (change->channel >= vdev->num_channels) {
            continue;
        }
        if (change->request == VUV_BACKEND_RESCIND_CHANNEL) {
            if (!change->channel && s->offers.closing) {
                /* not amid the bus's own work on the channel; in order */
                WITH_QEMU_LOCK_GUARD(&s->offers.lock) {
                    g_array_prepend_vals(s->offers.changes, change,
                                         changes->len - i);
                }
                qemu_bh_schedule(s->offers.bh);
                return;
            }
            if (!change->channel) {
                unplug_ends(s);
            }
            vmbus_device_rescind(vdev, change->channel);
            continue;
        }
        s->used = true;
        vmbus_device_offer(vdev, change->channel, &err);
        if (err) {
            vuv_report(s, err);
        }
    }
}

static void vuv_offers_bh(void *opaque)
{
    vuv_offers_apply(opaque);
}

void vuv_offers_limit(VHostUserVMBus *s, uint16_t max_channels)
{
    QEMU_LOCK_GUARD(&s->offers.lock);

    s->offers.max_channels = MIN(max_channels, VUV_MAX_CHANNELS);
}

void vuv_offers_primary_closed(VHostUserVMBus *s)
{
    VMBusDevice *vdev = VMBUS_DEVICE(s);

    /* what was asked for so far was meant for the channel that's gone */
    s->offers.closing = true;
    vuv_offers_apply(s);
    s->offers.closing = false;
    for (uint16_t i = vdev->num_channels; i-- > vdev->initial_channels;) {
        vmbus_device_rescind(vdev, i);
    }
    if (s->offers.unplug_waits && !s->conn.up) {
        /* without a back end nobody else says that the guest is ready */
        VuvChange change = { .request = VUV_BACKEND_RESCIND_CHANNEL };

        WITH_QEMU_LOCK_GUARD(&s->offers.lock) {
            g_array_append_val(s->offers.changes, change);
        }
        qemu_bh_schedule(s->offers.bh);
    }
}

/* ---------------------------- unplugging ---------------------------- */

/*
 * Linux waits for packets that a rescinded channel doesn't complete any more,
 * so a device in use is taken back when its driver has come to rest.  Bringing
 * it there is for the back end to do, which knows what the device is.
 */
static bool wait_for_rest(VHostUserVMBus *s)
{
    Error *err = NULL;
    uint32_t status;

    if (!s->chans[0].open || (s->conn.up && !s->conn.unplug)) {
        return false;
    }
    s->offers.unplug_waits = true;
    if (!s->conn.up) {
        return true;    /* the next back end is asked, whenever it comes */
    }
    if (!vuv_conn_ack(&s->conn, VUV_UNPLUG, NULL, 0, NULL, 0, &status, &err)) {
        vuv_report(s, err);
    } else if (status) {
        return false;
    }
    timer_mod(s->offers.unplug_timer, qemu_clock_get_ms(QEMU_CLOCK_VIRTUAL) +
              VUV_UNPLUG_TIMEOUT_MS);
    return true;
}

bool vuv_defer_rescind(VMBusDevice *vdev)
{
    VHostUserVMBus *s = VHOST_USER_VMBUS(vdev);

    /* whoever asks twice doesn't want to wait */
    if (!s->offers.unplug_waits && wait_for_rest(s)) {
        return true;
    }
    unplug_ends(s);
    return false;
}

static void vuv_unplug_timeout(void *opaque)
{
    VHostUserVMBus *s = opaque;

    if (!s->conn.up && s->chans[0].open) {
        return;         /* it ended after it was asked */
    }
    warn_report("vhost-user-vmbus (chardev %s): unplugged although its back "
                "end does not say that the guest is ready for it",
                qemu_chr_fe_get_driver(&s->conn.chr)->label);
    unplug_ends(s);
    vmbus_device_rescind(VMBUS_DEVICE(s), 0);
}

static void unplug_goes_on(VHostUserVMBus *s)
{
    if (s->offers.unplug_waits && !wait_for_rest(s)) {
        unplug_ends(s);
        vmbus_device_rescind(VMBUS_DEVICE(s), 0);
    }
}

/* ----------------------------- connected ---------------------------- */

void vuv_offers_connected(VHostUserVMBus *s)
{
    VMBusDevice *vdev = VMBUS_DEVICE(s);

    if (vdev->channels && vdev->unplugging) {
        unplug_goes_on(s);
    } else if (vdev->channels) {
        Error *err = NULL;

        vmbus_device_offer(vdev, 0, &err);
        if (err) {
            vuv_report(s, err);
        }
    }
    qemu_bh_schedule(s->offers.bh);
}

/* ---------------------------- life cycle ---------------------------- */

void vuv_offers_init(VHostUserVMBus *s)
{
    qemu_mutex_init(&s->offers.lock);
    s->offers.changes = g_array_new(false, false, sizeof(VuvChange));
    s->offers.max_channels = VUV_MAX_CHANNELS;
    s->offers.bh = qemu_bh_new(vuv_offers_bh, s);
    /* the guest's time: a machine that is stopped uses none of it */
    s->offers.unplug_timer = timer_new_ms(QEMU_CLOCK_VIRTUAL,
                                          vuv_unplug_timeout, s);
}

void vuv_offers_destroy(VHostUserVMBus *s)
{
    qemu_bh_delete(s->offers.bh);
    timer_free(s->offers.unplug_timer);
    g_array_free(s->offers.changes, true);
    qemu_mutex_destroy(&s->offers.lock);
}
