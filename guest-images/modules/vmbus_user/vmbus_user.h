/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * VMBus channels for user space: the interface of /dev/vmbus/<instance id>.
 *
 * Sizes are bytes, time-outs milliseconds (0: do not wait; negative: for ever), addresses
 * virtual ones of the caller. GUIDs are 16 bytes as they are on the wire. Structures have no
 * padding and the same layout for 32-bit callers.
 *
 * Errors common to all: ENODEV, the device is gone; ENOTCONN, no channel is open; EBUSY,
 * another open file has the channel; ESHUTDOWN, it was closed meanwhile; EINTR, a signal.
 */
#ifndef VMBUS_USER_H
#define VMBUS_USER_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define VMBUS_USER_ABI			1
#define VMBUS_USER_DEFINED_BYTES	120

enum vmbus_user_state {
	VMBUS_USER_CLOSED = 0,
	VMBUS_USER_OPEN = 1,
	VMBUS_USER_GONE = 2,
};

struct vmbus_user_info {
	__u32 abi;
	__u32 state;			/* enum vmbus_user_state */
	__u8 class_id[16];
	__u8 instance_id[16];
	__u32 vmbus_version;		/* major << 16 | minor */
	__u16 channel_flags;		/* of the offer, as the next two */
	__u16 mmio_megabytes;
	__u8 user_defined[VMBUS_USER_DEFINED_BYTES];
	/* zero unless the channel is open: */
	__u32 send_ring;		/* data bytes of the ring to the host */
	__u32 receive_ring;		/* and of the one from it */
	__u32 max_packet;		/* longest packet to send, its descriptor included */
	__u32 in_flight;		/* sent, to be completed by the host */
	__u32 completed;		/* completed, not waited for yet */
	__u32 received;			/* from the host, not received yet */
	__u32 to_complete;		/* received, to be completed by the user */
	__u32 gpadls;
	__u64 pinned_pages;		/* by packets and GPADLs of the user's memory */
	/* counted from the opening on: */
	__u64 sent;
	__u64 ring_full;		/* sends that found no room at first */
	__u64 completions;
	__u64 stray_completions;	/* with an id that is not in flight */
	__u64 packets;			/* from the host, all kinds but completions */
	__u64 dropped;			/* of those: no memory */
};

/*
 * Open the channel. The file that does owns it until it closes it or is closed.
 * Ring sizes in pages, each with its one page of header: 2 at least, both together at most
 * 1024. ECONNREFUSED: the host refused.
 */
struct vmbus_user_open {
	__u32 send_pages;
	__u32 receive_pages;
	__u32 max_packet;		/* longest from the host; 0: what the ring can carry */
	__u32 user_data_length;
	__u8 user_data[VMBUS_USER_DEFINED_BYTES];
};

/*
 * One range of external data.
 *
 * page_count 0: byte_count bytes at addr; byte_offset must be 0, the offset in the first page
 * follows from addr.
 * page_count > 0: addr is an array of that many __u64, each the address of a page of the
 * caller's; the same page may come again. byte_offset, less than a page, is where the data
 * begins in the first; ceil((byte_offset + byte_count) / 4096) must be page_count.
 */
struct vmbus_user_range {
	__u64 addr;
	__u32 byte_count;
	__u32 byte_offset;
	__u32 page_count;
	__u32 reserved;			/* 0 */
};

/* The host completes the packet; required with external data. */
#define VMBUS_USER_WAIT_FOR_COMPLETION	(1U << 0)
/* The host writes to the external data: the pages must be writable and become dirty. */
#define VMBUS_USER_HOST_WRITES		(1U << 1)

/*
 * Send a packet: in-band if there are no ranges, GPA direct if there are. The buffer is copied
 * and may change afterwards; the pages of the ranges are pinned until the completion comes.
 * timeout is for room in the ring, counted when all who came before have been served.
 * EMSGSIZE: longer than the ring can ever carry. EAGAIN: no room in time, nothing was sent.
 * ENOBUFS: too many packets are in flight or completed and not waited for. ENOMEM: also when
 * RLIMIT_MEMLOCK does not allow to pin that many pages. EFAULT: memory that cannot be used.
 */
