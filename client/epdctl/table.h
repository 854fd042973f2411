/* A table of texts with columns as wide as their contents. Numbers stand right, words left. One owner, one
 * thread.
 *
 *   table_init(&table, "op,>launches,>p50");   '>' in front of a title: right-aligned column
 *   table_add(&table, "dispatch"); table_add(&table, "12"); table_add(&table, "3.1 us");
 *   table_print(&table, stdout); table_fini(&table);                                                */
#ifndef EPD_EPDCTL_TABLE_H
#define EPD_EPDCTL_TABLE_H

#include <stddef.h>
#include <stdio.h>

#define TABLE_MAX_COLUMNS 24

struct table {
    size_t n_columns;
    char titles[TABLE_MAX_COLUMNS][24];
    int right[TABLE_MAX_COLUMNS];
    size_t n_cells, max_cells;
    char **cells;   /* owned, owned texts, row after row */
    int incomplete; /* memory ran out: table_print says so */
};

void table_init(struct table *table, const char *titles);
void table_fini(struct table *table);
/* The next cell, row after row; copied. NULL or "" becomes "-". */
void table_add(struct table *table, const char *text);
size_t table_n_rows(const struct table *table);
/* Titles and rows; nothing at all if there is no row. */
void table_print(const struct table *table, FILE *out);

#endif
