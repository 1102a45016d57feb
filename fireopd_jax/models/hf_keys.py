"""Whether a key of `config.json` that no family reads could change what the model computes.

    key, value, architecture -> about texts, training or another program? -> None
                             -> a part that is not supported             -> objection
                             -> the value that is computed anyway?       -> None, or objection
                             -> absent, empty, off or none?              -> None, or objection

Names alone decide little: `use_qk_norm: false` is neutral in a Llama and another model in a Qwen3,
and a multiplier of 0 is no absence. So names with a known meaning are compared with the
architecture. Of the others, values load that switch off what no decoder here has.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fireopd_jax.config import nearest
from fireopd_jax.models.architecture import DecoderConfig

Accepted = Callable[[DecoderConfig], tuple[Any, ...]]
"""Architecture -> the values of a key under which the model computes the same."""
ANY = object()
"""Every value is accepted."""


def names(words: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(words.split())


REASONS = {
    "quantization_config": "quantised checkpoints are not supported; use the original one",
    "quantization": "quantised checkpoints are not supported; use the original one",
    "auto_map": "code in a model folder is never run",
    "vision_config": "only text models are supported",
    "audio_config": "only text models are supported",
}

# Bookkeeping, loading and labels; limits of lengths; precision and implementation.
BOOKKEEPING = names("""
    transformers_version name_or_path model_name model_version version revision base_model
    base_model_name_or_path license author description language library_name finetuning_task
    task_specific_params id2label label2id num_labels problem_type return_dict use_return_dict
    output_attentions output_hidden_states output_router_logits output_past torchscript
    use_cache chunk_size_feed_forward tie_encoder_decoder is_decoder pretraining_tp
    max_window_layers attn_implementation attn_impl attention_implementation use_flash_attn
    use_flash_attention flash_attention use_bfloat16 fp16 bf16 fp32 softmax_in_fp32
    attention_softmax_in_fp32 reorder_and_upcast_attn max_sequence_length max_seq_length
    max_seq_len seq_length seq_len sequence_length model_max_length context_length n_ctx
    n_positions gradient_checkpointing use_gradient_checkpointing seq_aux
""")  # fmt: skip
GENERATION = names("""
    max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings
    do_sample num_beams num_beam_groups num_assistant_tokens penalty_alpha dola_layers
    temperature top_k top_p top_h min_p typical_p epsilon_cutoff eta_cutoff diversity_penalty
    repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size
    bad_words_ids force_words_ids renormalize_logits constraints remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias
    token_healing guidance_scale low_memory watermarking_config num_return_sequences
    output_scores output_logits return_dict_in_generate encoder_no_repeat_ngram_size
    is_assistant num_assistant_tokens_schedule assistant_confidence_threshold
    prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit assistant_lookbehind
    target_lookbehind cache_implementation cache_config compile_config disable_compile
    continuous_batching_config prefill_chunk_size use_mtp max_cache_len
    assistant_ensemble_weight speculation_type use_model_defaults prefix generation_config
    thinking_budget
""")  # fmt: skip
TOKENIZER = names("""
    chat_template add_prefix_space padding_side truncation_side vocab_file special_tokens_map
    clean_up_tokenization_spaces ignore_index
""")  # fmt: skip
TOKEN = re.compile(r"(^|_)token(_ids?|_index)?$")
TRAINING = frozenset(("dropout", "pdrop", "loss", "optimizer", "warmup", "epochs", "seed"))
IMPLEMENTATION = frozenset(("fused", "fuse", "flash", "triton", "xformers", "sdpa"))
FIRST_WORDS = names("init initializer tokenizer unsloth drop training")
RUNTIMES = names("""
    js onnx openvino tflite coreml neuron tensorrt trt executorch webgpu webllm mlc vllm sglang
    gguf rknn qnn
""")  # fmt: skip

COMPUTED_BY_ALL = names("""
    norm norms rms rmsnorm layernorm normalize causal rope rotary gated gate glu swiglu geglu
    residual softmax scale scaled tie tied
""")  # fmt: skip
"""Words of switches that every decoder here has on: false would turn its own computation off."""
FACTORS = names("""
    multiplier scale scaling scalar factor factors temperature softcap softcapping cap clip
    clamp limit eps epsilon theta base freq alpha beta gamma gain weight weights ratio fraction
    pct percent exponent power threshold
