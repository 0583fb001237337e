// SPDX-License-Identifier: GPL-2.0-only
/*
 * vmbus_user: an open channel, from its opening to its end, and what comes in on it.
 *
 * The channel's interrupt only masks further ones and starts the work, which empties the ring,
 * unmasks and looks again. The work runs in process context, so it may free pinned pages and
 * allocate memory; a work item never runs twice at the same time, so only one reads the ring.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/sched.h>
#include <linux/slab.h>

#include "internal.h"

static struct workqueue_struct *vu_workqueue;

int vu_start(void)
{
	vu_workqueue = alloc_workqueue("vmbus_user", WQ_HIGHPRI, 0);
	return vu_workqueue ? 0 : -ENOMEM;
}

void vu_stop(void)
{
	destroy_workqueue(vu_workqueue);
}

/* Become a user of the session that file owns, or, without a file, of any. */
struct vu_session *vu_session_get(struct vu_device *vd, struct file *file)
{
	struct vu_session *s;
	unsigned long flags;

	spin_lock_irqsave(&vd->irq_lock, flags);
	s = vd->session;
	if (vd->gone)
		s = ERR_PTR(-ENODEV);
	else if (!s || s->closing)
		s = ERR_PTR(-ENOTCONN);
	else if (file && s->owner != file)
		s = ERR_PTR(-EBUSY);
	else
		s->users++;
	spin_unlock_irqrestore(&vd->irq_lock, flags);
	return s;
}

void vu_session_put(struct vu_session *s)
{
	struct vu_device *vd = s->vd;
	unsigned long flags;
	bool last;

	spin_lock_irqsave(&vd->irq_lock, flags);
	last = !--s->users && s->closing;
	spin_unlock_irqrestore(&vd->irq_lock, flags);
	/* s may be gone by now, vd is kept by the caller's open file. */
	if (last)
		wake_up_all(&vd->wait);
}

void vu_kick_work(struct vu_session *s)
{
	struct vu_device *vd = s->vd;
	unsigned long flags;

	spin_lock_irqsave(&vd->irq_lock, flags);
	if (s->live)
		queue_work(vu_workqueue, &s->work);
	spin_unlock_irqrestore(&vd->irq_lock, flags);
}

/* In hard interrupt context, because of HV_CALL_ISR. */
static void vu_interrupt(void *context)
{
	struct vu_device *vd = context;
	struct vu_session *s;
	unsigned long flags;

	spin_lock_irqsave(&vd->irq_lock, flags);
	s = vd->session;
	if (s && s->live) {
		hv_begin_read(&s->channel->inbound);
		queue_work(vu_workqueue, &s->work);
	}
	spin_unlock_irqrestore(&vd->irq_lock, flags);
}

static void vu_take_completion(struct vu_session *s, const struct vmpacket_descriptor *desc)
{
	u32 length = (desc->len8 - desc->offset8) << 3;
	struct vu_packet *p = NULL;

	/* Nobody else frees a packet that is claimed and not complete. */
	spin_lock(&s->lock);
	if (desc->trans_id <= U32_MAX)
		p = xa_load(&s->packets, desc->trans_id);
	if (!p || p->claimed) {
		s->stray_completions++;
		spin_unlock(&s->lock);
		return;
	}
	p->claimed = true;
	spin_unlock(&s->lock);

	p->reply_length = length;
	memcpy(p->reply, (const u8 *)desc + (desc->offset8 << 3),
	       min(length, p->reply_capacity));
	atomic_long_sub(p->pages.count, &s->pinned);
	vu_pages_release(&p->pages);

	spin_lock(&s->lock);
	p->complete = true;
	list_add_tail(&p->node, &s->completed);
	s->completed_count++;
	s->completions++;
	spin_unlock(&s->lock);
}

static void vu_take_packet(struct vu_session *s, const struct vmpacket_descriptor *desc)
{
	u32 length = (desc->len8 << 3) - sizeof(*desc);
	struct vu_received *r;

	r = kvmalloc(struct_size(r, data, length), GFP_KERNEL);
	if (r) {
		r->id = desc->trans_id;
		r->type = desc->type;
		r->flags = desc->flags & VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED ?
			   VMBUS_USER_TO_COMPLETE : 0;
		r->header_length = (desc->offset8 << 3) - sizeof(*desc);
		r->length = length;
		memcpy(r->data, desc + 1, length);
	}
	spin_lock(&s->lock);
	s->received++;
	if (r) {
		list_add_tail(&r->node, &s->queue);
		s->queued++;
		s->queued_bytes += length;
	} else {
		s->dropped++;
	}
	spin_unlock(&s->lock);
}

