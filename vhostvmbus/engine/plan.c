/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Plans: packets that are nothing but a transfer between a file and the guest's pages, done here
 * instead of by the device's Python code.
 *
 * A rule says which packets it is about, where in the payload the transfer's place and size are,
 * and how the completion is made of the payload. Looked at is the private copy of the packet, like
 * everywhere. Whatever does not fit a rule exactly, and whatever cannot be done whole, goes up as
 * an ordinary packet: the device does it again, from the start, and says what is wrong with it.
 */
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ringbuf.h"

#define WORDS (VVB_PLAN_BYTES / 8)

struct rule {
    struct vvb_rule as;
    uint64_t mask[WORDS];
    uint64_t value[WORDS];
};

struct rules {
    struct vvb_plan plan;
    uint32_t count;
    struct rule rules[];
};

/* ---- making one ---- */

static bool number_ok(const struct vvb_number *number, uint32_t payload_length, bool needed)
{
    switch (number->width) {
    case 0:
        return !needed;
    case 1:
    case 2:
    case 4:
    case 8:
        return number->shift < 64 && (uint32_t)number->offset + number->width <= payload_length;
    default:
        return false;
    }
}

/* Whether every value up to max can be written. */
static bool number_holds(const struct vvb_number *number, uint64_t max)
{
    return number->width == 0 || number->width == 8 ||
           max >> number->shift < 1ull << (8 * number->width);
}

static bool rule_ok(const struct vvb_rule *rule)
{
    uint32_t length = rule->payload_length;

    if (!length || length > VVB_PLAN_BYTES || length % 8 || rule->fd < 0 ||
        rule->operation > VVB_PLAN_WRITE || rule->file_size > INT64_MAX || !rule->max_length) {
        return false;
    }
    for (uint32_t i = 0; i < VVB_PLAN_BYTES; i++) {
        if ((rule->value[i] & ~rule->mask[i]) ||
            (i >= length && (rule->mask[i] | rule->keep[i] | rule->set[i]))) {
            return false;
        }
    }
    return number_ok(&rule->position, length, true) && number_ok(&rule->length, length, true) &&
           number_ok(&rule->room, length, false) && number_ok(&rule->done, length, false) &&
           number_holds(&rule->done, rule->max_length);
}

static bool rules_fit(const struct vvb_plan *plan, const struct vvb_batch *batch,
                      struct vvb_todo *todo);
static bool rules_perform(const struct vvb_plan *plan, struct vvb_batch *batch,
                          const struct vvb_todo *todo);

struct vvb_plan *vvb_plan_new(const struct vvb_rule *rules, uint32_t count, int *err)
{
    struct rules *plan;

    for (uint32_t i = 0; i < count; i++) {
        if (!rule_ok(&rules[i])) {
            *err = EINVAL;
            return NULL;
        }
    }
    plan = calloc(1, sizeof(*plan) + count * sizeof(plan->rules[0]));
    if (!plan) {
        *err = ENOMEM;
        return NULL;
    }
    plan->plan = (struct vvb_plan){.fits = rules_fit, .perform = rules_perform};
    plan->count = count;
    for (uint32_t i = 0; i < count; i++) {
        plan->rules[i].as = rules[i];
        memcpy(plan->rules[i].mask, rules[i].mask, VVB_PLAN_BYTES);
        memcpy(plan->rules[i].value, rules[i].value, VVB_PLAN_BYTES);
    }
    return &plan->plan;
}

void vvb_plan_free(struct vvb_plan *plan)
{
    free(plan);
}

/* ---- finding the rule for a packet ---- */

/* False if the value does not fit into 64 bits once it is shifted. */
static bool number_get(const struct vvb_number *number, const uint8_t *payload, uint64_t *value)
{
    const uint8_t *at = payload + number->offset;
    uint64_t result = 0;

    for (uint32_t i = 0; i < number->width; i++) {
        result = result << 8 | at[number->big_endian ? i : number->width - 1u - i];
    }
    *value = result << number->shift;
    return *value >> number->shift == result;
}

