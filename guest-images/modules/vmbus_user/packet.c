// SPDX-License-Identifier: GPL-2.0-only
/*
 * vmbus_user: packets, in both directions.
 *
 * Transaction ids are handed out in turn, from 1, skipping those still in use.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/slab.h>
#include <linux/uaccess.h>

#include "internal.h"

#define GPA_DIRECT_HEADER	((u32)(sizeof(struct vmpacket_descriptor) + 2 * sizeof(u32)))
#define SPACE_POLL		msecs_to_jiffies(20)

/* What is to go into the ring. */
struct vu_outgoing {
	enum vmbus_packet_type type;
	u32 flags;
	u64 id;
	void *payload;
	u32 payload_length;
	struct vmbus_packet_mpb_array *gpa;	/* for GPA direct: all before the payload */
	u32 gpa_length;
};

static long vu_jiffies(s32 timeout)
{
	return timeout < 0 ? MAX_SCHEDULE_TIMEOUT : msecs_to_jiffies(timeout);
}

static u32 vu_packet_length(const struct vu_outgoing *out)
{
	u32 header = out->gpa ? out->gpa_length : sizeof(struct vmpacket_descriptor);

	return ALIGN(header + out->payload_length, 8);
}

static int vu_push_once(struct vu_session *s, const struct vu_outgoing *out)
{
	if (READ_ONCE(s->closing))
		return -ESHUTDOWN;
	if (out->gpa)
		return vmbus_sendpacket_mpb_desc(s->channel, out->gpa, out->gpa_length,
						 out->payload, out->payload_length, out->id);
	return vmbus_sendpacket(s->channel, out->payload, out->payload_length, out->id,
				out->type, out->flags);
}

/*
 * Put a packet into the ring, after those of all who came before.
 *
 * While there is no room the host knows how much is wanted and signals when there is. It need
 * not if it lacks that feature, and cannot while it is away; so look by ourselves as well.
 */
static int vu_push(struct vu_session *s, const struct vu_outgoing *out, s32 timeout)
{
	u32 needed = vu_packet_length(out) + VU_TRAILER;
	unsigned long end = 0;
	struct vmbus_channel *channel = s->channel;
	long left;
	int ret;

	if (!timeout) {
		if (!mutex_trylock(&s->send_lock))
			return -EAGAIN;
	} else {
		ret = mutex_lock_interruptible(&s->send_lock);
		if (ret)
			return -EINTR;
		end = jiffies + (timeout > 0 ? msecs_to_jiffies(timeout) : 0);
	}
	ret = vu_push_once(s, out);
	if (ret == -EAGAIN) {
		spin_lock(&s->lock);
		s->ring_full++;
		spin_unlock(&s->lock);
	}
	while (ret == -EAGAIN && timeout) {
		left = timeout < 0 ? SPACE_POLL : min_t(long, end - jiffies, SPACE_POLL);
		if (left <= 0)
			break;
		set_channel_pending_send_size(channel, needed);
		/* The host reads the pending size after it has moved its read index. */
		virt_mb();
		left = wait_event_interruptible_timeout(s->vd->wait, READ_ONCE(s->closing) ||
				hv_get_bytes_to_write(&channel->outbound) > needed, left);
		set_channel_pending_send_size(channel, 0);
		if (left < 0) {
			ret = -EINTR;
			break;
		}
		ret = vu_push_once(s, out);
	}
	if (!ret) {
		spin_lock(&s->lock);
		s->sent++;
		spin_unlock(&s->lock);
	}
	mutex_unlock(&s->send_lock);
	return ret;
}

void vu_packet_free(struct vu_session *s, struct vu_packet *p)
{
	if (!p->complete)
		atomic_long_sub(p->pages.count, &s->pinned);
	vu_pages_release(&p->pages);
	kvfree(p);
}

static struct vu_packet *vu_packet_alloc(struct vu_session *s, u32 reply_capacity)
{
	struct vu_packet *p;
	int ret;

	reply_capacity = min(reply_capacity, VU_MAX_PACKET);
	p = kvzalloc(struct_size(p, reply, reply_capacity), GFP_KERNEL_ACCOUNT);
	if (!p)
		return ERR_PTR(-ENOMEM);
	p->reply_capacity = reply_capacity;

