/* The checks of plans: of one when it is created, and of all ranks' when they are joined. Loop thread. */
#ifndef EPD_EP_PLAN_CHECK_H
#define EPD_EP_PLAN_CHECK_H

#include "ep/plan_impl.h"

/* 1 if rows of the op's tokens cross between nodes, where a group has several. */
static inline int plan_check_crosses(enum epd_op op)
{
    return op_is_collective(op) && op != EPD_OP_BARRIER;
}

/* Op, rank, context and modes, before anything is made. */
EPD_MUST_CHECK enum epd_status plan_check_request(const struct team *team, const struct plan_request *request,
                                                  struct epd_error *error);
/* What depends on which tensors are bound; sets the saved parts and bytes, within the budget. */
EPD_MUST_CHECK enum epd_status plan_check_bound(struct plan *plan, const struct plan_request *request,
                                                struct epd_error *error);
/* Fills key and shape hash from the checked plan. */
void plan_check_fill_key(struct plan *plan);
/* EPD_PLAN_MISMATCH names the rank and the property. */
EPD_MUST_CHECK enum epd_status plan_check_join(struct plan *const *plans, uint32_t n_plans,
                                               struct epd_error *error);

#endif
