/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Waiting for eventfds, and signalling them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sys/uio.h>
#include <unistd.h>

#include "engine.h"

int vvb_wait(const int *fds, uint32_t count, int timeout_ms)
{
    struct pollfd poll_fds[8];
    int fired = 0;

    if (count > 8) {
        return -EINVAL;
    }
    for (uint32_t i = 0; i < count; i++) {
        poll_fds[i] = (struct pollfd){.fd = fds[i], .events = POLLIN};
    }
    if (poll(poll_fds, count, timeout_ms) < 0) {
        return errno == EINTR ? 0 : -errno;
    }
    for (uint32_t i = 0; i < count; i++) {
        if (poll_fds[i].revents) {
            uint64_t value;
            struct iovec iov = {&value, sizeof(value)};

            /*
             * Whether a read blocks is a property of the open file, which the peer may change, and
             * he may be reading as well: so it is asked for here. EAGAIN: it was empty.
             */
            if (preadv2(fds[i], &iov, 1, -1, RWF_NOWAIT) < 0 && errno != EAGAIN &&
                (errno != EOPNOTSUPP ||
                 (read(fds[i], &value, sizeof(value)) < 0 && errno != EAGAIN))) {
                return -errno;
            }
            fired |= 1 << i;
        }
    }
    return fired;
}

int vvb_signal(int fd)
{
    uint64_t one = 1;

    while (write(fd, &one, sizeof(one)) < 0) {
        if (errno == EAGAIN) {
            return 0; /* the counter is at its limit: it is signalled already */
        }
        if (errno != EINTR) {
            return -errno;
        }
    }
    return 0;
}
