/* A rank of the tests of nodes, as a process of its own with a GPU: one MoE layer, forward and backward, on a daemon. */
#ifndef EPD_TESTS_GPU_FABRIC_NODE_RANK_H
#define EPD_TESTS_GPU_FABRIC_NODE_RANK_H

struct node_rank_options {
    /* "layer": every check; "check": results, repeats and a step that fails; "until_lost"; "for:S": steps, S seconds */
    const char *mode;
    const char *group;
    unsigned rank, world_size, n_nodes, device;
    const char *socket_path;
    /* Of files: "PREFIX.RANK", the result of "layer" and "check"; "PREFIX.steps", made by rank 0 of the others when they
     * step; "-": none. */
    const char *prefix;
    const char *epdctl, *control_path; /* rank 0 of "layer" prints the fabric; "-": not */
};

#define NODE_RANK_ARGUMENTS 12
/* "PROGRAM rank MODE GROUP RANK WORLD NODES DEVICE SOCKET PREFIX EPDCTL CONTROL"; exits. EPD_TEST_CROSSING=eager in the
 * environment: plans are eager. */
_Noreturn void node_rank_main(char **argv);

#endif
