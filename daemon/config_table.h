/* The table of the configuration's keys: one row each, which feeds the file's reader, the flags, --help and the
 * status document. No dependencies. */
#ifndef EPD_DAEMON_CONFIG_TABLE_H
#define EPD_DAEMON_CONFIG_TABLE_H

#include <stddef.h>
#include <stdint.h>

enum config_type {
    CONFIG_TEXT,
    CONFIG_COUNT,    /* plain number */
    CONFIG_BYTES,    /* number with K, M, G or T */
    CONFIG_DURATION, /* number with ms, s or m; kept in milliseconds */
    CONFIG_MODE,     /* octal file mode */
    CONFIG_WORD,     /* one of a list; kept as its position */
};

struct config_key {
    const char *section, *key; /* flag: --key with '-' for '_' */
    enum config_type type;
    size_t offset;            /* into struct config */
    const char *fallback;     /* the default, as in the file */
    uint64_t min, max;        /* of numbers */
    const char *const *words; /* of CONFIG_WORD, NULL at the end */
    int reloadable;           /* SIGHUP takes it over; otherwise only a restart does */
    const char *help;
};

/* The table; *n_keys entries. Static. */
const struct config_key *config_keys(size_t *n_keys);

#endif
