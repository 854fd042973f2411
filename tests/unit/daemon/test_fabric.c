/* Parts of the fabric by themselves: its configuration, its messages, its proofs. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/config.h"
#include "daemon/fabric_auth.h"
#include "daemon/fabric_config.h"
#include "daemon/group_fields.h"
#include "proto/fabric.h"
#include "tests/unit/daemon/suite.h"

static struct epd_error error;

/* ---- configuration ---- */

START_TEST(the_first_host_of_a_slurm_list_is_found)
{
    static const char *const cases[][2] = {{"gpu07", "gpu07"},
                                           {"gpu07,gpu08", "gpu07"},
                                           {"gpu[07-09,12],x", "gpu07"},
                                           {"gpu[12]", "gpu12"},
                                           {"a-b[3,4]", "a-b3"},
                                           {"gpu[07-09]-ib,x", "gpu07-ib"},
                                           {"rack[1-2]n[003,007-9].cluster", "rack1n003.cluster"},
                                           {"n1.a,n[2-3]", "n1.a"}};
    char host[64];
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        ck_assert_int_eq(fabric_config_first_host(cases[i][0], host, sizeof(host), &error), EPD_OK);
        ck_assert_str_eq(host, cases[i][1]);
    }
    ck_assert_int_eq(fabric_config_first_host("", host, sizeof(host), &error), EPD_INVALID_ARGUMENT);
    ck_assert_int_eq(fabric_config_first_host("gpu[]", host, sizeof(host), &error), EPD_INVALID_ARGUMENT);
    ck_assert_int_eq(fabric_config_first_host("gpu[1-2", host, sizeof(host), &error), EPD_INVALID_ARGUMENT);
    ck_assert_int_eq(fabric_config_first_host("gpu1]", host, sizeof(host), &error), EPD_INVALID_ARGUMENT);
    ck_assert_int_eq(fabric_config_first_host("gpu[1[2]]", host, sizeof(host), &error), EPD_INVALID_ARGUMENT);
    ck_assert_int_eq(fabric_config_first_host("too-long-for-this", host, 8, &error), EPD_INVALID_ARGUMENT);
}
END_TEST

START_TEST(a_rendezvous_is_a_host_and_perhaps_a_port)
{
    static const char *const cases[][3] = {{"h:1", "h", "1"},
                                           {"node-0.cluster", "node-0.cluster", FABRIC_DEFAULT_PORT},
                                           {"10.0.0.1:65535", "10.0.0.1", "65535"},
                                           {"[fd00::1]:99", "fd00::1", "99"},
                                           {"[::1]", "::1", FABRIC_DEFAULT_PORT},
                                           {"fe80::2", "fe80::2", FABRIC_DEFAULT_PORT}};
    static const char *const bad[] = {"",    ":1",   "h:",   "h:0",  "h:65536",
                                      "h:x", "h:-1", "[::1", "[]:1", "[::1]1"};
    struct fabric_config fabric;
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        ck_assert_int_eq(fabric_config_split(cases[i][0], &fabric, &error), EPD_OK);
        ck_assert_str_eq(fabric.host, cases[i][1]);
        ck_assert_str_eq(fabric.port, cases[i][2]);
    }
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++)
        ck_assert_msg(fabric_config_split(bad[i], &fabric, &error) == EPD_INVALID_ARGUMENT, "%s", bad[i]);
}
END_TEST

static char secret[] = "/tmp/epd-test-fabric-XXXXXX"; /* a name of its own, from main on */

static void write_secret(const char *text, mode_t mode)
{
    const int fd = open(secret, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    close(fd);
    ck_assert_int_eq(chmod(secret, mode), 0);
}

static void clear_environment(void)
{
    static const char *const names[] = {"NNODES",      "SLURM_NNODES",       "SLURM_JOB_NUM_NODES",
                                        "GROUP_RANK",  "NODE_RANK",          "SLURM_NODEID",
                                        "MASTER_ADDR", "SLURM_JOB_NODELIST", "GROUP_WORLD_SIZE"};
    for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++)
        unsetenv(names[i]);
}

