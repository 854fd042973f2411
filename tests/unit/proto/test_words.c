/* Every word has a name, every dtype a size, and epd.proto spells words as words.h does. */
#include <ctype.h>
#include <stdio.h>
#include <string.h>

#include "proto/epd.pb-c.h"
#include "proto/message.h"
#include "tests/unit/proto/suite.h"

/* "EPD_ROLE_RECV_X" without its prefix, in lower case, is what users read. */
static void expect_spelling(const ProtobufCEnumDescriptor *words, int number, const char *prefix,
                            const char *name)
{
    const ProtobufCEnumValue *value = protobuf_c_enum_descriptor_get_value(words, number);
    char want[64];

    ck_assert_msg(value != NULL, "epd.proto has no %s %d (%s)", words->short_name, number, name);
    ck_assert_msg(strncmp(value->name, prefix, strlen(prefix)) == 0, "%s", value->name);
    snprintf(want, sizeof want, "%s", value->name + strlen(prefix));
    for (char *c = want; *c; c++)
        *c = (char)tolower(*c);
    ck_assert_str_eq(name, want);
}

START_TEST(the_schema_spells_the_words_as_the_tables_do)
{
    for (int i = 1; i < EPD_OP_COUNT; i++)
        expect_spelling(&epd__v1__op__descriptor, i, "EPD_OP_", op_name((enum epd_op)i));
    for (int i = 1; i < EPD_ROLE_COUNT; i++)
        expect_spelling(&epd__v1__role__descriptor, i, "EPD_ROLE_", role_name((enum epd_role)i));
    for (int i = 1; i <= EPD_I64; i++)
        expect_spelling(&epd__v1__dtype__descriptor, i, "EPD_", dtype_name((enum epd_dtype)i));
    for (int i = 1; i <= EPD_RELU2; i++)
        expect_spelling(&epd__v1__activation__descriptor, i, "EPD_", activation_name((enum epd_activation)i));
    for (int i = 1; i <= EPD_GEMM_NT; i++)
        expect_spelling(&epd__v1__gemm_layout__descriptor, i, "EPD_GEMM_",
                        gemm_layout_name((enum epd_gemm_layout)i));
    for (int i = 1; i <= EPD_BACKEND_CUDA; i++)
        expect_spelling(&epd__v1__backend_kind__descriptor, i, "EPD_BACKEND_",
                        backend_name((enum epd_backend_kind)i));
}
END_TEST

START_TEST(the_schema_has_no_words_beyond_the_tables)
{
    ck_assert_uint_eq(epd__v1__op__descriptor.n_values, EPD_OP_COUNT);
    ck_assert_uint_eq(epd__v1__role__descriptor.n_values, EPD_ROLE_COUNT);
    ck_assert_uint_eq(epd__v1__dtype__descriptor.n_values, EPD_I64 + 1);
    ck_assert_uint_eq(epd__v1__activation__descriptor.n_values, EPD_RELU2 + 1);
    ck_assert_uint_eq(epd__v1__gemm_layout__descriptor.n_values, EPD_GEMM_NT + 1);
    ck_assert_uint_eq(epd__v1__overflow__descriptor.n_values, EPD_OVERFLOW_DROP + 1);
    ck_assert_uint_eq(epd__v1__saved__descriptor.n_values, EPD_SAVED_RECOMPUTE + 1);
    ck_assert_uint_eq(epd__v1__crossing__descriptor.n_values, EPD_CROSSING_STATIC + 1);
    ck_assert_uint_eq(epd__v1__memory_kind__descriptor.n_values, EPD_MEMORY_CUDA_VMM + 1);
    ck_assert_uint_eq(epd__v1__backend_kind__descriptor.n_values, EPD_BACKEND_CUDA + 1);
    ck_assert_uint_eq(epd__v1__control_verb__descriptor.n_values, CONTROL_VERB_COUNT);
    ck_assert_uint_eq(epd__v1__status__descriptor.n_values, EPD_INTERNAL + 1);
}
END_TEST

START_TEST(unknown_words_are_a_question_mark)
{
    ck_assert_str_eq(dtype_name(EPD_DTYPE_UNSPECIFIED), "?");
    ck_assert_str_eq(dtype_name((enum epd_dtype)99), "?");
    ck_assert_str_eq(op_name(EPD_OP_COUNT), "?");
    ck_assert_str_eq(role_name((enum epd_role) - 1), "?");
    ck_assert_str_eq(phase_name(EPD_PHASE_COUNT), "?");
    ck_assert_str_eq(activation_name((enum epd_activation)4), "?");
    ck_assert_str_eq(gemm_layout_name(EPD_GEMM_UNSPECIFIED), "?");
    ck_assert_str_eq(backend_name((enum epd_backend_kind)3), "?");
    ck_assert_str_eq(message_kind_name(MESSAGE_KIND_COUNT), "?");
}
END_TEST

START_TEST(phases_and_kinds_have_names)
{
    for (int i = 0; i < EPD_PHASE_COUNT; i++)
        ck_assert_str_ne(phase_name((enum epd_phase)i), "?");
    ck_assert_str_eq(phase_name(EPD_PHASE_GATHER), "gather");
    for (int i = 0; i < MESSAGE_KIND_COUNT; i++) {
        ck_assert_ptr_nonnull(message_kind_name((enum message_kind)i));
        for (int j = 0; j < i; j++)
            ck_assert_str_ne(message_kind_name((enum message_kind)i),
                             message_kind_name((enum message_kind)j));
    }
    ck_assert_str_eq(message_kind_name(MESSAGE_GROUP_JOIN), "group_join");
}
END_TEST

START_TEST(dtypes_have_their_sizes)
{
    ck_assert_uint_eq(dtype_bytes(EPD_F32), 4);
    ck_assert_uint_eq(dtype_bytes(EPD_BF16), 2);
    ck_assert_uint_eq(dtype_bytes(EPD_F16), 2);
    ck_assert_uint_eq(dtype_bytes(EPD_I32), 4);
    ck_assert_uint_eq(dtype_bytes(EPD_I64), 8);
    ck_assert_uint_eq(dtype_bytes(EPD_DTYPE_UNSPECIFIED), 0);
    ck_assert_uint_eq(dtype_bytes((enum epd_dtype)6), 0);
}
END_TEST

START_TEST(ops_that_exchange_rows_are_collective)
{
    static const enum epd_op local[] = {EPD_OP_GROUPED_GEMM, EPD_OP_ACTIVATION, EPD_OP_ACTIVATION_BWD,
                                        EPD_OP_MOE_WGRAD};

    for (int op = 1; op < EPD_OP_COUNT; op++) {
        int want = 1;
        for (size_t i = 0; i < sizeof local / sizeof local[0]; i++)
            want = want && op != (int)local[i];
        ck_assert_msg(op_is_collective((enum epd_op)op) == want, "%s", op_name((enum epd_op)op));
    }
    ck_assert_int_eq(op_is_collective(EPD_OP_UNSPECIFIED), 0);
}
END_TEST

int main(void)
{
    TCase *tcase = tcase_create("words");

    tcase_add_test(tcase, the_schema_spells_the_words_as_the_tables_do);
    tcase_add_test(tcase, the_schema_has_no_words_beyond_the_tables);
    tcase_add_test(tcase, unknown_words_are_a_question_mark);
    tcase_add_test(tcase, phases_and_kinds_have_names);
    tcase_add_test(tcase, dtypes_have_their_sizes);
    tcase_add_test(tcase, ops_that_exchange_rows_are_collective);
    return suite_run("words", tcase);
}
