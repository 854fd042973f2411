#include "settings.h"

#include <errno.h>
#include <getopt.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <epd.h>

enum option_kind {
    OPTION_TEXT,
    OPTION_COUNT,
    OPTION_SEED,
    OPTION_FLOAT,
    OPTION_DOUBLE,
    OPTION_SWITCH,
    OPTION_FD,
    OPTION_DTYPE
};

/* One row per option: where it goes and what is allowed. */
struct option_row {
    const char *name;
    enum option_kind kind;
    size_t offset;
    uint64_t min, max;    /* of counts */
    const char *argument; /* what help calls it; "" without one */
    const char *help;     /* NULL: for rank processes only */
};

#define FIELD(name) offsetof(struct settings, name)

static const struct option_row option_rows[] = {
    {"text", OPTION_TEXT, FIELD(text_path), 0, 0, "FILE", "text to learn (/usr/share/common-licenses/GPL-3)"},
    {"socket", OPTION_TEXT, FIELD(socket_path), 0, 0, "PATH", "socket of the daemon ($EPD_SOCKET)"},
    {"losses", OPTION_TEXT, FIELD(losses_path), 0, 0, "FILE", "write the losses of every step there"},
    {"ranks", OPTION_COUNT, FIELD(n_ranks), 1, MAX_RANKS, "N", "rank processes (4)"},
    {"steps", OPTION_COUNT, FIELD(n_steps), 1, 1000000, "N", "training steps (200)"},
    {"tokens", OPTION_COUNT, FIELD(n_tokens), 1, 65536, "N", "tokens of a rank in a step (256)"},
    {"context", OPTION_COUNT, FIELD(context_bytes), 1, MAX_CONTEXT_BYTES, "N",
     "bytes a prediction looks back on (8)"},
    {"hidden", OPTION_COUNT, FIELD(hidden), 8, MAX_HIDDEN, "N", "hidden size, a multiple of 8 (64)"},
    {"ffn", OPTION_COUNT, FIELD(ffn), 8, 32768, "N", "ffn size of an expert, a multiple of 8 (128)"},
    {"experts", OPTION_COUNT, FIELD(n_experts), 1, 1024, "N", "experts, a multiple of the ranks (8)"},
    {"top-k", OPTION_COUNT, FIELD(top_k), 1, MAX_TOP_K, "N", "experts of a token (2)"},
    {"learning-rate", OPTION_FLOAT, FIELD(learning_rate), 0, 0, "X", "of Adam (0.003)"},
    {"seed", OPTION_SEED, FIELD(seed), 0, 0, "N", "of the weights and the order of the data (1)"},
    {"report", OPTION_COUNT, FIELD(report_steps), 1, 1000000, "N", "a progress line every N steps (10)"},
    {"reference", OPTION_SWITCH, FIELD(reference), 0, 0, "",
     "train the same model in one process without epd as well and compare every step's loss"},
    {"reference-only", OPTION_SWITCH, FIELD(reference_only), 0, 0, "", "only that; needs no daemon"},
    {"tolerance", OPTION_DOUBLE, FIELD(tolerance), 0, 0, "X",
     "relative difference of losses that passes (fp32: 1e-4; bf16 and fp16: 5e-2, or where every token "
     "goes to all experts 1.6e-2 and 2e-3)"},
    {"dtype", OPTION_DTYPE, FIELD(dtype), 0, 0, "NAME",
     "of the layer: f32 (host backend only), bf16 or f16 (host: f32, CUDA: bf16)"},
    {"help", OPTION_SWITCH, 0, 0, 0, "", "this text"},
    {"rank", OPTION_FD, FIELD(rank), 0, 0, NULL, NULL},
    {"exchange-fd", OPTION_FD, FIELD(exchange_fd), 0, 0, NULL, NULL},
    {"launcher-pid", OPTION_FD, FIELD(launcher_pid), 0, 0, NULL, NULL},
};
#define N_OPTIONS (sizeof(option_rows) / sizeof(option_rows[0]))

static void settings_defaults(struct settings *settings)
{
    *settings = (struct settings){
        .text_path = "/usr/share/common-licenses/GPL-3",
        .n_ranks = 4,
        .n_steps = 200,
        .n_tokens = 256,
        .context_bytes = 8,
        .hidden = 64,
        .ffn = 128,
        .n_experts = 8,
        .top_k = 2,
        .report_steps = 10,
        .seed = 1,
        .learning_rate = 0.003f,
        .rank = -1,
        .exchange_fd = -1,
    };
}