	spin_lock(&s->lock);
	ret = s->tracked < VU_MAX_TRACKED ? 0 : -ENOBUFS;
	if (!ret)
		s->tracked++;
	spin_unlock(&s->lock);
	if (!ret) {
		ret = xa_alloc_cyclic(&s->packets, &p->id, p, xa_limit_32b, &s->next_id,
				      GFP_KERNEL_ACCOUNT);
		if (ret >= 0)
			return p;
		spin_lock(&s->lock);
		s->tracked--;
		spin_unlock(&s->lock);
	}
	kvfree(p);
	return ERR_PTR(ret);
}

/* Forget a packet that was not sent; false if the host has completed it all the same. */
static bool vu_packet_abandon(struct vu_session *s, struct vu_packet *p)
{
	bool claimed;

	spin_lock(&s->lock);
	claimed = p->claimed;
	if (!claimed) {
		xa_erase(&s->packets, p->id);
		s->tracked--;
	}
	spin_unlock(&s->lock);
	if (!claimed)
		vu_packet_free(s, p);
	return !claimed;
}

/* How many pages a range has; negative if it makes no sense. */
static long vu_range_pages(const struct vmbus_user_range *range)
{
	u64 offset = range->page_count ? range->byte_offset : range->addr & ~PAGE_MASK;
	u64 pages = (offset + range->byte_count + PAGE_SIZE - 1) >> PAGE_SHIFT;

	if (!range->byte_count || range->reserved || range->byte_offset >= PAGE_SIZE)
		return -EINVAL;
	if (range->page_count ? range->page_count != pages : range->byte_offset)
		return -EINVAL;
	return pages;
}

/* Pin the pages that a range's array names, as many as possible at a time. */
static int vu_pin_listed(struct vu_pages *set, const struct vmbus_user_range *range, bool write)
{
	u32 first, next;
	u64 *list;
	int ret = 0;

	list = vmemdup_user(u64_to_user_ptr(range->addr), array_size(range->page_count, 8));
	if (IS_ERR(list))
		return PTR_ERR(list);
	for (first = 0; first < range->page_count && !ret; first = next) {
		next = first + 1;
		while (next < range->page_count && list[next] == list[next - 1] + PAGE_SIZE)
			next++;
		ret = vu_pages_pin(set, list[first], next - first, write);
	}
	kvfree(list);
	return ret;
}

/* Pin what the ranges describe, and describe it to the host. */
static int vu_describe(struct vu_packet *p, struct vu_outgoing *out,
		       const struct vmbus_user_range *ranges, u32 count, unsigned long pages,
		       bool write)
{
	u64 *wire;
	u32 i;
	int ret;

	out->gpa_length = GPA_DIRECT_HEADER + count * 8 + pages * 8;
	out->gpa = kvzalloc(out->gpa_length, GFP_KERNEL_ACCOUNT);
	if (!out->gpa)
		return -ENOMEM;
	ret = vu_pages_init(&p->pages, pages);
	if (ret)
		return ret;
	p->pages.dirty = write;
	out->gpa->rangecount = count;
	wire = (u64 *)&out->gpa->range;
	for (i = 0; i < count; i++) {
		const struct vmbus_user_range *range = &ranges[i];
		u32 offset = range->page_count ? range->byte_offset : range->addr & ~PAGE_MASK;
		unsigned long page = p->pages.count;

		if (range->page_count)
			ret = vu_pin_listed(&p->pages, range, write);
		else
			ret = vu_pages_pin(&p->pages, range->addr & PAGE_MASK,
					   vu_range_pages(range), write);
		if (ret)
			return ret;
		*wire++ = (u64)offset << 32 | range->byte_count;
		for (; page < p->pages.count; page++)
			*wire++ = page_to_hvpfn(p->pages.page[page]);
	}
	return 0;
}

static struct vmbus_user_range *vu_get_ranges(const struct vmbus_user_send *arg,
					      unsigned long *pages)
{
	struct vmbus_user_range *ranges;
	u32 i;

	ranges = vmemdup_user(u64_to_user_ptr(arg->ranges),
			      array_size(arg->range_count, sizeof(*ranges)));
	if (IS_ERR(ranges))
		return ranges;
	*pages = 0;
	for (i = 0; i < arg->range_count; i++) {
		long count = vu_range_pages(&ranges[i]);

		if (count < 0) {
			kvfree(ranges);
			return ERR_PTR(count);
		}
		*pages += count;
	}
	return ranges;
}

