#include "daemon/joint_plan.h"

#include <stdio.h>
#include <stdlib.h>

#include "daemon/clock.h"
#include "daemon/fabric.h"
#include "daemon/group_span.h"
#include "daemon/member.h"
#include "daemon/number_set.h"
#include "daemon/rank_plan.h"
#include "daemon/session.h"

static struct joint_plan *find(struct group *group, uint32_t key)
{
    list_each(node, after, &group->joint_plans)
    {
        struct joint_plan *joint = list_owner(node, struct joint_plan, in_group);
        if (joint->key == key)
            return joint;
    }
    return NULL;
}

static struct joint_plan *create(struct group *group, uint32_t key, enum epd_op op, uint32_t rank)
{
    struct joint_plan *joint = calloc(1, sizeof(*joint) + group_n_ranks(group) * sizeof(joint->plans[0]));
    if (!joint)
        return NULL;
    joint->group = group;
    joint->key = key;
    joint->op = op;
    joint->n_ranks = group_n_ranks(group);
    joint->base_rank = group_first_rank(group);
    joint->first_rank = rank;
    joint->first_ns = clock_ns();
    joint->ended_by = -1;
    list_append(&group->joint_plans, &joint->in_group);
    group->n_joint_plans++;
    group_arm(group, joint->first_ns + clock_ms_to_ns(group->worker->config.plan_ms));
    return joint;
}

static void free_joint(struct joint_plan *joint)
{
    if (joint->set)
        plan_set_destroy(joint->set);
    list_remove(&joint->in_group);
    joint->group->n_joint_plans--;
    free(joint);
}

enum epd_status joint_plan_arrive(struct member *member, enum epd_op op, struct joint_plan **result,
                                  struct epd_error *error)
{
    struct group *group = member->group;
    const uint32_t key = member->n_collective_plans + 1;
    struct joint_plan *joint = find(group, key);
    if (!joint && group->n_joint_plans >= GROUP_MAX_JOINT_PLANS)
        return error_set(error, EPD_QUOTA, "plan: group %s has %u collective plans, at most %d", group->name,
                         group->n_joint_plans, GROUP_MAX_JOINT_PLANS);
    if (!joint)
        joint = create(group, key, op, member->rank);
    if (!joint)
        return error_set(error, EPD_NO_MEMORY, "plan: no memory for a joint plan");
    member->n_collective_plans++;
    joint->n_arrived++;
    joint->arrived |= 1ull << member->rank;
    if (joint->state == JOINT_PLAN_GATHERING && joint->op != op) {
        struct epd_error mismatch;
        (void)error_set(&mismatch, EPD_PLAN_MISMATCH,
                        "plan %u of group %s: rank %u creates %s, rank %u creates %s", key, group->name,
                        member->rank, op_name(op), joint->first_rank, op_name(joint->op));
        joint_plan_fail(joint, -1, &mismatch);
    }
    if (joint->state == JOINT_PLAN_GATHERING) {
        *result = joint;
        return EPD_OK;
    }
    *error = joint->error;
    joint_plan_leave(joint, member->rank);
    return error->status;
}

static enum epd_status join_all(struct joint_plan *joint, struct epd_error *error)
{
    struct plan *plans[EPD_MAX_WORLD_SIZE];
    for (uint32_t i = 0; i < joint->n_ranks; i++)
        plans[i] = joint->plans[i]->plan;
    return plan_join(plans, joint->n_ranks, &joint->set, error);
}

static void make_ready(struct joint_plan *joint)
{
    joint->state = JOINT_PLAN_READY;
    for (uint32_t i = 0; i < joint->n_ranks; i++)
        rank_plan_ready(joint->plans[i]);
}

/* What the nodes compare: the shape, and which plan is the context. */
static uint64_t agreement_hash(const struct rank_plan *plan)
{
    return plan_shape_hash(plan->plan) ^ plan->context_key * 0x9e3779b97f4a7c15u;
}

