"""Settings and methods of TRL's that raywards does not have, and what to use instead.

A setting is refused by name, never ignored. Where TRL's default means what raywards does anyway,
that value (`neutral`) is accepted, so that a script which spells the default out still runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Refused(NamedTuple):
    """Why a setting is refused, and the values of it that change nothing here."""

    instead: str
    neutral: tuple[Any, ...] = ()


_OWN_DATA_PLAN = "raywards reads prepared Arrow shards in a fixed order; leave it out."
_ONE_BACKEND = "raywards trains with DeepSpeed: set `deepspeed` to a ZeRO stage or a config."
_LOGS = "raywards writes `metrics.jsonl` and TensorBoard files on one rank; leave it out."
_NOT_YET = "It is not built yet; leave it out."

REFUSED: dict[str, Refused] = {
    "accelerator_config": Refused(
        "Batches are planned over the whole cluster; leave it out.", (None,)
    ),
    "activation_checkpointing": Refused("Use `gradient_checkpointing`.", (None,)),
    "activation_checkpointing_kwargs": Refused("Use `gradient_checkpointing_kwargs`.", (None,)),
    "auto_find_batch_size": Refused("Set `per_device_train_batch_size`.", (False,)),
    "average_tokens_across_devices": Refused(
        "The loss is the mean over the pairs of the global batch at any world size.", (True,)
    ),
    "batch_eval_metrics": Refused(
        "Metrics are always summed batch by batch; leave it out.", (False,)
    ),
    "bf16_full_eval": Refused("Evaluation runs in the precision of training.", (False,)),
    "data_collator": Refused("Pairs are batched by raywards itself; leave it out.", (None,)),
    "dataloader_in_order": Refused(_OWN_DATA_PLAN, (True,)),
    "dataloader_multiprocessing_context": Refused(_OWN_DATA_PLAN, (None,)),
    "dataloader_num_workers": Refused(_OWN_DATA_PLAN, (0,)),
    "dataloader_persistent_workers": Refused(_OWN_DATA_PLAN, (False,)),
    "dataloader_pin_memory": Refused(_OWN_DATA_PLAN, (True,)),
    "dataloader_prefetch_factor": Refused(_OWN_DATA_PLAN, (None,)),
    "ddp_backend": Refused("The backend follows the device: nccl on GPUs, gloo on CPUs.", (None,)),
    "ddp_broadcast_buffers": Refused(_ONE_BACKEND, (None,)),
    "ddp_bucket_cap_mb": Refused("Use `reduce_bucket_size` in the `deepspeed` dict.", (None,)),
    "ddp_find_unused_parameters": Refused(_ONE_BACKEND, (None,)),
    "ddp_static_graph": Refused(_ONE_BACKEND, (None,)),
    "debug": Refused("Use Ray's dashboard and `py-spy`.", ("", [])),
    "do_eval": Refused("Use `eval_strategy`.", (False,)),
    "do_predict": Refused("Use `Scorer`.", (False,)),
    "do_train": Refused("Call `train()`.", (False,)),
    "enable_jit_checkpoint": Refused("A lost node costs the steps since `save_steps`.", (False,)),
    "eval_accumulation_steps": Refused("Evaluation keeps sums, not predictions.", (None,)),
    "eval_delay": Refused("Use `eval_steps`.", (0,)),
    "eval_do_concat_batches": Refused("Evaluation keeps sums, not predictions.", (True,)),
    "eval_use_gather_object": Refused("Evaluation keeps sums, not predictions.", (False,)),
    "fp16": Refused("Use `bf16=True`: the same speed and no loss scaling.", (False,)),
    "fp16_full_eval": Refused("Evaluation runs in the precision of training.", (False,)),
    "fsdp": Refused(_ONE_BACKEND, (None, "", [])),
    "fsdp_config": Refused(_ONE_BACKEND, (None,)),
    "full_determinism": Refused(_NOT_YET, (False,)),
    "hub_always_push": Refused("`push_to_hub` uploads the export once, at the end.", (False,)),
    "hub_strategy": Refused(
        "`push_to_hub` uploads the export once, at the end.", ("end", "every_save")
    ),
    "ignore_data_skip": Refused("A resumed run reads on at the next pair at no cost.", (False,)),
    "include_for_metrics": Refused("Evaluation keeps sums, not predictions.", ([],)),
    "include_num_input_tokens_seen": Refused("`num_tokens` is always logged.", ("no", False)),
    "label_names": Refused("Preference rows have no labels.", (None, [])),
    "label_smoothing_factor": Refused(
        "Use `label_smoothing`: a factor spreads over both classes, so 0.2 is 0.1 there.", (0, 0.0)
    ),
    "length_column_name": Refused(_OWN_DATA_PLAN, ("length",)),
    "liger_kernel_config": Refused("Liger's RMSNorm and SwiGLU are used; leave it out.", (None,)),
    "local_rank": Refused("Ray Train places the workers; set `num_workers`.", (-1,)),
    "log_level": Refused(_LOGS, ("passive",)),
    "log_level_replica": Refused(_LOGS, ("warning",)),
    "log_on_each_node": Refused(_LOGS, (True,)),
    "logging_nan_inf_filter": Refused("A loss that is not finite stops the run.", (True, False)),
    "logging_strategy": Refused("Use `logging_steps`.", ("steps",)),
    "neftune_noise_alpha": Refused("Noise in the embeddings is not supported.", (None,)),
    "optim": Refused(
        "AdamW (torch, fused) is the optimizer.", ("adamw_torch_fused", "adamw_torch")
    ),
    "optim_args": Refused(
        "Use `adam_beta1`, `adam_beta2`, `adam_epsilon`, `weight_decay`.", (None,)
    ),
    "optim_target_modules": Refused("AdamW trains every parameter.", (None,)),
    "pad_to_multiple_of": Refused("Padding never changes a reward; leave it out.", ("auto", None)),
    "pad_token": Refused("Pooling goes by position, so padding never changes a reward.", (None,)),
    "parallelism_config": Refused(_ONE_BACKEND, (None,)),
    "prediction_loss_only": Refused("Evaluation keeps sums, not predictions.", (False,)),
    "remove_unused_columns": Refused("Only the columns of a preference row are read.", (True,)),
    "restore_callback_states_from_checkpoint": Refused(
        "Callbacks live in the driver, and checkpoints do not hold their state.", (False,)
    ),
    "save_on_each_node": Refused("Checkpoints go to `storage_path`, once.", (False,)),
    "save_only_model": Refused(
        "A checkpoint must be resumable; the export has weights only.", (False,)
    ),
    "skip_memory_metrics": Refused("Use Ray's dashboard.", (True,)),
    "tf32": Refused("Call `torch.set_float32_matmul_precision` in your script.", (None,)),
    "torch_compile": Refused(_NOT_YET, (False,)),
    "torch_compile_backend": Refused(_NOT_YET, (None,)),
    "torch_compile_mode": Refused(_NOT_YET, (None,)),
    "torch_empty_cache_steps": Refused(_NOT_YET, (None,)),
    "use_cache": Refused("Training keeps no key-value cache.", (False,)),
}

_OWN_LOOP = "The loop is `raywards/train/loop.py`; its losses are set by fields of `RewardConfig`."
_OWN_OPTIMIZER = "AdamW and its schedule are set by fields of `RewardConfig`."
_PAIRS = "Pairs are planned over the whole cluster; `prepared/` in the run folder holds them."

REFUSED_METHODS: dict[str, str] = {
    "autocast_smart_context_manager": "Set `bf16`.",
    "call_model_init": "Start one run for each model.",
    "compute_loss": _OWN_LOOP,
    "compute_loss_context_manager": _OWN_LOOP,
    "create_accelerator_and_postprocess": "raywards trains with DeepSpeed, without accelerate.",
    "create_optimizer": _OWN_OPTIMIZER,
    "create_optimizer_and_scheduler": _OWN_OPTIMIZER,
    "create_scheduler": _OWN_OPTIMIZER,
    "evaluation_loop": "Call `evaluate()`.",
    "floating_point_ops": "Take 6 x parameters x `num_tokens`.",
    "get_batch_samples": _PAIRS,
    "get_cp_size": "Context parallelism is not supported.",
    "get_decay_parameter_names": "Weight decay is on matrices only, as in transformers.",
    "get_eval_dataloader": _PAIRS,
    "get_learning_rates": "`learning_rate` is in every record of `state.log_history`.",
    "get_num_trainable_parameters": "Count the parameters of `model`.",
    "get_optimizer_cls_and_kwargs": _OWN_OPTIMIZER,
    "get_optimizer_group": _OWN_OPTIMIZER,
    "get_sp_size": "Sequence parallelism is not supported.",
    "get_test_dataloader": _PAIRS,
    "get_total_train_batch_size": "Multiply `per_device_train_batch_size`, "
    "`gradient_accumulation_steps` and `num_workers`.",
    "get_tp_size": "Tensor parallelism is not supported.",
    "get_train_dataloader": _PAIRS,
    "hyperparameter_search": "Start one run for each setting, each with its own `output_dir`.",
    "init_hf_repo": "`push_to_hub()` makes the repository.",
    "log": "Append to `state.log_history`.",
    "num_examples": "`train()` returns `num_pairs`.",
    "predict": "Use `Scorer` on the export.",
    "prediction_step": "Use `Scorer` on the export.",
    "set_initial_training_values": _OWN_LOOP,
    "store_flos": "Take 6 x parameters x `num_tokens`.",
    "training_step": _OWN_LOOP,
}