int vu_send(struct vu_session *s, struct vmbus_user_send *arg)
{
	bool wait = arg->flags & VMBUS_USER_WAIT_FOR_COMPLETION;
	bool write = arg->flags & VMBUS_USER_HOST_WRITES;
	struct vmbus_user_range *ranges = NULL;
	struct vu_outgoing out = { };
	struct vu_packet *p = NULL;
	unsigned long pages = 0;
	u64 length;
	int ret;

	if (arg->flags & ~(VMBUS_USER_WAIT_FOR_COMPLETION | VMBUS_USER_HOST_WRITES) ||
	    arg->reserved || (arg->range_count && !wait))
		return -EINVAL;
	if (arg->buffer_length > s->max_packet || arg->range_count > s->max_packet / 16)
		return -EMSGSIZE;
	if (arg->range_count) {
		ranges = vu_get_ranges(arg, &pages);
		if (IS_ERR(ranges))
			return PTR_ERR(ranges);
		length = GPA_DIRECT_HEADER + arg->range_count * 8ULL + pages * 8ULL;
	} else {
		length = sizeof(struct vmpacket_descriptor);
	}
	ret = -EMSGSIZE;
	if (ALIGN(length + arg->buffer_length, 8) > s->max_packet)
		goto free;

	out.type = VM_PKT_DATA_INBAND;
	out.flags = wait ? VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED : 0;
	out.payload_length = arg->buffer_length;
	if (out.payload_length) {
		out.payload = vmemdup_user(u64_to_user_ptr(arg->buffer), out.payload_length);
		ret = PTR_ERR_OR_ZERO(out.payload);
		if (ret) {
			out.payload = NULL;
			goto free;
		}
	}
	if (wait) {
		p = vu_packet_alloc(s, arg->reply_capacity);
		ret = PTR_ERR_OR_ZERO(p);
		if (ret) {
			p = NULL;
			goto free;
		}
		out.id = p->id;
	}
	if (ranges) {
		ret = vu_describe(p, &out, ranges, arg->range_count, pages, write);
		atomic_long_add(p->pages.count, &s->pinned);
		if (ret)
			goto abandon;
	}
	/* From here on, once it is in the ring, p may be completed, waited for and freed. */
	ret = vu_push(s, &out, arg->timeout);
	arg->transaction_id = out.id;
	if (ret == -ENODEV) {
		/* It may be in the ring of a channel that is being rescinded; kept to its end. */
		p = NULL;
	}
abandon:
	if (ret && p && !vu_packet_abandon(s, p))
		ret = 0;
free:
	kvfree(out.payload);
	kvfree(out.gpa);
	kvfree(ranges);
	return ret;
}

/* Take a completed packet out; -EINPROGRESS if it is not complete. */
static int vu_reap(struct vu_session *s, u64 id, struct vu_packet **found)
{
	struct vu_packet *p;
	int ret = 0;

	if (READ_ONCE(s->closing))
		return -ESHUTDOWN;
	spin_lock(&s->lock);
	if (id)
		p = id <= U32_MAX ? xa_load(&s->packets, id) : NULL;
	else
		p = list_first_entry_or_null(&s->completed, struct vu_packet, node);
	if (!p) {
		ret = id ? -ENOENT : -EINPROGRESS;
	} else if (!p->complete) {
		ret = -EINPROGRESS;
	} else {
		list_del(&p->node);
		xa_erase(&s->packets, p->id);
		s->completed_count--;
		s->tracked--;
		*found = p;
	}
	spin_unlock(&s->lock);
	return ret;
}

int vu_wait(struct vu_session *s, struct vmbus_user_wait *arg)
{
	struct vu_packet *p = NULL;
	long left;
	int ret;

	left = wait_event_interruptible_timeout(s->vd->wait,
			(ret = vu_reap(s, arg->transaction_id, &p)) != -EINPROGRESS,
			vu_jiffies(arg->timeout));
	if (ret == -EINPROGRESS)
		return left < 0 ? -EINTR : -ETIMEDOUT;
	if (ret)
		return ret;
	arg->transaction_id = p->id;
	arg->reply_length = p->reply_length;
	arg->copied = min3(p->reply_length, p->reply_capacity, arg->capacity);
	if (copy_to_user(u64_to_user_ptr(arg->reply), p->reply, arg->copied))
		ret = -EFAULT;
	vu_packet_free(s, p);
	return ret;
}