struct vmbus_user_send {
	__u64 buffer;
	__u32 buffer_length;
	__u32 flags;
	__u64 ranges;			/* array of struct vmbus_user_range */
	__u32 range_count;
	__u32 reply_capacity;		/* longest completion payload to keep */
	__s32 timeout;
	__u32 reserved;			/* 0 */
	__u64 transaction_id;		/* out; 0 without VMBUS_USER_WAIT_FOR_COMPLETION */
};

/*
 * Take the completion of a packet; with transaction_id 0 of whichever packet was completed
 * first and not waited for. A time-out (ETIMEDOUT) leaves the packet in flight, its pages pinned.
 * ENOENT: no such packet. reply_length is the payload's length as the host sent it, a multiple
 * of 8; copied, how much of it is in the buffer: what is longer than the packet's
 * reply_capacity or than capacity is cut off.
 */
struct vmbus_user_wait {
	__u64 transaction_id;		/* in and out */
	__u64 reply;
	__u32 capacity;
	__u32 reply_length;		/* out */
	__s32 timeout;
	__u32 copied;			/* out */
};

/* The host waits for the packet's completion. */
#define VMBUS_USER_TO_COMPLETE		(1U << 0)

/*
 * Receive a packet that the host sent by itself. EMSGSIZE: longer than capacity; length says
 * how long, and the packet stays. ETIMEDOUT: none in time. ENOBUFS: too many packets wait to be
 * completed.
 */
struct vmbus_user_receive {
	__u64 buffer;
	__u32 capacity;
	__u32 length;			/* out: bytes in the buffer, a multiple of 8 */
	__u32 header_length;		/* out: of those, the descriptor's type-specific rest */
	__u16 type;			/* out: 6 in-band, 7 transfer pages, … */
	__u16 flags;			/* out: VMBUS_USER_TO_COMPLETE */
	__u64 transaction_id;		/* out */
	__s32 timeout;
	__u32 reserved;			/* 0 */
};

/* Complete a received packet, once. ENOENT: none with this id waits for it. EAGAIN: no room. */
struct vmbus_user_complete {
	__u64 transaction_id;
	__u64 buffer;
	__u32 buffer_length;
	__s32 timeout;
};

/*
 * Create a GPADL, of the caller's memory (page-aligned, pinned while it exists) or, with
 * addr 0, of memory that the kernel allocates and mmap(2) at mmap_offset shows. At most 8190
 * pages. Deleting waits until the host has let go of it.
 */
struct vmbus_user_gpadl {
	__u64 addr;
	__u64 length;			/* multiple of the page size */
	__u32 handle;			/* out */
	__u32 reserved;			/* 0 */
	__u64 mmap_offset;		/* out */
};

#define VMBUS_USER_IOC_INFO		_IOR('V', 0xe0, struct vmbus_user_info)
#define VMBUS_USER_IOC_OPEN		_IOW('V', 0xe1, struct vmbus_user_open)
#define VMBUS_USER_IOC_CLOSE		_IO('V', 0xe2)
#define VMBUS_USER_IOC_SEND		_IOWR('V', 0xe3, struct vmbus_user_send)
#define VMBUS_USER_IOC_WAIT		_IOWR('V', 0xe4, struct vmbus_user_wait)
#define VMBUS_USER_IOC_RECEIVE		_IOWR('V', 0xe5, struct vmbus_user_receive)
#define VMBUS_USER_IOC_COMPLETE		_IOW('V', 0xe6, struct vmbus_user_complete)
#define VMBUS_USER_IOC_GPADL_CREATE	_IOWR('V', 0xe7, struct vmbus_user_gpadl)
#define VMBUS_USER_IOC_GPADL_DELETE	_IOW('V', 0xe8, __u32)

/*
 * poll(2): POLLIN, a packet to receive; POLLPRI, a completion to take; POLLHUP, the device is
 * gone; POLLERR, no channel is open. POLLOUT is always there while the channel is open: a
 * send waits for room by itself.
 */

#endif
