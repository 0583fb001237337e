/*
 * VMBus device whose back end is another process: GPADLs and channels
 *
 * Copyright (c) 2026 The vhostvmbus maintainers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the guest does with them is passed on to the back end, and told again
 * to one that comes later.
 */

#include "qemu/osdep.h"
#include <sys/mman.h>
#include "qapi/error.h"
#include "qemu/bswap.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/memfd.h"
#include "hw/hyperv/vhost-user-vmbus.h"

typedef struct WireGpadl {
    uint32_t channel;
    uint32_t gpadl_id;
    uint32_t range_count;
    uint32_t range_bytes;
} QEMU_PACKED WireGpadl;

typedef struct WireOpen {
    uint32_t channel;
    uint32_t gpadl_id;
    uint32_t ring_offset;
    uint32_t target_vp;
    uint32_t vmbus_version;
    uint32_t flags;
    uint8_t user_data[VMBUS_CHANNEL_USER_DATA_SIZE];
} QEMU_PACKED WireOpen;

QEMU_BUILD_BUG_ON(sizeof(WireOpen) != 144);

void vuv_report(VHostUserVMBus *s, Error *err)
{
    error_reportf_err(err, "vhost-user-vmbus (chardev %s): ",
                      qemu_chr_fe_get_driver(&s->conn.chr)->label);
}

void vuv_conn_complain(VuvConn *c, Error *err)
{
    if (!g_strcmp0(c->complaint, error_get_pretty(err))) {
        error_free(err);
        return;
    }
    g_free(c->complaint);
    c->complaint = g_strdup(error_get_pretty(err));
    error_reportf_err(err, "vhost-user-vmbus (chardev %s): ",
                      qemu_chr_fe_get_driver(&c->chr)->label);
}

void vuv_conn_settled(VuvConn *c)
{
    g_clear_pointer(&c->complaint, g_free);
}

/*
 * Request without an interesting payload, for which there's nothing to be done
 * if it fails.
 */
static void vuv_tell(VHostUserVMBus *s, uint32_t request, const void *payload,
                     uint32_t size)
{
    Error *err = NULL;
    uint32_t status;

    if (!s->conn.up) {
        return;
    }
    if (!vuv_conn_ack(&s->conn, request, payload, size, NULL, 0, &status,
                      &err)) {
        vuv_report(s, err);
    } else if (status) {
        error_setg(&err, "the back end answered request %u with status 0x%x",
                   request, status);
        vuv_report(s, err);
    }
}

/* ---------------------------- GPADLs ---------------------------- */

/* A sealed file with the page list, as one GPA range; -1 on failure */
static int gpadl_to_memfd(VMBusGpadl *gpadl, uint32_t *bytes, Error **errp)
{
    uint32_t n;
    const uint64_t *gfns = vmbus_gpadl_gfns(gpadl, &n);
    size_t size = 8 + n * sizeof(uint64_t);
    g_autofree uint8_t *buf = g_malloc(size);
    int fd;

    stl_le_p(buf, vmbus_gpadl_len(gpadl));
    stl_le_p(buf + 4, 0);
    for (uint32_t i = 0; i < n; i++) {
        stq_le_p(buf + 8 + i * sizeof(uint64_t), gfns[i]);
    }

    fd = qemu_memfd_create("vmbus-gpadl", size, false, 0,
                           F_SEAL_SHRINK | F_SEAL_GROW, errp);
    if (fd < 0) {
        return -1;
    }
    /* sealed against writing only now that it's written */
    if (RETRY_ON_EINTR(pwrite(fd, buf, size, 0)) != size ||
        fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE) < 0) {
        error_setg_errno(errp, errno, "cannot write a page list");
        close(fd);
        return -1;
    }
    *bytes = size;
    return fd;
}

/* Returns the status for the guest; @errp is for failures without one. */
static uint32_t send_gpadl(VHostUserVMBus *s, uint32_t channel,
                           VMBusGpadl *gpadl, Error **errp)
{
    uint32_t bytes, status;
    int fd = gpadl_to_memfd(gpadl, &bytes, errp);
    WireGpadl w;

    if (fd < 0) {
        return VUV_STATUS_INSUFFICIENT_RESOURCES;
    }
    w = (WireGpadl) {
        .channel = cpu_to_le32(channel),
        .gpadl_id = cpu_to_le32(vmbus_gpadl_id(gpadl)),
        .range_count = cpu_to_le32(1),
        .range_bytes = cpu_to_le32(bytes),
    };
    s->used = true;
    if (!vuv_conn_ack(&s->conn, VUV_GPADL_CREATE, &w, sizeof(w), &fd, 1,
                      &status, errp)) {
        status = VUV_STATUS_DEVICE_NOT_CONNECTED;
    }
    close(fd);
    return status;
}

