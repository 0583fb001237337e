/*
 * VMBus device whose back end is another process: the connection
 *
 * Copyright (c) 2026 The vhostvmbus maintainers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <poll.h>
#include "qapi/error.h"
#include "qemu/bswap.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/rcu.h"
#include "qemu/sockets.h"
#include "qemu/timer.h"
#include "chardev/char-socket.h"
#include "io/channel.h"
#include "hw/hyperv/vhost-user-vmbus.h"
#include "trace.h"

#define FLAGS_VERSION           1u
#define FLAGS_VERSION_MASK      3u
#define FLAGS_REPLY             4u
#define FLAGS_NEED_REPLY        8u

#define F_PROTOCOL_FEATURES     (1ull << 30)

#define PF_REPLY_ACK            (1ull << 3)
#define PF_BACKEND_REQ          (1ull << 5)
#define PF_INFLIGHT_SHMFD       (1ull << 12)
#define PF_CONFIGURE_MEM_SLOTS  (1ull << 15)
#define PF_VMBUS                (1ull << 48)
#define PF_VMBUS_CODE_MAP       (1ull << 49)
#define PF_VMBUS_UNPLUG         (1ull << 50)
#define PF_VMBUS_SUSPEND        (1ull << 51)

static const struct {
    uint64_t bit;
    const char *name;
} feature_names[] = {
    { PF_REPLY_ACK, "REPLY_ACK" },
    { PF_BACKEND_REQ, "BACKEND_REQ" },
    { PF_CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS" },
    { PF_VMBUS, "VMBUS" },
    { PF_VMBUS_CODE_MAP, "VMBUS_CODE_MAP" },
};

typedef struct Header {
    uint32_t request;
    uint32_t flags;
    uint32_t size;
} QEMU_PACKED Header;

typedef struct Message {
    Header hdr;
    uint8_t payload[VUV_MAX_PAYLOAD];
} QEMU_PACKED Message;

/* ----------------------------- words ----------------------------- */

void vuv_conn_unheard(VuvConn *c, Error **errp)
{
    error_setg(errp, "the back end at '%s' closes the connection at once: it "
               "serves another front end, or it fails (its log says which); "
               "each device needs a back end of its own", c->where);
}

static void conn_closed(VuvConn *c, Error **errp)
{
    if (c->heard) {
        error_setg(errp, "the back end closed the connection");
    } else {
        vuv_conn_unheard(c, errp);
    }
}

static void conn_late(VuvConn *c, Error **errp)
{
    double seconds = (c->limit_ms ?: c->answer_ms) / 1000.0;

    if (c->heard) {
        error_setg(errp, "the back end did not answer in %g seconds", seconds);
    } else {
        error_setg(errp, "no back end answers at '%s' in %g seconds, although "
                   "something listens there: it is stopped or busy",
                   c->where, seconds);
    }
}

/* ------------------ our requests, on the chardev ------------------ */

void vuv_conn_limit(VuvConn *c, uint32_t ms)
{
    c->limit_ms = MIN(ms, c->answer_ms);
}

static bool conn_send(VuvConn *c, uint32_t request, bool need_reply,
                      const void *payload, uint32_t size,
                      const int *fds, int nfds, Error **errp)
{
    g_autofree Message *msg = g_new(Message, 1);
    int len = sizeof(msg->hdr) + size;

    assert(size <= sizeof(msg->payload));
    msg->hdr.request = cpu_to_le32(request);
    msg->hdr.flags = cpu_to_le32(FLAGS_VERSION |
                                 (need_reply ? FLAGS_NEED_REPLY : 0));
    msg->hdr.size = cpu_to_le32(size);
    if (size) {
        memcpy(msg->payload, payload, size);
    }

    trace_vhost_user_vmbus_request(request, size, nfds);

    if (nfds && qemu_chr_fe_set_msgfds(&c->chr, (int *)fds, nfds) < 0) {
        error_setg(errp, "cannot pass file descriptors to the back end");
        return false;
    }
    /*
     * Never blocks for long, although the chardev would retry for ever: there
     * is at most one unanswered request, and it fits in the socket's buffer.
     */
    if (qemu_chr_fe_write_all(&c->chr, (uint8_t *)msg, len) != len) {
        conn_closed(c, errp);
        return false;
    }
    return true;
}

