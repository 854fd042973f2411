#include "client/epdctl/status_view.h"

#include <math.h>
#include <string.h>

#include "client/epdctl/field.h"
#include "client/epdctl/quantity.h"
#include "client/epdctl/table.h"

static void print_count(FILE *out, const json_t *document, const char *key)
{
    const double count = field_number(document, key);
    if (!isnan(count))
        fprintf(out, ", %.0f %.*s%s", count, (int)strlen(key) - 1, key, count == 1 ? "" : "s");
}

void status_view_headline(const json_t *document, FILE *out)
{
    char text[QUANTITY_BYTES];
    fprintf(out, "epd %s", field_text(document, "version", "-"));
    if (field_text(document, "backend", NULL))
        fprintf(out, " on %s", field_text(document, "backend", NULL));
    if (!isnan(field_number(document, "uptime_ms")))
        fprintf(out, ", up %s", quantity_age(text, field_number(document, "uptime_ms")));
    print_count(out, document, "sessions");
    print_count(out, document, "groups");
    print_count(out, document, "plans");
    if (field_true(document, "draining"))
        fprintf(out, ", DRAINING: no new work is taken");
    fputc('\n', out);
}

/* What the supervisor answers while no worker serves: one that hangs, ends or starts is there all the same. */
static void print_no_worker(const json_t *status, FILE *out)
{
    char text[QUANTITY_BYTES];
    const char *worker = field_text(status, "worker", "-");
    fprintf(out, "epd %s: no worker serves (%s)\n", field_text(status, "version", "-"), worker);
    if (field_number(status, "hangs") > 0)
        fprintf(out, "  ended for hangs %s\n", quantity_count(text, field_number(status, "hangs")));
    fprintf(out, "  last exit       %s\n", field_text(status, "last_exit", "-"));
    fprintf(out, "  failures        %s in a row\n", quantity_count(text, field_number(status, "failures")));
    if (strcmp(worker, "waiting") == 0)
        fprintf(out, "  next start in   %s\n",
                quantity_duration(text, field_number(status, "restart_in_ms") * 1e6));
}

static void print_line(FILE *out, const json_t *object, const char *label, const char *key)
{
    char text[512];
    fprintf(out, "  %-22s %s\n", label, field_print(object, key, text, sizeof(text)));
}

/* How many of each device are taken, and what a session and a uid may take. */
static void print_queues(const json_t *status, FILE *out)
{
    const json_t *queues = field_object(status, "queues");
    char session[32], uid[32];
    size_t idx;
    json_t *n;
    if (!queues)
        return;
    fprintf(out, "  %-22s", "queues by device");
    json_array_foreach (field_array(queues, "devices"), idx, n)
        fprintf(out, " %lld", (long long)json_integer_value(n));
    fprintf(out, " (at most %s of a session, %s of a uid; 0: no limit)\n",
            field_print(queues, "per_session", session, sizeof(session)),
            field_print(queues, "per_uid", uid, sizeof(uid)));
}

static void print_limits(const json_t *status, FILE *out)
{
    const char *name;
    json_t *hits;
    json_object_foreach (field_object(status, "limits_hit"), name, hits) {
        if (json_number_value(hits) > 0)
            fprintf(out, "  limit %s was hit %.0f times; raise it, or find out who needs so much\n", name,
                    json_number_value(hits));
    }
}

static void print_config(const json_t *status, FILE *out)
{
    struct table table;
    table_init(&table, "section,key,value,default,reload");
    size_t idx;
    json_t *entry;
    json_array_foreach (field_array(status, "config"), idx, entry) {
        char text[512];
        static const char *const keys[] = {"section", "key", "value", "default", "reloadable"};
        for (size_t i = 0; i < sizeof(keys) / sizeof(keys[0]); i++)
            table_add(&table, field_print(entry, keys[i], text, sizeof(text)));
    }
    fputc('\n', out);
    table_print(&table, out);
    table_fini(&table);
}

void status_view(const json_t *status, int verbose, FILE *out)
{
    if (field_text(status, "worker", NULL)) {
        print_no_worker(status, out);
        return;
    }
    status_view_headline(status, out);
    const json_t *sockets = field_object(status, "sockets");
    print_line(out, status, "worker pid", "pid");
    print_line(out, status, "supervisor pid", "supervisor_pid");
    print_line(out, status, "boot id", "boot_id");
    print_line(out, status, "epoch", "epoch");
    print_line(out, status, "worker restarts", "generation");
    print_line(out, status, "of them after hangs", "hangs");
    if (*field_text(status, "last_exit", ""))
        print_line(out, status, "last worker's exit", "last_exit");
    print_line(out, sockets, "socket of ranks", "rank");
    print_line(out, sockets, "control socket", "control");
    print_line(out, status, "configuration file", "config_file");
    print_line(out, status, "MPS", "mps");
    print_line(out, status, "buffers", "buffers");
    print_line(out, status, "launches in flight", "launches_in_flight");
    print_queues(status, out);
    print_limits(status, out);
    if (verbose)
        print_config(status, out);
}
