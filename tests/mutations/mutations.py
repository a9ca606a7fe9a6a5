"""Deliberate mistakes in the parallel code, each with the test that must fail because of it.

None of them raises anything: the run would go on, slower or to a worse model. `test_mutations.py` makes them one by one
in a copy of the package. To add one: say what is wrong, make the smallest edit that does it, name the fastest test that
sees it. What no test sees is a missing test. Mistakes of other kinds are in `ranks.py`, `starts.py` and `stored.py`.
"""

from __future__ import annotations

from tests.mutations.mutation import Mutation

TENSOR_PARALLEL = "tests/model/test_tensor_parallel.py::test_the_split_model_is_the_whole_one[2]"
OWN_MODEL = "tests/engine/test_own_model.py::test_it_trains_as_on_one_rank"
CROSSINGS = "tests/parallel/test_mappings.py::test_crossings_and_their_gradients"
NORM = "tests/engine/test_initialize.py::test_the_norm_counts_every_part_once"
LAYOUT = "tests/train/test_layouts.py::test_every_routing_is_the_same_on_every_layout[plain-ep=2,zero=0-selective]"
TENSOR_LAYOUT = LAYOUT.replace("ep=2,zero=0-selective", "tp=2,sp=true,ep=4,zero=2,dp=2-full")

SUMS = "tests/engine/test_gradient_sums.py::"
CONSISTENCY = "tests/runtime/test_consistency.py::test_what_differs_is_named_with_both_values_and_the_ranks"
OWN_PROGRAM = "tests/train/test_alike.py::test_another_"
GUARD = "tests/engine/test_update_guard.py::"
NOTHING_CHANGES = f"{GUARD}test_a_step_that_is_not_finite_on_one_rank_changes_nothing"
NOT_FINITE = "tests/checkpoint/test_not_finite.py::"

