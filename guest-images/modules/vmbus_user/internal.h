/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * vmbus_user: what its files share.
 *
 * Locks, outermost first:
 *   device->control	mutex: opening, closing, GPADLs; held while the host is waited for, so
 *			at most one such wait is there for a rescind to end
 *   session->send_lock	mutex: order of senders, held while waiting for room
 *   device->irq_lock	spinlock, hard interrupts: device->session and its users
 *   session->lock	spinlock, process context: packets, queues, GPADL list
 *
 * A session is one open channel. Whoever uses it outside device->control counts as a user;
 * closing keeps new users away, wakes the old ones and waits until they have left. So no lock
 * is held over page faults that mmap() would also need.
 */
#ifndef VMBUS_USER_INTERNAL_H
#define VMBUS_USER_INTERNAL_H

#include <linux/cdev.h>
#include <linux/device.h>
#include <linux/fs.h>
#include <linux/hyperv.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/spinlock.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include "vmbus_user.h"

#define VU_MAX_RING_BYTES	SZ_4M		/* one allocation of the buddy allocator */
#define VU_MAX_PACKET		(U16_MAX * 8U)	/* the descriptor counts in units of 8 */
#define VU_TRAILER		8U
#define VU_MAX_TRACKED		16384U		/* packets in flight, and to be completed */
#define VU_MAX_QUEUED		1024U		/* received packets; more stay in the ring */
#define VU_MAX_QUEUED_BYTES	SZ_2M
#define VU_MAX_GPADL_PAGES	8190U		/* range_buflen, a u16, is 8 + 8 per page */

struct vu_session;

struct vu_device {
	struct device dev;
	struct cdev cdev;
	struct hv_device *hdev;		/* NULL once removed; under control */
	struct mutex control;
	spinlock_t irq_lock;
	struct vu_session *session;	/* under irq_lock */
	bool gone;			/* under irq_lock */
	wait_queue_head_t wait;		/* everything that changes */
	struct vmbus_user_info offer;	/* the part that never changes */
};

/* Pages of a process, pinned and accounted. */
struct vu_pages {
	struct page **page;
	unsigned long count;		/* pinned */
	unsigned long room;		/* of page[] */
	unsigned long charged;		/* to mm->pinned_vm */
	struct mm_struct *mm;
	bool dirty;			/* mark them so when unpinned */
};

/* A packet that the host is to complete. */
struct vu_packet {
	struct list_head node;		/* in session->completed, once it is */
	bool claimed;			/* its completion came and is being taken */
	bool complete;
	u32 id;
	struct vu_pages pages;
	u32 reply_capacity;
	u32 reply_length;		/* as sent; may be more than was kept */
	u8 reply[];
};

/* A packet from the host. */
struct vu_received {
	struct list_head node;
	u64 id;
	u16 type;
	u16 flags;
	u32 header_length;
	u32 length;			/* header included */
	u8 data[];
};

struct vu_gpadl {
	struct list_head node;
	struct kref ref;
	struct vmbus_gpadl gpadl;
	void *memory;
	bool from_kernel;
	struct vu_pages pages;
};

struct vu_session {
	struct vu_device *vd;
	struct vmbus_channel *channel;
	struct file *owner;
	unsigned int users;		/* under vd->irq_lock, as the next two */
	bool closing;
	bool live;			/* interrupts may start the work */
	struct work_struct work;
	struct mutex send_lock;
	u32 max_packet;

	spinlock_t lock;
	struct xarray packets;		/* id to vu_packet, until waited for */
	u32 next_id;
	u32 tracked;			/* entries of packets */
	struct list_head completed;	/* vu_packet, oldest first */
	u32 completed_count;
	struct list_head queue;		/* vu_received, oldest first */
	u32 queued;
	size_t queued_bytes;
	bool stalled;			/* the queue is full, the ring is left alone */
	struct xarray to_complete;	/* host's id to how many of it, a value entry */
	u32 to_complete_count;
	struct list_head gpadls;
	u32 gpadl_count;
	atomic_long_t pinned;
	u64 sent, ring_full, completions, stray_completions, received, dropped;
};

/* session.c */
struct vu_session *vu_session_get(struct vu_device *vd, struct file *file);
void vu_session_put(struct vu_session *s);
int vu_open(struct vu_device *vd, struct file *file, const struct vmbus_user_open *arg);
void vu_close_session(struct vu_device *vd);
bool vu_queue_resumes(struct vu_session *s);
void vu_kick_work(struct vu_session *s);
void vu_fill_info(struct vu_session *s, struct vmbus_user_info *info);
int vu_start(void);
void vu_stop(void);

/* packet.c */
int vu_send(struct vu_session *s, struct vmbus_user_send *arg);
int vu_wait(struct vu_session *s, struct vmbus_user_wait *arg);
int vu_receive(struct vu_session *s, struct vmbus_user_receive *arg);
int vu_complete(struct vu_session *s, const struct vmbus_user_complete *arg);
void vu_packet_free(struct vu_session *s, struct vu_packet *p);

/* memory.c */
int vu_pages_init(struct vu_pages *set, unsigned long room);
int vu_pages_pin(struct vu_pages *set, u64 addr, unsigned long count, bool write);
void vu_pages_release(struct vu_pages *set);
int vu_gpadl_create(struct vu_session *s, struct vmbus_user_gpadl *arg);
int vu_gpadl_delete(struct vu_session *s, u32 handle);
void vu_gpadl_delete_all(struct vu_session *s);
int vu_gpadl_mmap(struct vu_session *s, struct vm_area_struct *vma);

#endif