/* Every rank that waits, and every one that comes later, gets the error. */
static void end_gathering(struct joint_plan *joint, int32_t rank, const struct epd_error *error)
{
    joint->state = JOINT_PLAN_FAILED;
    joint->error = *error;
    if (rank >= 0) /* the others have to know whose plan it was */
        (void)error_set(&joint->error, error->status, "rank %d: %s", (int)rank, error->text);
    if (joint->set)
        plan_set_destroy(joint->set);
    joint->set = NULL;
    const uint32_t n_ranks = joint->n_ranks;
    const struct epd_error shown = joint->error;
    struct rank_plan *waiting[EPD_MAX_WORLD_SIZE]; /* the last refusal may free the joint plan */
    for (uint32_t i = 0; i < n_ranks; i++)
        waiting[i] = joint->plans[i];
    for (uint32_t i = 0; i < n_ranks; i++)
        if (waiting[i])
            rank_plan_refuse(waiting[i], &shown);
}

void joint_plan_add(struct joint_plan *joint, struct rank_plan *plan)
{
    if (joint->state != JOINT_PLAN_GATHERING) {
        rank_plan_refuse(plan, &joint->error);
        return;
    }
    joint->plans[plan->rank - joint->base_rank] = plan;
    if (++joint->n_ready < joint->n_ranks)
        return;
    struct epd_error error = {0};
    if (join_all(joint, &error) != EPD_OK) {
        joint_plan_fail(joint, -1, &error);
        return;
    }
    if (!joint->group->span) {
        make_ready(joint);
        return;
    }
    joint->offered = 1;
    group_span_offer(joint->group, joint, agreement_hash(plan), plan_set_tokens(joint->set));
}

/* A joint plan that is not there any more was left by all ranks of this node; else none has come to it. */
static int all_have_left(const struct group *group, uint32_t key)
{
    const struct member *member = group->members[group_first_rank(group)];
    return !member || member->n_collective_plans >= key;
}

/* Another node's ranks have failed with a plan that nobody here has come to: whoever does gets the error. */
static struct joint_plan *create_failed(struct group *group, uint32_t key)
{
    struct epd_error error;
    struct joint_plan *joint = NULL;
    if (group->n_joint_plans < GROUP_MAX_JOINT_PLANS)
        joint = create(group, key, EPD_OP_UNSPECIFIED, group_first_rank(group));
    if (joint)
        return joint;
    if (group->n_joint_plans >= GROUP_MAX_JOINT_PLANS)
        (void)error_set(&error, EPD_QUOTA,
                        "group %s: ranks of another node are %u collective plans ahead, at most %d",
                        group->name, group->n_joint_plans, GROUP_MAX_JOINT_PLANS);
    else
        (void)error_set(&error, EPD_NO_MEMORY, "group %s: no memory for a joint plan", group->name);
    group_break(group, -1, &error);
    return NULL;
}

/* The coordinator keeps what has failed until every node has said that it will hear no more of it. */
static void say_heard(const struct group *group, uint32_t key)
{
    struct fabric_message message;
    struct epd_error ignored; /* the way to it is gone: then it knows */
    fabric_message_init(&message, FABRIC_HEARD);
    message.group = group->span->id;
    message.number = key;
    (void)!fabric_ask(group->worker->fabric, &message, &ignored);
}

/* No node has more tokens than the group allows, nor all of them fewer than this one. */
static void take_ready(struct joint_plan *joint, uint32_t n_tokens)
{
    const uint32_t own = plan_set_tokens(joint->set), most = joint->group->config.max_tokens;
    struct epd_error error;
    if (n_tokens < own || n_tokens > most) {
        (void)error_set(&error, EPD_PROTOCOL, "plan %u (%s) of group %s: %u tokens of all nodes, want %u..%u",
                        joint->key, op_name(joint->op), joint->group->name, n_tokens, own, most);
        end_gathering(joint, -1, &error);
        return;
    }
    plan_set_agree(joint->set, n_tokens);
    make_ready(joint);
}