static int vu_count_to_complete(struct vu_session *s, u64 id)
{
	unsigned long count;
	void *old;

	if (s->to_complete_count >= VU_MAX_TRACKED)
		return -ENOBUFS;
	old = xa_load(&s->to_complete, id);
	count = old ? xa_to_value(old) : 0;
	old = xa_store(&s->to_complete, id, xa_mk_value(count + 1), GFP_ATOMIC);
	if (xa_is_err(old))
		return xa_err(old);
	s->to_complete_count++;
	return 0;
}

/* Take the oldest packet of the host's; -EINPROGRESS if there is none. */
static int vu_dequeue(struct vu_session *s, struct vmbus_user_receive *arg,
		      struct vu_received **found)
{
	struct vu_received *r;
	bool resume = false;
	int ret = 0;

	if (READ_ONCE(s->closing))
		return -ESHUTDOWN;
	spin_lock(&s->lock);
	r = list_first_entry_or_null(&s->queue, struct vu_received, node);
	if (!r) {
		ret = -EINPROGRESS;
	} else if (r->length > arg->capacity) {
		arg->length = r->length;
		ret = -EMSGSIZE;
	} else if (r->flags & VMBUS_USER_TO_COMPLETE) {
		ret = vu_count_to_complete(s, r->id);
	}
	if (!ret) {
		list_del(&r->node);
		s->queued--;
		s->queued_bytes -= r->length;
		resume = vu_queue_resumes(s);
		*found = r;
	}
	spin_unlock(&s->lock);
	if (resume)
		vu_kick_work(s);
	return ret;
}

int vu_receive(struct vu_session *s, struct vmbus_user_receive *arg)
{
	struct vu_received *r = NULL;
	long left;
	int ret;

	if (arg->reserved)
		return -EINVAL;
	left = wait_event_interruptible_timeout(s->vd->wait,
			(ret = vu_dequeue(s, arg, &r)) != -EINPROGRESS,
			vu_jiffies(arg->timeout));
	if (ret == -EINPROGRESS)
		return left < 0 ? -EINTR : -ETIMEDOUT;
	if (ret)
		return ret;
	arg->length = r->length;
	arg->header_length = r->header_length;
	arg->type = r->type;
	arg->flags = r->flags;
	arg->transaction_id = r->id;
	if (copy_to_user(u64_to_user_ptr(arg->buffer), r->data, r->length))
		ret = -EFAULT;
	kvfree(r);
	return ret;
}

static void vu_uncount_to_complete(struct vu_session *s, u64 id, unsigned long count)
{
	if (count > 1)
		xa_store(&s->to_complete, id, xa_mk_value(count - 1), GFP_ATOMIC);
	else
		xa_erase(&s->to_complete, id);
	s->to_complete_count--;
}

int vu_complete(struct vu_session *s, const struct vmbus_user_complete *arg)
{
	struct vu_outgoing out = {
		.type = VM_PKT_COMP,
		.id = arg->transaction_id,
		.payload_length = arg->buffer_length,
	};
	void *count;
	int ret;

	if (arg->buffer_length > s->max_packet ||
	    ALIGN(arg->buffer_length, 8) + sizeof(struct vmpacket_descriptor) > s->max_packet)
		return -EMSGSIZE;
	if (out.payload_length) {
		out.payload = vmemdup_user(u64_to_user_ptr(arg->buffer), out.payload_length);
		if (IS_ERR(out.payload))
			return PTR_ERR(out.payload);
	}
	/* Claimed first: of two who complete the same packet, one is too late. */
	spin_lock(&s->lock);
	count = xa_load(&s->to_complete, out.id);
	if (count)
		vu_uncount_to_complete(s, out.id, xa_to_value(count));
	spin_unlock(&s->lock);
	ret = -ENOENT;
	if (count) {
		ret = vu_push(s, &out, arg->timeout);
		if (ret) {
			spin_lock(&s->lock);
			vu_count_to_complete(s, out.id);
			spin_unlock(&s->lock);
		}
	}
	kvfree(out.payload);
	return ret;
}
