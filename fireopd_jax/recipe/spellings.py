"""Values that users of other libraries type, and what they are here; see `hints`."""

VALUES = {
    "bf16": "bfloat16",
    "torch.bfloat16": "bfloat16",
    "jnp.bfloat16": "bfloat16",
    "bfloat": "bfloat16",
    "half": "bfloat16",
    "fp16": "bfloat16",
    "float16": "bfloat16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "torch.float32": "float32",
    "full_precision": "float32",
    "cosine_with_warmup": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_with_restarts": "cosine",
    "warmup_cosine": "cosine",
    "constant_with_warmup": "constant",
    "polynomial": "linear",
    "linear_with_warmup": "linear",
    "tb": "tensorboard",
    "tensorboardx": "tensorboard",
    "weights_and_biases": "wandb",
    "w&b": "wandb",
    "q8": "int8",
    "8bit": "int8",
    "token-mean": "token",
    "seq-mean-token-mean": "seq",
    "seq-mean-token-sum": "seq",
    "true": "full",
    "nothing_saveable": "full",
    "error_if_exists": "never",
    "truncate": "drop",
    "left": "drop",
    "right": "drop",
}
"""Value of a choice as other libraries spell it -> as it is spelt here, where that is a choice."""

SAMPLED = "reverse KL on sampled tokens is method.loss.kind=sampled_reverse_kl (method/opd)"
FORWARD = "forward KL is a divergence: method.loss.divergence.kind=forward_kl, with method/gkd"
JENSEN = "Jensen-Shannon is one: method.loss.divergence.kind=jensen_shannon, with method/gkd"
KINDS = {
    "forward_kl": FORWARD,
    "fkl": FORWARD,
    "kl": "reverse KL on sampled tokens is method/opd, on the whole vocabulary a divergence of "
    "method/gkd",
    "reverse_kl": f"{SAMPLED}, on the whole vocabulary method.loss.divergence.kind=reverse_kl, "
    "with method/gkd",
    "rkl": SAMPLED,
    "jsd": JENSEN,
    "jensen_shannon": JENSEN,
    "gkd": "GKD is a whole method: method/gkd",
    "opd": "OPD is a whole method: method/opd",
    "k1": SAMPLED,
    "k2": "the square of the log-ratio is method.loss.kind=sampled_square",
    "k3": SAMPLED,
    "low_var_kl": SAMPLED,
    "grpo": "a distilled student has no reward; the nearest method is method/opd",
    "ppo": "a distilled student has no reward; the nearest method is method/opd",
    "fire": "FiRe-OPD is a whole method: method/fire_opd",
    "fire_opd": "FiRe-OPD is a whole method: method/fire_opd",
    "fire-opd": "FiRe-OPD is a whole method: method/fire_opd",
    "fireopd": "FiRe-OPD is a whole method: method/fire_opd",
    "none": "the kind that does nothing is keep_all of method.filter, uniform of method.reweight",
}
"""`kind` as people guess it -> what it is here."""

WHOLE = {
    "teachers": "`teacher.path=...` is the model of a single teacher, `teachers.NAME.path=...` "
    "of one of several",
    "eval.sets": "`eval.sets.NAME.path=...` is the file of a set",
    "method": "a whole method is a file: configs/method/NAME.yaml, on the command line method/NAME",
    "student": "`student.path=...` is the model",
    "student.lora": "`student.lora={}` trains adapters with the default rank, "
    "`student.lora.rank=16` with another",
    "optim": "`optim.optimizer=adamw` (or muon) is the optimizer; AdamW is the default",
    "data": "`data.path=...` is the file or data set",
}
"""A section that was given a single value -> the keys that were probably meant."""