static void number_put(const struct vvb_number *number, uint8_t *payload, uint64_t value)
{
    uint8_t *at = payload + number->offset;

    value >>= number->shift;
    for (uint32_t i = 0; i < number->width; i++, value >>= 8) {
        at[number->big_endian ? number->width - 1u - i : i] = (uint8_t)value;
    }
}

static bool bytes_fit(const struct rule *rule, const uint64_t *words)
{
    for (uint32_t i = 0; i < WORDS; i++) {
        if ((words[i] & rule->mask[i]) != rule->value[i]) {
            return false;
        }
    }
    return true;
}

static bool transfer_fits(const struct vvb_rule *rule, const uint8_t *payload, uint64_t external,
                          struct vvb_todo *todo)
{
    uint64_t room = external;

    if (!number_get(&rule->position, payload, &todo->position) ||
        !number_get(&rule->length, payload, &todo->length) ||
        (rule->room.width && !number_get(&rule->room, payload, &room))) {
        return false;
    }
    return todo->length && todo->length <= rule->max_length && todo->length <= external &&
           todo->length <= room && todo->position <= rule->file_size &&
           todo->length <= rule->file_size - todo->position;
}

static bool rules_fit(const struct vvb_plan *plan, const struct vvb_batch *batch,
                      struct vvb_todo *todo)
{
    const struct rules *rules = (const struct rules *)plan;
    const struct vvb_packet *packet = &batch->packets[todo->packet];
    uint32_t length = packet->length - packet->payload_offset;
    uint64_t words[WORDS] = {0};

    if (!packet->seg_count || !(packet->flags & VVB_COMPLETION_REQUESTED) ||
        length > sizeof(words)) {
        return false;
    }
    memcpy(words, batch->data + packet->data_offset + packet->payload_offset, length);
    for (uint32_t i = 0; i < rules->count; i++) {
        const struct rule *rule = &rules->rules[i];

        if (rule->as.payload_length == length && bytes_fit(rule, words) &&
            transfer_fits(&rule->as, (const uint8_t *)words, packet->external_length, todo)) {
            todo->rule = &rule->as;
            return true;
        }
    }
    return false;
}

bool vvb_plan_match(const struct vvb_plan *plan, struct vvb_batch *batch, uint32_t index)
{
    struct vvb_todo *todo = &batch->todo[batch->todo_count];

    *todo = (struct vvb_todo){.packet = index};
    if (batch->packets[index].error || !plan->fits(plan, batch, todo)) {
        return false;
    }
    batch->todo_bytes += todo->length;
    batch->todo_count++;
    return true;
}

/* ---- doing it ---- */

static bool spans_room(struct vvb_batch *batch)
{
    if (batch->spans_cap < batch->segs.count) {
        struct vvb_span *spans = realloc(batch->spans, batch->segs.cap * sizeof(*spans));

        if (!spans) {
            return false;
        }
        batch->spans = spans;
        batch->spans_cap = batch->segs.cap;
    }
    return true;
}

static void note_written(struct vvb_batch *batch, const struct vvb_seg *seg, uint64_t left)
{
    for (; left; seg++) {
        uint64_t here = seg->len < left ? seg->len : left;

        batch->spans[batch->span_count++] = (struct vvb_span){.gpa = seg->gpa, .len = here};
        left -= here;
    }
}

uint8_t *vvb_plan_answer(struct vvb_batch *batch, const struct vvb_packet *packet, uint32_t length)
{
    uint8_t *out = batch->answers + batch->answers_len;

    batch->answers_len += length;
    batch->outgoing[batch->answer_count++] = (struct vvb_outgoing){
        .transaction_id = packet->transaction_id,
        .payload_len = length,
        .type = PKT_COMP,
        .slot = packet->slot,
    };
    return out;
}

