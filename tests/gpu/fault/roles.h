/* What a rank process does, by name. Each role ends the process with 0 if everything was as it must be. */
#ifndef EPD_TESTS_GPU_FAULT_ROLES_H
#define EPD_TESTS_GPU_FAULT_ROLES_H

#include "tests/gpu/fault/gpu_rank.h"

struct role {
    const char *name;
    void (*run)(struct gpu_rank *rank);
};

/* Ends with a role without a name. */
extern const struct role roles_of_life[];   /* roles_life.c: steps, deaths, recoveries */
extern const struct role roles_of_input[];  /* roles_input.c: what the GPU's memory may hold */
extern const struct role roles_of_memory[]; /* roles_memory.c: handles, allocations */

#endif
