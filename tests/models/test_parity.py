"""Qwen3 of Hugging Face's `transformers` with random weights gives the same log-probabilities."""

import functools

import jax
import numpy as np
import pytest

from tests.cases import response_stats, tiny_model

pytestmark = pytest.mark.parity

VOCABULARY, LAYERS = 48, 2
PROMPT, RESPONSE = np.array([6, 1, 4], np.int32), np.array([5, 3, 0])
LINEAR = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
          "mlp": ("gate_proj", "up_proj", "down_proj")}  # fmt: skip


def theirs(torch, architecture):
    """Return a model of `transformers` with random weights, also of its norms."""
    transformers = pytest.importorskip("transformers")
    names = {k: v for k, v in architecture.items() if k != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": architecture["rope_theta"]}
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, rope_parameters=rope, attn_implementation="eager", **names
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            weight.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
    return model


def ours(weights, tied):
    """Return Hugging Face weights as our parameters: kernels transposed, layers stacked."""

    def stack(name):
        return np.stack([weights[f"model.layers.{i}.{name}.weight"] for i in range(LAYERS)])

    layers = {
        block: {name: {"kernel": stack(f"{block}.{name}").swapaxes(1, 2)} for name in names}
        for block, names in LINEAR.items()
    }
    for name in ("q_norm", "k_norm"):
        layers["self_attn"][name] = {"scale": stack(f"self_attn.{name}")}
    for name in ("input_layernorm", "post_attention_layernorm"):
        layers[name] = {"scale": stack(name)}
    head = {} if tied else {"lm_head": weights["lm_head.weight"]}
    return head | {
        "embed_tokens": weights["model.embed_tokens.weight"],
        "layers": layers,
        "norm": {"scale": weights["model.norm.weight"]},
    }


@pytest.mark.parametrize(
    ("tied", "theta", "heads", "shared", "head_dim"),
    [(True, 1e4, 4, 2, 8), (False, 1e6, 4, 1, 12), (True, 100.0, 2, 2, 16)],
)
def test_logprobs_equal_transformers(tied, theta, heads, shared, head_dim):
    torch = pytest.importorskip("torch")
    architecture = {
        "hidden_size": 16,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": head_dim,
        "intermediate_size": 24,
        "rope_theta": theta,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
    }
    reference = theirs(torch, architecture)
    params = ours({k: v.detach().numpy() for k, v in reference.state_dict().items()}, tied)

    rng = np.random.default_rng(1)
    prompt = rng.integers(0, VOCABULARY, (3, 6)).astype(np.int32)
    tokens = rng.integers(0, VOCABULARY, (3, 5)).astype(np.int32)
    mask = np.arange(5)[None] < RESPONSE[:, None]
    model = tiny_model(VOCABULARY, **architecture)
    stats = jax.jit(functools.partial(response_stats, model))(params, prompt, PROMPT, tokens, mask)
    for i in range(3):
        sequence = np.concatenate([prompt[i, : PROMPT[i]], tokens[i, : RESPONSE[i]]])
        with torch.no_grad():
            logits = reference(torch.tensor(sequence[None], dtype=torch.long)).logits[0]
        logp = torch.log_softmax(logits.double(), dim=-1).numpy()
        for t in range(RESPONSE[i]):
            wanted = logp[PROMPT[i] + t - 1]
            assert abs(stats.logprob[i, t] - wanted[tokens[i, t]]) < 2e-5
            assert abs(stats.entropy[i, t] + np.exp(wanted) @ wanted) < 2e-5
