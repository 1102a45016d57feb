"""Conversion between Hugging Face's `config.json`, old and new spelling, and `DecoderConfig`.

    config.json -> defaults of its family -> DecoderConfig -> every other key neutral or rejected

A key that is not used and could change logits raises an error (`hf_keys`): ignoring it could give
other logits without an error. A null value counts as an absent key, but for `sliding_window`.
"""

import dataclasses
import math
from typing import Any, Literal

from pydantic import ValidationError

from fireopd_jax.config import UserError
from fireopd_jax.models.architecture import MOST_LAYERS, DecoderConfig, MoEConfig
from fireopd_jax.models.hf_forms import FORMS, NONE_IGNORED, IgnoredKeys, Json, Reader
from fireopd_jax.models.rope import LinearRope, Llama3Rope, YarnRope


def architecture(
    config_json: Json, source: str, ignored: IgnoredKeys = NONE_IGNORED
) -> DecoderConfig:
    """Return the architecture that a `config.json` describes; `source` is its file, for errors.

    Raises UserError with file and key for an unsupported family, key or value.
    """
    reader = Reader(config_json, source, ignored)
    if (layers := reader.integer("num_hidden_layers")) > MOST_LAYERS:
        raise reader.error(
            "num_hidden_layers", f"expected at most {MOST_LAYERS:,} layers (it is {layers:,})"
        )
    fields = dict(reader.form.fixed) | _sizes(reader) | _biases(reader) | _windows(reader)
    fields |= _rope(reader, "sliding_window" in fields)
    fields["max_position_embeddings"] = _longest(reader, fields["rope_scaling"])
    if reader.form.model_type == "qwen3_moe":
        fields |= _experts(reader)
    if reader.form.model_type == "smollm3":
        fields |= _layers_without_rope(reader)
    if reader.form.model_type == "gemma3_text":
        scalar = "query_pre_attn_scalar"
        fields[scalar] = reader.positive(scalar, reader.get(scalar, 256))
        fields["final_logit_softcapping"] = reader.get("final_logit_softcapping")
    try:
        config = DecoderConfig(model_type=reader.form.model_type, **fields)
    except ValidationError as error:
        raise _invalid(reader, error) from None
    reader.refuse_others(config)
    return config


def _invalid(reader: Reader, error: ValidationError) -> UserError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "config"
    return reader.error(key, first["msg"].removeprefix("Value error, "))


def _sizes(reader: Reader) -> dict[str, Any]:
    family, heads = reader.form.model_type, reader.integer("num_attention_heads")
    gated, default = "hidden_act", "silu"
    if family == "gemma3_text":
        gated, default = "hidden_activation", "gelu_pytorch_tanh"
    activation = reader.get(gated, default)
    if activation not in ("silu", "gelu_pytorch_tanh"):
        raise reader.error(gated, f"expected silu or gelu_pytorch_tanh (it is {activation!r})")
    head_dim = reader.get("head_dim")
    if head_dim is None:
        head_dim = reader.integer("hidden_size") // heads
    shared = reader.values.get("num_key_value_heads")
    # Of the families' defaults for this key, only llama's follows from other keys of the file.
    if shared is None and "num_key_value_heads" not in reader.nulls and family != "llama":
        raise reader.error("num_key_value_heads", "missing; expected a value for it")
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    return {name: reader.integer(name) for name in names} | {
        "num_attention_heads": heads,
        "num_key_value_heads": heads if shared is None else shared,
        "head_dim": head_dim,
        "hidden_act": activation,
        "rms_norm_eps": reader.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": reader.get("tie_word_embeddings"),
        "dtype": _dtype(reader),
    }


def _dtype(reader: Reader) -> Literal["float32", "bfloat16"]:
    name = str(reader.get("dtype", reader.get("torch_dtype", "float32"))).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise reader.error("dtype", f"expected float32, bfloat16 or float16 (it is {name!r})")
    # bfloat16 lacks float16's precision; float32 represents every float16 value exactly.
    return "bfloat16" if name == "bfloat16" else "float32"


def _biases(reader: Reader) -> dict[str, Any]:
    if reader.form.model_type == "qwen2":  # `transformers` fixes it in code
        return {"attention_bias": True}
    bias = reader.get("attention_bias", False)
    return {
        "attention_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": reader.get("mlp_bias", False),
    }


