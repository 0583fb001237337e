/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Ports: where a link's queue takes and gives frames. Two kinds of descriptor are known: one that
 * carries a virtio-net header and a frame with each read and write (a TAP's), and a stream socket
 * on which each frame has its length in front, 32 bits, big-endian, and no header (passt's).
 *
 * Nothing here waits. What cannot be sent is refused whole; but of a frame whose beginning went
 * into a stream, the rest is kept, and nothing else goes in before it.
 *
 * Of a stream as much is read at once as there is and as there is room for: whole frames are taken
 * from there, and the beginning of one waits there for its rest. Whoever wants to sleep until the
 * descriptor is readable has taken all whole frames before.
 *
 * passt of 2023 sends an answer of its own (ARP, NDP, DHCP, ICMP) in two steps, and waits in neither:
 * if its socket is full in between, there is a length and no frame. What comes next is the length of
 * another one. Such a length is told from one that has a frame by the source address, which is the
 * same in all that passt sends.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "net.h"

#define LENGTH_SIZE 4u
#define ROOM (256u << 10) /* of what was read: some of the longest frames */
#define SOURCE 6u /* where a frame's source address is, and how long */
#define MOST_ALONE 64u /* lengths in a row that have no frame */
#define UNDECIDED UINT32_MAX

struct vvb_net_port {
    int fd; /* the number stays, what is behind it does not */
    int idle[2]; /* a pipe into which nobody writes: one end is behind fd while nothing else is */
    int framing;
    int wake_fd; /* written when the rest of a frame waits for room */
    struct vvb_net_recording *recording;
    pthread_mutex_t sending, receiving; /* a stream's two directions, and what is behind fd */
    uint8_t *in;
    uint32_t begin, end; /* bytes in it that were not taken yet */
    uint8_t source[SOURCE]; /* of the last frame that was taken */
    bool has_source;
    uint8_t *rest;
    uint32_t rest_at, rest_end;
    struct vvb_net_port_state state;
};

static void close_all(struct vvb_net_port *port)
{
    int fds[3] = {port->fd, port->idle[0], port->idle[1]};

    vvb_store(&port->fd, -1);
    port->idle[0] = port->idle[1] = -1;
    for (int i = 0; i < 3; i++) {
        if (fds[i] >= 0) {
            close(fds[i]);
        }
    }
}

void vvb_net_port_close(struct vvb_net_port *port)
{
    pthread_mutex_lock(&port->sending);
    pthread_mutex_lock(&port->receiving);
    close_all(port);
    pthread_mutex_unlock(&port->receiving);
    pthread_mutex_unlock(&port->sending);
}

void vvb_net_port_free(struct vvb_net_port *port)
{
    if (port) {
        close_all(port);
        pthread_mutex_destroy(&port->sending);
        pthread_mutex_destroy(&port->receiving);
        free(port->in);
        free(port->rest);
        free(port);
    }
}

struct vvb_net_port *vvb_net_port_new(int framing, int wake_fd)
{
    struct vvb_net_port *port = calloc(1, sizeof(*port));

    if (!port) {
        return NULL;
    }
    port->fd = port->idle[0] = port->idle[1] = -1;
    port->framing = framing;
    port->wake_fd = wake_fd;
    pthread_mutex_init(&port->sending, NULL);
    pthread_mutex_init(&port->receiving, NULL);
    if (framing == VVB_NET_PORT_STREAM) {
        port->in = malloc(ROOM);
        port->rest = malloc(LENGTH_SIZE + LONGEST_FRAME);
    }
    if (pipe2(port->idle, O_CLOEXEC | O_NONBLOCK)) {
        port->idle[0] = port->idle[1] = -1;
    } else {
        port->fd = fcntl(port->idle[0], F_DUPFD_CLOEXEC, 0);
    }
    if (port->fd < 0 || (framing == VVB_NET_PORT_STREAM && (!port->in || !port->rest))) {
        vvb_net_port_free(port);
        return NULL;
    }
    return port;
}

int vvb_net_port_fd(const struct vvb_net_port *port)
{
    return vvb_load(&port->fd);
}

int vvb_net_port_put(struct vvb_net_port *port, int fd)
{
    int ret;

    pthread_mutex_lock(&port->sending);
    pthread_mutex_lock(&port->receiving);
    do {
        ret = dup3(fd >= 0 ? fd : port->idle[0], port->fd, O_CLOEXEC) < 0 ? errno : 0;
    } while (ret == EINTR || ret == EBUSY);
    if (!ret) {
        port->begin = port->end = port->rest_at = port->rest_end = 0;
        port->has_source = false;
        vvb_store(&port->state.broken, VVB_NET_PORT_WHOLE);
    }
    pthread_mutex_unlock(&port->receiving);
    pthread_mutex_unlock(&port->sending);
    return ret;
}

void vvb_net_port_record(struct vvb_net_port *port, struct vvb_net_recording *recording)
{
    pthread_mutex_lock(&port->sending);
    pthread_mutex_lock(&port->receiving);
    port->recording = recording;
    pthread_mutex_unlock(&port->receiving);
    pthread_mutex_unlock(&port->sending);
}

void vvb_net_port_get_state(struct vvb_net_port *port, struct vvb_net_port_state *state)
{
    state->refused = vvb_load(&port->state.refused);
    state->too_long = vvb_load(&port->state.too_long);
    state->missing = vvb_load(&port->state.missing);
    state->broken = vvb_load(&port->state.broken);
    state->bad_length = vvb_load(&port->state.bad_length);
}

/* ---- sending ---- */

/* Tells whether nothing is left of the frame before; under the lock. */
static bool flush(struct vvb_net_port *port)
{
    while (port->rest_at < port->rest_end) {
        ssize_t sent = send(port->fd, port->rest + port->rest_at, port->rest_end - port->rest_at,
                            MSG_DONTWAIT | MSG_NOSIGNAL);

        if (sent >= 0) {
            port->rest_at += (uint32_t)sent;
        } else if (errno != EINTR) {
            return false;
        }
    }
    port->rest_at = port->rest_end = 0;
    return true;
}

int vvb_net_port_flush(struct vvb_net_port *port)
{
    bool done;

    pthread_mutex_lock(&port->sending);
    done = flush(port);
    pthread_mutex_unlock(&port->sending);
    return done;
}

/* Keeps what is behind the first bytes of the pieces. */
static void keep(struct vvb_net_port *port, const struct iovec *iov, uint32_t count, size_t sent)
{
    for (uint32_t i = 0; i < count; i++) {
        size_t skip = sent < iov[i].iov_len ? sent : iov[i].iov_len;

        memcpy(port->rest + port->rest_end, (uint8_t *)iov[i].iov_base + skip,
               iov[i].iov_len - skip);
        port->rest_end += (uint32_t)(iov[i].iov_len - skip);
        sent -= skip;
    }
}

static bool stream_write(struct vvb_net_port *port, const struct vnet *vnet, struct iovec *iov,
                         uint32_t count, uint32_t length)
{
    uint8_t prefix[LENGTH_SIZE] = {(uint8_t)(length >> 24), (uint8_t)(length >> 16),
                                   (uint8_t)(length >> 8), (uint8_t)length};
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = count};
    ssize_t sent;

    if (vnet->flags || vnet->gso_type || length < VVB_NET_ETHERNET || length > LONGEST_FRAME ||
        !flush(port)) {
        return false; /* nobody at the other end would finish the frame */
    }
    iov[0] = (struct iovec){prefix, sizeof(prefix)};
    do {
        sent = sendmsg(port->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    if (sent < 0) {
        return false;
    }
    if ((size_t)sent < LENGTH_SIZE + length) {
        keep(port, iov, count, (size_t)sent);
        if (!flush(port) && port->wake_fd >= 0) {
            vvb_signal(port->wake_fd);
        }
    }
    return true;
}

static bool datagram_write(struct vvb_net_port *port, const struct vnet *vnet, struct iovec *iov,
                           uint32_t count)
{
    ssize_t sent;

    iov[0] = (struct iovec){(void *)vnet, sizeof(*vnet)};
    do {
        sent = writev(vvb_load(&port->fd), iov, (int)count);
    } while (sent < 0 && errno == EINTR);
    return sent >= 0;
}

bool net_port_write(struct vvb_net_port *port, const struct vnet *vnet, struct iovec *iov,
                    uint32_t count, uint32_t length)
{
    uint64_t when = port->recording ? net_now(CLOCK_REALTIME) : 0;
    bool done;

    if (port->framing == VVB_NET_PORT_STREAM) {
        pthread_mutex_lock(&port->sending);
        done = stream_write(port, vnet, iov, count, length);
        pthread_mutex_unlock(&port->sending);
    } else {
        done = datagram_write(port, vnet, iov, count);
    }
    if (!done) {
        __atomic_add_fetch(&port->state.refused, 1, __ATOMIC_RELAXED);
    } else if (port->recording) {
        net_record(port->recording, VVB_NET_RECORDING_INBOUND, iov + 1, count - 1, length, when);
    }
    return done;
}

/* ---- receiving ---- */

static uint32_t be32(const uint8_t *at)
{
    return (uint32_t)be16(at) << 16 | be16(at + 2);
}

static void give_up(struct vvb_net_port *port, uint32_t why, uint32_t length)
{
    port->begin = port->end = 0;
    vvb_store(&port->state.bad_length, length);
    vvb_store(&port->state.broken, why);
    shutdown(port->fd, SHUT_RDWR); /* whoever looks after the connection sees it */
}

static bool is_length(uint32_t length)
{
    return length >= VVB_NET_ETHERNET && length <= LONGEST_FRAME;
}

/*
 * Returns how many lengths without a frame are at begin. Each is followed by a length, and the last
 * by a frame from where all come from. UNDECIDED: not enough has come to say.
 */
static uint32_t lengths_alone(const struct vvb_net_port *port)
{
    const uint8_t *at = port->in + port->begin;
    uint32_t have = port->end - port->begin;

    for (uint32_t i = 0; port->has_source && i < MOST_ALONE; i++) {
        if (have >= LENGTH_SIZE && !is_length(be32(at))) {
            return 0;
        }
        if (have < LENGTH_SIZE + 2 * SOURCE) {
            return UNDECIDED;
        }
        if (!memcmp(at + LENGTH_SIZE + SOURCE, port->source, SOURCE)) {
            return i;
        }
        at += LENGTH_SIZE;
        have -= LENGTH_SIZE;
    }
    return 0;
}

/* Returns the length of the whole frame at begin; 0: there is none. Under the lock. */
static uint32_t stream_next(struct vvb_net_port *port)
{
    while (vvb_load(&port->state.broken) == VVB_NET_PORT_WHOLE) {
        uint32_t have = port->end - port->begin, length = 0, alone;
        ssize_t got;

        if (have >= LENGTH_SIZE) {
            length = be32(port->in + port->begin);
            if (!is_length(length)) {
                give_up(port, VVB_NET_PORT_NONSENSE, length);
                return 0;
            }
            alone = lengths_alone(port);
            if (alone && alone != UNDECIDED) {
                __atomic_add_fetch(&port->state.missing, alone, __ATOMIC_RELAXED);
                port->begin += alone * LENGTH_SIZE;
                continue;
            }
            if (!alone && have - LENGTH_SIZE >= length) {
                return length;
            }
        }
        if (!have) {
            port->begin = port->end = 0;
        } else if (ROOM - port->begin < LENGTH_SIZE + LONGEST_FRAME) {
            memmove(port->in, port->in + port->begin, have);
            port->begin = 0;
            port->end = have;
        }
        got = recv(port->fd, port->in + port->end, ROOM - port->end, MSG_DONTWAIT);
        if (got > 0) {
            port->end += (uint32_t)got;
        } else if (!got) {
            give_up(port, VVB_NET_PORT_CLOSED, 0);
        } else if (errno == EAGAIN || errno == ENOTSOCK || errno == EBADF) {
            return 0; /* nothing more, or there is no connection */
        } else if (errno != EINTR) {
            give_up(port, VVB_NET_PORT_CLOSED, 0);
        }
    }
    return 0;
}

static ssize_t stream_read(struct vvb_net_port *port, struct vnet *vnet, struct iovec *iov,
                           uint32_t count)
{
    uint32_t length = stream_next(port), left = length;
    const uint8_t *from = port->in + port->begin + LENGTH_SIZE;

    if (!length) {
        return -1;
    }
    memset(vnet, 0, sizeof(*vnet));
    memcpy(port->source, from + SOURCE, SOURCE);
    port->has_source = true;
    for (uint32_t i = 0; i < count && left; i++) {
        uint32_t here = iov[i].iov_len < left ? (uint32_t)iov[i].iov_len : left;

        memcpy(iov[i].iov_base, from, here);
        from += here;
        left -= here;
    }
    port->begin += LENGTH_SIZE + length;
    return length;
}

static ssize_t datagram_read(struct vvb_net_port *port, struct vnet *vnet, struct iovec *iov,
                             uint32_t count)
{
    uint8_t spare; /* tells a frame that just fits from one that was cut off */
    ssize_t got;

    iov[0] = (struct iovec){vnet, sizeof(*vnet)};
    iov[count] = (struct iovec){&spare, 1};
    do {
        got = readv(vvb_load(&port->fd), iov, (int)count + 1);
    } while (got < 0 && errno == EINTR);
    if (got <= 0) { /* nothing there, or the link has just vanished: poll() will say */
        return -1;
    }
    return (size_t)got < sizeof(*vnet) ? 0 : got - (ssize_t)sizeof(*vnet);
}

ssize_t net_port_read(struct vvb_net_port *port, struct vnet *vnet, struct iovec *iov,
                      uint32_t count)
{
    uint64_t room = 0;
    ssize_t got;

    for (uint32_t i = 1; i < count; i++) {
        room += iov[i].iov_len;
    }
    if (port->framing == VVB_NET_PORT_STREAM) {
        pthread_mutex_lock(&port->receiving);
        got = stream_read(port, vnet, iov + 1, count - 1);
        pthread_mutex_unlock(&port->receiving);
    } else {
        got = datagram_read(port, vnet, iov, count);
    }
    if (got > (ssize_t)room) {
        __atomic_add_fetch(&port->state.too_long, 1, __ATOMIC_RELAXED);
    } else if (got >= 0 && port->recording) {
        net_record(port->recording, VVB_NET_RECORDING_OUTBOUND, iov + 1, count - 1, (uint32_t)got,
                   net_now(CLOCK_REALTIME));
    }
    return got;
}

/* ---- without a card ---- */

int vvb_net_port_send(struct vvb_net_port *port, const char *header, const char *data,
                      uint32_t length)
{
    struct iovec iov[2] = {[1] = {(void *)data, length}};
    struct vnet vnet;

    memcpy(&vnet, header, sizeof(vnet));
    return net_port_write(port, &vnet, iov, 2, length);
}

int64_t vvb_net_port_receive(struct vvb_net_port *port, char *header, char *data, uint32_t room)
{
    struct iovec iov[3] = {[1] = {data, room}};
    struct vnet vnet = {0};
    ssize_t got;

    do {
        got = net_port_read(port, &vnet, iov, 2);
    } while (got > (ssize_t)room);
    memcpy(header, &vnet, sizeof(vnet));
    return got;
}
