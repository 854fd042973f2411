#include "ep/team_impl.h"

#include <assert.h>
#include <stdlib.h>

#include "ep/hop.h"
#include "ep/transport.h"

static const struct hop_form *hop_form_of(const struct node *node)
{
#ifdef EPD_HAVE_CUDA
    if (node->backend->kind == EPD_BACKEND_CUDA)
        return &hop_form_cuda;
#endif
    (void)node;
    return &hop_form_host;
}

static struct team_lane *team_find_lane(struct team *team, struct lane *lane)
{
    for (uint32_t i = 0; i < team->n_lanes; i++)
        if (team->lanes[i].lane == lane)
            return &team->lanes[i];
    struct team_lane *added = &team->lanes[team->n_lanes++];
    added->lane = lane;
    added->team = team;
    return added;
}

static enum epd_status team_place_ranks(struct team *team, const uint32_t *device_idx,
                                        struct epd_error *error)
{
    const uint32_t first = problem_first_rank(&team->problem);
    for (uint32_t i = 0; i < team->problem.ranks_per_node; i++) {
        const uint32_t rank = first + i;
        if (device_idx[i] >= team->node->n_devices)
            return error_set(error, EPD_INVALID_DEVICE, "group rank %u: device %u, want 0..%u", rank,
                             device_idx[i], team->node->n_devices - 1);
        struct team_lane *lane = team_find_lane(team, team->node->lanes[device_idx[i]]);
        lane->ranks[lane->n_ranks++] = i;
        team->ranks[rank].device_idx = device_idx[i];
        team->ranks[rank].lane_idx = (uint32_t)(lane - team->lanes);
    }
    return EPD_OK;
}

/* Multiprocessors that waiting blocks leave to everybody else's kernels: what the waiting depends on may be one
 * of these. */
#define SPARE_MULTIPROCESSORS 4

/* In the node. */
static uint32_t lane_device_idx(const struct node *node, const struct lane *lane)
{
    uint32_t device_idx = 0;
    while (node->lanes[device_idx] != lane)
        device_idx++;
    return device_idx;
}

/* Fused ops of all teams of a device may wait at once, each for a peer on another device: all of their blocks
 * must have room, or two teams could keep each other out for ever. */
static int team_fits(const struct team *team, uint32_t blocks)
{
    const struct node *node = team->node;
    for (uint32_t i = 0; i < team->n_lanes; i++) {
        struct device_info info;
        uint32_t device_idx = lane_device_idx(node, team->lanes[i].lane);
        node_device_info(node, device_idx, &info);
        if (node->resident_blocks[device_idx] + blocks + SPARE_MULTIPROCESSORS > info.n_multiprocessors)
            return 0;
    }
    return 1;
}

static void team_claim(struct team *team, uint32_t blocks)
{
    team->resident_blocks = blocks;
    for (uint32_t i = 0; i < team->n_lanes; i++)
        team->node->resident_blocks[lane_device_idx(team->node, team->lanes[i].lane)] += blocks;
}

/* Swaps in a stream wait on the device for other nodes, as fused ops do for other devices. */
static enum epd_status team_claim_rails(struct team *team, struct epd_error *error)
{
    uint32_t n_most = 0;
    if (!team_spans(team) || !team->node->backend->works_later)
        return EPD_OK;
    for (uint32_t i = 0; i < team->n_lanes; i++)
        n_most = team->lanes[i].n_ranks > n_most ? team->lanes[i].n_ranks : n_most;
    if (!team_fits(team, n_most * TRANSPORT_RAIL_BLOCKS))
        return error_set(error, EPD_BUSY,
                         "group: no room on a device for %u more blocks that wait for other nodes",
                         n_most * TRANSPORT_RAIL_BLOCKS);
    team_claim(team, n_most * TRANSPORT_RAIL_BLOCKS);
    return EPD_OK;
}

static void team_choose_form(struct team *team)
{
    struct exchange_shape shape = problem_shape(&team->problem);
    shape.max_blocks = team->node->comm_blocks;
    uint32_t blocks = team->node->backend->exchange_blocks(&shape);
    if (blocks == 0 || team->n_lanes != team->problem.world_size || !team_fits(team, blocks))
        return;
    team->fused = 1;
    team_claim(team, blocks);
}

static void team_leave_devices(struct team *team)
{
    for (uint32_t i = 0; i < team->n_lanes; i++)
        team->node->resident_blocks[lane_device_idx(team->node, team->lanes[i].lane)] -=
            team->resident_blocks;
}

enum epd_status team_create(struct node *node, const struct message_group_config *config, uint32_t world_size,
                            const uint32_t *device_idx, struct team **team, struct epd_error *error)
{
    const struct team_span alone = {.n_nodes = 1};
    return team_create_spanning(node, config, world_size, device_idx, &alone, team, error);
}

