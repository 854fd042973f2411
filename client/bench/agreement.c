#include "client/bench/agreement.h"

#include <math.h>
#include <stdio.h>

#include "client/epdctl/field.h"
#include "client/epdctl/link.h"

int agreement_read(const char *control_path, struct agreement *agreement)
{
    const struct message_control request = {.verb = CONTROL_FABRIC};
    struct link link;
    struct epd_error error = {0};
    json_t *document = NULL;
    enum epd_status status = link_open(&link, control_path, LINK_TIMEOUT_MS_DEFAULT, &error);
    if (status == EPD_OK) {
        status = link_request(&link, &request, &document, &error);
        link_close(&link);
    }
    if (status != EPD_OK) {
        fprintf(stderr, "epd-bench: %s: %s\n", control_path, error.text);
        return -1;
    }
    agreement->n_steps = field_number_in(document, "agreement", "steps");
    agreement->sum_ns = field_number_in(document, "agreement", "mean_ns") * agreement->n_steps;
    agreement->n_ahead = field_number_in(document, "agreement", "ahead");
    json_decref(document);
    if (isnan(agreement->sum_ns) || isnan(agreement->n_ahead)) {
        fprintf(stderr, "epd-bench: %s: does not say how its nodes agree\n", control_path);
        return -1;
    }
    return 0;
}
