"""Keys that a config.json leaves out: the defaults are those of transformers' configurations."""

import pytest
from transformers import CONFIG_MAPPING

from fireopd_jax.config import UserError
from fireopd_jax.models.hf_config import architecture, plainly
from fireopd_jax.models.hf_forms import COMMON, FORMS
from tests.models.test_hf_keys import values

NAMES = {"architectures", "model_type", "dtype", "torch_dtype"}
FREE = {"dtype", "max_position_embeddings"}  # a type and a limit, no values that are computed with
FULL = {
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 300.0,
    "sliding_window": 3,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "attention_bias": True,
    "mlp_bias": True,
    "no_rope_layer_interval": 2,
    "norm_topk_prob": True,
    "query_pre_attn_scalar": 9,
    "sliding_window_pattern": 2,
    "rope_local_base_freq": 50.0,
    "final_logit_softcapping": 3.0,
}
CASES = [(form.model_type, key) for form in FORMS
         for key in sorted((COMMON | form.keys) - NAMES)]  # fmt: skip


def theirs(given):
    """Return the architecture of transformers' configuration of these values."""
    named = {"architectures": given["architectures"]}
    config = CONFIG_MAPPING[given["model_type"]](**given)
    return architecture(config.to_dict() | named, "theirs")


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize(("family", "key"), CASES)
def test_an_absent_key_means_what_it_means_in_transformers(family, key, null):
    form = next(form for form in FORMS if form.model_type == family)
    given = values(family, **{k: v for k, v in FULL.items() if k in COMMON | form.keys})
    given.pop(key, None)
    given |= {key: None} if null else {}
    try:
        config = architecture(given, "ours")
    except UserError as error:
        assert key in str(error)  # stricter: the key must be given
        return
    try:
        wanted = theirs(given)
    except Exception:
        assert null  # their types forbid this null; here it is the default
        return
    ours, other = plainly(config), plainly(wanted)
    assert {k: v for k, v in ours.items() if k not in FREE} == {
        k: v for k, v in other.items() if k not in FREE
    }