""")  # fmt: skip
"""Words of numbers that multiply, divide or bound: 0 would be an extreme, not an absence."""


def objection(key: str, value: Any, config: DecoderConfig, known: Iterable[str] = ()) -> str | None:
    """Return how a key that is not read could change the computation; None if it cannot.

    `known` are the keys that are read, of which it may be a misspelling.
    """
    if is_empty(value) or key.startswith("_"):
        return None
    if key in REASONS:
        return REASONS[key]
    if key in COMPUTED:
        accepted = COMPUTED[key](config)
        if any(each is ANY or same(value, each) for each in accepted):
            return None
        computed = accepted[0] if accepted else None
        shown = "without it" if computed is None else f"as with {computed!r}"
        return f"a {config.model_type} model is computed {shown}"
    if is_elsewhere(key, value) or is_off(key, value, config):
        return None
    model = f"a {config.model_type} model{nearest(key, known)}"
    return f"unknown in {model}, and could change what it computes"


def is_elsewhere(key: str, value: Any) -> bool:
    """Return whether a key is about texts, training, bookkeeping or another program."""
    words = words_of(key)
    return (
        key in BOOKKEEPING | GENERATION | TOKENIZER
        or TOKEN.search(key) is not None
        or not (TRAINING | IMPLEMENTATION).isdisjoint(words)
        or words[0] in FIRST_WORDS
        or (isinstance(value, Mapping) and not RUNTIMES.isdisjoint(words))
    )


def is_off(key: str, value: Any, config: DecoderConfig | None) -> bool:
    """Return whether a value switches off, or counts none of, what no decoder here has.

    Without an architecture, the words of single families count as those of all.
    """
    words, own = set(words_of(key)), set()
    if config is None or config.sliding_window is not None:
        own |= {"window", "sliding", "swa"}
    if config is None or config.attention_bias or config.mlp_bias:
        own |= {"bias", "biases"}
    if is_empty(value):
        return True
    if value is False:
        return words.isdisjoint(COMPUTED_BY_ALL | own)
    return is_number(value) and value == 0 and words.isdisjoint(FACTORS | own)


def is_empty(value: Any) -> bool:
    """Return whether a value is null, or a text, list or object without contents."""
    return value is None or (isinstance(value, str | list | tuple | Mapping) and not value)


def is_number(value: Any) -> bool:
    """Return whether a value is a number; booleans are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def same(value: Any, computed: Any) -> bool:
    """Return whether two values of JSON are equal, numbers up to rounding, true never 1."""
    if is_number(value) and is_number(computed):
        return math.isclose(value, computed, rel_tol=1e-5)
    return type(value) is type(computed) and value == computed


def words_of(key: str) -> list[str]:
    """Return the words of a key in lower case: `transformers.js_config` has three."""
    return re.split(r"[._\-\s]+", key.lower())


def _types(c: DecoderConfig) -> list[str]:
    return ["full_attention" if k.window is None else "sliding_attention" for k in c.kinds]


def _activations(c: DecoderConfig) -> tuple[str, ...]:
    if c.hidden_act == "silu":
        return ("silu", "swish", "swiglu")
    return ("gelu_pytorch_tanh", "gelu_new", "gelu_tanh", "geglu")


def _biases(c: DecoderConfig) -> tuple[bool, ...]:
    """Return whether all linear maps have a bias; no value stands for some of them."""
    every = {c.attention_bias, c.attention_output_bias, c.mlp_bias}
    return tuple(every) if len(every) == 1 else ()


def _original_length(c: DecoderConfig) -> tuple[Any, ...]:
    """Only scalings that know the length before scaling use it."""
    return (getattr(c.rope_scaling, "original_max_position_embeddings", ANY),)


def _experts(c: DecoderConfig) -> tuple[int]:
    return (0 if c.moe is None else c.moe.num_experts,)


