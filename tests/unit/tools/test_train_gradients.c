/* The training example's gradients against differences of its loss. Embedding, router and head are the same
 * code on both sides of the example's own comparison, so an error there would pass it; here it does not. */
#include <check.h>
#include <math.h>
#include <stdlib.h>

#include "client/examples/train_moe/layer_plain.h"
#include "client/examples/train_moe/random.h"
#include "client/examples/train_moe/tokens.h"

#define N_PROBES 60
#define STEP     1e-2f

struct fixture {
    struct settings settings;
    struct text text;
    struct batch batch;
    struct model model;
    struct layer_plain layer;
};

static void fixture_open(struct fixture *fixture)
{
    struct settings *settings = &fixture->settings;
    char name[] = "train";
    char *arguments[] = {name, NULL};
    ck_assert_int_eq(settings_parse(settings, 1, arguments), SETTINGS_RUN); /* the defaults */
    settings->text_path = __FILE__;
    settings->n_ranks = 1;
    settings->n_tokens = 12;
    settings->context_bytes = 3;
    settings->hidden = 16;
    settings->ffn = 8;
    settings->n_experts = 4;
    settings->top_k = 3;
    ck_assert_int_eq(text_open(&fixture->text, &fixture->settings), EPD_OK);
    ck_assert_int_eq(batch_init(&fixture->batch, &fixture->settings), EPD_OK);
    ck_assert_int_eq(model_init(&fixture->model, &fixture->settings), EPD_OK);
    ck_assert_int_eq(layer_plain_init(&fixture->layer, &fixture->settings), EPD_OK);
    batch_take(&fixture->batch, &fixture->text, &fixture->settings, 0, 0);
    /* The head starts near zero; a larger one lets gradients of everything before it be seen. */
    for (size_t i = 0; i < VOCABULARY * fixture->settings.hidden; i++)
        fixture->model.weights.head[i] *= 20;
}

static void fixture_close(struct fixture *fixture)
{
    layer_plain_fini(&fixture->layer);
    model_fini(&fixture->model);
    batch_fini(&fixture->batch);
    text_close(&fixture->text);
}

/* Mean loss; gradients are left in model.grads and layer.dw1, dw2. */
static double run(struct fixture *fixture)
{
    model_zero_grads(&fixture->model);
    layer_plain_zero_grads(&fixture->layer);
    tokens_enter(&fixture->model, &fixture->batch, &fixture->layer.tokens);
    layer_plain_forward(&fixture->layer);
    const double loss = tokens_loss(&fixture->model, &fixture->batch, &fixture->layer.tokens);
    layer_plain_backward(&fixture->layer);
    tokens_leave(&fixture->model, &fixture->batch, &fixture->layer.tokens);
    return loss / fixture->settings.n_tokens;
}

/* Changes single weights both ways; n weights, their gradients as run() left them. */
static void check_gradients(struct fixture *fixture, const char *name, float *weights, const float *grads,
                            size_t n)
{
    float expected[N_PROBES];
    size_t probes[N_PROBES];
    double worst = 0, largest = 0;
    (void)run(fixture);
    for (size_t i = 0; i < N_PROBES; i++) {
        probes[i] = random_at(77, i) % n;
        expected[i] = grads[probes[i]];
        largest = fmax(largest, fabs(expected[i]));
    }
    for (size_t i = 0; i < N_PROBES; i++) {
        const float before = weights[probes[i]];
        weights[probes[i]] = before + STEP;
        const double above = run(fixture);
        weights[probes[i]] = before - STEP;
        const double below = run(fixture);
        weights[probes[i]] = before;
        worst = fmax(worst, fabs((above - below) / (2 * STEP) - expected[i]));
    }
    ck_assert_msg(largest > 0, "%s: no gradient at all", name);
    ck_assert_msg(worst < 0.01 * largest, "%s: a gradient is off by %g, the largest is %g", name, worst,
                  largest);
}

START_TEST(gradients_match_differences_of_the_loss)
{
    struct fixture fixture;
    fixture_open(&fixture);
    struct model *model = &fixture.model;
    struct layer_plain *layer = &fixture.layer;
    const struct settings *settings = &fixture.settings;
    /* Of the embedding only rows that the batch uses have a gradient: probe those of the first context byte.
     */
    const size_t row = fixture.batch.context[0] * (size_t)settings->hidden;
    check_gradients(&fixture, "embedding", model->weights.embedding + row, model->grads.embedding + row,
                    settings->hidden);
    check_gradients(&fixture, "router", model->weights.router, model->grads.router,
                    settings->n_experts * (size_t)settings->hidden);
    check_gradients(&fixture, "head", model->weights.head, model->grads.head,
                    VOCABULARY * (size_t)settings->hidden);
    check_gradients(&fixture, "head bias", model->weights.head_bias, model->grads.head_bias, VOCABULARY);
    check_gradients(&fixture, "w1", layer->w1, layer->dw1, settings->n_experts * experts_w1_size(settings));
    check_gradients(&fixture, "w2", layer->w2, layer->dw2, settings->n_experts * experts_w2_size(settings));
    fixture_close(&fixture);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("train gradients");
    TCase *tcase = tcase_create("all");
    tcase_set_timeout(tcase, 60);
    tcase_add_test(tcase, gradients_match_differences_of_the_loss);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    const int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
