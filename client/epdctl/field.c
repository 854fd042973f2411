#include "client/epdctl/field.h"

#include <math.h>
#include <stdio.h>

double field_number(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    if (json_is_number(value))
        return json_number_value(value);
    if (json_is_boolean(value))
        return json_is_true(value) ? 1 : 0;
    return NAN;
}

double field_number_in(const json_t *object, const char *key, const char *inner)
{
    return field_number(json_object_get(object, key), inner);
}

double field_growth(const json_t *now, const json_t *before, const char *key)
{
    const double earlier = field_number(before, key);
    return field_number(now, key) - (isnan(earlier) ? 0 : earlier);
}

const char *field_text(const json_t *object, const char *key, const char *fallback)
{
    const char *text = json_string_value(json_object_get(object, key));
    return text ? text : fallback;
}

int field_true(const json_t *object, const char *key)
{
    const double number = field_number(object, key);
    return !isnan(number) && number != 0;
}

json_t *field_array(const json_t *object, const char *key)
{
    json_t *value = json_object_get(object, key);
    return json_is_array(value) ? value : NULL;
}

json_t *field_object(const json_t *object, const char *key)
{
    json_t *value = json_object_get(object, key);
    return json_is_object(value) ? value : NULL;
}

const char *field_print(const json_t *object, const char *key, char *text, size_t bytes)
{
    const json_t *value = json_object_get(object, key);
    if (json_is_string(value) && json_string_length(value) > 0)
        (void)snprintf(text, bytes, "%s", json_string_value(value));
    else if (json_is_integer(value))
        (void)snprintf(text, bytes, "%" JSON_INTEGER_FORMAT, json_integer_value(value));
    else if (json_is_real(value))
        (void)snprintf(text, bytes, "%.3g", json_real_value(value));
    else if (json_is_boolean(value))
        (void)snprintf(text, bytes, "%s", json_is_true(value) ? "yes" : "no");
    else
        (void)snprintf(text, bytes, "-");
    return text;
}
