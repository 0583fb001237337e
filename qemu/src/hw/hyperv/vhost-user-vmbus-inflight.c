/*
 * VMBus device whose back end is another process: packets that are under way
 *
 * Copyright (c) 2026 The vhostvmbus maintainers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * All that's done here is to keep a file between one back end and the next.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/bswap.h"
#include "qemu/error-report.h"
#include "hw/hyperv/vhost-user-vmbus.h"

void vuv_inflight_forget(VuvInflight *f)
{
    if (f->fd >= 0) {
        close(f->fd);
        f->fd = -1;
    }
}

/* Whether the back end took the file; if it's gone, @errp is set. */
static bool give(VuvInflight *f, VuvConn *c, Error **errp)
{
    uint32_t status;

    if (!vuv_conn_ack(c, VUV_SET_INFLIGHT_FD, &f->desc, sizeof(f->desc),
                      &f->fd, 1, &status, errp)) {
        return false;
    }
    if (status) {
        warn_report("vhost-user-vmbus (chardev %s): the back end does not take "
                    "what was under way in the last one: status 0x%x",
                    qemu_chr_fe_get_driver(&c->chr)->label, status);
    }
    return !status;
}

bool vuv_inflight_share(VuvInflight *f, VuvConn *c, uint16_t num_queues,
                        Error **errp)
{
    VuvInflightDesc ask = { .num_queues = cpu_to_le16(num_queues) };

    if (!c->inflight) {
        /* what it will do to the rings isn't in the file */
        vuv_inflight_forget(f);
        return true;
    }
    if (f->fd >= 0) {
        if (give(f, c, errp)) {
            return true;
        }
        if (!c->up) {
            return false;
        }
        vuv_inflight_forget(f);
    }
    if (!vuv_conn_ask(c, VUV_GET_INFLIGHT_FD, &ask, sizeof(ask), &f->desc,
                      sizeof(f->desc), &f->fd, errp)) {
        return false;
    }
    if (!f->desc.mmap_size || f->fd < 0) {
        warn_report("vhost-user-vmbus (chardev %s): the back end gives no file "
                    "for what is under way",
                    qemu_chr_fe_get_driver(&c->chr)->label);
        vuv_inflight_forget(f);
    }
    return true;
}