uint32_t vuv_gpadl_create(VMBusChannel *chan, VMBusGpadl *gpadl)
{
    VHostUserVMBus *s = VHOST_USER_VMBUS(vmbus_channel_device(chan));
    VuvGpadl *g;

    /* if there's no back end now, the next one learns of it */
    if (s->conn.up) {
        Error *err = NULL;
        uint32_t status = send_gpadl(s, vmbus_channel_idx(chan), gpadl, &err);

        if (err) {
            vuv_report(s, err);
        }
        if (status && s->conn.up) {
            return status;
        }
    }

    g = g_new(VuvGpadl, 1);
    g->channel = vmbus_channel_idx(chan);
    g->gpadl = gpadl;
    g_ptr_array_add(s->gpadls, g);
    return VUV_STATUS_SUCCESS;
}

void vuv_gpadl_teardown(VMBusChannel *chan, VMBusGpadl *gpadl)
{
    VHostUserVMBus *s = VHOST_USER_VMBUS(vmbus_channel_device(chan));
    uint32_t w[2];

    for (guint i = 0; i < s->gpadls->len; i++) {
        VuvGpadl *g = g_ptr_array_index(s->gpadls, i);

        if (g->gpadl == gpadl) {
            w[0] = cpu_to_le32(g->channel);
            w[1] = cpu_to_le32(vmbus_gpadl_id(gpadl));
            g_ptr_array_remove_index_fast(s->gpadls, i);
            vuv_tell(s, VUV_GPADL_TEARDOWN, w, sizeof(w));
            return;
        }
    }
}

/* ---------------------------- channels ---------------------------- */

static void vuv_call(EventNotifier *e)
{
    VuvChannel *c = container_of(e, VuvChannel, call);

    if (event_notifier_test_and_clear(e)) {
        vmbus_channel_notify_guest(c->chan);
    }
}

static uint32_t send_open(VHostUserVMBus *s, VuvChannel *c, uint32_t flags,
                          Error **errp)
{
    VMBusChannelOpenParams p;
    WireOpen w;
    uint32_t status;
    int fds[2] = {
        event_notifier_get_wfd(vmbus_channel_host_notifier(c->chan)),
        event_notifier_get_wfd(&c->call),
    };

    vmbus_channel_get_open_params(c->chan, &p);
    w = (WireOpen) {
        .channel = cpu_to_le32(vmbus_channel_idx(c->chan)),
        .gpadl_id = cpu_to_le32(p.gpadl_id),
        .ring_offset = cpu_to_le32(p.ring_offset),
        .target_vp = cpu_to_le32(p.target_vp),
        .vmbus_version = cpu_to_le32(p.version),
        .flags = cpu_to_le32(flags),
    };
    memcpy(w.user_data, p.user_data, sizeof(w.user_data));

    s->used = true;
    if (!vuv_conn_ack(&s->conn, VUV_OPEN, &w, sizeof(w), fds, 2, &status,
                      errp)) {
        return VUV_STATUS_DEVICE_NOT_CONNECTED;
    }
    return status;
}

int vuv_open_channel(VMBusChannel *chan)
{
    VHostUserVMBus *s = VHOST_USER_VMBUS(vmbus_channel_device(chan));
    VuvChannel *c = &s->chans[vmbus_channel_idx(chan)];
    uint32_t status = VUV_STATUS_DEVICE_NOT_CONNECTED;
    Error *err = NULL;

    c->chan = chan;
    if (s->conn.up) {
        if (event_notifier_init(&c->call, 0) < 0) {
            status = VUV_STATUS_INSUFFICIENT_RESOURCES;
            goto fail;
        }
        status = send_open(s, c, 0, &err);
        if (!status) {
            event_notifier_set_handler(&c->call, vuv_call);
            c->open = true;
            /* vmbus sets the kick notifier once the guest has its answer */
            return 0;
        }
        event_notifier_cleanup(&c->call);
        if (err) {
            vuv_report(s, err);
        }
    }
fail:
    vmbus_channel_set_open_status(chan, status);
    return -ENODEV;
}