START_TEST(the_environment_of_a_launcher_fills_what_is_not_given)
{
    struct config config;
    struct fabric_config fabric;
    clear_environment();
    write_secret("sixteen bytes or more\n", 0600);
    config_init(&config);
    ck_assert_int_eq(fabric_config_resolve(&config, &fabric, &error), EPD_OK);
    ck_assert_uint_eq(fabric.n_nodes, 1);
    setenv("SLURM_NNODES", "3", 1);
    setenv("SLURM_NODEID", "2", 1);
    setenv("SLURM_JOB_NODELIST", "n[4-6]", 1);
    ck_assert_int_eq(fabric_config_resolve(&config, &fabric, &error), EPD_OK);
    ck_assert_uint_eq(fabric.n_nodes, 1); /* nobody has made a secret */
    strcpy(config.secret_file, secret);
    ck_assert_int_eq(fabric_config_resolve(&config, &fabric, &error), EPD_OK);
    ck_assert_uint_eq(fabric.n_nodes, 3);
    ck_assert_uint_eq(fabric.node, 2);
    ck_assert_str_eq(fabric.host, "n4");
    ck_assert_str_eq(fabric.port, FABRIC_DEFAULT_PORT);
    config.nodes = 2;
    strcpy(config.node_rank, "1");
    strcpy(config.rendezvous, "10.0.0.1:99");
    ck_assert_int_eq(fabric_config_resolve(&config, &fabric, &error), EPD_OK);
    ck_assert_uint_eq(fabric.node, 1);
    ck_assert_str_eq(fabric.host, "10.0.0.1");
    ck_assert_str_eq(fabric.port, "99");
    config_init(&config); /* what torchrun sets */
    strcpy(config.secret_file, secret);
    clear_environment();
    setenv("GROUP_WORLD_SIZE", "4", 1);
    setenv("GROUP_RANK", "3", 1);
    setenv("MASTER_ADDR", "fd00::7", 1);
    ck_assert_int_eq(fabric_config_resolve(&config, &fabric, &error), EPD_OK);
    ck_assert_uint_eq(fabric.n_nodes, 4);
    ck_assert_uint_eq(fabric.node, 3);
    ck_assert_str_eq(fabric.rendezvous, "[fd00::7]:" FABRIC_DEFAULT_PORT);
    clear_environment();
    setenv("SLURM_JOB_NUM_NODES", "2", 1);
    setenv("NODE_RANK", "0", 1);
    setenv("SLURM_JOB_NODELIST", "n[4-6]-ib", 1);
    ck_assert_int_eq(fabric_config_resolve(&config, &fabric, &error), EPD_OK);
    ck_assert_uint_eq(fabric.n_nodes, 2);
    ck_assert_str_eq(fabric.rendezvous, "n4-ib:" FABRIC_DEFAULT_PORT);
    clear_environment();
    unlink(secret);
}
END_TEST

START_TEST(what_is_wrong_with_a_fabric_is_named)
{
    struct config config;
    struct fabric_config fabric;
    clear_environment();
    config_init(&config);
    config.nodes = 2;
    ck_assert_int_eq(fabric_config_resolve(&config, &fabric, &error), EPD_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.text, "secret_file"));
    strcpy(config.secret_file, secret);
    ck_assert_int_eq(fabric_config_resolve(&config, &fabric, &error), EPD_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.text, "node_rank"));
    strcpy(config.node_rank, "2");
    ck_assert_int_eq(fabric_config_resolve(&config, &fabric, &error), EPD_INVALID_ARGUMENT);
    strcpy(config.node_rank, "1");
    ck_assert_int_eq(fabric_config_resolve(&config, &fabric, &error), EPD_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.text, "rendezvous"));
    strcpy(config.rendezvous, "h:1");
    unlink(secret);
    ck_assert_int_eq(fabric_config_resolve(&config, &fabric, &error), EPD_INVALID_ARGUMENT);
    write_secret("sixteen bytes or more\n", 0644);
    ck_assert_int_eq(fabric_config_resolve(&config, &fabric, &error), EPD_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.text, "644"));
    write_secret("short", 0600);
    ck_assert_int_eq(fabric_config_resolve(&config, &fabric, &error), EPD_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.text, "5 bytes"));
    unlink(secret);
}
END_TEST

/* ---- proofs ---- */

START_TEST(proofs_hold_for_one_secret_one_side_and_one_pair_of_challenges)
{
    uint8_t key[FABRIC_KEY_BYTES] = {1}, other[FABRIC_KEY_BYTES] = {2}, mac[FABRIC_MAC_BYTES];
    struct fabric_hello a, b, c;
    struct fabric_keys mine, theirs;
    ck_assert(fabric_auth_available(&error));
    fabric_auth_hello(&a, 1, 2);
    fabric_auth_hello(&b, 0, 2);
    fabric_auth_hello(&c, 0, 2);
    fabric_auth_prove(key, FABRIC_LISTENER, &a, &b, mac);
    ck_assert(fabric_auth_check(key, FABRIC_LISTENER, &a, &b, mac));
    ck_assert(!fabric_auth_check(other, FABRIC_LISTENER, &a, &b, mac));
    ck_assert(!fabric_auth_check(key, FABRIC_CONNECTOR, &a, &b, mac)); /* not sent back as one's own */
    ck_assert(!fabric_auth_check(key, FABRIC_LISTENER, &a, &c, mac));  /* not replayed */
    fabric_auth_derive(key, FABRIC_CONNECTOR, &a, &b, &mine);
    fabric_auth_derive(key, FABRIC_LISTENER, &a, &b, &theirs);
    ck_assert(!memcmp(mine.send, theirs.receive, sizeof(mine.send)));
    ck_assert(!memcmp(mine.receive, theirs.send, sizeof(mine.send)));
    ck_assert(memcmp(mine.send, mine.receive, sizeof(mine.send)));
    fabric_auth_mark(mine.send, 5, "frame", 5, mac);
    ck_assert(fabric_auth_marked(mine.send, 5, "frame", 5, mac));
    ck_assert(!fabric_auth_marked(mine.send, 6, "frame", 5, mac));
    ck_assert(!fabric_auth_marked(mine.send, 5, "Frame", 5, mac));
}
END_TEST