/* Keep the first of the descriptors in @fd, unless that has one. */
static void keep_first_fd(int *fd, int *fds, size_t nfds)
{
    for (size_t i = 0; i < nfds; i++) {
        if (*fd < 0) {
            *fd = fds[i];
        } else {
            close(fds[i]);
        }
    }
    g_free(fds);
}

/*
 * Read from the chardev's socket, with a time limit, which chardevs don't have.
 * The chardev itself doesn't read, as this device has no handler for input.
 * With @fd, a descriptor that comes with the bytes is stored there.
 */
static bool conn_recv(VuvConn *c, void *buf, size_t len, int64_t deadline,
                      int *fd, Error **errp)
{
    SocketChardev *sock = SOCKET_CHARDEV(qemu_chr_fe_get_driver(&c->chr));

    while (len) {
        struct iovec iov = { .iov_base = buf, .iov_len = len };
        int *fds = NULL;
        size_t nfds = 0;
        int64_t left;
        ssize_t ret;

        if (sock->state != TCP_CHARDEV_STATE_CONNECTED || !sock->ioc) {
            conn_closed(c, errp);
            return false;
        }
        ret = qio_channel_readv_full(sock->ioc, &iov, 1, fd ? &fds : NULL,
                                     fd ? &nfds : NULL, 0, NULL);
        if (fd) {
            keep_first_fd(fd, fds, nfds);
        }
        if (ret == QIO_CHANNEL_ERR_BLOCK) {
            GPollFD pfd = { .fd = sock->sioc->fd, .events = G_IO_IN };

            left = deadline - qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
            if (left <= 0) {
                conn_late(c, errp);
                return false;
            }
            g_poll(&pfd, 1, left);
            continue;
        }
        if (ret <= 0) {
            /* an error means no more: something of ours was not read */
            conn_closed(c, errp);
            return false;
        }
        c->heard = true;
        buf += ret;
        len -= ret;
    }
    return true;
}

static void turn_ends(void *opaque)
{
    VuvConn *c = opaque;

    c->turn_deadline = 0;
}

static bool conn_reply(VuvConn *c, uint32_t request, void *reply,
                       uint32_t reply_size, int *fd, Error **errp)
{
    int64_t now = qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
    int64_t deadline = now + (c->limit_ms ?: c->answer_ms);
    Header hdr;
    uint32_t flags;

    if (c->turn_deadline) {
        deadline = MIN(deadline, c->turn_deadline);
    } else if (phase_check(PHASE_MACHINE_READY)) {
        /* before that, other devices may wait for back ends of their own */
        c->turn_deadline = now + c->answer_ms;
        qemu_bh_schedule(c->turn_bh);
    }
    if (!conn_recv(c, &hdr, sizeof(hdr), deadline, fd, errp)) {
        return false;
    }
    flags = le32_to_cpu(hdr.flags);
    if (le32_to_cpu(hdr.request) != request ||
        (flags & FLAGS_VERSION_MASK) != FLAGS_VERSION ||
        !(flags & FLAGS_REPLY) ||
        le32_to_cpu(hdr.size) != reply_size) {
        error_setg(errp, "the back end answered request %u (%u bytes expected) "
                   "with request %u, flags 0x%x, %u bytes", request, reply_size,
                   le32_to_cpu(hdr.request), flags, le32_to_cpu(hdr.size));
        return false;
    }
    return conn_recv(c, reply, reply_size, deadline, NULL, errp);
}

bool vuv_conn_ask(VuvConn *c, uint32_t request, const void *payload,
                  uint32_t size, void *reply, uint32_t reply_size, int *fd,
                  Error **errp)
{
    if (fd) {
        *fd = -1;
    }
    if (!c->up) {
        error_setg(errp, "no back end is connected");
        return false;
    }
    if (!conn_send(c, request, false, payload, size, NULL, 0, errp) ||
        !conn_reply(c, request, reply, reply_size, fd, errp)) {
        if (fd && *fd >= 0) {
            close(*fd);
            *fd = -1;
        }
        vuv_conn_drop(c);
        return false;
    }
    return true;
}

