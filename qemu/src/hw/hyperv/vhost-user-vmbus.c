/*
 * VMBus device whose back end is another process (vhost-user)
 *
 * Copyright (c) 2026 The vhostvmbus maintainers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * QEMU keeps the bus: SynIC, offers, GPADLs, opening and closing of channels.
 * The back end gets the rings.  A guest's signal goes to the back end's
 * eventfd without QEMU's main loop; the back end's signal becomes an event flag
 * and an interrupt.
 *
 * While there's no back end the guest goes on.  Its channels stay open, and
 * when a back end is there again it's told of the live GPADLs and the open
 * channels.  Only a new channel can't be opened meanwhile.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/bswap.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "chardev/char-socket.h"
#include "exec/tb-code-map.h"
#include "hw/hyperv/vhost-user-vmbus.h"
#include "hw/qdev-properties.h"
#include "hw/qdev-properties-system.h"
#include "migration/blocker.h"
#include "system/tcg.h"
#include "trace.h"

/* for each answer that is given before a device has anything to do */
#define GREET_TIMEOUT_MS 2000

static void vuv_fill_offer(VMBusChannel *chan,
                           struct vmbus_message_offer_channel *msg)
{
    VHostUserVMBus *s = VHOST_USER_VMBUS(vmbus_channel_device(chan));

    memcpy(msg->type_uuid, s->offer.class_id, sizeof(msg->type_uuid));
    msg->channel_flags = s->offer.channel_flags;
    msg->mmio_size_mb = s->offer.mmio_megabytes;
    memcpy(msg->user_data, s->offer.user_defined, sizeof(msg->user_data));
}

static uint16_t vuv_num_channels(VMBusDevice *vdev)
{
    return le16_to_cpu(VHOST_USER_VMBUS(vdev)->offer.channels);
}

static uint16_t vuv_max_channels(VMBusDevice *vdev)
{
    return VHOST_USER_VMBUS(vdev)->num_chans;
}

/* ---------------------------- connection ---------------------------- */

static uint32_t vuv_backend_request(void *opaque, uint32_t request,
                                    const uint8_t *payload, uint32_t size)
{
    VHostUserVMBus *s = opaque;

    switch (request) {
    case VUV_BACKEND_INVALIDATE_CODE:
        /* pairs with the release in vuv_realize: @mem is ready then */
        return qatomic_load_acquire(&s->have_mem) ?
               vuv_mem_invalidate(&s->mem, payload, size) :
               VUV_STATUS_INVALID_PARAMETER;
    case VUV_BACKEND_OFFER_CHANNEL:
    case VUV_BACKEND_RESCIND_CHANNEL:
        return vuv_offers_request(s, request, payload, size);
    default:
        return VUV_STATUS_NOT_SUPPORTED;
    }
}

static bool get_offer(VHostUserVMBus *s, Error **errp)
{
    VuvOffer offer;
    uint16_t channels;

    if (!vuv_conn_get(&s->conn, VUV_GET_OFFER, &offer, sizeof(offer), errp)) {
        return false;
    }
    if (s->have_offer) {
        if (memcmp(&offer, &s->offer, sizeof(offer))) {
            error_setg(errp, "the back end came back with another offer");
            vuv_conn_drop(&s->conn);
            return false;
        }
        return true;
    }

    channels = le16_to_cpu(offer.channels);
    if (!channels || channels > VUV_MAX_CHANNELS ||
        le16_to_cpu(offer.max_channels) < channels) {
        error_setg(errp, "the back end offers %u channels of at most %u",
                   channels, le16_to_cpu(offer.max_channels));
        vuv_conn_drop(&s->conn);
        return false;
    }
    s->offer = offer;
    s->have_offer = true;
    vuv_offers_limit(s, le16_to_cpu(offer.max_channels));
    return true;
}

/* What is said first; nothing in it takes a back end long. */
static bool vuv_greet(VHostUserVMBus *s, Error **errp)
{
    return vuv_conn_start(&s->conn, s->mem.code_map_fd >= 0, errp) &&
           get_offer(s, errp) &&
           vuv_inflight_share(&s->inflight, &s->conn, s->offers.max_channels,
                              errp);
}

static bool vuv_go_on(VHostUserVMBus *s, Error **errp)
{
    ERRP_GUARD();

    if (s->have_mem) {
        vuv_mem_forget(&s->mem);
        if (!vuv_mem_sync(&s->mem, errp)) {
            return false;
        }
    }
    if (!vuv_resume(s, errp)) {
        if (s->conn.up) {
            vuv_conn_drop(&s->conn);
        }
        return false;
    }
    vuv_conn_settled(&s->conn);
    if (!s->opens_due) {
        vuv_offers_connected(s);
    }
    return true;
}

static bool vuv_reconnect(VHostUserVMBus *s, Error **errp)
{
    bool ok;

    vuv_conn_limit(&s->conn, GREET_TIMEOUT_MS);
    ok = vuv_greet(s, errp);
    vuv_conn_limit(&s->conn, 0);
    return ok && vuv_go_on(s, errp);
}

