/* The control socket: drain and evict are answered with REPLY_OK (evict of a session that does not exist:
 * EPD_UNKNOWN_ID); every other verb of enum control_verb becomes one JSON document. Loop thread.
 *
 * Every document is an object with "verb", "version" (of the daemon), "pid" (of the worker), "boot_id" (32
 * hex digits), "epoch", "time_unix_ms" and "uptime_ms". Names end in their unit (_ns _ms _bytes _rows
 * _tokens); counters only grow within one boot_id. Beyond that:
 *
 *   status   backend, host, draining (bool), generation (worker starts before this one), hangs (of them, ended because their loop was stuck), last_exit (text, ""
 * if none), supervisor_pid, sockets {rank, control}, config_file ("" if none), mps (bool), sessions, groups,
 * buffers, plans, launches_in_flight, queues {devices [n taken], per_session, per_uid (limits; 0: none)}, config [{section, key, value, default, reloadable, help}], limits_hit
 * {name: n} stats    sessions {open, opened, refused, closed {reason: n}}, requests {kind: n}, errors
 * {status: n}, ops [{op, launches, failed, tokens, rows, dropped_rows, wire_bytes (of tokens that ranks of
 * this node sent to other ranks, once to each), network_bytes (what crossed to and from other nodes, both ways), copied_bytes, flops,
 *                  gather_ns {count, mean, p50, p99, max}, run_ns {...}, phase_ns {phase: n}}],
 *            failed_launches {status: n}, groups [{group_id, name, launches, failed, imbalance_last,
 * imbalance_mean, hottest_expert, expert_rows [E], ranks [{rank, came_last, held_up_ns}]}], limits_hit {name:
 * n}, devices [...as in devices], log_suppressed, log_unwritten, rss_bytes, fds clients  sessions [{session_id, name, kind
 * (rank|control), state, pid, uid, connected_ms, idle_ms, requests, groups, queues, buffers, plans, heap_bytes,
 * imported_bytes, saved_bytes, in_flight, output_bytes}] groups   groups [{group_id, name, uid, state
 * (joining|open|broken|closed: by a rank that left while nobody waited for a step), reason, epoch, world_size, dtype, overflow, n_experts, top_k, hidden, ffn,
 * max_tokens, capacity_rows, alignment, deadline_ms, launches, failed, in_flight, ranks [{rank, present, node (of a
 * group that spans nodes: its number in the fabric; left out while it is not known), session_id, pid, device_idx, queued, waiting_for (bool), heap_bytes}]}] plans    plans [{plan_id,
 * session_id, group_id, rank, op, plan_key, state, shape_hash (hex text), saved_bytes, launches, failed,
 * queued, in_flight, flag_idx}] devices  backend, devices [{device_idx, uuid (hex text), name, memory_bytes,
 * heap_bytes, heap_peak_bytes, imported_bytes, n_imports, jobs_done, jobs_queued, busy_ns}] drain draining:
 * true evict    session_id, evicted: true; EPD_UNKNOWN_ID is a REPLY_ERROR dump     ops: the flight recorder,
 * oldest first, see recorder.h
 *
 *   fabric   n_nodes (1: none, and nothing follows), node, rendezvous, complete (bool), fabric_epoch, last_error,
 * agreement {steps, mean_ns, max_ns, ahead: steps that were agreed upon while an earlier one of their group was on the
 * lanes}, nodes [{node, state (self|present|missing), linked (bool), address, version, since_ms, rtt_ns, losses,
 * sent_bytes, received_bytes, last_error}], groups [{group_id, name, state, n_nodes, nodes (their numbers in the fabric, in
 * the order of the ranks; none while it is being joined), first_rank, n_ranks, steps, announced, rails {swaps, swap_ns,
 * nodes [{node, sent_bytes, received_bytes}]}}]; status says fabric_complete (bool)
 *
 * While no worker runs, the supervisor answers STATUS itself with {"verb", "version", "pid": 0,
 * "supervisor_pid", "worker": "starting"|"waiting"|"ending"|"stuck" (its loop does not come round), "generation", "hangs", "last_exit", "restart_in_ms",
 * "failures"} and every other verb with EPD_RESTARTED. The STATS message of a rank session is answered with
 * the stats document too, with the groups of its uid alone, and expert_rows only of those that it is in. */
#ifndef EPD_DAEMON_CONTROL_H
#define EPD_DAEMON_CONTROL_H

#include "daemon/session.h"

/* Answers one CONTROL message of a control session, or STATS of a rank session. */
void control_answer(struct session *session, const struct message *message);

#endif
