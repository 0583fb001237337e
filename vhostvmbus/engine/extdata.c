/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What is done with external data: copies, file I/O straight into or out of the guest's pages.
 *
 * The caller has checked offset + len against the segments' total.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/uio.h>

#include "engine.h"

#define VVB_IOV_MAX 256 /* below IOV_MAX, and small enough for any stack */

/* Walks the pieces of [offset, offset + len). */
struct walk {
    const struct vvb_seg *seg;
    const struct vvb_seg *end;
    uint64_t skip;
    uint64_t left;
};

static struct walk walk_start(const struct vvb_seg *segs, uint32_t count, uint64_t offset,
                              uint64_t len)
{
    struct walk walk = {.seg = segs, .end = segs + count, .skip = offset, .left = len};

    while (walk.seg < walk.end && walk.skip >= walk.seg->len) {
        walk.skip -= walk.seg->len;
        walk.seg++;
    }
    return walk;
}

static bool walk_next(struct walk *walk, struct iovec *piece)
{
    uint64_t here;

    if (walk->seg == walk->end || !walk->left) {
        return false;
    }
    here = walk->seg->len - walk->skip;
    if (here > walk->left) {
        here = walk->left;
    }
    piece->iov_base = walk->seg->host + walk->skip;
    piece->iov_len = here;
    walk->left -= here;
    walk->skip = 0;
    walk->seg++;
    return true;
}

int vvb_ext_lost(const void *opaque, uint32_t count)
{
    const struct vvb_seg *segs = opaque;

    for (uint32_t i = 0; i < count; i++) {
        if ((i == 0 || segs[i].region != segs[i - 1].region) && vvb_region_lost(segs[i].region)) {
            return -EFAULT;
        }
    }
    return 0;
}

int vvb_ext_read(const void *segs, uint32_t count, uint64_t offset, char *dst,
                 uint64_t len)
{
    struct walk walk = walk_start(segs, count, offset, len);
    struct iovec piece;

    while (walk_next(&walk, &piece)) {
        memcpy(dst, piece.iov_base, piece.iov_len);
        dst += piece.iov_len;
    }
    return vvb_ext_lost(segs, count);
}

int vvb_ext_write(const void *segs, uint32_t count, uint64_t offset, const char *src,
                  uint64_t len)
{
    struct walk walk = walk_start(segs, count, offset, len);
    struct iovec piece;

    while (walk_next(&walk, &piece)) {
        memcpy(piece.iov_base, src, piece.iov_len);
        src += piece.iov_len;
    }
    return vvb_ext_lost(segs, count);
}

int vvb_ext_fill(const void *segs, uint32_t count, uint64_t offset, int byte,
                 uint64_t len)
{
    struct walk walk = walk_start(segs, count, offset, len);
    struct iovec piece;

    while (walk_next(&walk, &piece)) {
        memset(piece.iov_base, byte, piece.iov_len);
    }
    return vvb_ext_lost(segs, count);
}

static int64_t file_io(const struct vvb_seg *segs, uint32_t count, uint64_t offset, uint64_t len,
                       int fd, int64_t file_offset, bool write, bool nowait)
{
    uint64_t done = 0;

    while (done < len) {
        struct walk walk = walk_start(segs, count, offset + done, len - done);
        struct iovec iov[VVB_IOV_MAX];
        ssize_t moved;
        int n = 0;

        while (n < VVB_IOV_MAX && walk_next(&walk, &iov[n])) {
            n++;
        }
        if (!n) {
            break;
        }
        if (write) {
            moved = pwritev(fd, iov, n, (off_t)(file_offset + (int64_t)done));
        } else {
            moved = preadv2(fd, iov, n, (off_t)(file_offset + (int64_t)done),
                            nowait ? RWF_NOWAIT : 0);
        }
        if (moved < 0) {
            if (errno == EINTR) {
                continue;
            }
            /* What arrived before the error counts; asking again brings the error back. */
            return done ? (int64_t)done : -errno;
        }
        if (moved == 0) {
            break;
        }
        done += (uint64_t)moved;
    }
    return (int64_t)done;
}

int64_t vvb_file_io(const struct vvb_seg *segs, uint32_t count, uint64_t offset, uint64_t len,
                    int fd, int64_t file_offset, bool write, bool nowait)
{
    struct vvb_writing writing = {.segs = segs, .count = count};
    int64_t moved;

    if (!write) {
        return file_io(segs, count, offset, len, fd, file_offset, false, nowait);
    }
    moved = vvb_writing_begin(&writing);
    if (!moved) {
        moved = file_io(segs, count, offset, len, fd, file_offset, true, nowait);
        vvb_writing_end(&writing);
    }
    return moved;
}

int64_t vvb_ext_preadv(const void *segs, uint32_t count, uint64_t offset, uint64_t len,
                       int fd, int64_t file_offset)
{
    return vvb_file_io(segs, count, offset, len, fd, file_offset, false, false);
}

int64_t vvb_ext_pwritev(const void *segs, uint32_t count, uint64_t offset, uint64_t len,
                        int fd, int64_t file_offset)
{
    return vvb_file_io(segs, count, offset, len, fd, file_offset, true, false);
}
