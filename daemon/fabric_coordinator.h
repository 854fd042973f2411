/* What node 0 does for the groups that span nodes, those that it is not in itself too: brings their joins, their
 * collective plans and their steps together. Groups may have any nodes in common. It decides the order of all steps of all groups, once for the whole fabric: every node begins them in that order, so no
 * two nodes can wait for each other's steps. Loop thread of node 0. */
#ifndef EPD_DAEMON_FABRIC_COORDINATOR_H
#define EPD_DAEMON_FABRIC_COORDINATOR_H

#include "proto/fabric.h"

struct coordinator;
struct fabric;

/* Steps that a node may announce ahead of the last one that all have announced. */
#define COORDINATOR_MAX_AHEAD 64u
/* Groups, those that are being joined included; and plans of one that not every node has made, or has heard the failure
 * of. A node that asks for more is refused with EPD_QUOTA. */
#define COORDINATOR_MAX_GROUPS 4096u
#define COORDINATOR_MAX_PLANS  4096u
/* After a node's own deadline, so that its words, which name ranks, come first. */
#define COORDINATOR_GRACE_MS 500u

struct coordinator *coordinator_create(struct fabric *fabric);
void coordinator_destroy(struct coordinator *coordinator);
/* JOIN, PLAN, HEARD, STEP or BREAK of a node. EPD_PROTOCOL if no honest node says so; what only cannot be done is told
 * to the node. */
EPD_MUST_CHECK enum epd_status coordinator_receive(struct coordinator *coordinator, uint32_t node,
                                                   const struct fabric_message *message,
                                                   struct epd_error *error);
/* Its groups end on their other nodes; those that it is not in go on. */
void coordinator_lose(struct coordinator *coordinator, uint32_t node, const struct epd_error *why);
/* What it keeps: groups, and plans of all of them that are not settled. */
void coordinator_count(const struct coordinator *coordinator, uint64_t *n_groups, uint64_t *n_plans);
/* Deadlines. */
void coordinator_check(struct coordinator *coordinator, uint64_t now_ns);

#endif