static int parse_integer(const struct option_row *row, const char *text, uint64_t *value)
{
    char *end = NULL;
    errno = 0;
    *value = strtoull(text, &end, 10);
    if (errno || end == text || *end || text[0] == '-') {
        fprintf(stderr, "epd-train-moe: --%s %s: not a number\n", row->name, text);
        return -1;
    }
    if (row->kind == OPTION_COUNT && (*value < row->min || *value > row->max)) {
        fprintf(stderr, "epd-train-moe: --%s %s: allowed are %llu to %llu\n", row->name, text,
                (unsigned long long)row->min, (unsigned long long)row->max);
        return -1;
    }
    return 0;
}

static int parse_positive(const struct option_row *row, const char *text, double *value)
{
    char *end = NULL;
    *value = strtod(text, &end);
    if (end == text || *end || !(*value > 0) || *value > 1e6) {
        fprintf(stderr, "epd-train-moe: --%s %s: not a positive number\n", row->name, text);
        return -1;
    }
    return 0;
}

static int parse_dtype(const char *text, int *dtype)
{
    static const struct {
        const char *name;
        enum epd_dtype dtype;
    } names[] = {{"f32", EPD_F32}, {"bf16", EPD_BF16}, {"f16", EPD_F16}};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        if (strcmp(text, names[i].name) != 0)
            continue;
        *dtype = names[i].dtype;
        return 0;
    }
    fprintf(stderr, "epd-train-moe: --dtype %s: want f32, bf16 or f16\n", text);
    return -1;
}

static int apply_option(struct settings *settings, const struct option_row *row, const char *text)
{
    void *field = (char *)settings + row->offset;
    uint64_t integer = 0;
    double real = 0;
    switch (row->kind) {
    case OPTION_TEXT:
        *(const char **)field = text;
        return 0;
    case OPTION_SWITCH:
        *(int *)field = 1;
        return 0;
    case OPTION_DTYPE:
        return parse_dtype(text, field);
    case OPTION_FLOAT:
    case OPTION_DOUBLE:
        if (parse_positive(row, text, &real))
            return -1;
        if (row->kind == OPTION_FLOAT)
            *(float *)field = (float)real;
        else
            *(double *)field = real;
        return 0;
    case OPTION_COUNT:
    case OPTION_SEED:
    case OPTION_FD:
        if (parse_integer(row, text, &integer))
            return -1;
        if (row->kind == OPTION_COUNT)
            *(uint32_t *)field = (uint32_t)integer;
        else if (row->kind == OPTION_SEED)
            *(uint64_t *)field = integer;
        else
            *(int *)field = (int)integer;
        return 0;
    }
    return -1;
}

static int settings_check(const struct settings *settings)
{
    if (settings->n_experts % settings->n_ranks) {
        fprintf(stderr, "epd-train-moe: --experts %u is not a multiple of --ranks %u\n", settings->n_experts,
                settings->n_ranks);
        return -1;
    }
    if (settings->top_k > settings->n_experts) {
        fprintf(stderr, "epd-train-moe: --top-k %u is more than --experts %u\n", settings->top_k,
                settings->n_experts);
        return -1;
    }
    if (settings->hidden % 8 || settings->ffn % 8) {
        fprintf(stderr, "epd-train-moe: --hidden %u and --ffn %u must be multiples of 8\n", settings->hidden,
                settings->ffn);
        return -1;
    }
    return 0;
}

enum settings_result settings_parse(struct settings *settings, int argc, char **argv)
{
    struct option table[N_OPTIONS + 1];
    memset(table, 0, sizeof(table));
    for (size_t i = 0; i < N_OPTIONS; i++) {
        table[i].name = option_rows[i].name;
        table[i].has_arg = option_rows[i].kind == OPTION_SWITCH ? no_argument : required_argument;
    }
    settings_defaults(settings);
    int idx = 0, found = 0;
    while ((found = getopt_long(argc, argv, "", table, &idx)) != -1) {
        if (found == '?')
            return SETTINGS_USAGE_ERROR;
        if (strcmp(option_rows[idx].name, "help") == 0)
            return SETTINGS_HELP;
        if (apply_option(settings, &option_rows[idx], optarg))
            return SETTINGS_USAGE_ERROR;
    }
    if (optind < argc) {
        fprintf(stderr, "epd-train-moe: what is '%s'? all arguments are options, see --help\n", argv[optind]);
        return SETTINGS_USAGE_ERROR;
    }
    return settings_check(settings) ? SETTINGS_USAGE_ERROR : SETTINGS_RUN;
}

static void print_option(const struct option_row *row)
{
    char option[32];
    (void)snprintf(option, sizeof(option), "--%s %s", row->name, row->argument);
    printf("  %-18s %s\n", option, row->help);
}

void settings_print_help(void)
{
    printf(
        "epd-train-moe: trains a small byte-level MoE language model, its experts run by an epd daemon.\n\n");
    for (size_t i = 0; i < N_OPTIONS; i++)
        if (option_rows[i].help)
            print_option(&option_rows[i]);
    printf("\nExit codes: 0 trained (and, with --reference, the losses agree), 1 failed, 2 usage.\n");
}
