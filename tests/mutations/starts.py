"""Mistakes at a start: what a launcher has said, whether it lives, what is printed, and text for other languages."""

from __future__ import annotations

from tests.mutations.mutation import REFUSED, Mutation

START = "tests/runtime/test_start.py::"
ANCESTRY = "tests/runtime/test_launcher_exit.py::"
LAUNCHERS = "tests/runtime/test_launchers.py::"
WORLD = "tests/runtime/test_world.py::"
CONSOLE = "tests/runtime/test_standard_streams.py::"
QUOTING = "tests/launch/test_quoting.py::"
CHECK = "tests/data/test_check_sources.py::"
INPUTS = "tests/config/test_input_files.py::"

MUTATIONS = [
    # What is said before torch is imported.
    Mutation(
        "rank 0 ends before the others have its answer",
        "dsmoe/runtime/start.py",
        old="            _serve_answer(_answer(text) + bytes([code]))\n",
        new="",
        caught_by=f"{START}test_what_all_ranks_have_wrong_is_said_once_without_torch["
        "torch's names-command0-the following arguments are required: --config]",
    ),
    Mutation(
        "every rank says what rank 0 has said",
        "dsmoe/runtime/start.py",
        old="        if answer[:-1] != _answer(text):\n",
        new="        if answer[:-1] != _answer(text) + answer[-1:]:\n",
        caught_by=f"{START}test_a_rank_with_an_error_asks_whether_rank_0_has_it[the same error]",
    ),
    Mutation(
        "a rank without the file ends with another code than rank 0",
        "dsmoe/runtime/start.py",
        old="        return answer[-1]\n",
        new="        return code\n",
        caught_by=f"{START}test_a_rank_with_an_error_asks_whether_rank_0_has_it[the same error]",
    ),
    Mutation(
        "a wrong file on a host is taken for one that is not there",
        "dsmoe/runtime/start.py",
        old="        if Path(path).exists() or reports_for_job():\n",
        new="        if reports_for_job():\n",
        caught_by=f"{START}test_a_file_that_is_wrong_is_for_a_person_and_one_that_is_missing_perhaps_of_this_host",
    ),
    Mutation(
        "Ctrl-C is an end without fault",
        "dsmoe/runtime/start.py",
        old="        os._exit(INTERRUPTED)\n",
        new="        os._exit(0)\n",
        caught_by=f"{START}test_ctrl_c_is_one_line_and_130",
    ),
    # Whether the launcher lives.
    Mutation(
        "another process with a launcher's number is taken for it",
        "dsmoe/runtime/launcher_exit.py",
        old=" or started != self.started\n",
        new="\n",
        caught_by=f"{ANCESTRY}test_a_number_that_was_given_to_another_process_is_not_taken_for_it",
    ),
    Mutation(
        "a launcher that nobody has waited for is taken for alive",
        "dsmoe/runtime/launcher_exit.py",
        old='return state in "ZX"',
        new='return state in "X"',
        caught_by=f"{ANCESTRY}test_a_process_that_has_stopped_is_there_and_a_zombie_has_gone",
    ),
    Mutation(
        "a launcher that is stopped is taken for gone",
        "dsmoe/runtime/launcher_exit.py",
        old='return state in "ZX"',
        new='return state in "ZXT"',
        caught_by=f"{ANCESTRY}test_a_process_that_has_stopped_is_there_and_a_zombie_has_gone",
    ),
    Mutation(
        "a launcher that cannot be looked at now has gone",
        "dsmoe/runtime/launcher_exit.py",
        old="        except OSError:  # too many open files, say\n            return False\n",
        new="        except OSError:  # too many open files, say\n            return True\n",
        caught_by=f"{ANCESTRY}test_what_cannot_be_read_now_has_not_gone",
    ),
    Mutation(
        "a bracket in a process' name ends it",
        "dsmoe/runtime/launcher_exit.py",
        old='text.rpartition(")")',
        new='text.partition(")")',
        caught_by=f"{ANCESTRY}test_a_name_with_brackets_is_one_name",
    ),
    Mutation(
        "every rank of a host says that the launcher has gone",
        "dsmoe/runtime/launcher_exit.py",
        old="if is_host_leader():",
        new="if True:",
        caught_by=f"{ANCESTRY}test_one_rank_of_a_host_says_so_and_sigterm_ends_those_that_do_not_train_yet",
    ),
    Mutation(
        "the end of `deepspeed` above launch.py is not seen",
        "dsmoe/runtime/launcher_exit.py",
        old="    return above.program in _RUNNERS or (by_ssh",
        new="    return (by_ssh",
        caught_by=f"{ANCESTRY}test_the_launchers_of_a_rank_are_known[deepspeed]",
    ),
    # What a launcher says.
    Mutation(
        "ranks that are dealt out over the hosts are taken as they come",
        "dsmoe/runtime/launchers.py",
        old="    if rest or task.rank % task.local_size != task.local_rank:\n",
        new="    if rest:\n",
        caught_by=f"{LAUNCHERS}test_what_cannot_be_read_is_refused[round-robin]",
    ),
    Mutation(
        "hosts with different numbers of ranks are taken as they come",
        "dsmoe/runtime/launchers.py",
        old="    if rest or task.rank",
        new="    if task.rank",
        caught_by=f"{LAUNCHERS}test_what_cannot_be_read_is_refused[uneven hosts]",
    ),
    Mutation(
        "a rank may be as large as their number",
        "dsmoe/runtime/launchers.py",
        old="    if rank >= size:\n",
        new="    if rank > size:\n",
        caught_by=f"{LAUNCHERS}test_what_cannot_be_read_is_refused[a rank beyond the size]",
    ),
    Mutation(
        "every rank of a launcher takes a port of its own",
        "dsmoe/runtime/launchers.py",
        old="(process + shift)",
        new="(os.getpid() + shift)",
        caught_by=f"{LAUNCHERS}test_the_ranks_of_one_launcher_have_its_port_through_any_shell_and_another_launcher_has_another",
    ),
    Mutation(
        "srun's own PMI is taken for a launcher that says half",
        "dsmoe/runtime/launchers.py",
        old='    return "SLURM_JOB_ID" in environment and not any(',
        new='    return "SLURM_JOB_ID" not in environment and not any(',
        caught_by=f"{LAUNCHERS}test_launchers_in_launchers[srun --mpi=pmi2]",
        shown_by=REFUSED,
    ),
    Mutation(
        "an attempt of a job has the port of the one before",
        "dsmoe/runtime/world.py",
        old="        attempt += _PORTS_APART * whole",
        new="        attempt += 0 * whole",
        caught_by=f"{WORLD}test_another_attempt_of_a_job_has_another_port",
    ),
    Mutation(
        "nodes with different numbers of ranks are taken as they come",
        "dsmoe/runtime/world.py",
        old="    if nodes * local != size:\n",
        new="    if nodes * local > 2 * size:\n",
        caught_by=f"{WORLD}test_nodes_with_unequal_numbers_of_tasks_are_refused",
    ),
    Mutation(
        "there is a port 65536",
        "dsmoe/runtime/world.py",
        old='"MASTER_PORT") < 65536:',
        new='"MASTER_PORT") <= 65536:',
        caught_by=f"{LAUNCHERS}test_what_cannot_be_read_is_refused[a port beyond the last]",
    ),
    Mutation(
        "torchrun's store is thought to be in its agent where it is in rank 0",
        "dsmoe/runtime/world.py",
        old='environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"',
        new='"TORCHELASTIC_USE_AGENT_STORE" in environment',
        caught_by=f"{WORLD}test_where_the_store_is_is_decided_as_torch_does",
    ),
    Mutation(
        "the second node's tasks are thought to be those of the first",
        "dsmoe/runtime/world.py",
        old='whole_number(environment, "SLURM_NODEID") * per_node\n',
        new='whole_number(environment, "SLURM_LOCALID") * per_node\n',
        caught_by=f"{WORLD}test_every_task_of_srun_is_a_rank",
        shown_by=REFUSED,
    ),
    # Standard streams.
    Mutation(
        "a full disk under the log ends a run",
        "dsmoe/runtime/standard_streams.py",
        old="        with suppress(OSError):\n            written = super().write(data)\n",
        new="        written = super().write(data)\n",
        caught_by=f"{CONSOLE}test_streams_decide_nothing[->/dev/full 2>/dev/full]",
    ),
    Mutation(
        "what is printed goes into a file that took the number of a closed stream",
        "dsmoe/runtime/standard_streams.py",
        old="            os.open(os.devnull, os.O_RDWR)  # takes",
        new="            pass  # takes",
        caught_by=f"{CONSOLE}test_streams_decide_nothing[-'a library' >&-]",
    ),
    Mutation(
        "a sign that the console does not have ends a run",
        "dsmoe/runtime/standard_streams.py",
        old='errors="backslashreplace"',
        new='errors="strict"',
        caught_by=f"{CONSOLE}test_streams_decide_nothing[->&2 2>/dev/null]",
    ),
    Mutation(
        "what was printed last is lost where a process ends at once",
        "dsmoe/runtime/standard_streams.py",
        old="        try:\n            stream.flush()\n",
        new="        try:\n            pass\n",
        caught_by=f"{CONSOLE}test_what_is_printed_is_there_when_a_process_ends_at_once",
    ),
    # Text for other languages.
    Mutation(
        "a line break in a path ends a comment of a job's script",
        "dsmoe/launch/quoting.py",
        old="return shlex.quote(text) if text.isprintable() else _escaped(text, str.isprintable)",
        new="return shlex.quote(text)",
        caught_by=f"{QUOTING}test_any_text_is_one_word_of_a_shell_and_one_string_of_yaml[150]",
    ),
    Mutation(
        "a dollar sign in a path is a variable of compose",
        "dsmoe/launch/quoting.py",
        old='text.replace("$", "$$")',
        new="text",
        caught_by=f"{QUOTING}test_text_in_the_configs_path",
    ),
    Mutation(
        "a semicolon goes bare into the shells of other hosts",
        "dsmoe/launch/quoting.py",
        old="|[|&;<>(){{}}\\\"']",
        new="|[|&<>(){{}}\\\"']",
        caught_by=f"{QUOTING}test_every_sign_that_is_not_refused_reaches_the_hosts_as_it_is",
    ),
    Mutation(
        "a host's name is checked at its beginning",
        "dsmoe/launch/quoting.py",
        old="    if not _HOST.fullmatch(text):\n",
        new="    if not _HOST.match(text):\n",
        caught_by=f"{QUOTING}test_a_hostfiles_host_that_is_no_name_is_refused_with_its_line",
    ),
    # The sources before the work, and names from elsewhere.
    Mutation(
        "a folder is to be made below a file",
        "dsmoe/data/check_sources.py",
        old="    if not os.path.isdir(existing):\n",
        new="    if not os.path.lexists(existing):\n",
        caught_by=f"{CHECK}test_a_folder_that_cannot_be_made[file-runs_dir]",
    ),
    Mutation(
        "a corpus of empty files passes",
        "dsmoe/data/check_sources.py",
        old="not any(file.stat().st_size for file in",
        new="not any(file for file in",
        caught_by=f"{CHECK}test_config_check_finds_what_prepare_would",
    ),
    Mutation(
        "`plan` says nothing of a damaged cache that stands for lost text",
        "dsmoe/data/check_sources.py",
        old="        except LostCopyError:\n            raise\n",
        new="",
        caught_by=f"{CHECK}test_a_damaged_cache_does_not_serve_without_the_text[a checksum]",
    ),
    Mutation(
        "`config check` opens every file of a large folder",
        "dsmoe/data/check_sources.py",
        old="source_problems(source, cache_dir, MOST_FILES)",
        new="source_problems(source, cache_dir)",
        caught_by=f"{CHECK}test_of_a_large_folder_the_first_files_are_opened",
    ),
    Mutation(
        "a tokenizer without an end of a document passes the check",
        "dsmoe/data/check_sources.py",
        old="        require_end_of_document(tokenizer, config)\n",
        new="        pass\n",
        caught_by=f"{INPUTS}test_a_tokenizer_of_which_nothing_ends_a_document",
    ),
    Mutation(
        "names with hyphens are not known",
        "dsmoe/config/synonyms.py",
        old='name.lower().replace("-", "_")',
        new="name.lower()",
        caught_by=f"{INPUTS}test_names_from_elsewhere_are_understood[moe.moe-router-topk-'moe.top_k']",
    ),
    Mutation(
        "a name from elsewhere leads to a key that there is not",
        "dsmoe/config/synonyms.py",
        old='"router_z_loss_coef": "moe.balance.z_loss"',
        new='"router_z_loss_coef": "moe.z_loss"',
        caught_by=f"{INPUTS}test_every_synonym_is_of_a_key_and_none_is_a_key",
    ),
]