static void vuv_cleanup_bh(void *opaque)
{
    VHostUserVMBus *s = opaque;

    if (!s->conn.up) {
        vuv_conn_cleanup(&s->conn);
    }
}

static void stop_hello(VHostUserVMBus *s)
{
    timer_del(s->hello_timer);
    if (s->hello_watch) {
        g_source_remove(s->hello_watch);
        s->hello_watch = 0;
    }
}

static void vuv_hello_timeout(void *opaque)
{
    VHostUserVMBus *s = opaque;

    Error *err = NULL;

    error_setg(&err, "the back end is connected but does not answer");
    vuv_conn_complain(&s->conn, err);
    stop_hello(s);
    vuv_conn_drop(&s->conn);
}

static gboolean vuv_hello_answered(void *do_not_use, GIOCondition cond,
                                   void *opaque)
{
    VHostUserVMBus *s = opaque;
    Error *err = NULL;

    s->hello_watch = 0;
    stop_hello(s);
    if (!vuv_reconnect(s, &err)) {
        vuv_conn_complain(&s->conn, err);
    }
    return G_SOURCE_REMOVE;
}

static void vuv_event(void *opaque, QEMUChrEvent event)
{
    VHostUserVMBus *s = opaque;
    Error *err = NULL;

    switch (event) {
    case CHR_EVENT_OPENED:
        if (s->conn.up) {
            break;
        }
        /*
         * All else is done while the guest waits, but a back end that hangs
         * must not stop the guest for 10 seconds each time it's connected.
         */
        if (!vuv_conn_hello(&s->conn, &err)) {
            vuv_conn_complain(&s->conn, err);
            vuv_conn_drop(&s->conn);
            break;
        }
        s->hello_watch = qemu_chr_fe_add_watch(&s->conn.chr,
                                               G_IO_IN | G_IO_HUP,
                                               vuv_hello_answered, s);
        timer_mod(s->hello_timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) +
                  s->conn.answer_ms);
        break;
    case CHR_EVENT_CLOSED:
        /* a chardev without a parent goes with QEMU, and no longer knows much */
        if (s->hello_watch &&
            OBJECT(qemu_chr_fe_get_driver(&s->conn.chr))->parent) {
            vuv_conn_unheard(&s->conn, &err);
            vuv_conn_complain(&s->conn, err);
        }
        /* may come amid a request, so only note it */
        s->conn.up = false;
        s->conn.hello_sent = false;
        stop_hello(s);
        qemu_bh_schedule(s->cleanup_bh);
        break;
    case CHR_EVENT_BREAK:
    case CHR_EVENT_MUX_IN:
    case CHR_EVENT_MUX_OUT:
        break;
    }
}

/* ---------------------------- life cycle ---------------------------- */

static bool check_chardev(VHostUserVMBus *s, Error **errp)
{
    Chardev *chr = qemu_chr_fe_get_driver(&s->conn.chr);

    if (!chr) {
        error_setg(errp, "'chardev' is missing");
        return false;
    }
    if (!object_dynamic_cast(OBJECT(chr), TYPE_CHARDEV_SOCKET) ||
        !qemu_chr_has_feature(chr, QEMU_CHAR_FEATURE_FD_PASS)) {
        error_setg(errp, "chardev '%s' isn't a UNIX socket", chr->label);
        return false;
    }
    return true;
}

static void choose_instance(VHostUserVMBus *s)
{
    VMBusDevice *vdev = VMBUS_DEVICE(s);

    if (qemu_uuid_is_null(&vdev->instanceid)) {
        memcpy(&vdev->instanceid, s->offer.instance_id,
               sizeof(vdev->instanceid));
        /* wire order has the first three fields little-endian */
        vdev->instanceid = qemu_uuid_bswap(vdev->instanceid);
    }
    if (qemu_uuid_is_null(&vdev->instanceid)) {
        qemu_uuid_generate(&vdev->instanceid);
    }
}

static void vuv_release(VHostUserVMBus *s)
{
    qemu_chr_fe_set_handlers(&s->conn.chr, NULL, NULL, NULL, NULL, NULL, NULL,
                             false);
    if (s->conn.up) {
        vuv_conn_drop(&s->conn);
    }
    vuv_conn_cleanup(&s->conn);
    if (s->have_mem) {
        vuv_mem_destroy(&s->mem);
        s->have_mem = false;
    }
    g_clear_pointer(&s->vm_state, qemu_del_vm_change_state_handler);
    stop_hello(s);
    timer_free(s->hello_timer);
    qemu_bh_delete(s->cleanup_bh);
    vuv_offers_destroy(s);
    vuv_conn_destroy(&s->conn);
    vuv_inflight_forget(&s->inflight);
    g_ptr_array_free(s->gpadls, true);
    g_free(s->chans);
    migrate_del_blocker(&s->migration_blocker);
}

/*
 * Runs before the bus's part, since that wants to know the instance id and the
 * number of channels.
 */
