#include "client/epdctl/quantity.h"

#include <math.h>
#include <stdio.h>

static char *unknown(char *text)
{
    (void)snprintf(text, QUANTITY_BYTES, "-");
    return text;
}

/* Three figures, without a decimal point at the end. */
static void print_figures(char *text, double value, const char *suffix)
{
    const int decimals = value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
    (void)snprintf(text, QUANTITY_BYTES, "%.*f%s", decimals, value, suffix);
}

/* value in the largest prefix that leaves at least 1; exact below the first. */
static char *print_prefixed(char *text, double value, double base, const char *const *prefixes,
                            const char *unit)
{
    int idx = 0;
    while (value >= base * 0.9995 && prefixes[idx + 1]) {
        value /= base;
        idx++;
    }
    char suffix[24];
    (void)snprintf(suffix, sizeof(suffix), "%s%s%s", *prefixes[idx] || (*unit && *unit != '/') ? " " : "",
                   prefixes[idx], unit);
    if (idx == 0 && value == floor(value))
        (void)snprintf(text, QUANTITY_BYTES, "%.0f%s", value, suffix);
    else
        print_figures(text, value, suffix);
    return text;
}

static const char *const decimal_prefixes[] = {"", "k", "M", "G", "T", "P", NULL};

char *quantity_count(char *text, double count)
{
    if (!isfinite(count))
        return unknown(text);
    if (fabs(count) < 1e7)
        (void)snprintf(text, QUANTITY_BYTES, "%.0f", count);
    else
        print_prefixed(text, count, 1000, decimal_prefixes, "");
    return text;
}

char *quantity_memory(char *text, double bytes)
{
    static const char *const prefixes[] = {"", "Ki", "Mi", "Gi", "Ti", NULL};
    return isfinite(bytes) ? print_prefixed(text, bytes, 1024, prefixes, "B") : unknown(text);
}

char *quantity_duration(char *text, double ns)
{
    static const char *const units[] = {" ns", " us", " ms", " s"};
    if (!isfinite(ns))
        return unknown(text);
    int idx = 0;
    for (; ns >= 999.5 && idx < 3; idx++)
        ns /= 1000;
    if (idx == 0)
        (void)snprintf(text, QUANTITY_BYTES, "%.0f ns", ns);
    else
        print_figures(text, ns, units[idx]);
    return text;
}

char *quantity_age(char *text, double ms)
{
    if (!isfinite(ms))
        return unknown(text);
    const long seconds = (long)(ms / 1000);
    if (seconds < 60)
        (void)snprintf(text, QUANTITY_BYTES, "%ld s", seconds);
    else if (seconds < 3600)
        (void)snprintf(text, QUANTITY_BYTES, "%ld min %ld s", seconds / 60, seconds % 60);
    else if (seconds < 86400)
        (void)snprintf(text, QUANTITY_BYTES, "%ld h %ld min", seconds / 3600, seconds / 60 % 60);
    else
        (void)snprintf(text, QUANTITY_BYTES, "%ld d %ld h", seconds / 86400, seconds / 3600 % 24);
    return text;
}

char *quantity_rate(char *text, double per_second, const char *unit)
{
    char per[16];
    (void)snprintf(per, sizeof(per), "%s/s", unit);
    return isfinite(per_second) ? print_prefixed(text, per_second, 1000, decimal_prefixes, per)
                                : unknown(text);
}

char *quantity_share(char *text, double share)
{
    if (!isfinite(share))
        return unknown(text);
    (void)snprintf(text, QUANTITY_BYTES, "%.0f %%", share * 100);
    return text;
}

char *quantity_ratio(char *text, double ratio)
{
    if (!isfinite(ratio))
        return unknown(text);
    (void)snprintf(text, QUANTITY_BYTES, "%.2fx", ratio);
    return text;
}