/* ---- messages ---- */

START_TEST(messages_travel_whole_and_bad_ones_are_refused)
{
    static uint8_t data[FABRIC_MAX_MESSAGE_BYTES];
    static struct fabric_address addresses[EPD_MAX_WORLD_SIZE];
    struct arena arena;
    struct fabric_message sent, got;
    size_t bytes;
    ck_assert_int_eq(arena_init(&arena, FABRIC_MAX_ARENA_BYTES), EPD_OK);
    for (int i = 0; i < EPD_MAX_WORLD_SIZE; i++) {
        addresses[i].bytes = EPD_MAX_RAIL_ADDRESS_BYTES;
        memset(addresses[i].data, i, sizeof(addresses[i].data));
    }
    fabric_message_init(&sent, FABRIC_JOIN);
    strcpy(sent.name, "a group");
    sent.group = 7, sent.uid = 1000, sent.world_size = 64;
    sent.n_config = GROUP_N_FIELDS;
    sent.config[3] = -5;
    sent.n_addresses = EPD_MAX_WORLD_SIZE;
    sent.addresses = addresses;
    sent.block = 63;
    sent.n_nodes = EPD_MAX_NODES;
    for (uint32_t i = 0; i < EPD_MAX_NODES; i++)
        sent.nodes[i] = 63 - i;
    ck_assert_int_eq(fabric_encode(&sent, data, &bytes, &error), EPD_OK); /* the largest there is */
    ck_assert_int_eq(fabric_decode(data, bytes, &arena, &got, &error), EPD_OK);
    ck_assert_str_eq(got.name, "a group");
    ck_assert_int_eq(got.config[3], -5);
    ck_assert_uint_eq(got.n_addresses, EPD_MAX_WORLD_SIZE);
    ck_assert_uint_eq(got.block, 63);
    ck_assert_uint_eq(got.n_nodes, EPD_MAX_NODES);
    ck_assert(!memcmp(got.nodes, sent.nodes, sizeof(got.nodes)));
    ck_assert(!memcmp(got.addresses, addresses, sizeof(addresses)));
    unsigned n_refused = 0;
    ck_assert_uint_gt(bytes, 200 * 300);
    for (size_t cut = 1; cut < 200; cut++)
        n_refused += fabric_decode(data, bytes - cut * 300, &arena, &got, &error) != EPD_OK;
    ck_assert_uint_eq(n_refused, 199); /* all that was cut */
    n_refused = 0;
    uint64_t seed = 88172645463325252u;
    for (int round = 0; round < 20000; round++) {
        for (size_t i = 0; i < 64; i++) {
            seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
            data[i] = (uint8_t)seed;
        }
        n_refused += fabric_decode(data, seed % 64, &arena, &got, &error) != EPD_OK;
    }
    printf("%u of 20000 random messages refused\n", n_refused);
    ck_assert_uint_gt(n_refused, 10000);
    fabric_message_init(&sent, (enum fabric_kind)5);
    ck_assert_int_eq(fabric_encode(&sent, data, &bytes, &error), EPD_OK);
    ck_assert_int_eq(fabric_decode(data, bytes, &arena, &got, &error), EPD_PROTOCOL);
    fabric_message_init(&sent, FABRIC_JOIN);
    sent.block = EPD_MAX_NODES;
    ck_assert_int_eq(fabric_encode(&sent, data, &bytes, &error), EPD_OK);
    ck_assert_int_eq(fabric_decode(data, bytes, &arena, &got, &error), EPD_PROTOCOL);
    fabric_message_init(&sent, FABRIC_OPEN);
    sent.n_nodes = 2;
    sent.nodes[1] = EPD_MAX_NODES;
    ck_assert_int_eq(fabric_encode(&sent, data, &bytes, &error), EPD_OK);
    ck_assert_int_eq(fabric_decode(data, bytes, &arena, &got, &error), EPD_PROTOCOL);
    fabric_message_init(&sent, FABRIC_STEP);
    strcpy(sent.name, "line\nbreak");
    ck_assert_int_eq(fabric_encode(&sent, data, &bytes, &error), EPD_OK);
    ck_assert_int_eq(fabric_decode(data, bytes, &arena, &got, &error), EPD_PROTOCOL);
    arena_fini(&arena);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {the_first_host_of_a_slurm_list_is_found,
                                  a_rendezvous_is_a_host_and_perhaps_a_port,
                                  the_environment_of_a_launcher_fills_what_is_not_given,
                                  what_is_wrong_with_a_fabric_is_named,
                                  proofs_hold_for_one_secret_one_side_and_one_pair_of_challenges,
                                  messages_travel_whole_and_bad_ones_are_refused,
                                  NULL};
    const int fd = mkstemp(secret);
    if (fd < 0)
        return 1;
    close(fd);
    unlink(secret); /* tests make it */
    const int failed = suite_run("daemon_fabric", tests, NULL, NULL);
    unlink(secret);
    return failed;
}