static void vuv_realize(DeviceState *dev, Error **errp)
{
    ERRP_GUARD();
    VHostUserVMBus *s = VHOST_USER_VMBUS(dev);
    void (*bus_realize)(DeviceState *, Error **) =
        DEVICE_CLASS(object_class_by_name(TYPE_VMBUS_DEVICE))->realize;

    if (!check_chardev(s, errp) || !vuv_mem_check(errp)) {
        return;
    }

    s->inflight.fd = -1;
    s->mem.code_map_fd = -1;
    if (tcg_enabled()) {
        s->mem.code_map_fd = tb_code_map_enable(errp);
        if (s->mem.code_map_fd < 0) {
            return;
        }
    }

    error_setg(&s->migration_blocker,
               "vhost-user-vmbus can't migrate the state of its back end");
    if (migrate_add_blocker(&s->migration_blocker, errp) < 0) {
        return;
    }

    s->conn.backend_request = vuv_backend_request;
    s->conn.opaque = s;
    vuv_conn_init(&s->conn);
    s->gpadls = g_ptr_array_new_with_free_func(g_free);
    s->cleanup_bh = qemu_bh_new(vuv_cleanup_bh, s);
    s->hello_timer = timer_new_ms(QEMU_CLOCK_REALTIME, vuv_hello_timeout, s);
    vuv_offers_init(s);

    /* a guest that runs must not wait for a back end to come */
    if (dev->hotplugged && !qemu_chr_fe_backend_open(&s->conn.chr)) {
        error_setg(errp, "no back end is connected to chardev '%s': there is "
                   "none at '%s', or it serves another front end",
                   qemu_chr_fe_get_driver(&s->conn.chr)->label,
                   s->conn.where);
        goto fail;
    }
    if (qemu_chr_fe_wait_connected(&s->conn.chr, errp) < 0) {
        goto fail;
    }
    vuv_conn_limit(&s->conn, dev->hotplugged ? GREET_TIMEOUT_MS : 0);
    if (!vuv_greet(s, errp) || !vuv_go_on(s, errp)) {
        goto fail;
    }
    s->num_chans = s->offers.max_channels;
    s->chans = g_new0(VuvChannel, s->num_chans);
    choose_instance(s);

    bus_realize(dev, errp);
    if (*errp) {
        goto fail;
    }

    /* the listener reports all memory at once, and it's sent */
    vuv_mem_init(&s->mem, &s->conn, s->mem.code_map_fd, errp);
    vuv_conn_limit(&s->conn, 0);
    qatomic_store_release(&s->have_mem, true);
    if (*errp) {
        DEVICE_GET_CLASS(dev)->unrealize(dev);
        return;
    }

    qemu_chr_fe_set_handlers(&s->conn.chr, NULL, NULL, vuv_event, NULL, s,
                             NULL, true);
    s->vm_state = qdev_add_vm_change_state_handler(dev, vuv_vm_state, s);
    return;

fail:
    vuv_release(s);
}

static void vuv_vmdev_unrealize(VMBusDevice *vdev)
{
    vuv_release(VHOST_USER_VMBUS(vdev));
}

static void vuv_instance_init(Object *obj)
{
    /* the base class has made one up, but the back end may have a say */
    memset(&VMBUS_DEVICE(obj)->instanceid, 0, sizeof(QemuUUID));
}

static const Property vuv_properties[] = {
    DEFINE_PROP_CHR("chardev", VHostUserVMBus, conn.chr),
    DEFINE_PROP_UINT32("x-answer-timeout-ms", VHostUserVMBus, conn.answer_ms,
                       VUV_ANSWER_TIMEOUT_MS),
};

static void vuv_class_init(ObjectClass *klass, void *data)
{
    DeviceClass *dc = DEVICE_CLASS(klass);
    VMBusDeviceClass *vdc = VMBUS_DEVICE_CLASS(klass);

    device_class_set_props(dc, vuv_properties);
    dc->realize = vuv_realize;
    dc->desc = "VMBus device in another process";
    set_bit(DEVICE_CATEGORY_MISC, dc->categories);
    dc->hotpluggable = true;

    vdc->vmdev_unrealize = vuv_vmdev_unrealize;
    vdc->num_channels = vuv_num_channels;
    vdc->max_channels = vuv_max_channels;
    vdc->open_channel = vuv_open_channel;
    vdc->close_channel = vuv_close_channel;
    vdc->gpadl_create = vuv_gpadl_create;
    vdc->gpadl_teardown = vuv_gpadl_teardown;
    vdc->fill_offer = vuv_fill_offer;
    vdc->bus_reset = vuv_bus_reset;
    vdc->defer_rescind = vuv_defer_rescind;
    /* no chan_notify_cb: the back end handles the rings */
}

static const TypeInfo vuv_type_info = {
    .name = TYPE_VHOST_USER_VMBUS,
    .parent = TYPE_VMBUS_DEVICE,
    .instance_size = sizeof(VHostUserVMBus),
    .instance_init = vuv_instance_init,
    .class_init = vuv_class_init,
};

static void vuv_register_types(void)
{
    type_register_static(&vuv_type_info);
}

type_init(vuv_register_types)
