/* What one run of the training example is: sizes, data, where the daemon listens. Filled once from the
 * command line, read by every other part; rank processes parse the same command line again and so see the
 * same settings. */
#ifndef TRAIN_MOE_SETTINGS_H
#define TRAIN_MOE_SETTINGS_H

#include <stdint.h>

#define VOCABULARY        256 /* bytes */
#define MAX_RANKS         64
#define MAX_CONTEXT_BYTES 32
#define MAX_TOP_K         32
#define MAX_HIDDEN        8192

struct settings {
    const char *text_path;
    const char *socket_path; /* NULL: the library's default */
    const char *losses_path; /* NULL: losses are not written */
    uint32_t n_ranks;
    uint32_t n_steps;
    uint32_t n_tokens;      /* T, of one rank and step */
    uint32_t context_bytes; /* bytes a prediction looks back on */
    uint32_t hidden, ffn, n_experts, top_k;
    uint32_t report_steps; /* a progress line every so many steps */
    uint64_t seed;
    float learning_rate;
    double
        tolerance; /* relative, between the losses of epd and of the reference; 0: the dtype's (losses.h) */
    int dtype;     /* enum epd_dtype of the layer; 0: the backend's */
    int reference; /* run the reference beside and compare */
    int reference_only; /* run the reference alone, no daemon */
    int rank;           /* >= 0 in a rank process */
    int exchange_fd;    /* of a rank process */
    int launcher_pid;   /* names the group */
};

enum settings_result { SETTINGS_RUN, SETTINGS_HELP, SETTINGS_USAGE_ERROR };

/* Errors have been printed to stderr. Strings point into argv. */
enum settings_result settings_parse(struct settings *settings, int argc, char **argv);
void settings_print_help(void);

#endif
