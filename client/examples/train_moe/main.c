/* epd-train-moe: a byte-level Mixture-of-Experts language model trained by several processes through one epd
 * daemon, and the same training without it, to compare. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "launcher.h"
#include "layer_epd.h"
#include "losses.h"
#include "model.h"
#include "rank.h"
#include "reference.h"

enum { EXIT_FAILED = 1, EXIT_USAGE = 2 };

static int run_reference_only(const struct settings *settings)
{
    double *losses = calloc(settings->n_steps, sizeof(double));
    if (!losses)
        return EXIT_FAILED;
    enum epd_status status = reference_run(settings, 1, losses);
    if (status == EPD_OK)
        losses_print_summary("reference", losses, settings->n_steps);
    if (status == EPD_OK && settings->losses_path)
        status = losses_write(settings->losses_path, losses, NULL, settings->n_steps);
    free(losses);
    return status == EPD_OK ? 0 : EXIT_FAILED;
}

/* After the ranks are done, so that neither run takes processor time from the other. */
static int finish(const struct settings *settings, struct exchange *exchange)
{
    const double *losses = exchange_losses(exchange);
    double *reference = settings->reference ? exchange_reference_losses(exchange) : NULL;
    if (reference && reference_run(settings, 1, reference) != EPD_OK)
        return EXIT_FAILED;
    losses_print_summary("epd", losses, settings->n_steps);
    if (settings->losses_path &&
        losses_write(settings->losses_path, losses, reference, settings->n_steps) != EPD_OK)
        return EXIT_FAILED;
    if (!reference)
        return 0;
    losses_print_summary("reference", reference, settings->n_steps);
    return losses_agree(losses, reference, settings->n_steps, losses_tolerance(settings)) ? 0 : EXIT_FAILED;
}

static int run_launcher(struct settings *settings, int argc, char **argv)
{
    struct exchange exchange;
    int exchange_fd = -1;
    if (layer_epd_meet(settings) != EPD_OK)
        return EXIT_FAILED;
    if (exchange_create(&exchange, settings, model_n_params(settings), &exchange_fd) != EPD_OK)
        return EXIT_FAILED;
    printf("%u ranks, %u tokens each; context %u bytes, hidden %u, ffn %u, %u experts, top-%u; %zu shared "
           "weights\n",
           settings->n_ranks, settings->n_tokens, settings->context_bytes, settings->hidden, settings->ffn,
           settings->n_experts, settings->top_k, model_n_params(settings));
    fflush(stdout); /* before the ranks write to the same stream */
    int code = EXIT_FAILED;
    if (launcher_run(settings, &exchange, exchange_fd, argc, argv) == EPD_OK)
        code = finish(settings, &exchange);
    close(exchange_fd);
    exchange_close(&exchange);
    return code;
}

int main(int argc, char **argv)
{
    struct settings settings;
    switch (settings_parse(&settings, argc, argv)) {
    case SETTINGS_HELP:
        settings_print_help();
        return 0;
    case SETTINGS_USAGE_ERROR:
        return EXIT_USAGE;
    case SETTINGS_RUN:
        break;
    }
    if (settings.rank >= 0) {
        (void)prctl(PR_SET_PDEATHSIG, SIGTERM); /* a rank does not outlive its launcher */
        return rank_run(&settings) == EPD_OK ? 0 : EXIT_FAILED;
    }
    if (settings.reference_only)
        return run_reference_only(&settings);
    return run_launcher(&settings, argc, argv);
}