MUTATIONS = [
    # Groups and experts.
    Mutation(
        "the ranks of an expert group are a stride apart",
        "dsmoe/plan/topology.py",
        old='"expert": self.expert_tensor, "expert_data": self.exchange}',
        new='"expert": self.expert_tensor * self.expert_data, "expert_data": self.expert_tensor}',
        caught_by="tests/plan/test_topology.py::test_deepspeed_example",
    ),
    Mutation(
        "the experts of a rank start alike",
        "dsmoe/moe/experts.py",
        old='seed_of(seed, "gate_up", first_expert + local)',
        new='seed_of(seed, "gate_up", first_expert)',
        caught_by="tests/moe/test_layer.py::TestInitialWeights::"
        "test_experts_differ_and_follow_from_their_global_id[False]",
    ),
    Mutation(
        "every rank starts with the experts of the first",
        "dsmoe/moe/experts.py",
        old="return expert_rank * num_local_experts, slice_index",
        new="return 0, slice_index",
        caught_by="tests/moe/test_layer.py::TestInitialWeights::"
        "test_another_place_in_the_group_draws_that_places_experts",
    ),
    Mutation(
        "experts' gradients are reduced over ranks that hold other experts",
        "dsmoe/parallel/groups.py",
        old='expert_data=member("expert_data")',
        new='expert_data=member("expert_data")._replace(handle=self.handle("data"))',
        caught_by="tests/parallel/test_groups.py::test_groups_are_the_topologys_and_deepspeeds[2-1]",
    ),
    Mutation(
        "experts' gradients are divided by the number of their copies, not by that of data ranks",
        "dsmoe/engine/make_engine.py",
        old="                module.set_expert_group(groups.expert_group(name))\n",
        new="                module.set_expert_group(groups.expert_group(name))\n"
        "                for weight in module.experts.parameters():\n"
        "                    weight.register_hook(lambda g: g * groups.topology.data / groups.topology.expert_data)\n",
        caught_by=LAYOUT,
    ),
    # Exchange and combine.
    Mutation(
        "the backward exchange brings zeros",
        "dsmoe/parallel/collectives.py",
        old="ctx.state.exchange.reversed().start(grad_ND)",
        new="ctx.state.exchange.reversed().start(torch.zeros_like(grad_ND))",
        caught_by="tests/parallel/test_collectives.py::test_uneven_exchange_and_its_gradient",
    ),
    Mutation(
        "gradients stay where they are instead of travelling back",
        "dsmoe/parallel/collectives.py",
        old="return ctx.state.receive(), None",
        new="return (ctx.state.transfer.sent, ctx.state.receive())[0], None",
        caught_by="tests/parallel/test_collectives.py::test_equal_exchange_and_its_gradient",
    ),
    Mutation(
        "combine weights are applied twice",
        "dsmoe/moe/layer.py",
        old="sent, sent_weights_TK = assignments, weights_TK\n",
        new="sent, sent_weights_TK = assignments, weights_TK.square()\n",
        caught_by="tests/moe/test_reference.py::TestEverySetting::test_plain[2-True-position-None]",
    ),
    Mutation(
        "the router gets no gradient from experts on other ranks",
        "dsmoe/moe/dispatch.py",
        old="gather_weights(weights_TK, sent)[:, None]",
        new="gather_weights(weights_TK, sent)[:, None].detach()",
        caught_by="tests/moe/test_parallel.py::test_every_dispatch_equals_one_rank[2-2-1]",
    ),
    Mutation(
        "the partial sums of an expert's slices are averaged",
        "dsmoe/moe/layer.py",
        old="weights_TK.repeat_interleave(self.layout.expert_tensor, dim=1)",
        new="weights_TK.repeat_interleave(self.layout.expert_tensor, dim=1) / self.layout.expert_tensor",
        caught_by="tests/moe/test_parallel.py::test_every_dispatch_equals_one_rank[2-1-2]",
    ),
    Mutation(
        "on the return route the partial sum of a token in a node is added twice",
        "dsmoe/moe/dispatch.py",
        old="output_UD = dispatched.node_route.take_back(output_UD)",
        new="output_UD = 2 * dispatched.node_route.take_back(output_UD)",
        caught_by="tests/moe/test_hierarchical.py::test_two_levels_equal_one_rank[4-1-4-8-2-3]",
    ),
    Mutation(
        "the chunk that came last goes home first",
        "dsmoe/moe/dispatch.py",
        old="_join([flight.wait() for flight, _ in returning])",
        new="_join([flight.wait() for flight, _ in reversed(returning)])",
        caught_by="tests/moe/test_overlap.py::test_the_number_of_chunks_changes_nothing[dropless-1]",
    ),
    Mutation(
        "a place at the end of a padded chunk is taken for one of the chunk before",
        "dsmoe/moe/dispatch.py",
        old="chunk_A = ((place_A + 1) * num_chunks - 1) // capacity",
        new="chunk_A = place_A * num_chunks // capacity",
        caught_by="tests/moe/test_overlap.py::test_the_number_of_chunks_changes_nothing[dropping-1]",
    ),
    Mutation(
        "no gradient flows through the shared expert to the tokens",
        "dsmoe/moe/layer.py",
        old="dense_TD = self._dense(x_TD)",
        new="dense_TD = self._dense(x_TD.detach())",
        caught_by="tests/moe/test_reference.py::test_what_every_token_passes[False-None-shared]",
    ),
    Mutation(
        "the kernels take an activation that they do not know for none",
        "dsmoe/kernels/weighted_activation.py",
        old='tl.static_assert(False, f"this kernel has no branch for the activation {ACT}")',
        new="return x, x",
        caught_by="tests/kernels/test_registries.py::test_a_code_without_a_branch_does_not_compile[True]",
    ),
    # Tensor and sequence parallelism.
    Mutation(
        "the router's gradient is that of one tensor rank's tokens",
        "dsmoe/moe/router.py",
        old="copy_weight_to_tensor_parallel_region(self.weight, self.tensor_group)",
        new="self.weight",
        caught_by=TENSOR_PARALLEL,
    ),
    Mutation(
        "under sequence parallelism a norm's gradient is that of one slice",
        "dsmoe/model/transformer.py",
        old="self.ffn_norm = RMSNorm(model.hidden_size, model.norm_eps, group.over_sequence)",
        new="self.ffn_norm = RMSNorm(model.hidden_size, model.norm_eps, TensorGroup.alone())",
        caught_by=TENSOR_PARALLEL,
    ),
    Mutation(
        "the gradient of a key/value head that ranks share is that of one rank's queries",
        "dsmoe/nn/linear.py",
        old="copy_weight_to_tensor_parallel_region(self.weight, self.group)[self.rows]",
        new="self.weight[self.rows]",
        caught_by=TENSOR_PARALLEL,
    ),
    Mutation(
        "gate and up are cut as if they were one matrix",
        "dsmoe/nn/linear.py",
        old="self.shard = Shard(0, group.rank, group.size, parts)",
        new="self.shard = Shard(0, group.rank, group.size)",
        caught_by=TENSOR_PARALLEL,
    ),
    Mutation(
        "without sequence parallelism the gradients of a column-parallel layer's input are not summed",
        "dsmoe/parallel/mappings.py",
        old="_cross(x, group, _same, all_reduce)",
        new="_cross(x, group, _same, _same)",
        caught_by=CROSSINGS,
    ),
    Mutation(
        "the cross entropy forgets the sums of the other slices of the vocabulary",
        "dsmoe/nn/loss.py",
        old="parts_RN2[..., 0].logsumexp(dim=0)",
        new="parts_RN2[..., 0].amax(dim=0)",
        caught_by=TENSOR_PARALLEL,
    ),
    Mutation(
        "the gradient of the cross entropy is that of a softmax over one slice of the vocabulary",
        "dsmoe/nn/loss.py",
        old="ctx.save_for_backward(hidden_ND, head_VD, targets_N, lse_N)",
        new="ctx.save_for_backward(hidden_ND, head_VD, targets_N, parts_N2[:, 0])",
        caught_by=TENSOR_PARALLEL,
    ),
    # The gradient norm.
    Mutation(
        "ZeRO's norm forgets the experts of all tensor ranks but the first",
        "dsmoe/moe/experts.py",
        old="        mark_split(parameter)\n",
        new="",
        caught_by=TENSOR_LAYOUT,
    ),
    Mutation(
        "without ZeRO the norm forgets the other slices of the experts",
        "dsmoe/engine/clipping.py",
        old="(parts, deepspeed_registry.expert_group(name))",
        new='(parts, groups.handle("expert"))',
        caught_by=f"{NORM}[2]",
    ),
    Mutation(
        "without ZeRO all experts' norms are added up over one group, whatever the ep_size of their layer",
        "dsmoe/engine/clipping.py",
        old="registry.expert_group(name)",
        new='groups.handle("exchange")',
        caught_by=f"{OWN_MODEL}[2-0-parallel0-1]",
    ),
    Mutation(
        "tensor ranks keep different values of what all of them have",
        "dsmoe/engine/make_engine.py",
        old="    _copy_first_tensor_rank(model, groups)\n    routers",
        new="    routers",
        caught_by=f"{OWN_MODEL}[2-1-parallel3-2]",
    ),
    Mutation(
        "every tensor rank's slice of a shared expert is drawn alike",
        "dsmoe/nn/feed_forward.py",
        old="self.gate_up.weight, std, self.gate_up.shard)",
        new="self.gate_up.weight, std)",
        caught_by=f"{OWN_MODEL}[2-1-parallel3-2]",
    ),
    Mutation(
        "an engine reduces over the groups of the engine that was made last",
        "dsmoe/engine/make_engine.py",
        old="        groups.register_with_deepspeed()\n",
        new="",
        caught_by="tests/engine/test_own_model.py::test_engines_of_two_layouts_train_side_by_side[0]",
    ),
    Mutation(
        "each rank clips by the norm of its own part",
        "dsmoe/engine/clipping.py",
        old="        dist.all_reduce(part, group=handle)\n",
        new="",
        caught_by=f"{NORM}[1]",
    ),
    Mutation(
        "the norm counts a replicated weight once per tensor rank",
        "dsmoe/engine/clipping.py",
        old='if group["moe"] else split if group["split"] else whole',
        new='if group["moe"] else split',
        caught_by=f"{NORM}[2]",
    ),
    # Balance and data.
    Mutation(
        "the balancing loss sees the load of one tensor rank's tokens",
        "dsmoe/moe/balance.py",
        old="counts_E = assigned_E if group.size == 1 else all_reduce(assigned_E, group)",
        new="counts_E = assigned_E",
        caught_by=TENSOR_PARALLEL,
    ),
    Mutation(
        "the balancing loss' mean over a tensor group's tokens divides by those of one rank",
        "dsmoe/moe/balance.py",
        old="both[-1].clamp(min=1)",
        new="count.clamp(min=1)",
        caught_by=TENSOR_PARALLEL,
    ),
    Mutation(
        "balancing losses count once per micro-batch instead of once per step",
        "dsmoe/engine/make_engine.py",
        old="module.loss_scale = 1.0 / accumulation_steps",
        new="module.loss_scale = 1.0",
        caught_by=LAYOUT,
    ),
    Mutation(
        "selection biases follow the loads of this rank alone",
        "dsmoe/moe/step_updates.py",
        old="    if dist.is_initialized():\n        dist.all_reduce(counts)\n",
        new="",
        caught_by="tests/moe/test_step_updates.py::"
        "test_bias_and_load_share_follow_from_the_loads_of_all_ranks[2-signs1-share1]",
    ),
    Mutation(
        "loads are counted again under recompute",
        "dsmoe/moe/layer.py",
        old="if self.training and first:",
        new="if self.training:",
        caught_by="tests/moe/test_layer.py::TestStatistics::test_count_once_under_recompute",
    ),
    Mutation(
        "a recomputation draws anew",
        "dsmoe/moe/replay.py",
        old="match = self._match(print_4, going_backward)",
        new="pass",
        caught_by="tests/moe/test_recompute.py::test_a_graph_that_goes_backward_twice",
    ),
    Mutation(
        "every data rank reads the same micro-batches",
        "dsmoe/data/loader.py",
        old="first, stride = self._rank * self._micro_batch_size,",
        new="first, stride = 0,",
        caught_by="tests/data/test_loader.py::test_all_ranks_together_read_what_one_rank_reads[2]",
    ),
    Mutation(
        "text that another source holds out is trained on",
        "dsmoe/data/loader.py",
        old="config.train.sequence_length, source.left_out)",
        new="config.train.sequence_length)",
        caught_by="tests/data/test_held_out_overlap.py::test_the_single_document_of_one_source_among_those_of_another",
    ),
    Mutation(
        "what is read of the cache is not checked",
        "dsmoe/data/checksummed_files.py",
        old="* CHUNK]) != expected:",
        new="* CHUNK]) != expected and False:",
        caught_by="tests/data/test_damaged_cache.py::test_every_damage_is_refused[150]",
    ),
    Mutation(
        "how much is evaluated depends on the micro-batch",
        "dsmoe/plan/batch.py",
        old="return train.eval_sequences\n",
        new="return train.eval_sequences * train.micro_batch_size\n",
        caught_by="tests/data/test_loader.py::test_the_held_out_sequences_do_not_depend_on_the_micro_batch[False]",
    ),
    Mutation(
        "a light source's share is rounded away",
        "dsmoe/data/sampling_order.py",
        old="* (1 << 64)))",
        new="* (1 << 10)) << 54)",
        caught_by="tests/data/test_sampling_order.py::test_light_sources_have_their_weight_and_no_more",
    ),
    Mutation(
        "the ranks of a tensor group read different data",
        "dsmoe/train/initialize.py",
        old='groups.coordinate("data"), groups.topology.data)',
        new="groups.rank % groups.topology.data, groups.topology.data)",
        caught_by=TENSOR_LAYOUT,
    ),
    # Steps that are not finite.
    Mutation(
        "fp32 without ZeRO takes steps that are not finite",
        "dsmoe/engine/update_guard.py",
        old="self._stopped.float()  #",
        new="torch.zeros_like(norm)  #",
        caught_by=f"{NOTHING_CHANGES}[0-fp32-False]",
    ),
    Mutation(
        "a loss that is not finite and has a finite gradient is learnt from",
        "dsmoe/train/trainer.py",
        old="propagate_non_finite(losses_BS.mean())",
        new="losses_BS.mean()",
        caught_by=f"{NOTHING_CHANGES}[1-bf16-False]",
    ),
    Mutation(
        "selection biases follow the loads of a step that was skipped",
        "dsmoe/train/trainer.py",
        old="update_routers(self.moe_layers, self.guard.was_applied())",
        new="update_routers(self.moe_layers)",
        caught_by=f"{NOTHING_CHANGES}[1-fp32-False]",
    ),
    Mutation(
        "with the optimizer on the host a gradient that is not finite stays for ever",
        "dsmoe/engine/gradient_sums.py",
        old="        _forget_sums_of_skipped_steps(optimizer)\n",
        new="",
        caught_by=f"{NOTHING_CHANGES}[2-bf16-True]",
    ),
    Mutation(
        "a step that the device has skipped moves the schedule",
        "dsmoe/engine/update_guard.py",
        old="scheduler.last_epoch -= 2",
        new="scheduler.last_epoch -= 1",
        caught_by=f"{GUARD}test_a_loop_of_ones_own_needs_nothing_of_the_guard",
    ),
    # Sums of gradients.
    Mutation(
        "bf16 gradients are summed in bf16 over micro-batches",
        "dsmoe/engine/gradient_sums.py",
        old="            parameter.grad_dtype = torch.float32\n",
        new="            parameter.grad_dtype = parameter.dtype\n",
        caught_by=f"{SUMS}test_gradients_and_norm_are_fp32_sums[0]",
    ),
    Mutation(
        "fp32 gradients pass a bf16 bucket between ranks",
        "dsmoe/engine/gradient_sums.py",
        old="        optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32\n",
        new="        optimizer._gradient_reduction_buffer_dtype = lambda: torch.bfloat16\n",
        caught_by=f"{SUMS}test_gradients_and_norm_are_fp32_sums[2]",
    ),
    Mutation(
        "the sum over all ranks is kept in bf16",
        "dsmoe/engine/gradient_sums.py",
        old="        optimizer.gradient_accumulation_dtype = torch.float32\n",
        new="        optimizer.gradient_accumulation_dtype = torch.bfloat16\n",
        caught_by=f"{SUMS}test_gradients_and_norm_are_fp32_sums[2]",
    ),
    Mutation(
        "gradients are exchanged in bf16",
        "dsmoe/config/deepspeed.py",
        old='"communication_data_type": "fp32"',
        new='"communication_data_type": "bf16"',
        caught_by=f"{SUMS}test_gradients_and_norm_are_fp32_sums[0]",
    ),
    # What is compared, sealed or looked at before the work.
    Mutation(
        "ranks with other settings are let in",
        "dsmoe/runtime/rendezvous_barrier.py",
        old="if other != digests[0]]\n    queried",
        new="if other == _ERROR]\n    queried",
        caught_by=CONSISTENCY,
    ),
    Mutation(
        "ranks that have joined are not compared",
        "dsmoe/runtime/consistency.py",
        old="differing = [rank for rank, other in enumerate(digests) if other != digests[0]]",
        new="differing = [rank for rank, other in enumerate(digests) if not other]",
        caught_by="tests/runtime/test_consistency.py::test_ranks_that_have_joined_compare_as_well",
    ),
    Mutation(
        "the settings of a program's ranks are not compared",
        "dsmoe/train/initialize.py",
        old="    check_all_ranks_agree(run_fingerprint(config))",
        new="    run_fingerprint(config)",
        caught_by=f"{OWN_PROGRAM}config_on_one_rank_of_a_program[rate]",
    ),
    Mutation(
        "the data of a program's ranks are not compared",
        "dsmoe/train/initialize.py",
        old="    check_all_ranks_agree(data_fingerprint(sources))",
        new="    data_fingerprint(sources)",
        caught_by=f"{OWN_PROGRAM}corpus_or_tokenizer_on_one_rank_of_a_program",
    ),
    Mutation(
        "what a tokenizer's path leads to is not compared",
        "dsmoe/train/alike.py",
        old='tokenizer_digest(config) or f"no file {config.data.tokenizer}"',
        new='f"some file {tokenizer_digest(config) != str()}"',
        caught_by=f"{OWN_PROGRAM}corpus_or_tokenizer_on_one_rank_of_a_program",
    ),
    Mutation(
        "a run goes on with another tokenizer at the same path",
        "dsmoe/train/identity.py",
        old="    if old_digest == digest:\n",
        new="    if old == now:\n",
        caught_by="tests/train/test_identity.py::test_a_run_without_checkpoints_of_other_contents",
    ),
    Mutation(
        "a run goes on from a checkpoint of another tokenizer",
        "dsmoe/train/changed.py",
        old="saved.tokenizer != current.tokenizer:",
        new="saved.tokenizer != saved.tokenizer:",
        caught_by="tests/train/test_changed.py::test_another_tokenizer_is_never_accepted",
    ),
    Mutation(
        "the checksums of the cache are believed unread",
        "dsmoe/data/checksummed_files.py",
        old="xxh3_128_hexdigest(sums_path(path).read_bytes()) != stored.xxh128",
        new="not stored.xxh128",
        caught_by="tests/data/test_damaged_cache.py::test_other_tokens_with_checksums_of_their_own",
    ),
    Mutation(
        "the description of a cache is believed unsealed",
        "dsmoe/data/cache_meta.py",
        old="if not has_valid_checksum(text, content):",
        new="if not text:",
        caught_by="tests/data/test_damaged_cache.py::test_a_number_that_nothing_else_tells_is_sealed",
    ),
    Mutation(
        "damaged tokens serve where the text is gone",
        "dsmoe/data/check_sources.py",
        old="        verify_files([(prepared, meta)], VERIFIED_AT_START)\n",
        new="",
        caught_by="tests/data/test_check_sources.py"
        "::test_a_damaged_cache_does_not_serve_without_the_text[a held-out token]",
    ),
    Mutation(
        "a manifest is believed unsealed",
        "dsmoe/checkpoint/manifest.py",
        old="if not has_valid_checksum(text, content, _TABLES):",
        new="if not text:",
        caught_by="tests/checkpoint/test_manifests.py::test_a_number_that_nothing_else_tells_is_sealed",
    ),
    Mutation(
        "a sealed manifest is believed, whatever the files' headers say",
        "dsmoe/checkpoint/folder.py",
        old="        if expected.get(chunk) != actual.get(chunk):\n",
        new="        if chunk not in actual:\n",
        caught_by="tests/checkpoint/test_manifests.py::test_a_header_that_says_something_else_than_the_manifest_is_found",
    ),
    Mutation(
        "a state that is not finite is saved",
        "dsmoe/train/trainer.py",
        old="if not self.checkpoints.is_finite(self.meter.is_loss_finite()):",
        new="if not self.meter.is_loss_finite():",
        caught_by=f"{NOT_FINITE}test_one_bad_element_on_one_rank_keeps_the_state_from_being_saved[one rank-nan]",
    ),
    Mutation(
        "a checkpoint that is not finite is gone on from",
        "dsmoe/checkpoint/checkpointer.py",
        old="        if first is not None:\n            raise NotFiniteError",
        new="        if first == str():\n            raise NotFiniteError",
        caught_by=f"{NOT_FINITE}test_every_rank_refuses_to_go_on_from_one_and_names_the_tensor[weight-model/]",
    ),
]