/*
 * Take all that is in the ring. False: the user does not receive fast enough, the rest waits.
 * hv_pkt_iter_first() hands out a private copy whose lengths agree with each other.
 */
static bool vu_drain(struct vu_session *s)
{
	struct vmpacket_descriptor *desc;
	bool stalled;

	foreach_vmbus_pkt(desc, s->channel) {
		if (!READ_ONCE(s->live))
			break;
		if (desc->type == VM_PKT_COMP) {
			vu_take_completion(s, desc);
			continue;
		}
		spin_lock(&s->lock);
		stalled = s->queued >= VU_MAX_QUEUED || s->queued_bytes >= VU_MAX_QUEUED_BYTES;
		s->stalled = stalled;
		spin_unlock(&s->lock);
		if (stalled)
			break;
		vu_take_packet(s, desc);
	}
	/* Where it ended by itself, foreach_vmbus_pkt() has told the host already. */
	if (desc)
		hv_pkt_iter_close(s->channel);
	return !desc;
}

static void vu_work(struct work_struct *work)
{
	struct vu_session *s = container_of(work, struct vu_session, work);
	bool more = true;

	while (more && READ_ONCE(s->live)) {
		more = vu_drain(s);
		wake_up_all(&s->vd->wait);
		if (more && !hv_end_read(&s->channel->inbound))
			break;
		hv_begin_read(&s->channel->inbound);
		cond_resched();
	}
}

/* The user has taken something from the queue; called with s->lock held. */
bool vu_queue_resumes(struct vu_session *s)
{
	if (!s->stalled || s->queued > VU_MAX_QUEUED / 2 ||
	    s->queued_bytes > VU_MAX_QUEUED_BYTES / 2)
		return false;
	s->stalled = false;
	return true;
}

static u32 vu_longest(const struct hv_ring_buffer_info *ring)
{
	/* A ring is never filled to the last byte: it would look empty. */
	return min(ring->ring_datasize - VU_TRAILER - 8, VU_MAX_PACKET);
}

static struct vu_session *vu_session_alloc(struct vu_device *vd, struct file *file)
{
	struct vu_session *s = kzalloc(sizeof(*s), GFP_KERNEL_ACCOUNT);

	if (!s)
		return NULL;
	s->vd = vd;
	s->channel = vd->hdev->channel;
	s->owner = file;
	INIT_WORK(&s->work, vu_work);
	mutex_init(&s->send_lock);
	spin_lock_init(&s->lock);
	xa_init_flags(&s->packets, XA_FLAGS_ALLOC1);
	xa_init(&s->to_complete);
	INIT_LIST_HEAD(&s->completed);
	INIT_LIST_HEAD(&s->queue);
	INIT_LIST_HEAD(&s->gpadls);
	return s;
}

static void vu_session_free(struct vu_session *s)
{
	struct vu_received *r, *next;
	struct vu_packet *p;
	unsigned long id;

	xa_for_each(&s->packets, id, p)
		vu_packet_free(s, p);
	list_for_each_entry_safe(r, next, &s->queue, node)
		kvfree(r);
	xa_destroy(&s->packets);
	xa_destroy(&s->to_complete);
	kfree(s);
}

/* The channel as another driver would like to find it. */
static void vu_channel_restore(struct vmbus_channel *channel)
{
	unsigned long flags;

	spin_lock_irqsave(&channel->sched_lock, flags);
	channel->onchannel_callback = NULL;
	spin_unlock_irqrestore(&channel->sched_lock, flags);
	set_channel_read_mode(channel, HV_CALL_BATCHED);
	channel->max_pkt_size = 0;
}