def _experts(reader: Reader) -> dict[str, Any]:
    step = reader.whole("decoder_sparse_step", 1)
    dense = reader.listed("mlp_only_layers", reader.get("mlp_only_layers", []))
    layers = range(reader.integer("num_hidden_layers"))
    sparse = [i not in dense and (i + 1) % step == 0 for i in layers]
    if not all(sparse):
        key = "mlp_only_layers" if dense else "decoder_sparse_step"
        if any(sparse):
            raise reader.error(key, "layers with and without experts cannot be mixed here")
        return {}
    count = reader.get("num_experts", reader.get("num_local_experts"))
    if count is None:
        raise reader.error("num_experts", "missing; expected a value for it")
    names = ("num_experts_per_tok", "moe_intermediate_size")
    values = {name: reader.need(name) for name in names}
    values["norm_topk_prob"] = reader.get("norm_topk_prob", False)
    try:
        return {"moe": MoEConfig(num_experts=count, **values)}
    except ValidationError as error:
        raise _invalid(reader, error) from None


def _windows(reader: Reader) -> dict[str, Any]:
    """Return window and layer types; `layer_types` overrides the family's own rule."""
    family = reader.form.model_type
    window, types = reader.get("sliding_window"), reader.get("layer_types")
    if family == "llama":
        return {}
    # Here alone null is no default: it says that there is no window.
    optional = "use_sliding_window" in reader.form.keys
    if "sliding_window" in reader.nulls or (
        optional and not reader.get("use_sliding_window", False)
    ):
        window = None
    if types is None:
        types = _types(reader, slides=window is not None)
    elif family == "mistral" and types != _types(reader, slides=window is not None):
        raise reader.error("layer_types", "a mistral model slides in every layer or in none")
    for name in reader.listed("layer_types", types):
        if name not in ("full_attention", "sliding_attention"):
            raise reader.error("layer_types", f"{name!r} is not supported")
    if "sliding_attention" not in types:
        return {}
    if window is None:
        raise reader.error("layer_types", "sliding layers without a sliding_window")
    every = all(name == "sliding_attention" for name in types)
    return {"sliding_window": window, "layer_types": None if every else tuple(types)}


def _types(reader: Reader, *, slides: bool) -> list[str]:
    """Return the type of each layer by the family's own rule; `slides`: it has a window."""
    family, layers = reader.form.model_type, reader.integer("num_hidden_layers")
    if family == "gemma3_text":
        older = reader.whole("_sliding_window_pattern", 6)
        pattern = reader.whole("sliding_window_pattern", older)
        sliding = [bool((i + 1) % pattern) for i in range(layers)]
    elif not slides:
        sliding = [False] * layers
    elif family in ("qwen2", "qwen3"):
        first = reader.whole("max_window_layers", 28, least=0)
        sliding = [i >= first for i in range(layers)]
    elif family == "smollm3":
        sliding = [not turns for turns in _turned(reader)]
    else:
        sliding = [True] * layers
    return ["sliding_attention" if each else "full_attention" for each in sliding]


def _rope(reader: Reader, slides: bool) -> dict[str, Any]:
    """Return base and scaling of RoPE, from `rope_scaling` or from `rope_parameters`."""
    old, new = reader.table("rope_scaling"), reader.table("rope_parameters")
    if old and new and old != new:
        raise reader.error("rope_scaling", "rope_parameters differs from it; expected one of them")
    given, where = new or old, "rope_parameters" if new else "rope_scaling"
    for key in ("full_attention", "sliding_attention"):
        if not isinstance(given.get(key) or {}, dict):
            raise reader.error(f"{where}.{key}", f"expected an object (it is {given[key]!r})")
    gemma = reader.form.model_type == "gemma3_text"
    local: Json = {}
    if gemma:
        local = {"rope_theta": reader.get("rope_local_base_freq", 10000.0)}
        local = local | (given.get("sliding_attention") or {})
    nested = [key for key in ("full_attention", "sliding_attention") if key in given]
    if nested and not gemma:
        raise reader.error(f"rope_parameters.{nested[0]}", "only a gemma3_text model can have it")
    given = given.get("full_attention") or {} if nested else given
    inner = f"{where}.rope_theta" if "rope_theta" in given else "rope_theta"
    theta = reader.positive(inner, given.get("rope_theta", reader.get("rope_theta")))
    fields = {"rope_theta": theta, "rope_scaling": _scaling(reader, given)}
    if gemma and slides:
        if _scaling(reader, local) is not None:
            raise reader.error("rope_parameters", "scaling in sliding layers is not supported")
        fields["rope_local_theta"] = reader.positive("rope_local_base_freq", local["rope_theta"])
    return fields


