#include "client/epdctl/table.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define GAP 2 /* blanks between two columns */

void table_init(struct table *table, const char *titles)
{
    *table = (struct table){0};
    while (*titles) {
        assert(table->n_columns < TABLE_MAX_COLUMNS);
        const size_t column = table->n_columns++;
        table->right[column] = *titles == '>';
        titles += table->right[column];
        const size_t length = strcspn(titles, ",");
        (void)snprintf(table->titles[column], sizeof(table->titles[column]), "%.*s", (int)length, titles);
        titles += length + (titles[length] == ',');
    }
}

void table_fini(struct table *table)
{
    for (size_t i = 0; i < table->n_cells; i++)
        free(table->cells[i]);
    free(table->cells);
    *table = (struct table){0};
}

void table_add(struct table *table, const char *text)
{
    if (table->n_cells == table->max_cells) {
        const size_t max_cells = table->max_cells ? 2 * table->max_cells : 64;
        char **cells = realloc(table->cells, max_cells * sizeof(*cells));
        if (!cells) {
            table->incomplete = 1;
            return;
        }
        table->cells = cells;
        table->max_cells = max_cells;
    }
    char *copy = strdup(text && *text ? text : "-");
    if (copy)
        table->cells[table->n_cells++] = copy;
    else
        table->incomplete = 1;
}

size_t table_n_rows(const struct table *table)
{
    return table->n_columns ? table->n_cells / table->n_columns : 0;
}

/* Columns on the screen: bytes that do not continue a UTF-8 character. */
static size_t display_width(const char *text)
{
    size_t width = 0;
    for (; *text; text++)
        width += ((unsigned char)*text & 0xc0) != 0x80;
    return width;
}

static void print_cell(const struct table *table, size_t column, const char *text, size_t width, FILE *out)
{
    const int blanks = (int)(width - display_width(text));
    const int last = column + 1 == table->n_columns;
    if (table->right[column])
        fprintf(out, "%*s%s", blanks, "", text);
    else
        fprintf(out, "%s%*s", text, last ? 0 : blanks, "");
    fprintf(out, "%*s", last ? 0 : GAP, "");
}

void table_print(const struct table *table, FILE *out)
{
    const size_t n_rows = table_n_rows(table);
    size_t widths[TABLE_MAX_COLUMNS];
    for (size_t column = 0; column < table->n_columns; column++) {
        widths[column] = display_width(table->titles[column]);
        for (size_t row = 0; row < n_rows; row++) {
            const size_t width = display_width(table->cells[row * table->n_columns + column]);
            widths[column] = width > widths[column] ? width : widths[column];
        }
    }
    for (size_t column = 0; n_rows && column < table->n_columns; column++)
        print_cell(table, column, table->titles[column], widths[column], out);
    if (n_rows)
        fputc('\n', out);
    for (size_t row = 0; row < n_rows; row++) {
        for (size_t column = 0; column < table->n_columns; column++)
            print_cell(table, column, table->cells[row * table->n_columns + column], widths[column], out);
        fputc('\n', out);
    }
    if (table->incomplete)
        fprintf(out, "(table cut: out of memory)\n");
}
