"""The order of the prompts: as it always was without new keys, and by weights in a mixture."""

import json
from collections import Counter

import numpy as np
import pytest

from fireopd_jax.config import UserError, validate
from fireopd_jax.data.pipeline import PromptLoader, encode, split
from fireopd_jax.data.settings import DataConfig
from fireopd_jax.data.sources import read_rows, route
from fireopd_jax.text.tokenizer import BUILTIN, load_tokenizer

TOKENIZER = load_tokenizer(BUILTIN)

# Recorded from the package before columns were recognised and mixtures came in: digest of the
# data without and with references, first prompts, first held-out rows. Another value is another
# stream for every run that exists.
STREAMS = {
    "builtin:addition-1": (
        ("9e7cc31eedd15e6e", "14b8952660c63e81"),
        [78, 25, 1, 24, 80, 81],
        [16, 66, 2, 91],
    ),
    "builtin:addition-2": (
        ("b9e7c5c01411f3fe", "db60949f50b6e130"),
        [3423, 84, 5512, 284, 7612, 9387],
        [3590, 1855, 2560, 5800],
    ),
    "builtin:subtraction-2": (
        ("3e1d46ffe3530523", "c1f3cf66fc815f81"),
        [3448, 84, 3274, 286, 1042, 1681],
        [1997, 4502, 2040, 789],
    ),
}


def encoded_of(config, rows):
    return encode(
        rows,
        tokenizer=TOKENIZER,
        template_kwargs={},
        teacher_tokenizers=[TOKENIZER],
        teacher_template_kwargs=[{}],
        route=np.zeros(len(rows), np.int32),
        config=config,
        max_reference_tokens=32,
    )


def data(**keys):
    return validate(DataConfig, {"max_prompt_tokens": 16, **keys}, {})


def loader(config, rows, indices=None, **keys):
    indices = np.arange(len(rows)) if indices is None else indices
    settings = {"prompts_per_step": 6, "group_size": 1, "seed": 7, **keys}
    return PromptLoader(encoded_of(config, rows), indices, **settings)


@pytest.mark.parametrize("task", STREAMS)
def test_streams_of_built_in_tasks_are_what_they_were(task):
    digests, first, held = STREAMS[task]
    config = data(path=task, max_prompt_tokens=8)
    rows = read_rows(config)
    train, held_out = split(rows, 64)
    assert held_out[:4].tolist() == held
    for references, digest in zip((False, True), digests, strict=True):
        stream = loader(config, rows, train, references=references)
        assert stream.identity["data"] == digest
        assert next(stream).row.tolist() == first


def files(folder, **sizes):
    """Write a file of rows for each name, which the prompts begin with."""
    for name, size in sizes.items():
        lines = [json.dumps({"prompt": f"{name}{i}", "answer": i}) for i in range(size)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return [str(folder / f"{name}.jsonl") for name in sizes]


def drawn(stream, batches):
    return np.concatenate([next(stream).row for _ in range(batches)])


def test_a_mixture_holds_its_sources_in_proportion_to_their_weights(tmp_path):
    small, large = files(tmp_path, s=5, l=40)
    config = data(mixture=[{"path": small, "weight": 3}, {"path": large}])
    rows = read_rows(config)
    assert [row.source for row in rows] == [0] * 5 + [1] * 40
    stream = loader(config, rows, prompts_per_step=8)
    for _ in range(5):
        assert (next(stream).row < 5).sum() == 6
    seen = Counter(drawn(stream, 35))
    # 210 prompts of five rows, and 70 of forty: no row of a source is drawn twice as often.
    assert all(41 <= seen[row] <= 43 for row in range(5))
    assert all(1 <= seen[row] <= 2 for row in range(5, 45))


def test_the_nth_prompt_of_a_mixture_depends_on_data_and_seed_alone(tmp_path):
    config = data(mixture=[{"path": each} for each in files(tmp_path, a=7, b=9)])
    rows = read_rows(config)
    expected = drawn(loader(config, rows), 10)
    assert drawn(loader(config, rows, prompts_per_step=20), 3).tolist() == expected.tolist()
    later = loader(config, rows)
    state = loader(config, rows).get_state() | {"position": 18}
    later.set_state(state)
    assert drawn(later, 7).tolist() == expected[18:].tolist()
    assert drawn(loader(config, rows, seed=8), 10).tolist() != expected.tolist()


def test_a_position_of_other_weights_is_refused(tmp_path):
    paths = files(tmp_path, a=7, b=9)
    one = data(mixture=[{"path": each} for each in paths])
    other = data(
        mixture=[{"path": each, "weight": w} for each, w in zip(paths, (1, 2), strict=True)]
    )
    rows = read_rows(one)
    with pytest.raises(UserError, match="another stream of prompts: its data is"):
        loader(other, rows).set_state(loader(one, rows).get_state())


def test_a_source_without_rows_to_train_on_is_named(tmp_path):
    (path,) = files(tmp_path, a=7)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "x" * 99}))
    config = data(mixture=[{"path": path}, {"path": str(long)}])
    with pytest.raises(UserError, match=r"data\.mixture\[1\]: none of its rows is left"):
        loader(config, read_rows(config))


def test_sources_of_a_mixture_name_their_teachers(tmp_path):
    a, b = files(tmp_path, a=1, b=2)
    config = data(mixture=[{"path": a, "teacher": "math"}, {"path": b, "teacher": "code"}])
    assert config.routed
    rows = read_rows(config)
    assert route(rows, ["code", "math"], None).tolist() == [1, 0, 0]
    with pytest.raises(UserError, match=r"b\.jsonl:1: its source names .*'code'; known are math"):
        route(rows, ["math"], None)
    assert not data(mixture=[{"path": a, "teacher": "math"}, {"path": b}]).routed


def test_a_source_of_a_mixture_needs_a_path():
    with pytest.raises(UserError, match=r"mixture\.0: field required"):
        data(mixture=[{"weight": 2}])
    with pytest.raises(UserError, match="greater than 0"):
        data(mixture=[{"path": "builtin:addition-1", "weight": 0}])


def test_values_of_a_column_are_routed_by_patterns(tmp_path):
    file = tmp_path / "rows.jsonl"
    sources = ["openai/gsm8k", "code_contests", "codeforces", "other"]
    file.write_text(
        "\n".join(json.dumps({"prompt": name, "data_source": name}) for name in sources)
    )
    routes = {"openai/gsm8k": "math", "code*": "code", "*": "general"}
    config = data(path=str(file), teacher_column="data_source", routes=routes)
    assert [row.teacher for row in read_rows(config)] == ["math", "code", "code", "general"]
    del routes["*"]
    config = data(path=str(file), teacher_column="data_source", routes=routes)
    with pytest.raises(
        UserError, match=r"rows\.jsonl:4: .*no teacher for 'other'; it has .*code\*"
    ):
        read_rows(config)


def test_short_prompts_are_dropped_and_counted(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": "x" * n}) for n in range(1, 20)))
    config = data(path=str(file), min_prompt_tokens=8)
    encoded = encoded_of(config, read_rows(config))
    # A template of three tokens around each text.
    assert encoded.kept.tolist() == list(range(4, 13))
    assert (encoded.dropped_short, encoded.dropped_prompts) == (4, 6)
    with pytest.raises(UserError, match="min_prompt_tokens=17: none of 13 prompts"):
        config = data(path=str(file), min_prompt_tokens=17)
        encoded_of(config, read_rows(config))
