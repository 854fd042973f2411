/* What the ranks of a case bring: routing by a pattern, and values; the same for the same case. Used by one thread. */
#ifndef EPD_TESTS_GPU_EXCHANGE_INPUTS_H
#define EPD_TESTS_GPU_EXCHANGE_INPUTS_H

#include "tests/gpu/exchange/reference.h"

enum pattern { UNIFORM, ALL_TO_ONE, NONE, SOME_NONE, HOSTILE };
extern const char *const pattern_names[];

/* Sets problem->n_tokens; uneven: odd ranks have none. All but y of input[n_ranks] is allocated here. */
void inputs_make(struct problem *problem, enum pattern pattern, int uneven, struct rank_input *input);
/* y, once the capacity is known. */
void inputs_make_y(const struct problem *problem, struct rank_input *input);
/* The rows that the fullest rank needs. */
int64_t inputs_needed_rows(const struct problem *problem, const struct rank_input *input);
void inputs_free(const struct problem *problem, struct rank_input *input);

#endif