enum epd_status team_create_spanning(struct node *node, const struct message_group_config *config,
                                     uint32_t world_size, const uint32_t *device_idx,
                                     const struct team_span *span, struct team **team,
                                     struct epd_error *error)
{
    struct problem problem;
    if (problem_init(&problem, config, world_size, error) ||
        problem_span(&problem, span->n_nodes, span->node, error))
        return error->status;
    struct team *created = calloc(1, sizeof *created);
    if (!created)
        return error_set(error, EPD_NO_MEMORY, "group: %zu bytes", sizeof *created);
    created->node = node;
    created->problem = problem;
    created->rails = span->rails;
    created->hop = hop_form_of(node);
    created->ranks = calloc(world_size, sizeof *created->ranks);
    if (!created->ranks) {
        error_set(error, EPD_NO_MEMORY, "group: %u ranks", world_size);
        goto free_team;
    }
    if (team_place_ranks(created, device_idx, error) || team_claim_rails(created, error))
        goto free_ranks;
    team_choose_form(created);
    *team = created;
    return EPD_OK;

free_ranks:
    free(created->ranks);
free_team:
    free(created);
    return error->status;
}

static struct team_lane *team_lane_of_job(struct lane_job *job)
{
    return (struct team_lane *)((char *)job - offsetof(struct team_lane, end_job));
}

/* Lane thread. */
static void team_run_end(struct lane_job *job, struct lane *lane)
{
    struct team_lane *ending = team_lane_of_job(job);
    const uint32_t first = problem_first_rank(&ending->team->problem);
    for (uint32_t i = 0; i < ending->n_ranks; i++) {
        if (ending->team->ranks[first + ending->ranks[i]].has_desk)
            ending->team->hop->desk_destroy(ending->team, first + ending->ranks[i]);
        scratch_fini(&ending->team->ranks[first + ending->ranks[i]].scratch, lane_heap(lane));
    }
    if (ending->queue)
        lane_backend(lane)->queue_destroy(ending->queue);
}

static void team_complete_end(struct lane_job *job)
{
    struct team *team = team_lane_of_job(job)->team;
    if (--team->n_lanes_left)
        return;
    team_leave_devices(team);
    free(team->ranks);
    free(team);
}

void team_destroy(struct team *team)
{
    assert(team->n_plans == 0);
    team->n_lanes_left = team->n_lanes;
    for (uint32_t i = 0; i < team->n_lanes; i++) {
        struct team_lane *lane = &team->lanes[i];
        lane->end_job = (struct lane_job){
            .run = team_run_end, .complete = team_complete_end, .what = "a group that goes"};
        lane_post(lane->lane, &lane->end_job);
    }
}

int team_is_fused(const struct team *team)
{
    return team->fused;
}

uint32_t team_n_unrecorded(const struct team *team, struct epd_error *why)
{
    const int told = atomic_load(&team->unrecorded_told);
    if (why && told)
        *why = team->unrecorded;
    return told ? atomic_load(&team->n_unrecorded) : 0;
}

int64_t team_capacity_rows(const struct team *team)
{
    return team->problem.capacity_rows;
}

uint32_t team_n_local_experts(const struct team *team)
{
    return team->problem.n_local_experts;
}

uint32_t team_n_refused(const struct team *team)
{
    return team->n_refused;
}

uint64_t team_heap_bytes(const struct team *team, uint32_t rank)
{
    assert(rank < team->problem.world_size);
    return atomic_load(&team->ranks[rank].heap_bytes);
}

static struct lane *rank_lane(struct team *team, uint32_t rank)
{
    return team->lanes[team->ranks[rank].lane_idx].lane;
}

enum epd_status team_alloc(struct team *team, uint32_t rank, uint64_t bytes, struct backend_block *block,
                           struct epd_error *error)
{
    if (heap_alloc(lane_heap(rank_lane(team, rank)), bytes, 0, block, error))
        return error->status;
    atomic_fetch_add(&team->ranks[rank].heap_bytes, block->bytes);
    return EPD_OK;
}

void team_free(struct team *team, uint32_t rank, struct backend_block *block)
{
    if (block->data)
        atomic_fetch_sub(&team->ranks[rank].heap_bytes, block->bytes);
    heap_free(lane_heap(rank_lane(team, rank)), block);
}

enum epd_status team_scratch(struct team *team, uint32_t rank, enum scratch_region region, void **data,
                             struct epd_error *error)
{
    struct team_rank *place = &team->ranks[rank];
    uint64_t added_bytes;
    if (scratch_acquire(&place->scratch, lane_heap(rank_lane(team, rank)), &team->problem, region, data,
                        &added_bytes, error))
        return error->status;
    atomic_fetch_add(&place->heap_bytes, added_bytes);
    return EPD_OK;
}

enum epd_status team_queue(struct team *team, uint32_t rank, struct backend_queue **queue,
                           struct epd_error *error)
{
    struct team_lane *lane = &team->lanes[team->ranks[rank].lane_idx];
    if (!lane->queue && lane_backend(lane->lane)->queue_create(lane_device(lane->lane), &lane->queue, error))
        return error->status;
    if (team_spans(team) && !team->ranks[rank].has_desk) {
        if (team->hop->desk_create(team, rank, error))
            return error->status;
        team->ranks[rank].has_desk = 1;
    }
    *queue = lane->queue;
    return EPD_OK;
}
