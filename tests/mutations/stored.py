"""Mistakes in what is stored and read: corpora, caches, checkpoints, a run's identity; and figures of a run."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

OVERLAP = "tests/data/test_held_out_overlap.py::"
DAMAGE = "tests/data/test_damaged_cache.py::"
CACHE = "tests/data/test_cache.py::"
FAULTS = "tests/checkpoint/test_faults.py::"
IDENTITY = "tests/train/test_identity.py::"
EFFECTS = "tests/config/test_effects.py::"
CHANGED = "tests/train/test_changed.py::"
DURABLE = "tests/runtime/test_atomic_files.py::"
METER = "tests/metrics/test_meter.py::"
CRASHES = "tests/checkpoint/test_crashes.py::"
ON_DISK = f"{CRASHES}test_everything_is_on_the_disk_before_it_has_its_name_and_before_the_old_ones_go"
FLOPS = "tests/plan/test_flops.py::"

MUTATIONS = [
    # One split for all sources, exact shares.
    Mutation(
        "which documents are held out depends on white space at their ends",
        "dsmoe/data/packing.py",
        old='hashlib.blake2b(canonical_text(text).encode("utf-8")',
        new='hashlib.blake2b(text.encode("utf-8", "replace")',
        caught_by=f"{OVERLAP}test_white_space_at_the_ends_and_line_ends_do_not_make_another_document",
    ),
    Mutation(
        "what a small source holds out beyond the limit is trained on in others",
        "dsmoe/data/held_out_overlap.py",
        old="return self.train.find(np.union1d(held_out, other.held_out_above))",
        new="return self.train.find(np.unique(held_out))",
        caught_by=f"{OVERLAP}test_the_same_documents_in_sources_of_any_size[0.2-0]",
    ),
    Mutation(
        "what a small source trains on below the limit is not looked up in others",
        "dsmoe/data/held_out_overlap.py",
        old="return self.train.find(np.union1d(held_out, other.held_out_above))",
        new="return self.train.find(other.held_out_above)",
        caught_by=f"{OVERLAP}test_a_small_source_of_what_a_large_one_holds_out",
    ),
    Mutation(
        "the sequence before a held-out document has its first token",
        "dsmoe/data/prepared_source.py",
        old="-(-(begin - length) // length)",
        new="-(-(begin - length + 1) // length)",
        caught_by="tests/data/test_loader.py::test_text_that_is_left_out_is_never_read",
    ),
    Mutation(
        "the samples of a light source are counted by rounding",
        "dsmoe/data/sampling_order.py",
        old="    return (above + (below + offset < below)).astype(np.int64)\n",
        new="    return np.round(number * (share / 2.0**64)).astype(np.int64)\n",
        caught_by="tests/data/test_sampling_order.py::test_counts_are_those_of_the_samples",
    ),
    # The cache.
    Mutation(
        "a token one beyond the vocabulary is let in",
        "dsmoe/data/cache.py",
        old="meta.max_token >= tokenizer.vocab_size",
        new="meta.max_token > tokenizer.vocab_size",
        caught_by=f"{DAMAGE}test_the_first_token_beyond_the_vocabulary_is_refused",
    ),
    Mutation(
        "a cache gets its name before its files are on the disk",
        "dsmoe/data/cache.py",
        old="    for path in partial.iterdir():\n        sync_file(path)\n",
        new="",
        caught_by=f"{CACHE}test_everything_is_on_the_disk_before_it_has_its_name",
    ),
    Mutation(
        "a cache gets its name before those of its files are on the disk",
        "dsmoe/data/cache.py",
        old="    sync_folder(partial)\n",
        new="",
        caught_by=f"{CACHE}test_everything_is_on_the_disk_before_it_has_its_name",
    ),
    Mutation(
        "of the files of a cache, the first part is checked",
        "dsmoe/data/cache.py",
        old="    verify(pieces[::every])\n",
        new="    verify(pieces[: len(pieces) // 2 + 1])\n",
        caught_by=f"{DAMAGE}test_every_damage_is_refused[150]",
    ),
    Mutation(
        "what was sampled counts as checked whole",
        "dsmoe/data/cache.py",
        old="dict.fromkeys(states, every == 1)",
        new="dict.fromkeys(states, True)",
        caught_by=f"{DAMAGE}test_a_large_cache_is_sampled_at_a_start_and_read_whole_where_that_is_asked",
    ),
    Mutation(
        "what another process is writing is removed",
        "dsmoe/runtime/file_locks.py",
        old="fcntl.LOCK_EX | fcntl.LOCK_NB",
        new="fcntl.LOCK_SH | fcntl.LOCK_NB",
        caught_by="tests/runtime/test_file_locks.py::test_it_is_held_until_its_holder_dies",
    ),
    # Files that are there whole or not at all.
    Mutation(
        "a file has its name before its content is on the disk",
        "dsmoe/runtime/atomic_files.py",
        old="            os.fsync(stream.fileno())\n",
        new="",
        caught_by=f"{DURABLE}test_content_then_name_then_folder_are_forced_onto_the_disk",
    ),
    Mutation(
        "the name of a file is not on the disk",
        "dsmoe/runtime/atomic_files.py",
        old="    sync_folder(path.parent)\n",
        new="",
        caught_by=f"{DURABLE}test_content_then_name_then_folder_are_forced_onto_the_disk",
    ),
    Mutation(
        "a disk that fails under a folder is none that cannot sync folders",
        "dsmoe/runtime/atomic_files.py",
        old="        if error.errno not in _NO_SYNC:\n",
        new="        if error.errno == errno.EPERM:\n",
        caught_by=f"{DURABLE}test_a_file_system_that_cannot_sync_folders_is_no_error[5-True]",
    ),
    # Checkpoints.
    Mutation(
        "a checkpoint has its name before its tensors are on the disk",
        "dsmoe/checkpoint/safetensors.py",
        old="        os.fsync(stream.fileno())\n",
        new="",
        caught_by=ON_DISK,
    ),
    Mutation(
        "a checkpoint has its name before those of its files are on the disk",
        "dsmoe/checkpoint/dcp.py",
        old="        sync_folder(self._partial)\n",
        new="",
        caught_by=ON_DISK,
    ),
    Mutation(
        "the name of a checkpoint is not on the disk when older ones are removed",
        "dsmoe/runtime/atomic_files.py",
        old="    sync_folder(final.parent)\n",
        new="",
        caught_by=ON_DISK,
    ),
    Mutation(
        "every rank checks the files of the first",
        "dsmoe/checkpoint/checkpointer.py",
        old="                names = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]\n"
        "                job.expect",
        new="                names = sorted(manifest.files)[:: dist.get_world_size()]\n                job.expect",
        caught_by="tests/checkpoint/test_refusals.py::test_resuming_names_the_damaged_file_on_every_rank",
    ),
    Mutation(
        "every rank compares the headers of the first rank's files",
        "dsmoe/checkpoint/checkpointer.py",
        old="check_headers(checkpoint, manifest, sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()])",
        new="check_headers(checkpoint, manifest, sorted(manifest.files)[:: dist.get_world_size()])",
        caught_by="tests/checkpoint/test_refusals.py::test_tensors_that_are_exchanged_in_the_manifest_are_not_loaded[1]",
    ),
    Mutation(
        "folders whose names begin like ours are removed",
        "dsmoe/checkpoint/retention.py",
        old="if _LEFTOVER.fullmatch(entry.name)]",
        new="if _LEFTOVER.match(entry.name)]",
        caught_by=f"{FAULTS}test_nothing_in_the_folder_is_in_the_way[somebody's copy of ours]",
    ),
    Mutation(
        "losses of different texts compete to be the best",
        "dsmoe/checkpoint/retention.py",
        old="losses.setdefault((facts.held_out, length), [])",
        new='losses.setdefault(("", length), [])',
        caught_by=f"{CRASHES}test_the_best_of_each_text_stays_and_losses_of_two_texts_are_not_compared[1-kept1]",
    ),
    Mutation(
        "losses of sequences of different lengths compete to be the best",
        "dsmoe/checkpoint/retention.py",
        old="losses.setdefault((facts.held_out, length), [])",
        new='losses.setdefault((facts.held_out, ""), [])',
        caught_by=f"{CRASHES}test_losses_of_sequences_of_two_lengths_are_not_compared",
    ),
    Mutation(
        "a newest checkpoint that is not whole takes the place of good ones",
        "dsmoe/checkpoint/retention.py",
        old="    if saved is not None and saved not in found.whole:\n",
        new="    if saved is not None and not saved.exists():\n",
        caught_by=f"{FAULTS}test_nothing_is_removed_while_the_newest_does_not_look_whole",
    ),
    Mutation(
        "a full disk is for a person to mend",
        "dsmoe/checkpoint/saving.py",
        old="isinstance(cause, OSError), exit_code_of(cause)",
        new="isinstance(cause, OSError), UserError.exit_code",
        caught_by=f"{FAULTS}test_the_attempts_have_an_end_and_the_exit_code_says_whether_to_start_again"
        "[28-1-the limit]",
    ),
    Mutation(
        "a save that fails for no disk's sake is tried again",
        "dsmoe/checkpoint/saving.py",
        old="failure.is_of_disk, failure.exit_code = isinstance(cause, OSError)",
        new="failure.is_of_disk, failure.exit_code = True",
        caught_by=f"{FAULTS}test_what_is_not_the_disks_fault_is_not_tried_again",
    ),
    Mutation(
        "saves that failed long ago are counted with those of now",
        "dsmoe/checkpoint/saving.py",
        old='f"step {step}", time.time(), 0, 0',
        new='f"step {step}", time.time(), self.failed, 0',
        caught_by=f"{FAULTS}test_misses_are_counted_from_the_last_checkpoint_on",
    ),
    Mutation(
        "a run without a new checkpoint says so from the third on",
        "dsmoe/checkpoint/saving.py",
        old="        if self.failed + self.put_off < 2:\n",
        new="        if max(self.failed, self.put_off) < 2:\n",
        caught_by=f"{FAULTS}test_misses_are_counted_from_the_last_checkpoint_on",
    ),
    # A run's identity, and what the effects of keys decide.
    Mutation(
        "a key of the model that only another version has does not count",
        "dsmoe/config/effects.py",
        old='if key not in EFFECTS or EFFECTS[key].level == "tensor"}',
        new='if key in EFFECTS and EFFECTS[key].level == "tensor"}',
        caught_by=f"{EFFECTS}test_a_key_of_the_model_that_only_another_version_has_counts",
    ),
    Mutation(
        "counts of a balancing loss begin anew on a resume",
        "dsmoe/config/effects.py",
        old='if effect.switch.level == "tensor" or not weights_only:',
        new='if effect.switch.level == "tensor":',
        caught_by=f"{EFFECTS}test_a_start_does_with_another_value_what_the_effect_says[moe.balance.scope]",
    ),
    Mutation(
        "weights are taken over without the selection bias that they need",
        "dsmoe/config/sections/moe.py",
        old='lambda rate: rate > 0, "tensor")',
        new='lambda rate: rate > 0, "step")',
        caught_by=f"{EFFECTS}test_settings_of_tensors_that_may_begin_anew_are_left_out_for_weights",
    ),
    Mutation(
        "a run goes on with another corpus at another path",
        "dsmoe/train/identity.py",
        old=" or recorded.checksum == checksum\n",
        new=" or bool(recorded.checksum)\n",
        caught_by=f"{IDENTITY}test_a_run_without_checkpoints_of_other_contents",
    ),
    Mutation(
        "a link to the project is another project",
        "dsmoe/train/identity.py",
        old="os.path.realpath(old) == os.path.realpath(now)",
        new="os.path.abspath(old) == os.path.abspath(now)",
        caught_by=f"{IDENTITY}test_a_link_is_the_place_that_it_leads_to",
    ),
    Mutation(
        "another tokenizer is the same where nothing was recorded",
        "dsmoe/train/identity.py",
        old='        return [] if old == now or _same_place(old, now) else [("data.tokenizer", old, now)]\n',
        new="        return []\n",
        caught_by=f"{IDENTITY}test_another_tokenizer_where_nothing_was_recorded_is_another",
    ),
    Mutation(
        "a run without checkpoints goes on with other sources",
        "dsmoe/train/identity.py",
        old='    order = _ORDER_KEYS if has_checkpoints or config.data.changed_order == "accept" else ()\n',
        new="    order = _ORDER_KEYS\n",
        caught_by=f"{IDENTITY}test_a_run_without_checkpoints_of_other_contents",
    ),
    Mutation(
        "what is held out on resume is compared by its size",
        "dsmoe/train/changed.py",
        old="        elif saved.texts and saved.texts[name] != current.texts[name]:\n",
        new="        elif saved.texts and len(saved.texts[name]) != len(current.texts[name]):\n",
        caught_by=f"{CHANGED}test_what_makes_another_order_is_said",
    ),
    # Figures.
    Mutation(
        "the causal convention leaves attention out",
        "dsmoe/plan/flops.py",
        old="self.attention // 2",
        new="self.attention",
        caught_by=f"{FLOPS}test_mixed_layers_by_hand[False]",
    ),
    Mutation(
        "attention's multiplications are counted without its additions",
        "dsmoe/plan/flops.py",
        old="model.num_layers * 2 * 2 * sequence_length",
        new="model.num_layers * 2 * sequence_length",
        caught_by=f"{FLOPS}test_mixed_layers_by_hand[False]",
    ),
    Mutation(
        "both conventions have one figure",
        "dsmoe/metrics/meter.py",
        old="causal_tflops = rate * flops.causal_training",
        new="causal_tflops = rate * flops.training",
        caught_by=f"{METER}test_throughput_is_of_the_slowest_rank_over_the_steps_in_between",
    ),
    Mutation(
        "throughput is that of the fastest rank",
        "dsmoe/metrics/meter.py",
        old="dist.all_reduce(worst, op=dist.ReduceOp.MAX)",
        new="dist.all_reduce(worst, op=dist.ReduceOp.MIN)",
        caught_by=f"{METER}test_throughput_is_of_the_slowest_rank_over_the_steps_in_between",
    ),
    Mutation(
        "the load of the best layer is reported as the worst one's",
        "dsmoe/metrics/definitions.py",
        old="ranks=Combine.SUM, layers=Combine.MAX)",
        new="ranks=Combine.SUM, layers=Combine.MIN)",
        caught_by="tests/metrics/test_routing.py::test_loads_name_the_worst_layer_and_the_mean",
    ),
    Mutation(
        "the padding of the last evaluated batch counts",
        "dsmoe/train/evaluate.py",
        old="row[1] += weight.to(device).sum() * losses_BS.shape[1]",
        new="row[1] += losses_BS.numel()",
        caught_by="tests/train/test_held_out.py::test_the_loss_is_the_same_on_any_ranks_with_any_micro_batch[2]",
    ),
    Mutation(
        "evaluated losses are summed in the precision of the model",
        "dsmoe/train/evaluate.py",
        old="sums = torch.zeros(len(held_out), 2, dtype=torch.float64, device=device)",
        new="sums = torch.zeros(len(held_out), 2, dtype=torch.bfloat16, device=device)",
        caught_by="tests/train/test_held_out.py::test_the_loss_is_the_same_on_any_ranks_with_any_micro_batch[2]",
    ),
]