static void answer(struct vvb_batch *batch, const struct vvb_todo *todo)
{
    const struct vvb_packet *packet = &batch->packets[todo->packet];
    const uint8_t *payload = batch->data + packet->data_offset + packet->payload_offset;
    const struct vvb_rule *rule = todo->rule;
    uint8_t *out = vvb_plan_answer(batch, packet, rule->payload_length);

    for (uint32_t i = 0; i < rule->payload_length; i++) {
        out[i] = (payload[i] & rule->keep[i]) | rule->set[i];
    }
    number_put(&rule->done, out, todo->length);
}

/* Whether the file is as long as it was: writing to one that was cut off would make it grow again. */
static bool still_whole(struct vvb_batch *batch, const struct vvb_rule *rule)
{
    if (batch->whole != rule && lseek(rule->fd, 0, SEEK_END) >= (off_t)rule->file_size) {
        batch->whole = rule;
    }
    return batch->whole == rule;
}

/* Whether all of it was moved. Half of it is nothing: the device does the whole once more. */
static bool transfer(struct vvb_batch *batch, const struct vvb_todo *todo)
{
    struct vvb_packet *packet = &batch->packets[todo->packet];
    const struct vvb_seg *segs = batch->segs.v + packet->first_seg;
    const struct vvb_rule *rule = todo->rule;
    int64_t moved;

    if (rule->operation == VVB_PLAN_WRITE && !still_whole(batch, rule)) {
        return false;
    }
    moved = vvb_file_io(segs, packet->seg_count, 0, todo->length, rule->fd,
                        (int64_t)todo->position, rule->operation == VVB_PLAN_WRITE,
                        rule->nowait);

    if (rule->operation == VVB_PLAN_READ) {
        packet->written = todo->length; /* some of it, perhaps, even if it failed */
    }
    return moved == (int64_t)todo->length && !vvb_ext_lost(segs, packet->seg_count);
}

static bool rules_perform(const struct vvb_plan *plan, struct vvb_batch *batch,
                          const struct vvb_todo *todo)
{
    const struct vvb_packet *packet = &batch->packets[todo->packet];

    (void)plan;
    if (!spans_room(batch) || !transfer(batch, todo)) {
        return false;
    }
    if (todo->rule->operation == VVB_PLAN_READ) {
        note_written(batch, batch->segs.v + packet->first_seg, todo->length);
    }
    answer(batch, todo);
    return true;
}

void vvb_plan_run(const struct vvb_plan *plan, struct vvb_batch *batch)
{
    uint32_t kept = 0, next = 0;

    if (!batch->todo_count) {
        return;
    }
    for (uint32_t i = 0; i < batch->count; i++) {
        const struct vvb_packet *packet = &batch->packets[i];

        if (vvb_load(&batch->stopped)) {
            next = batch->todo_count;
        }
        if (next < batch->todo_count && batch->todo[next].packet == i &&
            plan->perform(plan, batch, &batch->todo[next++])) {
            batch->done_count++;
            batch->done_payload += packet->length - packet->payload_offset;
            batch->done_external += packet->external_length;
            if (packet->seg_count) {
                vvb_segs_put(batch->segs.v + packet->first_seg, packet->seg_count);
            }
            continue;
        }
        batch->packets[kept++] = *packet;
    }
    batch->count = kept;
}

void vvb_batch_stop(struct vvb_batch *batch)
{
    vvb_store(&batch->stopped, 1u);
}

bool vvb_plan_room(struct vvb_batch *batch, uint32_t max_packets)
{
    batch->todo = calloc(max_packets, sizeof(*batch->todo));
    batch->outgoing = calloc(max_packets, sizeof(*batch->outgoing));
    batch->answers = malloc((size_t)max_packets * VVB_PLAN_BYTES);
    return batch->todo && batch->outgoing && batch->answers;
}

void vvb_plan_unroom(struct vvb_batch *batch)
{
    free(batch->todo);
    free(batch->outgoing);
    free(batch->answers);
    free(batch->spans);
}