bool vuv_conn_get(VuvConn *c, uint32_t request, void *reply,
                  uint32_t reply_size, Error **errp)
{
    return vuv_conn_ask(c, request, NULL, 0, reply, reply_size, NULL, errp);
}

bool vuv_conn_ack(VuvConn *c, uint32_t request, const void *payload,
                  uint32_t size, const int *fds, int nfds,
                  uint32_t *status, Error **errp)
{
    uint64_t ack;

    if (!c->up) {
        error_setg(errp, "no back end is connected");
        return false;
    }
    if (!conn_send(c, request, true, payload, size, fds, nfds, errp) ||
        !conn_reply(c, request, &ack, sizeof(ack), NULL, errp)) {
        vuv_conn_drop(c);
        return false;
    }
    ack = le64_to_cpu(ack);
    *status = ack && !(uint32_t)ack ? VUV_STATUS_UNSUCCESSFUL : ack;
    trace_vhost_user_vmbus_status(request, *status);
    return true;
}

/* Request that isn't answered, because of its place in the negotiation */
static bool conn_set(VuvConn *c, uint32_t request, const uint64_t *value,
                     Error **errp)
{
    uint64_t le = value ? cpu_to_le64(*value) : 0;

    return conn_send(c, request, false, &le, value ? sizeof(le) : 0,
                     NULL, 0, errp);
}

/* ------------- the back end's requests, on a socket pair ------------- */

static bool recv_full(int fd, void *buf, size_t len)
{
    while (len) {
        ssize_t ret = RETRY_ON_EINTR(recv(fd, buf, len, 0));

        if (ret <= 0) {
            return false;
        }
        buf += ret;
        len -= ret;
    }
    return true;
}

static bool send_full(int fd, const void *buf, size_t len)
{
    while (len) {
        ssize_t ret = RETRY_ON_EINTR(send(fd, buf, len, MSG_NOSIGNAL));

        if (ret <= 0) {
            return false;
        }
        buf += ret;
        len -= ret;
    }
    return true;
}

static void *backend_thread(void *opaque)
{
    VuvConn *c = opaque;
    g_autofree Message *msg = g_new(Message, 1);

    rcu_register_thread();

    while (recv_full(c->backend_fd, &msg->hdr, sizeof(msg->hdr))) {
        uint32_t request = le32_to_cpu(msg->hdr.request);
        uint32_t flags = le32_to_cpu(msg->hdr.flags);
        uint32_t size = le32_to_cpu(msg->hdr.size);
        uint32_t status;
        struct {
            Header hdr;
            uint64_t status;
        } QEMU_PACKED reply;

        if (size > sizeof(msg->payload) ||
            (flags & FLAGS_VERSION_MASK) != FLAGS_VERSION ||
            !recv_full(c->backend_fd, msg->payload, size)) {
            break;
        }

        status = c->backend_request(c->opaque, request, msg->payload, size);
        trace_vhost_user_vmbus_backend_request(request, size, status);

        if (flags & FLAGS_NEED_REPLY) {
            reply.hdr.request = cpu_to_le32(request);
            reply.hdr.flags = cpu_to_le32(FLAGS_VERSION | FLAGS_REPLY);
            reply.hdr.size = cpu_to_le32(sizeof(reply.status));
            reply.status = cpu_to_le64(status);
            if (!send_full(c->backend_fd, &reply, sizeof(reply))) {
                break;
            }
        }
    }

    /* no answers from now on: let the back end know */
    shutdown(c->backend_fd, SHUT_RDWR);
    rcu_unregister_thread();
    return NULL;
}

static bool start_backend_thread(VuvConn *c, Error **errp)
{
    int fds[2];
    uint32_t status;
    bool ok;

    if (qemu_socketpair(AF_UNIX, SOCK_STREAM, 0, fds) < 0) {
        error_setg_errno(errp, errno, "cannot create a socket pair");
        return false;
    }
    ok = vuv_conn_ack(c, VUV_SET_BACKEND_REQ_FD, NULL, 0, &fds[1], 1, &status,
                      errp);
    close(fds[1]);
    if (ok && status) {
        error_setg(errp, "the back end refuses the back-end channel: 0x%x",
                   status);
        ok = false;
    }
    if (!ok) {
        close(fds[0]);
        return false;
    }

    c->backend_fd = fds[0];
    c->thread_running = true;
    qemu_thread_create(&c->thread, "vuv-back-end", backend_thread, c,
                       QEMU_THREAD_JOINABLE);
    return true;
}