SCALINGS = {
    "linear": (LinearRope, ()),
    "llama3": (Llama3Rope, ("low_freq_factor", "high_freq_factor",
                            "original_max_position_embeddings")),
    "yarn": (YarnRope, ("original_max_position_embeddings", "beta_fast", "beta_slow",
                        "attention_factor", "truncate")),
}  # fmt: skip


def _longest(reader: Reader, scaling: LinearRope | Llama3Rope | YarnRope | None) -> int | None:
    """Return the longest text: YaRN is added to a file without a change of the length in it."""
    length = reader.get("max_position_embeddings")
    if not isinstance(scaling, YarnRope) or not isinstance(length, int):
        return length
    return max(length, int(scaling.factor * scaling.original_max_position_embeddings))


def _turned(reader: Reader) -> list[int]:
    """Return for each layer whether it has RoPE, as 1 or 0."""
    layers, given = reader.integer("num_hidden_layers"), reader.get("no_rope_layers")
    if given is None:
        interval = reader.whole("no_rope_layer_interval", 4)
        return [int((i + 1) % interval != 0) for i in range(layers)]
    if not isinstance(given, list) or len(given) < layers or any(i not in (0, 1) for i in given):
        raise reader.error("no_rope_layers", f"expected a list of {layers} layers, 1 or 0 each")
    return given[:layers]


def _layers_without_rope(reader: Reader) -> dict[str, Any]:
    turned = _turned(reader)
    return {} if all(turned) else {"no_rope_layers": turned}


