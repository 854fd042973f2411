/* Messages between nodes: what comes in is checked before it is used. */
#include <stdlib.h>
#include <string.h>

#include "ep/hop_frame.h"
#include "tests/unit/ep/harness.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))
#define CONTENT      (HOP_COUNTS | HOP_EXPERTS | HOP_WEIGHTS | HOP_ROWS)
#define STEP         7
#define THERE        0 /* the node that it comes from; this one is node 1 */
#define N_TOKENS     3

struct letter {
    struct problem problem;
    struct hop_frame sent, came;
    void *data;
};

/* Experts 4..7 are here. The sender has a token that does not come here, too: for 0 and 1. */
static void letter_init(struct letter *letter, uint32_t content)
{
    const struct message_group_config config = {.n_experts = 8,
                                                .top_k = 2,
                                                .hidden = 8,
                                                .max_tokens = 4,
                                                .capacity_rows = 16,
                                                .alignment = 1,
                                                .dtype = EPD_F32,
                                                .overflow = EPD_OVERFLOW_ERROR};
    static const int32_t experts[N_TOKENS][2] = {{4, 0}, {5, 4}, {7, -1}};
    static const int32_t counts[8] = {2, 1, 0, 0, 2, 1, 0, 1};
    struct epd_error error = {.status = EPD_OK};
    ck_assert_int_eq(problem_init(&letter->problem, &config, 4, &error), EPD_OK);
    ck_assert_int_eq(problem_span(&letter->problem, 2, 1, &error), EPD_OK);
    letter->data = calloc(1, 4096);
    hop_frame_begin(&letter->sent, &letter->problem, content,
                    (struct hop_tokens){letter->problem.max_tokens, N_TOKENS}, STEP, letter->data);
    ck_assert_uint_le(letter->sent.bytes, 4096);
    if (letter->sent.experts)
        memcpy(letter->sent.experts, experts, sizeof experts);
    if (letter->sent.counts)
        memcpy(letter->sent.counts, counts, sizeof counts);
}

static enum epd_status check(struct letter *letter, uint32_t content, uint32_t n_due, struct epd_error *error)
{
    return hop_frame_check(&letter->came, &letter->problem, content,
                           (struct hop_tokens){letter->problem.max_tokens, n_due}, STEP, THERE, letter->data,
                           letter->sent.bytes, error);
}

START_TEST(a_message_is_taken_as_it_was_sent)
{
    for (uint32_t content = CONTENT; content <= (CONTENT | HOP_STATIC); content += HOP_STATIC) {
        struct letter letter;
        struct epd_error error;
        int32_t counts[8];
        letter_init(&letter, content);
        memcpy(counts, letter.sent.counts, sizeof counts);
        ck_assert_int_eq(check(&letter, content, N_TOKENS, &error), EPD_OK);
        ck_assert_int_eq(check(&letter, content, UINT32_MAX, &error), EPD_OK);
        ck_assert_ptr_eq(letter.came.rows, letter.sent.rows);
        ck_assert_mem_eq(counts, letter.came.counts, sizeof counts);
        free(letter.data);
    }
}
END_TEST

static void expect_refused(struct letter *letter, uint32_t n_due, const char *text)
{
    struct epd_error error;
    ck_assert_int_eq(check(letter, CONTENT, n_due, &error), EPD_PROTOCOL);
    ck_assert_msg(strstr(error.text, "node 0") && strstr(error.text, text), "%s", error.text);
    free(letter->data);
}

START_TEST(a_message_that_lies_is_refused)
{
    struct letter letter;
    letter_init(&letter, CONTENT);
    letter.sent.head->magic++;
    expect_refused(&letter, UINT32_MAX, "step");
    letter_init(&letter, CONTENT);
    letter.sent.head->step++;
    expect_refused(&letter, UINT32_MAX, "step");
    letter_init(&letter, CONTENT);
    expect_refused(&letter, N_TOKENS + 1, "content");
    letter_init(&letter, CONTENT);
    letter.sent.head->n_tokens = 5;
    expect_refused(&letter, UINT32_MAX, "content");
    letter_init(&letter, CONTENT);
    letter.sent.head->n_tokens = 2;
    expect_refused(&letter, UINT32_MAX, "bytes");
    letter_init(&letter, CONTENT);
    letter.sent.experts[3] = 8;
    expect_refused(&letter, UINT32_MAX, "expert 8");
    letter_init(&letter, CONTENT);
    letter.sent.counts[0] = -1;
    expect_refused(&letter, UINT32_MAX, "expert 0");
    letter_init(&letter, CONTENT);
    letter.sent.counts[3] = 5;
    expect_refused(&letter, UINT32_MAX, "expert 3");
}
END_TEST

/* Of this node's experts; what the sender sends elsewhere is not here to be counted. */
START_TEST(counts_that_differ_from_the_experts_are_refused)
{
    struct letter letter;
    letter_init(&letter, CONTENT);
    letter.sent.counts[4] = 1;
    expect_refused(&letter, UINT32_MAX, "expert 4");
    letter_init(&letter, CONTENT);
    letter.sent.counts[6] = 1;
    expect_refused(&letter, UINT32_MAX, "expert 6");
    letter_init(&letter, CONTENT);
    letter.sent.experts[0] = 6;
    expect_refused(&letter, UINT32_MAX, "expert 4");
}
END_TEST

START_TEST(a_rank_that_is_off_is_a_lost_peer)
{
    struct letter letter;
    struct epd_error error;
    letter_init(&letter, CONTENT);
    letter.sent.head->status = EPD_TIMEOUT;
    ck_assert_int_eq(check(&letter, CONTENT, UINT32_MAX, &error), EPD_PEER_LOST);
    free(letter.data);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        a_message_is_taken_as_it_was_sent,
        a_message_that_lies_is_refused,
        counts_that_differ_from_the_experts_are_refused,
        a_rank_that_is_off_is_a_lost_peer,
    };
    return suite_run("frame", tests, COUNT(tests));
}
