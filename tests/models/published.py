"""The `config.json` of much used text models, key by key, written from memory as facts.

Values are those of the repositories, as far as they decide how a key is judged; tensors are never
needed, so the sizes are real.
"""

DENSE = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def sizes(hidden, layers, heads, shared, inner, vocabulary, positions):
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
    }


QWEN2 = DENSE | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "transformers_version": "4.40.1",
    "use_mrope": False,
    "use_sliding_window": False,
}
QWEN2_INSTRUCT = {k: v for k, v in QWEN2.items() if k != "use_mrope"} | {"eos_token_id": 151645}
QWEN3 = DENSE | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "transformers_version": "4.51.0",
    "use_sliding_window": False,
}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
LLAMA = DENSE | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.42.3",
}
SMALL_LLAMA = LLAMA | {
    "head_dim": 64,
    "rope_scaling": LLAMA["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}
SMOLLM2 = DENSE | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.041666666666666664,
    "is_llama_config": True,
    "mlp_bias": False,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
}
MISTRAL = DENSE | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.42.0.dev0",
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
GEMMA3_270M = GEMMA3 | sizes(640, 18, 4, 1, 2048, 262144, 32768) | {
    "_sliding_window_pattern": 6,
    "layer_types": ([SLIDING] * 5 + [FULL]) * 3,
    "transformers_version": "4.55.0.dev0",
    "use_bidirectional_attention": False,
}  # fmt: skip
GEMMA3_1B = GEMMA3 | sizes(1152, 26, 4, 1, 6912, 262144, 32768) | {
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "sliding_window_pattern": 6,
    "transformers_version": "4.50.0.dev0",
}  # fmt: skip
QWEN3_CODER = QWEN3_MOE | sizes(2048, 48, 32, 4, 5472, 151936, 262144) | {
    "max_window_layers": 28,
    "qkv_bias": False,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 0,
    "use_qk_norm": True,
    "transformers_version": "4.52.3",
}  # fmt: skip
SMOLLM3 = DENSE | sizes(2048, 36, 16, 4, 11008, 128256, 65536) | {
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_id": 128012,
    "layer_types": [FULL] * 36,
    "max_window_layers": 28,
    "mlp_bias": False,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "pad_token_id": 128004,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "transformers_version": "4.54.0.dev0",
    "use_cache": False,
    "use_sliding_window": False,
}  # fmt: skip

PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": QWEN2 | sizes(896, 24, 14, 2, 4864, 151936, 32768)
    | {"max_window_layers": 24, "sliding_window": 32768, "tie_word_embeddings": True},
    "Qwen/Qwen2.5-1.5B-Instruct": QWEN2_INSTRUCT | sizes(1536, 28, 12, 2, 8960, 151936, 32768)
    | {"max_window_layers": 21, "sliding_window": 32768, "tie_word_embeddings": True},
    "Qwen/Qwen2.5-7B": QWEN2 | sizes(3584, 28, 28, 4, 18944, 152064, 131072),
    "Qwen/Qwen2.5-Math-1.5B": QWEN2 | sizes(1536, 28, 12, 2, 8960, 151936, 4096)
    | {"max_window_layers": 21, "rope_theta": 10000, "sliding_window": 4096},
    "Qwen/Qwen2.5-Coder-7B-Instruct": QWEN2_INSTRUCT
    | sizes(3584, 28, 28, 4, 18944, 152064, 32768),
    "Qwen/Qwen3-0.6B": QWEN3 | sizes(1024, 28, 16, 8, 3072, 151936, 40960),
    "Qwen/Qwen3-4B-Base": QWEN3 | sizes(2560, 36, 32, 8, 9728, 151936, 32768)
    | {"eos_token_id": 151643, "max_window_layers": 36},
    "Qwen/Qwen3-8B": QWEN3 | sizes(4096, 36, 32, 8, 12288, 151936, 40960)
    | {"tie_word_embeddings": False, "max_window_layers": 36},
    "Qwen/Qwen3-4B-Instruct-2507": QWEN3 | sizes(2560, 36, 32, 8, 9728, 151936, 262144)
    | {"rope_theta": 5000000, "max_window_layers": 36},
    "Qwen/Qwen3-30B-A3B-Instruct-2507": QWEN3_MOE
    | sizes(2048, 48, 32, 4, 6144, 151936, 262144),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": QWEN3_CODER,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA | sizes(4096, 32, 32, 8, 14336, 128256, 131072),
    "meta-llama/Llama-3.2-1B": SMALL_LLAMA | sizes(2048, 16, 32, 8, 8192, 128256, 131072)
    | {"eos_token_id": 128001},
    "meta-llama/Llama-3.2-3B-Instruct": SMALL_LLAMA
    | sizes(3072, 28, 24, 8, 8192, 128256, 131072) | {"head_dim": 128},
    "meta-llama/Llama-3.3-70B-Instruct": LLAMA | sizes(8192, 80, 64, 8, 28672, 128256, 131072)
    | {"head_dim": 128, "transformers_version": "4.47.0.dev0"},
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2 | sizes(576, 30, 9, 3, 1536, 49152, 8192),
    "HuggingFaceTB/SmolLM2-360M-Instruct": SMOLLM2 | sizes(960, 32, 15, 5, 2560, 49152, 8192),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": {
        key: value for key, value in SMOLLM2.items()
        if key not in ("is_llama_config", "rope_interleaved")
    } | sizes(2048, 24, 32, 32, 8192, 49152, 8192)
    | {"rope_theta": 130000, "transformers.js_config": {
        "dtype": "q4", "kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"},
        "use_external_data_format": {"model.onnx": True, "model_fp16.onnx": True}}},
    "HuggingFaceTB/SmolLM3-3B": SMOLLM3,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": DENSE | sizes(2048, 22, 32, 4, 5632, 32000, 2048)
    | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
       "bos_token_id": 1, "eos_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
       "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
       "transformers_version": "4.35.0"},
    "mistralai/Mistral-7B-v0.1": MISTRAL | sizes(4096, 32, 32, 8, 14336, 32000, 32768)
    | {"rope_theta": 10000.0, "sliding_window": 4096, "transformers_version": "4.34.0.dev0"},
    "mistralai/Mistral-7B-Instruct-v0.3": MISTRAL | sizes(4096, 32, 32, 8, 14336, 32768, 32768),
    "mistralai/Mistral-Nemo-Instruct-2407": MISTRAL
    | sizes(5120, 40, 32, 8, 14336, 131072, 1024000) | {"head_dim": 128},
    "mistralai/Ministral-8B-Instruct-2410": MISTRAL
    | sizes(4096, 36, 32, 8, 12288, 131072, 32768)
    | {"architectures": ["MinistralForCausalLM"], "model_type": "ministral", "head_dim": 128,
       "layer_types": [FULL, SLIDING, SLIDING, SLIDING] * 9, "rope_theta": 100000000.0,
       "sliding_window": 32768},
    "google/gemma-3-270m-it": GEMMA3_270M,
    "google/gemma-3-1b-it": GEMMA3_1B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": QWEN2
    | sizes(1536, 28, 12, 2, 8960, 151936, 131072)
    | {"max_window_layers": 21, "rope_theta": 10000, "bos_token_id": 151646,
       "sliding_window": 4096},
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": LLAMA
    | sizes(4096, 32, 32, 8, 14336, 128256, 131072) | {"eos_token_id": 128001},
}  # fmt: skip