void vuv_close_channel(VMBusChannel *chan)
{
    VHostUserVMBus *s = VHOST_USER_VMBUS(vmbus_channel_device(chan));
    VuvChannel *c = &s->chans[vmbus_channel_idx(chan)];
    uint32_t w[2] = { cpu_to_le32(vmbus_channel_idx(chan)), 0 };

    if (!c->open) {
        return;
    }
    if (!s->opens_due) {
        vuv_tell(s, VUV_CLOSE, w, sizeof(w));
    }
    event_notifier_set_handler(&c->call, NULL);
    event_notifier_cleanup(&c->call);
    c->open = false;
    if (!vmbus_channel_idx(chan)) {
        vuv_offers_primary_closed(s);
    }
}

void vuv_bus_reset(VMBusDevice *vdev)
{
    VHostUserVMBus *s = VHOST_USER_VMBUS(vdev);

    g_ptr_array_set_size(s->gpadls, 0);
    if (s->used) {
        s->used = false;
        vuv_tell(s, VUV_RESET, NULL, 0);
        /* a back end that's there has emptied it */
        if (!s->conn.up) {
            vuv_inflight_forget(&s->inflight);
        }
    }
    /* what was asked for before the answer goes with the rest */
    vuv_offers_apply(s);
}

static bool open_channels(VHostUserVMBus *s, Error **errp)
{
    s->opens_due = false;
    for (uint16_t i = 0; i < s->num_chans; i++) {
        VuvChannel *c = &s->chans[i];
        uint32_t status;

        if (!c->open) {
            continue;
        }
        status = send_open(s, c, VUV_OPEN_RESUME, errp);
        if (status) {
            if (s->conn.up && !*errp) {
                error_setg(errp, "the back end refuses to resume channel %u: "
                           "status 0x%x", i, status);
            }
            return false;
        }
        /* either side may have missed a signal */
        vmbus_channel_notify_host(c->chan);
        vmbus_channel_notify_guest(c->chan);
    }
    return true;
}

/* Bring a new back end to where the last one was. */
bool vuv_resume(VHostUserVMBus *s, Error **errp)
{
    s->suspended = false;
    for (guint i = 0; i < s->gpadls->len; i++) {
        VuvGpadl *g = g_ptr_array_index(s->gpadls, i);
        uint32_t status = send_gpadl(s, g->channel, g->gpadl, errp);

        if (status) {
            if (s->conn.up && !*errp) {
                error_setg(errp, "the back end refuses GPADL %u: status 0x%x",
                           vmbus_gpadl_id(g->gpadl), status);
            }
            return false;
        }
    }
    if (s->conn.suspend && !runstate_is_running()) {
        s->opens_due = true;
        return true;
    }
    return open_channels(s, errp);
}

/* ------------------------ a machine that is stopped ------------------------ */

static void vuv_suspend(VHostUserVMBus *s)
{
    Error *err = NULL;
    uint32_t status;

    if (!s->conn.up || !s->conn.suspend || !s->used || s->suspended ||
        s->opens_due) {
        return;
    }
    s->suspended = true;
    if (!vuv_conn_ack(&s->conn, VUV_SUSPEND, NULL, 0, NULL, 0, &status, &err)) {
        vuv_report(s, err);
    } else if (status) {
        error_setg(&err, "the machine is stopped, but not the back end: "
                   "status 0x%x; memory and disks may change still", status);
        vuv_report(s, err);
    }
    /* what it signalled before is the guest's by now */
    for (uint16_t i = 0; i < s->num_chans; i++) {
        if (s->chans[i].open) {
            vuv_call(&s->chans[i].call);
        }
    }
}

void vuv_vm_state(void *opaque, bool running, RunState state)
{
    VHostUserVMBus *s = opaque;
    Error *err = NULL;

    if (!running) {
        vuv_suspend(s);
        return;
    }
    if (s->suspended) {
        s->suspended = false;
        vuv_tell(s, VUV_CONTINUE, NULL, 0);
    }
    if (!s->opens_due || !s->conn.up) {
        return;
    }
    if (open_channels(s, &err)) {
        vuv_offers_connected(s);
        return;
    }
    if (s->conn.up) {
        vuv_conn_drop(&s->conn);
    }
    vuv_conn_complain(&s->conn, err);
}
