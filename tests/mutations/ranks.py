"""Mistakes in what ranks know of each other: who has come, who waits for whom, who is gone, who says so."""

from __future__ import annotations

from tests.mutations.mutation import REFUSED, WAITS, Mutation

WAITING = "tests/runtime/test_waiting.py::"
JOBS = "tests/runtime/test_progress.py::"
WATCH = "tests/runtime/test_watchdog.py::"
LOST = "tests/runtime/test_lost_ranks.py::"
BARRIER = "tests/runtime/test_rendezvous_barrier.py::"
AGREEMENT = "tests/parallel/test_shape_check.py::"
CONSISTENCY = "tests/runtime/test_consistency.py::"
DEVICES = "tests/runtime/test_local_device.py::"
ALIKE = "tests/train/test_alike.py::"

MUTATIONS = [
    # Waiting for work.
    Mutation(
        "a rank waits on although another has failed",
        "dsmoe/runtime/waiting.py",
        old="            watch.check_others()\n            if job",
        new="            if job",
        caught_by=f"{WAITING}test_nobody_waits_for_a_rank_that_has_failed",
        shown_by=WAITS,
    ),
    Mutation(
        "the first rank whose work is done lets all go on",
        "dsmoe/runtime/waiting.py",
        old="1) == len(workers):",
        new="1) == 1:",
        caught_by=f"{WAITING}test_a_slow_host_is_waited_for_and_seen",
        shown_by=WAITS,
    ),
    Mutation(
        "what a rank logs while others wait is not shown to them",
        "dsmoe/runtime/waiting.py",
        old="        self._job.at(text)\n",
        new="",
        caught_by=f"{WAITING}test_a_slow_host_is_waited_for_and_seen",
    ),
    Mutation(
        "the console keeps the level of a wait",
        "dsmoe/runtime/waiting.py",
        old="        package.setLevel(level)\n",
        new="",
        caught_by=f"{WAITING}test_a_slow_host_is_waited_for_and_seen",
    ),
    Mutation(
        "a rank that waits outlives SIGTERM",
        "dsmoe/runtime/waiting.py",
        old="                os.kill(os.getpid(), signal.SIGTERM)\n",
        new="                sigterm.clear()\n",
        caught_by=f"{WAITING}test_a_signal_ends_a_rank_that_waits",
    ),
    Mutation(
        "a collective waits on for a rank that is gone from its job",
        "dsmoe/runtime/waiting.py",
        old="            if job is not None and job.lost_error:\n                raise job.lost_error\n",
        new="",
        caught_by=f"{WAITING}test_a_collective_that_would_wait_for_hours_is_left_when_a_rank_is_gone[rank 1 is silent]",
        shown_by=WAITS,
    ),
    Mutation(
        "an error is swallowed by the thread that waits",
        "dsmoe/runtime/waiting.py",
        old="    if errors:\n        raise errors[0]\n    return results[0]\n",
        new="    return results[0] if results else None  # type: ignore[return-value]\n",
        caught_by=f"{AGREEMENT}test_the_odd_rank_is_named_on_every_rank[dtype]",
    ),
    # Jobs that take long.
    Mutation(
        "a rank that is gone from a job is said, and the others wait on",
        "dsmoe/runtime/progress.py",
        old="                self._job.lost_error = LostRanksError(lost)\n",
        new="",
        caught_by=f"{JOBS}test_a_rank_without_a_heartbeat_is_named_and_ends_the_job[2]",
    ),
    Mutation(
        "a run ends for a lost rank before that is in the log",
        "dsmoe/runtime/progress.py",
        old="                self._log(lost)  # before the main thread ends the run for it\n"
        "                self._job.lost_error = LostRanksError(lost)\n",
        new="                self._job.lost_error = LostRanksError(lost)\n                self._log(lost)\n",
        caught_by=f"{JOBS}test_a_rank_that_is_lost_is_in_the_log_before_the_run_ends_for_it",
    ),
    Mutation(
        "a rank that has not begun a job is gone from it",
        "dsmoe/runtime/progress.py",
        old="[1] in (WORKING, WAITING)",
        new="[1] in (WORKING, WAITING, ABSENT)",
        caught_by=f"{JOBS}test_a_rank_that_is_only_silent_before_it_begins_ends_nothing",
    ),
    Mutation(
        "a rank that has done its part and left is said to be silent",
        "dsmoe/runtime/progress.py",
        old="for r, seconds in found.items() if _progress(self._positions[r], self._job)[1] != DONE}",
        new="for r, seconds in found.items()}",
        caught_by=f"{JOBS}test_a_rank_that_has_done_its_part_may_be_silent",
    ),
    Mutation(
        "a process that stood still blames those that it did not hear",
        "dsmoe/runtime/progress.py",
        old="min(self._polled - before, self._max_interval)",
        new="self._polled - before",
        caught_by=f"{JOBS}test_a_process_that_stood_still_itself_blames_nobody",
    ),
    Mutation(
        "a process that stood still itself ends a load",
        "dsmoe/runtime/progress.py",
        old="            self._rank_0_missing_since = None\n        elif self._rank_0_missing_since is None:",
        new="            pass\n        elif self._rank_0_missing_since is None:",
        caught_by=f"{JOBS}test_a_rank_that_monitors_nothing_learns_of_rank_0_unless_it_stood_still_itself",
    ),
    Mutation(
        "every host logs beside rank 0",
        "dsmoe/runtime/progress.py",
        old="if time.monotonic() - self._line_at > patience and time",
        new="if patience and time",
        caught_by=f"{JOBS}test_rank_0_says_every_minute_who_has_done_what",
    ),
    Mutation(
        "a line at every poll",
        "dsmoe/runtime/progress.py",
        old="        self._next_line = now + LOG_INTERVAL_SECONDS\n",
        new="        self._next_line = now + POLL_SECONDS\n",
        caught_by=f"{JOBS}test_a_line_a_minute",
    ),
    Mutation(
        "the store of thousands of ranks is asked during every save",
        "dsmoe/runtime/progress.py",
        old="self._begun < LOG_INTERVAL_SECONDS / 2:",
        new="self._begun < 0:",
        caught_by=f"{JOBS}test_nothing_is_said_or_read_of_a_short_job",
    ),
    Mutation(
        "binary gigabytes under the name of decimal ones",
        "dsmoe/runtime/progress.py",
        old='(1e9, "GB")',
        new='(2**30, "GB")',
        caught_by=f"{JOBS}test_a_number_of_batches_and_of_bytes_is_written_for_people",
    ),
    # The watchdog.
    Mutation(
        "a failed rank that waits for the first one is taken for gone",
        "dsmoe/runtime/watchdog.py",
        old="if not position.failed and position.heartbeat",
        new="if position.heartbeat",
        caught_by=f"{WATCH}test_a_failed_rank_that_waits_for_the_first_one_is_not_gone",
    ),
    Mutation(
        "those who have come furthest are missing",
        "dsmoe/runtime/watchdog.py",
        old="least = min(",
        new="least = max(",
        caught_by=f"{WATCH}test_the_furthest_behind_of_the_living_is_missing",
    ),
    Mutation(
        "every rank that fails is the first",
        "dsmoe/runtime/watchdog.py",
        old='int(self.store.compare_set(FIRST_FAILED_KEY, "", str(self.rank)).decode())',
        new="self.store.set(FIRST_FAILED_KEY, str(self.rank)) or self.rank",
        caught_by=f"{WATCH}test_the_first_failed_rank_is_agreed_on",
    ),
    Mutation(
        "a long save is a stall",
        "dsmoe/runtime/watchdog.py",
        old=" or step == 0 or activity == SAVING)",
        new=" or step == 0)",
        caught_by=f"{WATCH}test_a_stall_is_noticed_within_a_step_only",
    ),
    Mutation(
        "a long preparation is a stall",
        "dsmoe/runtime/watchdog.py",
        old=" or step == 0 or activity == SAVING)",
        new=" or activity == SAVING)",
        caught_by=f"{WATCH}test_a_stall_is_noticed_within_a_step_only",
    ),
    Mutation(
        "a rank whose store fails once gives no sign of life any more",
        "dsmoe/runtime/watchdog.py",
        old="                    with suppress(Exception):\n"
        "                        self._heartbeat_store = self.store.clone()\n",
        new="                    return\n",
        caught_by=f"{WATCH}test_heartbeats_go_on_after_one_that_failed",
    ),
    Mutation(
        "a rank 0 that is silent is never given up",
        "dsmoe/runtime/watchdog.py",
        old="self._rank_0_timer.update(heartbeat != self._rank_0_heartbeat)",
        new="self._rank_0_timer.update(heartbeat >= self._rank_0_heartbeat)",
        caught_by=f"{WATCH}test_a_silent_rank_0_is_given_up_after_the_timeout",
    ),
    Mutation(
        "the end of a launcher's store is taken for that of rank 0",
        "dsmoe/runtime/watchdog.py",
        old="return (self._store_has_ended and not launcher_has_store()) or silence",
        new="return self._store_has_ended or silence",
        caught_by=f"{WATCH}test_a_store_that_has_ended_tells_of_rank_0_only_where_that_has_it",
    ),
    Mutation(
        "what a rank did last is not published",
        "dsmoe/runtime/watchdog.py",
        old="        if not self._thread.is_alive():\n            call_with_timeout(STORE_SECONDS, self._publish)\n",
        new="",
        caught_by=f"{WATCH}test_the_last_position_of_a_rank_is_known",
    ),
    # The reporting rank.
    Mutation(
        "every rank reports for its host",
        "dsmoe/runtime/reporting_rank.py",
        old="        lock.close()\n        return False\n",
        new="        lock.close()\n        return True\n",
        caught_by=f"{WAITING}test_one_rank_reports_for_a_host",
    ),
    Mutation(
        "the rank that reports for a host does so only once",
        "dsmoe/runtime/reporting_rank.py",
        old="    if _bound:\n        return True\n",
        new="",
        caught_by=f"{WAITING}test_one_rank_reports_for_a_host",
    ),
    Mutation(
        "two runs on a host have one reporting rank",
        "dsmoe/runtime/launchers.py",
        old='("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")',
        new='("MASTER_ADDR", "TORCHELASTIC_RESTART_COUNT")',
        caught_by=f"{WAITING}test_runs_and_attempts_have_reporting_ranks_of_their_own[MASTER_PORT]",
    ),
    # Which errors mean that ranks are gone.
    Mutation(
        "whatever times out is a lost rank",
        "dsmoe/runtime/lost_ranks.py",
        old="isinstance(error, dist.DistBackendError) or _is_of_collective(error)",
        new="isinstance(error, RuntimeError)",
        caught_by=f"{LOST}test_the_same_words_from_elsewhere_are_not[the download of shard 3 timed out]",
    ),
    Mutation(
        "whatever is waited for and times out is a lost rank",
        "dsmoe/runtime/lost_ranks.py",
        old="    if _is_raised_by_python(last):\n        return False\n",
        new="",
        caught_by=f"{LOST}test_neither_are_other_things_that_are_waited_for",
    ),
    Mutation(
        "wrong arguments of a collective are a lost rank",
        "dsmoe/runtime/lost_ranks.py",
        old=" or not _SAYS_LOST.search(text):",
        new=":",
        caught_by=f"{LOST}test_what_a_collective_says_of_its_arguments_is_not",
    ),
    Mutation(
        "an error's own line begins with a place in gloo's sources",
        "dsmoe/runtime/lost_ranks.py",
        old='re.sub(r"^\\[[^\\]]*\\]\\s*", "", str(error))',
        new="str(error)",
        caught_by=f"{LOST}test_what_gloo_raises_is_and_keeps_its_own_line",
    ),
    # The rendezvous barrier.
    Mutation(
        "every rank says that it waits for rank 0",
        "dsmoe/runtime/rendezvous_barrier.py",
        old="    prints = is_host_leader()\n",
        new="    prints = True\n",
        caught_by=f"{BARRIER}test_a_rank_0_that_is_not_there_is_missed_by_each_host",
    ),
    Mutation(
        "a missing rank's place on its node is taken for the node",
        "dsmoe/runtime/rendezvous_barrier.py",
        old="{rank // devices_per_node}",
        new="{rank % devices_per_node}",
        caught_by=f"{BARRIER}test_those_who_do_not_come_are_named",
    ),
    Mutation(
        "ranks that torchrun has started again find those of the attempt before",
        "dsmoe/runtime/rendezvous_barrier.py",
        old="{Rendezvous.from_environment().restart}",
        new="0",
        caught_by=f"{BARRIER}test_those_of_an_earlier_attempt_have_not_come",
    ),
    Mutation(
        "what cannot start on one host is never tried again",
        "dsmoe/runtime/rendezvous_barrier.py",
        old="{}, error, exit_code)",
        new="{}, error)",
        caught_by=f"{CONSISTENCY}test_rank_0_reports_for_a_rank_that_cannot_start[1]",
    ),
    Mutation(
        "two ranks drive one device",
        "dsmoe/runtime/rendezvous_barrier.py",
        old="        shared = shared_devices(devices)\n",
        new='        shared = shared_devices(devices[:1]) or ""\n',
        caught_by=f"{DEVICES}test_ranks_compare_their_devices_before_they_join[one is shared]",
    ),
    # What is compared.
    Mutation(
        "of two errors the one that another try may pass decides",
        "dsmoe/runtime/consistency.py",
        old="return max((one.exit_code",
        new="return min((one.exit_code",
        caught_by=f"{CONSISTENCY}test_where_one_of_them_is_a_persons_to_mend_no_other_try_will_do",
    ),
    Mutation(
        "what a rank has and rank 0 has not is not named",
        "dsmoe/runtime/consistency.py",
        old="names = [*first, *(name for name in own if name not in first)]",
        new="names = [*first]",
        caught_by=f"{CONSISTENCY}test_what_differs_is_named_with_both_values_and_the_ranks",
    ),
    Mutation(
        "the code is compared by the names of its files",
        "dsmoe/train/alike.py",
        old="        digest.update(path.read_bytes())\n",
        new="",
        caught_by=f"{ALIKE}test_the_code_is_compared_by_its_contents",
    ),
    Mutation(
        "corpora are compared by their sizes",
        "dsmoe/train/alike.py",
        old='held-out "\n        f"tokens, checksum {source.checksum}"',
        new='held-out "\n        f"tokens"',
        caught_by=f"{ALIKE}test_text_of_the_same_size_is_told_apart",
    ),
    Mutation(
        "versions of packages are not compared",
        "dsmoe/train/alike.py",
        old='{name: package_version(name) or "not installed" for name in PACKAGES}',
        new="{name: PACKAGES[0] for name in PACKAGES}",
        caught_by=f"{ALIKE}test_no_path_is_in_the_fingerprint_and_all_else_is",
    ),
    Mutation(
        "ranks exchange what they have different ideas of",
        "dsmoe/parallel/shape_check.py",
        old="for what, _ in intents.values()}) > 1:",
        new="for what, _ in intents.values()}) > 2:",
        caught_by=f"{AGREEMENT}test_the_odd_rank_is_named_on_every_rank[dtype]",
    ),
    Mutation(
        "the dtype of what is exchanged is not agreed on",
        "dsmoe/parallel/shape_check.py",
        old="{x_TD.shape[1]} x {x_TD.dtype} to",
        new="{x_TD.shape[1]} x torch.float32 to",
        caught_by=f"{AGREEMENT}test_the_odd_rank_is_named_on_every_rank[dtype]",
    ),
    # Devices.
    Mutation(
        "a rank with one device of its own looks for that of its number",
        "dsmoe/runtime/local_device.py",
        old="return 0 if torch.cuda.device_count() == 1 else local_rank",
        new="return local_rank",
        caught_by=f"{DEVICES}test_joining_binds_the_group_to_the_device_that_the_rank_drives[1]",
        shown_by=REFUSED,
    ),
    Mutation(
        "the first device that a rank does not see is thought to be there",
        "dsmoe/runtime/local_device.py",
        old="    if index >= visible:\n",
        new="    if index > visible:\n",
        caught_by=f"{DEVICES}test_a_rank_that_sees_some_devices_and_not_its_own_is_told_of_both_ways[2]",
    ),
    Mutation(
        "devices are told apart by the number that a rank sees",
        "dsmoe/runtime/local_device.py",
        old="            ranks.setdefault(device.uuid, []).append(rank)\n",
        new="            ranks.setdefault(device.uuid, [])\n"
        "            ranks[device.uuid] += [rank] * (device.visible == devices.get(device.uuid, device).visible)\n",
        caught_by=f"{DEVICES}test_one_device_has_one_name_whatever_shows_it",
    ),
    # Signals.
    Mutation(
        "only a signal to every rank stops a run",
        "dsmoe/train/signals.py",
        old="dist.ReduceOp.MAX",
        new="dist.ReduceOp.MIN",
        caught_by="tests/train/test_signals.py::test_a_signal_to_one_rank_stops_all_after_the_same_step[15]",
    ),
]