# Names of other programs and older files -> the values that mean what is computed here.
MEANINGS: tuple[tuple[str, Accepted], ...] = (
    ("use_qk_norm qk_norm qk_layernorm qk_layer_norm use_qk_layernorm use_query_key_norm "
     "apply_qk_norm", lambda c: (c.qk_norm,)),
    ("qkv_bias attention_qkv_bias attn_qkv_bias use_qkv_bias add_qkv_bias attention_bias attn_bias",
     lambda c: (c.attention_bias,)),
    ("attention_output_bias attention_out_bias o_proj_bias out_proj_bias",
     lambda c: (c.attention_output_bias,)),
    ("mlp_bias use_mlp_bias ffn_bias", lambda c: (c.mlp_bias,)),
    ("use_bias bias use_biases linear_bias add_bias_linear", _biases),
    ("lm_head_bias head_bias norm_bias layer_norm_bias", lambda c: (False,)),
    ("rope_interleaved rotary_interleaved interleaved_rope rope_interleave mrope_interleaved",
     lambda c: (False,)),
    ("use_rope rotary use_rotary use_rotary_embeddings use_rotary_position_embeddings",
     lambda c: (True,) if c.no_rope_layers is None else ()),
    ("is_neox_style is_llama_config rms_norm use_rms_norm use_rmsnorm pre_norm normalize_before "
     "do_layer_norm_before use_final_norm final_norm gated_mlp use_gated_mlp use_glu glu is_causal "
     "causal use_causal_mask scale_attn_weights", lambda c: (True,)),
    ("use_swiglu swiglu", lambda c: (c.hidden_act == "silu",)),
    ("norm_type normalization normalization_type",
     lambda c: ("rmsnorm", "rms_norm", "RMSNorm", "rms")),
    ("use_rope_scaling", lambda c: (c.rope_scaling is not None,)),
    ("position_embedding_type", lambda c: ("rope", "rotary")),
    ("rotary_emb_base rotary_base rope_base rope_local_base_freq", lambda c: (c.rope_theta,)),
    ("partial_rotary_factor rotary_pct rope_pct rotary_percent rotary_emb_fraction",
     lambda c: (1,)),
    ("rotary_dim head_size kv_channels d_head attention_head_dim v_head_dim qk_head_dim",
     lambda c: (c.head_dim,)),
    ("original_max_position_embeddings", _original_length),
    ("attention_multiplier attention_scale attn_scale softmax_scale",
     lambda c: ((c.query_pre_attn_scalar or c.head_dim) ** -0.5,)),
    ("query_pre_attn_scalar", lambda c: (c.query_pre_attn_scalar or c.head_dim,)),
    ("embedding_multiplier embedding_scale embed_scale emb_scale scale_emb",
     lambda c: (c.hidden_size**0.5 if c.scale_embeddings else 1,)),
    ("scale_embedding scale_embeddings normalize_embedding", lambda c: (c.scale_embeddings,)),
    ("residual_multiplier residual_scale logits_scaling logit_scale logits_scale "
     "lm_head_multiplier output_multiplier attention_temperature attn_temperature "
     "routed_scaling_factor moe_layer_freq rope_scaling_factor rope_factor rope_ratio",
     lambda c: (1,)),
    ("attn_logit_softcapping attn_logit_softcap attention_softcap router_logit_softcapping "
     "clip_qkv qkv_clip", lambda c: ()),
    ("final_logit_softcapping final_logit_softcap logit_softcap",
     lambda c: () if c.final_logit_softcapping is None else (c.final_logit_softcapping,)),
    ("norm_eps norm_epsilon layer_norm_eps layer_norm_epsilon layernorm_epsilon rms_norm_epsilon "
     "rms_eps", lambda c: (c.rms_norm_eps,)),
    ("post_norm post_norms use_post_norm sandwich_norm", lambda c: (c.post_norms,)),
    ("add_unit_offset rms_norm_add_unit_offset", lambda c: (c.zero_centered_norms,)),
    ("use_parallel_residual parallel_residual parallel_attn parallel_block is_encoder_decoder "
     "add_cross_attention use_bidirectional_attention use_bidirectional attention_k_eq_v "
     "attention_output_gate attn_output_gate use_output_gate gated_attention", lambda c: (False,)),
    ("hidden_activation activation_function activation mlp_hidden_act", _activations),
    ("use_sliding_window use_swa", lambda c: (c.sliding_window is not None,)),
    ("sliding_window", lambda c: () if c.sliding_window is None else (c.sliding_window,)),
    ("sliding_window_pattern", lambda c: (ANY,) if c.sliding_window is None else ()),
    ("layer_types", lambda c: (_types(c),)),
    ("multi_query", lambda c: (c.num_key_value_heads == 1,)),
    ("n_embd d_model", lambda c: (c.hidden_size,)),
    ("n_layer n_layers num_layers", lambda c: (c.num_hidden_layers,)),
    ("n_head n_heads num_heads", lambda c: (c.num_attention_heads,)),
    ("n_kv_heads num_kv_heads", lambda c: (c.num_key_value_heads,)),
    ("use_moe is_moe moe enable_moe_block", lambda c: (c.moe is not None,)),
    ("num_experts num_local_experts n_routed_experts moe_num_experts", _experts),
    ("num_experts_per_tok moe_top_k top_k_experts",
     lambda c: (0 if c.moe is None else c.moe.num_experts_per_tok,)),
    ("norm_topk_prob decoder_sparse_step mlp_only_layers",
     lambda c: (ANY,) if c.moe is None else ()),
    ("scoring_func", lambda c: ("softmax",)),
    ("tie_embeddings tied_embeddings weight_tying tie_weights tie_lm_head",
     lambda c: (c.tie_word_embeddings,)),
)  # fmt: skip
COMPUTED = {name: accepted for each, accepted in MEANINGS for name in names(each)}
