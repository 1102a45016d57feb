"""Option names of other libraries, with the keys of the same meaning here."""

ALIASES = {
    # TRL
    "model_name_or_path": "student.path",
    "teacher_model_name_or_path": "teacher.path",
    "dataset_name": "data.path",
    "dataset_config": "data.subset",
    "dataset_train_split": "data.split",
    "dataset_mixer": "data.mixture",
    "output_dir": "run.dir",
    "run_name": "run.name",
    "per_device_train_batch_size": "optim.micro_batch_size",
    "max_steps": "run.steps",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_completion_length": "rollout.max_tokens",
    "max_new_tokens": "rollout.max_tokens",
    "num_generations": "rollout.group_size",
    "max_grad_norm": "optim.clip_norm",
    "lr_scheduler_type": "optim.schedule",
    "logging_steps": "run.log_every",
    "eval_steps": "eval.every",
    "save_steps": "run.save_every",
    "save_total_limit": "run.keep",
    "resume_from_checkpoint": "run.resume",
    "chat_template_kwargs": "student.chat_template_kwargs",
    "lmbda": "rollout.on_policy_fraction",
    # verl and the FiRe-OPD scripts
    "train_files": "data.path",
    "prompt_key": "data.prompt_column",
    "max_response_length": "rollout.max_tokens",
    "train_batch_size": "rollout.batch_size",
    "ppo_mini_batch_size": "rollout.batch_size",
    "ppo_micro_batch_size": "optim.micro_batch_size",
    "ppo_micro_batch_size_per_gpu": "optim.micro_batch_size",
    "lr": "optim.learning_rate",
    "clip_ratio": "method.loss.clip",
    "test_freq": "eval.every",
    "save_freq": "run.save_every",
    "total_training_steps": "run.steps",
    "resume_mode": "run.resume",
    "traj_skip_percentile": "method.filter.drop_fraction",
    "entropy_alpha": "method.reweight.alpha",
    "entropy_beta": "method.reweight.beta",
    "opd_teacher": "data.teacher_column",
    "rollout_is_threshold": "method.loss.importance_cap",
}
"""Last part of a foreign key -> the key that means the same here."""

ELSEWHERE = {
    "gradient_accumulation_steps": (
        "set the rows of one forward and backward pass, optim.micro_batch_size, and those of one "
        "update, rollout.batch_size"
    ),
    "report_to": "metrics are written to metrics.jsonl in the run's folder, whatever the settings",
    "val_files": (
        "files of problems are named in eval.sets, and eval.problems is the number of rows that "
        "are held out"
    ),
    "num_train_epochs": "the length of a run is a number of batches: run.steps",
    "total_epochs": "the length of a run is a number of batches: run.steps",
    "bf16": "the compute dtype is a key of each model: student.dtype, teacher.dtype",
    "fp16": "models compute in float32 or bfloat16: student.dtype, teacher.dtype",
    "use_vllm": "responses are sampled by the package's own engine: see the section rollout",
}
"""Last part of a foreign key without an equivalent -> what to use instead."""
