/* A team is what ep knows of a group: its sizes, where its ranks live, and the scratch its plans share. Steps of one team
 * run one after the other on its lanes, so all its plans share the same scratch regions; each region is allocated by the
 * first plan that needs it and never moves. Loop thread; see node.h. */
#ifndef EPD_EP_TEAM_H
#define EPD_EP_TEAM_H

#include "ep/node.h"
#include "proto/message.h"

struct team;

/* Checks the configuration (errors name the field, what was given and what is allowed). device_idx[world_size]. */
EPD_MUST_CHECK enum epd_status team_create(struct node *node, const struct message_group_config *config,
                                           uint32_t world_size, const uint32_t *device_idx,
                                           struct team **team, struct epd_error *error);
struct rails;

/* A group that spans nodes. world_size and the configuration are the whole group's; device_idx[world_size / n_nodes], of
 * the ranks of this node: node * world_size / n_nodes and the following. The rails are borrowed: connected, one for each
 * of these ranks in their order; they are closed after team_destroy was called. */
struct team_span {
    uint32_t n_nodes, node;
    struct rails *rails;
};
EPD_MUST_CHECK enum epd_status team_create_spanning(struct node *node,
                                                    const struct message_group_config *config,
                                                    uint32_t world_size, const uint32_t *device_idx,
                                                    const struct team_span *span, struct team **team,
                                                    struct epd_error *error);
/* All plans must be gone. Scratch is freed on the lanes. */
void team_destroy(struct team *team);

/* Launches that plan_fail has given to the lanes and that they still hold: until their clients' streams come. Like steps they
 * take room there. */
uint32_t team_n_refused(const struct team *team);
int64_t team_capacity_rows(const struct team *team);
uint32_t team_n_local_experts(const struct team *team);
/* 1: exchanges are one launch per rank whose kernels wait for each other on the devices; 0: the backend has no such form, or
 * two ranks share a device, or the device has no room for more blocks that may wait at once. Decided when the team is
 * created. */
int team_is_fused(const struct team *team);
/* Plans that were to be replayed as graphs and cannot be recorded: they run launch by launch. why: the first one's reason;
 * NULL: not wanted. */
uint32_t team_n_unrecorded(const struct team *team, struct epd_error *why);
/* Owned bytes of one rank now: scratch, routing and saved contexts of its plans. */
uint64_t team_heap_bytes(const struct team *team, uint32_t rank);

#endif