/* ---------------------------- life cycle ---------------------------- */

static bool conn_negotiate(VuvConn *c, bool code_map, Error **errp)
{
    uint64_t want = PF_REPLY_ACK | PF_BACKEND_REQ | PF_CONFIGURE_MEM_SLOTS |
                    PF_VMBUS | (code_map ? PF_VMBUS_CODE_MAP : 0);
    uint64_t features, slots;

    if (!conn_reply(c, VUV_GET_FEATURES, &features, sizeof(features), NULL,
                    errp)) {
        return false;
    }
    if (!(le64_to_cpu(features) & F_PROTOCOL_FEATURES)) {
        error_setg(errp, "the back end lacks VHOST_USER_F_PROTOCOL_FEATURES");
        return false;
    }
    if (!vuv_conn_get(c, VUV_GET_PROTOCOL_FEATURES, &features,
                      sizeof(features), errp)) {
        return false;
    }
    for (int i = 0; i < ARRAY_SIZE(feature_names); i++) {
        if (want & ~le64_to_cpu(features) & feature_names[i].bit) {
            error_setg(errp, "the back end lacks protocol feature %s",
                       feature_names[i].name);
            return false;
        }
    }
    c->inflight = le64_to_cpu(features) & PF_INFLIGHT_SHMFD;
    c->unplug = le64_to_cpu(features) & PF_VMBUS_UNPLUG;
    c->suspend = le64_to_cpu(features) & PF_VMBUS_SUSPEND;
    want |= le64_to_cpu(features) &
            (PF_INFLIGHT_SHMFD | PF_VMBUS_UNPLUG | PF_VMBUS_SUSPEND);

    features = F_PROTOCOL_FEATURES;
    if (!conn_set(c, VUV_SET_PROTOCOL_FEATURES, &want, errp) ||
        !conn_set(c, VUV_SET_FEATURES, &features, errp) ||
        !conn_set(c, VUV_SET_OWNER, NULL, errp) ||
        !start_backend_thread(c, errp) ||
        !vuv_conn_get(c, VUV_GET_MAX_MEM_SLOTS, &slots, sizeof(slots), errp)) {
        return false;
    }
    c->max_mem_slots = le64_to_cpu(slots);
    return true;
}

bool vuv_conn_hello(VuvConn *c, Error **errp)
{
    c->heard = false;
    c->hello_sent = conn_send(c, VUV_GET_FEATURES, false, NULL, 0, NULL, 0,
                              errp);
    return c->hello_sent;
}

bool vuv_conn_start(VuvConn *c, bool code_map, Error **errp)
{
    vuv_conn_cleanup(c);
    c->up = true;
    if ((!c->hello_sent && !vuv_conn_hello(c, errp)) ||
        !conn_negotiate(c, code_map, errp)) {
        vuv_conn_drop(c);
        return false;
    }
    return true;
}

void vuv_conn_init(VuvConn *c)
{
    Chardev *chr = qemu_chr_fe_get_driver(&c->chr);
    SocketAddress *addr = SOCKET_CHARDEV(chr)->addr;

    c->where = g_strdup(addr && addr->type == SOCKET_ADDRESS_TYPE_UNIX ?
                        addr->u.q_unix.path : chr->label);
    c->turn_bh = qemu_bh_new(turn_ends, c);
}

void vuv_conn_destroy(VuvConn *c)
{
    vuv_conn_settled(c);
    qemu_bh_delete(c->turn_bh);
    g_clear_pointer(&c->where, g_free);
}

void vuv_conn_drop(VuvConn *c)
{
    /* first, as the chardev reports its closing before the call returns */
    c->up = false;
    c->hello_sent = false;
    qemu_chr_fe_disconnect(&c->chr);
}

void vuv_conn_cleanup(VuvConn *c)
{
    assert(!c->up);
    if (c->thread_running) {
        shutdown(c->backend_fd, SHUT_RDWR);
        qemu_thread_join(&c->thread);
        close(c->backend_fd);
        c->thread_running = false;
    }
}
