/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Frames that crossed a port, appended to a file in pcapng's form (draft-ietf-opsawg-pcapng): an
 * enhanced packet block each, with its time and its direction. ../link/pcap.py has made the file
 * and says what there is to say; a frame that cannot be recorded is counted, and passes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "net.h"

#define PACKET_BLOCK 6u
#define OPTION_FLAGS 2u

struct block_start {
    uint32_t type, total, interface, time_high, time_low, captured, original;
};
struct block_end { /* the option "flags", the end of options, and the block's length again */
    uint16_t option, size;
    uint32_t direction;
    uint16_t last_option, last_size;
    uint32_t total;
};
_Static_assert(sizeof(struct block_start) == 28, "as in the file");
_Static_assert(sizeof(struct block_end) == 16, "as in the file");

struct vvb_net_recording {
    pthread_mutex_t lock;
    int fd, news_fd;
    uint64_t end, retry_ns;
    uint64_t not_before; /* of the monotonic clock; 0: all is well */
    struct vvb_net_recording_state state;
};

uint64_t net_now(int clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

struct vvb_net_recording *vvb_net_recording_new(int fd, uint64_t end, uint64_t retry_ns,
                                                int news_fd)
{
    struct vvb_net_recording *recording = calloc(1, sizeof(*recording));

    if (recording) {
        *recording = (struct vvb_net_recording){
            .fd = fd, .end = end, .retry_ns = retry_ns, .news_fd = news_fd};
        pthread_mutex_init(&recording->lock, NULL);
    }
    return recording;
}

void vvb_net_recording_free(struct vvb_net_recording *recording)
{
    if (recording) {
        pthread_mutex_destroy(&recording->lock);
        free(recording);
    }
}

void vvb_net_recording_end(struct vvb_net_recording *recording)
{
    pthread_mutex_lock(&recording->lock);
    recording->fd = -1;
    pthread_mutex_unlock(&recording->lock);
}

void vvb_net_recording_get_state(struct vvb_net_recording *recording,
                                 struct vvb_net_recording_state *state)
{
    pthread_mutex_lock(&recording->lock);
    *state = recording->state;
    pthread_mutex_unlock(&recording->lock);
}

/* Under the lock. */
static void append(struct vvb_net_recording *recording, const struct iovec *iov, uint32_t count,
                   uint32_t total)
{
    struct vvb_net_recording_state *state = &recording->state;
    int error = ENOSPC; /* of a block that was written in part */
    ssize_t written;

    if (recording->fd < 0) {
        return;
    }
    if (recording->not_before && net_now(CLOCK_MONOTONIC) < recording->not_before) {
        state->lost++;
        return;
    }
    do {
        written = pwritev(recording->fd, iov, (int)count, (off_t)recording->end);
    } while (written < 0 && errno == EINTR);
    if (written == (ssize_t)total) {
        recording->end += total;
        recording->not_before = 0;
        error = 0;
    } else {
        error = written < 0 ? errno : error;
        state->lost++;
        recording->not_before = net_now(CLOCK_MONOTONIC) + recording->retry_ns;
        /* The file ends with its last whole block. */
        state->cut_error = ftruncate(recording->fd, (off_t)recording->end) ? errno : 0;
    }
    if (!error != !state->error) {
        state->error = error;
        vvb_signal(recording->news_fd);
    }
}

void net_record(struct vvb_net_recording *recording, uint32_t direction, const struct iovec *iov,
                uint32_t count, uint32_t length, uint64_t when)
{
    static const uint8_t zeros[4];
    uint32_t padding = -length & 3, left = length, used = 1;
    uint32_t total = (uint32_t)sizeof(struct block_start) + length + padding +
                     (uint32_t)sizeof(struct block_end);
    struct block_start start = {.type = PACKET_BLOCK, .total = total,
                                .time_high = (uint32_t)(when >> 32), .time_low = (uint32_t)when,
                                .captured = length, .original = length};
    struct block_end end = {.option = OPTION_FLAGS, .size = 4, .direction = direction,
                            .total = total};
    struct iovec block[NET_PIECES + 3];

    block[0] = (struct iovec){&start, sizeof(start)};
    for (uint32_t i = 0; i < count && left && used <= NET_PIECES; i++) {
        block[used] = iov[i];
        if (block[used].iov_len > left) {
            block[used].iov_len = left;
        }
        left -= (uint32_t)block[used++].iov_len;
    }
    block[used++] = (struct iovec){(void *)zeros, padding};
    block[used++] = (struct iovec){&end, sizeof(end)};
    pthread_mutex_lock(&recording->lock);
    append(recording, block, used, total);
    pthread_mutex_unlock(&recording->lock);
}