/* Called with vd->control held and the device there. */
int vu_open(struct vu_device *vd, struct file *file, const struct vmbus_user_open *arg)
{
	u32 send = arg->send_pages, receive = arg->receive_pages;
	struct vmbus_channel *channel = vd->hdev->channel;
	u8 user_data[VMBUS_USER_DEFINED_BYTES];
	struct vu_session *s;
	unsigned long flags;
	int ret;

	if (send < 2 || receive < 2 || arg->user_data_length > sizeof(user_data) ||
	    send > VU_MAX_RING_BYTES >> PAGE_SHIFT || receive > VU_MAX_RING_BYTES >> PAGE_SHIFT ||
	    send + receive > VU_MAX_RING_BYTES >> PAGE_SHIFT ||
	    (arg->max_packet && arg->max_packet < sizeof(struct vmpacket_descriptor)))
		return -EINVAL;
	if (vd->session)
		return -EBUSY;
	s = vu_session_alloc(vd, file);
	if (!s)
		return -ENOMEM;

	/* A longer packet would be cut where it ends here, and the rest taken for the next. */
	channel->max_pkt_size = min_t(u32, (receive - 1) << PAGE_SHIFT, VU_MAX_PACKET);
	if (arg->max_packet)
		channel->max_pkt_size = min(channel->max_pkt_size, ALIGN(arg->max_packet, 8));
	set_channel_read_mode(channel, HV_CALL_ISR);
	/* Our transaction ids go out as they are, whatever the driver before us had. */
	channel->next_request_id_callback = NULL;
	channel->request_addr_callback = NULL;
	channel->rqstor_size = 0;
	memset(&channel->requestor, 0, sizeof(channel->requestor));
	memcpy(user_data, arg->user_data, sizeof(user_data));
	ret = vmbus_open(channel, send << PAGE_SHIFT, receive << PAGE_SHIFT, user_data,
			 arg->user_data_length, vu_interrupt, vd);
	if (ret) {
		vu_channel_restore(channel);
		vu_session_free(s);
		return ret == -EAGAIN ? -ECONNREFUSED : ret;
	}
	s->max_packet = vu_longest(&channel->outbound);

	spin_lock_irqsave(&vd->irq_lock, flags);
	s->live = true;
	vd->session = s;
	/* For what came while there was no session to come to. */
	hv_begin_read(&channel->inbound);
	queue_work(vu_workqueue, &s->work);
	spin_unlock_irqrestore(&vd->irq_lock, flags);
	return 0;
}

static bool vu_deserted(struct vu_session *s)
{
	unsigned long flags;
	bool deserted;

	spin_lock_irqsave(&s->vd->irq_lock, flags);
	deserted = !s->users;
	spin_unlock_irqrestore(&s->vd->irq_lock, flags);
	return deserted;
}

/*
 * Close the channel, if it is open; called with vd->control held. When vmbus_close() is back,
 * the host has let go of the rings and of the pages that packets in flight describe.
 */
void vu_close_session(struct vu_device *vd)
{
	struct vu_session *s = vd->session;
	unsigned long flags;

	if (!s)
		return;
	spin_lock_irqsave(&vd->irq_lock, flags);
	s->closing = true;
	WRITE_ONCE(s->live, false);
	spin_unlock_irqrestore(&vd->irq_lock, flags);
	wake_up_all(&vd->wait);
	wait_event(vd->wait, vu_deserted(s));
	cancel_work_sync(&s->work);

	/* VMBus before 4.0 does not know a GPADL any more once its channel is closed. */
	vu_gpadl_delete_all(s);
	vmbus_close(s->channel);
	vu_channel_restore(s->channel);

	spin_lock_irqsave(&vd->irq_lock, flags);
	vd->session = NULL;
	spin_unlock_irqrestore(&vd->irq_lock, flags);
	wake_up_all(&vd->wait);
	vu_session_free(s);
}

void vu_fill_info(struct vu_session *s, struct vmbus_user_info *info)
{
	info->state = VMBUS_USER_OPEN;
	info->send_ring = s->channel->outbound.ring_datasize;
	info->receive_ring = s->channel->inbound.ring_datasize;
	info->max_packet = s->max_packet;
	info->pinned_pages = atomic_long_read(&s->pinned);
	spin_lock(&s->lock);
	info->in_flight = s->tracked - s->completed_count;
	info->completed = s->completed_count;
	info->received = s->queued;
	info->to_complete = s->to_complete_count;
	info->gpadls = s->gpadl_count;
	info->sent = s->sent;
	info->ring_full = s->ring_full;
	info->completions = s->completions;
	info->stray_completions = s->stray_completions;
	info->packets = s->received;
	info->dropped = s->dropped;
	spin_unlock(&s->lock);
}
