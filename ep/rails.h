/* The rails of one group's ranks on this node, one for each rank: opened and closed on the lanes of the ranks, connected
 * when the addresses of all nodes are known. They outlive the team that swaps through them. Loop thread; see node.h. */
#ifndef EPD_EP_RAILS_H
#define EPD_EP_RAILS_H

#include "ep/node.h"
#include "ep/transport.h"

struct rails;

/* Of all rails together; any of it may lag behind by a swap. */
struct rails_traffic {
    uint64_t n_swaps;
    uint64_t sent_bytes[EPD_MAX_NODES], received_bytes[EPD_MAX_NODES]; /* by node */
    uint64_t waited_ns; /* of all lanes: in swaps, or until swaps were in their streams */
};

/* error->status is EPD_OK when it went well on all lanes. */
typedef void (*rails_callback)(void *arg, const struct epd_error *error);

/* 1 if this build has a transport for the backend of the node and it was loaded; else 0 and the reason. */
int rails_available(const struct node *node, struct epd_error *reason);

/* What the transport has to do once on every device, before there is any other work. The callback comes once. */
EPD_MUST_CHECK enum epd_status rails_begin(struct node *node, rails_callback callback, void *arg,
                                           struct epd_error *error);
/* device_idx[n_ranks]; node_idx: this node, of the rails'. The callback comes once; then rails_address may be read. */
EPD_MUST_CHECK enum epd_status rails_open(struct node *node, uint32_t node_idx, uint32_t n_ranks,
                                          const uint32_t *device_idx, rails_callback callback, void *arg,
                                          struct rails **rails, struct epd_error *error);
const struct transport_address *rails_address(const struct rails *rails, uint32_t rank_idx);
/* addresses[n_nodes * n_ranks] in the order of the ranks, copied. A swap that takes longer than limit_ns fails. */
EPD_MUST_CHECK enum epd_status rails_connect(struct rails *rails, uint32_t n_nodes,
                                             const struct transport_address *addresses, uint64_t limit_ns,
                                             rails_callback callback, void *arg, struct epd_error *error);
/* Every swap, those that wait included, ends with the error. Any state; also a lane thread whose step is in flight. */
void rails_abort(struct rails *rails, const struct epd_error *why);
/* The team is destroyed, or was never made. Goes behind what the lanes have to do. */
void rails_close(struct rails *rails);
/* What errors call the node-th node of the rails: the addresses' word. After connect; what is no node of them is called as
 * it is. */
uint32_t rails_node_name(const struct rails *rails, uint32_t node);
/* Lane thread of the rank: bytes that its rail has sent to and received from all nodes so far. */
uint64_t rails_moved_bytes(const struct rails *rails, uint32_t rank_idx);
void rails_traffic(const struct rails *rails, struct rails_traffic *traffic);
/* "ucx", "nccl". */
const char *rails_transport(const struct rails *rails);

/* Lane thread of the rank: the swap of transport.h, counted. */
EPD_MUST_CHECK enum epd_status rails_swap(struct rails *rails, uint32_t rank_idx,
                                          struct transport_part *parts, struct epd_error *error);
/* Lane thread of the rank: the swap on a stream of transport.h, counted when it is put there. An error breaks the rails. */
EPD_MUST_CHECK enum epd_status rails_swap_on(struct rails *rails, uint32_t rank_idx,
                                             const struct transport_move *moves, uint32_t n_parts,
                                             struct CUstream_st *stream, struct epd_error *error);
/* Lane thread of the rank: whether swaps that are in its stream still can end well; an error breaks the rails. Often. */
EPD_MUST_CHECK enum epd_status rails_check(struct rails *rails, uint32_t rank_idx, struct epd_error *error);
/* Any thread: 1, and the first error, if a swap has failed or abort was called: the rails are of no use any more. */
int rails_broken(const struct rails *rails, struct epd_error *why);

#endif