void joint_plan_agreed(struct group *group, const struct fabric_message *ready)
{
    const uint32_t key = (uint32_t)ready->number;
    struct joint_plan *joint = find(group, key);
    if (ready->error.status == EPD_OK) {
        if (joint && joint->state == JOINT_PLAN_GATHERING && joint->offered)
            take_ready(joint, ready->n_tokens);
        return;
    }
    if (!joint && !all_have_left(group, key))
        joint = create_failed(group, key);
    if (joint && joint->state == JOINT_PLAN_GATHERING)
        end_gathering(joint, ready->rank, &ready->error);
    say_heard(group, key);
}

void joint_plan_fail(struct joint_plan *joint, int32_t rank, const struct epd_error *error)
{
    if (joint->state != JOINT_PLAN_GATHERING)
        return;
    struct epd_error named = *error;
    if (rank >= 0)
        (void)error_set(&named, error->status, "rank %d: %s", (int)rank, error->text);
    if (joint->group->span && !joint->offered)
        group_span_refuse(joint->group, joint, &named);
    end_gathering(joint, rank, error);
}

void joint_plan_leave(struct joint_plan *joint, uint32_t rank)
{
    joint->plans[rank - joint->base_rank] = NULL;
    joint->n_left++;
    if (joint->state == JOINT_PLAN_READY) {
        joint->state = JOINT_PLAN_ENDING;
        joint->ended_by = (int32_t)rank;
        plan_set_destroy(joint->set);
        joint->set = NULL;
    }
    if (joint->n_left == joint->n_ranks)
        free_joint(joint);
}

static void name_missing(const struct joint_plan *joint, char *text, size_t bytes)
{
    uint64_t missing = 0;
    for (uint32_t i = 0; i < joint->n_ranks; i++)
        missing |= (uint64_t) !(joint->arrived >> (joint->base_rank + i) & 1) << (joint->base_rank + i);
    number_set_name(missing, text, bytes);
}

uint64_t joint_plan_check(struct joint_plan *joint, uint64_t now_ns)
{
    if (joint->state != JOINT_PLAN_GATHERING || joint->n_arrived == joint->n_ranks)
        return CLOCK_NEVER; /* when all have asked, only ep is waited for */
    const uint64_t limit_ms = joint->group->worker->config.plan_ms;
    const uint64_t end_ns = joint->first_ns + clock_ms_to_ns(limit_ms);
    if (now_ns < end_ns)
        return end_ns;
    char missing[80];
    name_missing(joint, missing, sizeof(missing));
    struct epd_error error;
    (void)error_set(&error, EPD_TIMEOUT, "plan %u (%s) of group %s: not created within %llu ms by rank%s",
                    joint->key, op_name(joint->op), joint->group->name, (unsigned long long)limit_ms,
                    missing);
    joint_plan_fail(joint, -1, &error);
    return CLOCK_NEVER;
}

/* Failing one may free it: those that gather are taken out first, each once, and so nothing is looked at twice. */
void joint_plan_fail_all(struct group *group, const struct epd_error *error)
{
    struct list gathering;
    list_init(&gathering);
    list_each(node, after, &group->joint_plans)
    {
        if (list_owner(node, struct joint_plan, in_group)->state != JOINT_PLAN_GATHERING)
            continue;
        list_remove(node);
        list_append(&gathering, node);
    }
    while (!list_empty(&gathering)) {
        struct list *node = gathering.next;
        list_remove(node);
        list_append(&group->joint_plans, node);
        joint_plan_fail(list_owner(node, struct joint_plan, in_group), -1, error);
    }
}

void joint_plan_free_all(struct group *group)
{
    while (!list_empty(&group->joint_plans))
        free_joint(list_owner(group->joint_plans.next, struct joint_plan, in_group));
}
