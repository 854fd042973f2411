/* The table itself: which op takes which roles. Static; any thread. */
#ifndef EPD_EP_BINDING_RULES_H
#define EPD_EP_BINDING_RULES_H

#include "ep/binding.h"

enum binding_need {
    BINDING_REQUIRED = 1,
    BINDING_OPTIONAL = 2,
};

enum binding_type {
    TYPE_GROUP = 1, /* the group's dtype */
    TYPE_FREE,      /* f32, bf16 or f16: as the first tensor of the plan with this rule */
    TYPE_FREE_OR_F32,
    TYPE_FLOAT, /* f32, bf16 or f16, of its own */
    TYPE_F32,
    TYPE_I64,
    TYPE_INDEX, /* int32 or int64 */
};

struct binding_rule {
    enum epd_role role; /* UNSPECIFIED ends a list */
    enum binding_need need;
    enum binding_type type;
    enum binding_dim dims[3];
    int takes_parts;     /* may come as one tensor per expert, without the first dimension */
    enum epd_role needs; /* only together with this role */
};

/* The rules of an op, in the order in which they are checked; NULL for an unknown op or layout. */
const struct binding_rule *binding_rules(enum epd_op op, enum epd_gemm_layout layout);

#endif