def _scaling(reader: Reader, given: Json) -> LinearRope | Llama3Rope | YarnRope | None:
    given = {key: value for key, value in given.items() if value is not None}
    kind = given.get("rope_type", given.get("type", "default"))
    where = "rope_parameters" if "rope_parameters" in reader.values else "rope_scaling"
    if given.get("partial_rotary_factor", 1) != 1:
        raise reader.error(f"{where}.partial_rotary_factor", "only 1 is supported")
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise reader.error(
            f"{where}.rope_type", f"expected default, {', '.join(SCALINGS)} (it is {kind!r})"
        )
    make, names = SCALINGS[kind]
    names = ("factor", *names)
    # Conversions of YaRN's authors note that a model was trained with the scaling.
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned", *names}
    known |= {"mscale", "mscale_all_dim"} if kind == "yarn" else set()
    reader.refuse_parts(where, given, sorted(known), f"rope_type {kind}")
    fields = {name: given[name] for name in names if name in given}
    needed = [n for n in ("factor", "low_freq_factor", "high_freq_factor") if n in names]
    for name in needed:
        if name not in fields:
            raise reader.error(f"{where}.{name}", f"missing; rope_type {kind} needs it")
        reader.positive(f"{where}.{name}", fields[name])
    if "original_max_position_embeddings" in names:
        length = "original_max_position_embeddings"
        fields[length] = fields.get(length) or reader.need("max_position_embeddings")
    scales = [given.get(key) for key in ("mscale", "mscale_all_dim")]
    for key, scale in zip(("mscale", "mscale_all_dim"), scales, strict=True):
        if scale and kind == "yarn":
            reader.positive(f"{where}.{key}", scale)
    if "attention_factor" not in fields and all(scales):
        over, under = (_magnitude(fields["factor"], float(scale)) for scale in scales if scale)
        fields["attention_factor"] = over / under
    try:
        return make(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise reader.error(f"{where}.{first['loc'][0]}", first["msg"]) from None


def _magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def hf_config_json(
    config: DecoderConfig, vocab_size: int, *, dtype: str | None = None, **token_ids: Any
) -> dict[str, Any]:
    """Return the `config.json` of an architecture, in the older spelling, which all versions read.

    Raises UserError for an architecture that its `model_type` cannot express.
    """
    form = next(form for form in FORMS if form.model_type == config.model_type)
    layers, sliding = config.num_hidden_layers, config.sliding_window is not None
    out: dict[str, Any] = {
        "architectures": [form.architecture],
        "model_type": form.model_type,
        "vocab_size": vocab_size,
    }
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "head_dim", "intermediate_size", "rms_norm_eps", "tie_word_embeddings",
                 "rope_theta", "max_position_embeddings"):  # fmt: skip
        if getattr(config, name) is not None:
            out[name] = getattr(config, name)
    gemma = form.model_type == "gemma3_text"
    out["hidden_activation" if gemma else "hidden_act"] = config.hidden_act
    if config.rope_scaling is not None:
        out["rope_scaling"] = _scaling_json(config.rope_scaling)
    for name in ("attention_bias", "mlp_bias"):
        if name in form.keys:
            out[name] = getattr(config, name)
    types = tuple("full_attention" if k.window is None else "sliding_attention"
                  for k in config.kinds)  # fmt: skip
    if sliding and "sliding_window" in form.keys:
        out["sliding_window"] = config.sliding_window
        out |= {"use_sliding_window": True} if "use_sliding_window" in form.keys else {}
        # These families slide in layers from `max_window_layers` on.
        out |= {"max_window_layers": 0} if "max_window_layers" in form.keys else {}
    elif form.model_type in ("mistral", "ministral"):
        out["sliding_window"] = None
    if "no_rope_layers" in form.keys:
        out["no_rope_layers"] = list(config.no_rope_layers or (1,) * layers)
    if "layer_types" in form.keys and form.model_type != "mistral":
        out["layer_types"] = list(types)
    if config.moe is not None and "num_experts" in form.keys:
        out |= dataclasses.asdict(config.moe) | {"decoder_sparse_step": 1, "mlp_only_layers": []}
    elif form.model_type == "qwen3_moe":
        out["mlp_only_layers"] = list(range(layers))
        out |= {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 1}
    if gemma:
        # In Gemma 3, sliding layers have their own base and never the scaling.
        out["sliding_window"] = config.sliding_window or 1
        out["rope_local_base_freq"] = config.rope_local_theta or config.rope_theta
        scalar = config.query_pre_attn_scalar or config.head_dim
        out["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar
        out["final_logit_softcapping"] = config.final_logit_softcapping
    out["torch_dtype"] = dtype or config.param_dtype
    _check_form(config, out)
    return out | {key: ids for key, ids in token_ids.items() if ids is not None}


def _scaling_json(scaling: LinearRope | Llama3Rope | YarnRope) -> dict[str, Any]:
    values = {k: v for k, v in dataclasses.asdict(scaling).items() if v is not None}
    kind = values.pop("kind")
    return {"rope_type": kind, **values}


# Fields that do not change logits, or that the file expresses by other keys.
FREE = {"vocab_size", "dtype", "param_dtype", "max_position_embeddings"}


def _check_form(config: DecoderConfig, out: Json) -> None:
    """Raise UserError unless reading the written file gives the same architecture again."""
    again = architecture(out, "config.json")
    meant = plainly(config)
    for field in dataclasses.fields(DecoderConfig):
        if field.name in FREE:
            continue
        wanted, got = meant[field.name], plainly(again)[field.name]
        if wanted != got:
            raise UserError(
                f"a {config.model_type} model of Hugging Face cannot have {field.name}={wanted!r} "
                f"(it would be {got!r}); give another architecture.model_type"
            )


def check_same(given: DecoderConfig, found: DecoderConfig, key: str, source: str) -> None:
    """Raise UserError if a folder's architecture differs from the one in a configuration.

    Omitted fields count with their defaults, except dtypes, and `vocab_size` and
    `max_position_embeddings` where they are null.
    """
    stated, holds, default = plainly(given), plainly(found), plainly(DecoderConfig())
    free = {"dtype", "param_dtype"}
    free |= {n for n in ("vocab_size", "max_position_embeddings") if stated[n] is None}
    unlike = [name for name in stated if name not in free and stated[name] != holds[name]]
    # Name a field that the user wrote before one that has its default.
    unlike.sort(key=lambda name: getattr(given, name) == getattr(DecoderConfig(), name))
    for name in unlike[:1]:
        whence = " (the default)" if stated[name] == default[name] else ""
        raise UserError(
            f"{key}.architecture.{name} is {_shown(given, name)}{whence}, "
            f"{source} has {_shown(found, name)}; with a path, give the architecture of the "
            "folder, or none"
        )


def _shown(config: DecoderConfig, name: str) -> str:
    value = getattr(config, name)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return "null" if value is None else str(value)


def plainly(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields with implicit defaults resolved; windows and bases as those of layers."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values["query_pre_attn_scalar"] = config.query_pre_attn_scalar or config.head_dim
    kinds = config.kinds
    windows = tuple(kind.window for kind in kinds)
    local, plain = (config.rope_local_theta, None), (config.rope_theta, config.rope_scaling)
    return values | {
        "rope_local_theta": plain if config.rope_local_theta is None else local,
        "sliding_window": windows,
        "layer_types": windows,
        "no_rope_layers": tuple(kind.theta is not None for kind in kinds),
    }
