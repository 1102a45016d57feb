"""Shipped configurations load; conflicts between sections are refused, naming the key."""

import dataclasses
import math
from pathlib import Path

import pytest
import yaml

from fireopd_jax.commands.schema import text
from fireopd_jax.config import UserError
from fireopd_jax.method.filtering import KeepAll
from fireopd_jax.method.scoring import SampledToken, WholeVocabulary
from fireopd_jax.method.scoring.outcomes import OutcomeMargin
from fireopd_jax.models.hf_names import hf_shapes
from fireopd_jax.recipe.layers import SHIPPED
from fireopd_jax.recipe.models import TeacherConfig
from fireopd_jax.recipe.schema import (
    Config,
    MethodConfig,
    as_tree,
    load,
    load_config,
    with_method,
)
from tests.recipe.annotations import members

CONFIGS = next(folder for folder in SHIPPED if folder.is_dir())
WHOLE = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
METHODS = sorted(file.stem for file in (CONFIGS / "method").glob("*.yaml"))
FOLDERS = sorted(
    f"{folder}/{file.stem}"
    for folder in ("model", "hardware")
    for file in (CONFIGS / folder).glob("*.yaml")
)
FLYING = ["rollout.overprovision=0.5"]
GROUPS = "rollout.group_size=4"
TEACHER = "teacher.tokenizer=builtin:bytes"
TWO = ["teachers.a.tokenizer=builtin:bytes", "teachers.b.tokenizer=builtin:bytes"]
CHUNKS = [
    TEACHER,
    "method={refine: {kind: audit}, score: {kind: chunk_agreement}, "
    "loss: {kind: chunk_policy_gradient}, filter: {kind: keep_all}, reweight: {kind: uniform}, "
    "aggregate: token}",
]


def refusal(arguments):
    with pytest.raises(UserError) as caught:
        load_config(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_something_is_shipped():
    assert {"quickstart", "smoke"} <= set(WHOLE) and {"opd", "fire_opd"} <= set(METHODS)


@pytest.mark.parametrize("name", WHOLE)
def test_every_shipped_configuration_loads(name):
    config = load_config([f"configs/{name}.yaml"])
    assert bool(config.teachers) == config.method.teacher.resident


@pytest.mark.parametrize("name", FOLDERS)
def test_every_shipped_model_and_machine_loads(name):
    config = load_config([f"configs/{name}.yaml"])
    models = [config.student, *config.teachers.values()]
    assert all(model.path and model.architecture.vocab_size for model in models)
    assert len(models) == 2 or config.data.teacher_column
    assert with_method(config, "opd").student == config.student
    first = (CONFIGS / f"{name}.yaml").read_text().partition("\n")[0]
    assert first.startswith("# planned, not run: " if name.startswith("hardware") else "# ")


# Billions of parameters as the models' cards have them.
SIZES = {
    "model/qwen3_30b_a3b_to_4b": (4.02, 30.53),
    "model/qwen3_4b_math_code_to_4b": (4.02, 4.02, 4.02),
    "model/qwen3_8b_to_0_6b": (0.60, 8.19),
    "model/qwen3_8b_to_1_7b": (1.72, 8.19),
    "model/qwen2_5_7b_to_1_5b": (1.54, 7.62),
    "model/llama_3_1_8b_to_3_2_1b": (1.24, 8.03),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_architectures_are_of_the_published_sizes(name):
    config = load_config([f"configs/{name}.yaml"])
    sizes = []
    for model in (config.student, *config.teachers.values()):
        shapes = hf_shapes(model.architecture, model.architecture.vocab_size)
        sizes.append(round(sum(map(math.prod, shapes.values())) / 1e9, 2))
    assert tuple(sizes) == SIZES[name]


@pytest.mark.parametrize("name", METHODS)
def test_every_shipped_method_lies_on_smoke_and_beside_it(name):
    smoke = load_config(["smoke"])
    laid = load_config(["smoke", f"method/{name}"])
    assert dataclasses.replace(laid, method=smoke.method) == smoke
    assert with_method(smoke, name).method == laid.method


def test_a_whole_configuration_written_out_loads_to_itself(tmp_path):
    file = tmp_path / "a.yaml"
    for name in [*WHOLE, *FOLDERS]:
        config = load_config([name])
        file.write_text(yaml.safe_dump(as_tree(config), sort_keys=False))
        assert load_config([str(file)]) == config


def test_the_paper_is_the_default():
    assert load_config([TEACHER, "method/fire_opd"]) == load_config([TEACHER])


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "teachers"),
        ([TEACHER, "rollout.batch_size=8", "rollout.group_size=3"], "rollout.group_size=3"),
        ([TEACHER, "rollout.batch_size=8", "optim.micro_batch_size=3"], "optim.micro_batch_size=3"),
        (
            [TEACHER, "rollout.batch_size=8", "method.score.micro_batch_size=5"],
            "method.score.micro_batch_size=5",
        ),
        (
            [TEACHER, "student.sft.batch_size=8", "student.sft.optim.micro_batch_size=3"],
            "student.sft.optim.micro_batch_size=3",
        ),
        (
            [TEACHER, "teacher.sft.batch_size=8", "teacher.sft.optim.micro_batch_size=3"],
            "teachers.default.sft.optim.micro_batch_size=3",
        ),
        ([TEACHER, "rollout.temperature=0"], "rollout.temperature=0"),
        ([TEACHER, "rollout.top_p=0.9"], "method.loss.importance_cap"),
        ([TEACHER, "rollout.top_k=5"], "method.loss.importance_cap"),
        ([TEACHER, "rollout.min_p=0.1"], "method.loss.importance_cap"),
        (TWO, "data.teacher_column"),
        ([TEACHER, "teacher.sft.source=teacher"], "teachers.default.sft.source"),
        ([TEACHER, "run.compare=[odp]"], "odp"),
        ([TEACHER, "run.compare=[opd, opd]"], "named twice"),
        ([TEACHER, "run.compare=[fire_opd]"], "the method of the run itself"),
        ([TEACHER, "rollout.batch_size=16", "method.filter.drop_fraction=0.05"], "drops none"),
        ([TEACHER, "method.filter.drop_fraction=1"], "method.filter.drop_fraction=1"),
        ([TEACHER, "run.steps=5", "optim.warmup_steps=5"], "optim.warmup_steps=5"),
        (
            [TEACHER, "student.sft.steps=5", "student.sft.optim.warmup_steps=5"],
            "fewer than 5 updates",
        ),
        ([TEACHER, "optim.beta2=1"], "optim.beta2"),
        ([TEACHER, "optim.learning_rate=.inf"], "optim.learning_rate"),
        ([TEACHER, "rollout.temperature=.inf"], "rollout.temperature"),
        (
            [TEACHER, "method.loss.kind=support_divergence"],
            "support_divergence needs support, which method.score (sampled_token)",
        ),
        ([TEACHER, "method.loss.kind=minillm"], "minillm needs teacher.hidden"),
        ([TEACHER, "method.loss.baseline=exact_kl"], "needs teacher.hidden"),
        ([TEACHER, "method.loss.extrapolation=1.2"], "needs base.logprob"),
        ([TEACHER, "method/local_support", "method.score.k=1"], "identically zero"),
        ([TEACHER, "method/local_support", "method.score.k=0"], "method.score.k"),
        ([TEACHER, "method/local_support", "method.score.k=129"], "method.score.k"),
        ([TEACHER, "method/gkd", "method.loss.divergence.beta=1.5"], "divergence.beta"),
        ([TEACHER, "method/minillm", "rollout.top_p=0.9"], "student's whole distribution"),
        ([TEACHER, "method/eopd", "rollout.top_k=4"], "student's whole distribution"),
        (
            [TEACHER, "method/local_support", "method.loss.head=tail_sample", "rollout.top_p=.9"],
            "student's whole distribution",
        ),
        (
            [
                TEACHER,
                "method/local_support",
                "method.loss.head=tail_sample",
                "method.loss.divergence.kind=forward_kl",
            ],
            "head=tail_sample",
        ),
        ([*TWO, "data.teacher_column=domain", "method/gkd"], "one teacher's head"),
        ([TEACHER, "method.score.kind=whole_vocabulary"], "nor loss uses"),
        (
            [TEACHER, "method/opd", "method.loss.kind=sampled_square", "rollout.top_p=.9"],
            "importance_cap",
        ),
        ([TEACHER, "method.filter.kind=tip"], "tip needs reverse_kl"),
        ([TEACHER, "method/uni_opd"], "expected rollout.group_size of 2 or more"),
        ([TEACHER, "method.score.margin={}", "rollout.group_size=4"], "method.loss.margin=true"),
        ([TEACHER, "method.loss.margin=true"], "needs margin"),
        ([TEACHER, "rollout.on_policy_fraction=0.5"], "every response is sampled from the student"),
        ([TEACHER, "rollout.overprovision=0.5"], "expected 0, or method.loss.importance_cap"),
        ([TEACHER, "rollout.overprovision=1"], "rollout.overprovision"),
        ([TEACHER, "method/gkd", *FLYING, "rollout.window=2"], "expected rollout.window=1"),
        (
            [TEACHER, "method/gkd", *FLYING, "rollout.on_policy_fraction=0.5"],
            "expected rollout.on_policy_fraction=1",
        ),
        ([TEACHER, "method/uni_opd", *FLYING, GROUPS], "may end in different steps"),
        ([TEACHER, "method/opsa", *FLYING], "rollout.overprovision=0.5"),
        (
            [TEACHER, "method/minillm", "rollout.on_policy_fraction=0.5"],
            "rollout.on_policy_fraction",
        ),
        ([TEACHER, "method/gkd", "rollout.on_policy_fraction=1.5"], "rollout.on_policy_fraction"),
        (
            [TEACHER, "rollout.batch_size=2", "method.filter.window=1"],
            "of 4 rows drops none",
        ),
        ([TEACHER, "method.filter={kind: all_of, filters: [{kind: prefxi}]}"], "method.filter"),
        ([TEACHER, "method.filter={kind: all_of, filters: []}"], "method.filter"),
        (
            [
                TEACHER,
                "rollout.batch_size=2",
                "method.filter={kind: all_of, filters: [{kind: keep_all},"
                " {kind: teacher_quantile, window: 1}]}",
            ],
            "method.filter.filters.1.drop_fraction=0.2 of 4 rows drops none",
        ),
        ([TEACHER, "run.compare=[student]"], "reserved for a model of the run"),
        (["teachers={'': {}}"], "a name is empty"),
        ([*CHUNKS, "rollout.temperature=0.7"], "rollout.temperature=0.7: chunk_agreement"),
        ([*CHUNKS, "rollout.top_p=0.9"], "student's whole distribution"),
        ([*CHUNKS, "run.updates_per_rollout=2"], "run.updates_per_rollout=2: chunk_policy"),
        ([*CHUNKS, "method.loss.baseline=leave_one_out"], "rollout.group_size=1: chunk_policy"),
        ([*CHUNKS, "method.loss.beta=.inf"], "method.loss.beta"),
        ([*CHUNKS, "method.loss.kind=sampled_reverse_kl"], "needs teacher.logprob"),
        ([*CHUNKS, "rollout.on_policy_fraction=0.5"], "every response is sampled"),
        ([TEACHER, "method/opd", "method.score.kind=student"], "needs teacher.logprob"),
        (
            [TEACHER, "method/uni_opd", "method.score={kind: student, margin: {}}"],
            "gap_bound needs margin, which method.score (student)",
        ),
    ],
)
def test_sections_that_do_not_fit_together(arguments, named):
    assert named in refusal(arguments)


def test_what_fits_together():
    config = load_config([TEACHER, "rollout.top_p=0.9", "method.loss.importance_cap=2"])
    assert (config.rollout.top_p, config.method.loss.importance_cap) == (0.9, 2.0)
    assert load_config([*TWO, "data.teacher_column=domain"]).data.teacher_column == "domain"
    config = load_config([TEACHER, "rollout.batch_size=6", "rollout.group_size=3"])
    assert (config.rollout.batch_size, config.rollout.group_size) == (6, 3)


IDLE = [
    (["student.sft.teacher_rows=5"], "student.sft.teacher_rows"),
    (["student.path=x", "student.tokenizer=y"], "student.tokenizer"),
    (["student.path=x", "student.architecture.dtype=bfloat16"], "student.architecture.dtype"),
    (["teacher.dtype=bfloat16"], "teachers.default.dtype"),
    (["optim.final_fraction=0.5"], "optim.final_fraction"),
    (["optim.schedule=constant", "optim.final_fraction=0.5"], "optim.final_fraction"),
    (["optim.adam_learning_rate=1e-3"], "optim.adam_learning_rate"),
    (["student.sft.optim.final_fraction=0.5"], "student.sft.optim.final_fraction"),
    (["teacher.sft.optim.final_fraction=0.5"], "teachers.default.sft.optim.final_fraction"),
    (["eval.every_problems=3"], "eval.every_problems"),
    (["eval.problems=0", "eval.samples=3"], "eval.samples"),
    (["eval.problems=0", "eval.every=3"], "eval.every"),
    (["run.name=x", "run.dir=y"], "run.name"),
    (["run.resume=never"], "run.resume"),
    (["eval.temperature=0", "eval.top_p=0.5"], "eval.top_p"),
    (
        ["method.reweight.alpha=0", "method.reweight.beta=0", "method.reweight.max_scope=row"],
        "method.reweight.max_scope",
    ),
    (["method.reweight.max_scope=vocabulary", "method.reweight.max_quantile=0.9"],
     "method.reweight.max_quantile"),
    (["method.loss.floor=1", "method.loss.ceiling=0"], "method.loss.floor"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, key", IDLE)
def test_a_key_without_effect_is_a_warning_of_its_section(arguments, key):
    warnings = [note for note in load([TEACHER, *arguments]).notes if note.startswith("warning")]
    (warning,) = [each for each in warnings if f" {key} has no effect " in each]
    assert warning.startswith("warning: command line: ")


def test_keys_that_have_effect_or_are_not_the_users_are_not_warned_of(tmp_path):
    for arguments in (
        ["method.loss.clip=0.3", "run.updates_per_rollout=2"],
        ["student.sft.teacher_rows=5", "student.sft.source=teacher"],
        ["optim.final_fraction=0.5", "optim.schedule=linear"],
        ["optim.adam_learning_rate=1e-3", "optim.optimizer=muon"],
        ["eval.every_problems=3", "eval.every=2"],
        ["student.path=x", "student.dtype=bfloat16"],
        ["run.dir=x", "run.resume=never"],
        ["student.sft.source=teacher", "eval.problems=0", "eval.batch_size=8"],
        ["optim.final_fraction=0.1"],
    ):
        assert not [n for n in load([TEACHER, *arguments]).notes if n.startswith("warning")]
    # The resolved configuration of a run names every key, idle ones too.
    file = tmp_path / "config.yaml"
    for name in [*WHOLE, *FOLDERS]:
        file.write_text(yaml.safe_dump(as_tree(load_config([name]))))
        assert not [n for n in load([str(file)]).notes if n.startswith("warning")], name


def test_a_later_layer_may_turn_off_what_a_file_has_set(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "teacher: {}\neval: {samples: 3, every: 2, every_problems: 7}\n"
        "optim: {schedule: cosine, final_fraction: 0.5}\n"
    )
    loaded = load([str(file), "eval.problems=0", "optim.schedule=constant"])
    assert loaded.config.eval.problems == 0 and loaded.config.optim.schedule == "constant"
    assert any(f"{file}:2: eval.samples has no effect" in note for note in loaded.notes)
    file.write_text(yaml.safe_dump(as_tree(loaded.config)))
    assert load_config([str(file)]) == loaded.config


@pytest.mark.parametrize("under", METHODS)
def test_a_method_laid_over_any_other_is_that_method_alone(under):
    """A method file over another, as in `run.compare`: no value of the other remains."""
    groups = ["rollout.group_size=4", "rollout.batch_size=16"]
    below = load_config([TEACHER, *groups, f"method/{under}", "method.score.micro_batch_size=4"])
    for name in METHODS:
        alone = load_config([TEACHER, *groups, f"method/{name}"]).method
        assert load_config([TEACHER, *groups, f"method/{under}", f"method/{name}"]).method == alone
        control = with_method(below, name).method
        # By which means the scores are computed is the run's.
        assert control.score.micro_batch_size == 4
        score = dataclasses.replace(control.score, micro_batch_size=None)
        assert dataclasses.replace(control, score=score) == alone


@pytest.mark.parametrize("name", METHODS)
def test_a_method_file_names_all_of_its_choices(name):
    layer = yaml.safe_load((CONFIGS / "method" / f"{name}.yaml").read_text())
    assert list(layer) == ["method"]
    method = layer["method"]
    stages = {"teacher", "refine", "score", "filter", "reweight", "loss"}
    assert set(method) == stages | {"aggregate"}
    for stage in stages:
        assert "kind" in method[stage]


def test_a_stage_that_needs_what_is_not_scored(monkeypatch):
    given = property(lambda self: frozenset({"student.logprob", "teacher.logprob"}))
    monkeypatch.setattr(SampledToken, "gives", given)
    message = refusal([TEACHER])
    assert "confidence_confusion needs student.entropy, teacher.entropy" in message
    load_config([TEACHER, "method/opd"])


def test_every_stage_says_what_it_needs():
    stages = {
        name: [stage() for stage in members(field.type)]
        for name, field in MethodConfig.__dataclass_fields__.items()
        if name != "aggregate"
    }
    assert [len(stages[name]) for name in ("score", "filter", "reweight", "loss")] == [5, 13, 4, 10]
    assert KeepAll() in stages["filter"]
    scores = [*stages["score"], WholeVocabulary(reverse_kl=True, margin=OutcomeMargin())]
    given = frozenset().union(*(score.gives for score in scores))
    for name in ("filter", "reweight", "loss"):
        assert all(stage.needs <= given for stage in stages[name])


def test_top_p_rollouts_are_free_where_nothing_is_sampled():
    for method in ("local_support", "tail_bucket", "gkd"):
        assert load_config([TEACHER, f"method/{method}", "rollout.top_p=0.9"]).rollout.top_p == 0.9


def test_the_schema_is_not_stale():
    written = (CONFIGS / "schema.json").read_text()
    assert written == text(), "stale: run `fireopd schema configs/schema.json`"


def test_every_key_is_documented():
    def visit(section, prefix):
        for field in dataclasses.fields(section):
            info = section.__pydantic_fields__[field.name]
            yield f"{prefix}{field.name}", info.description
            for inner in members(field.type):
                if dataclasses.is_dataclass(inner):
                    yield from visit(inner, f"{prefix}{field.name}.")

    documented = [*visit(Config, ""), *visit(TeacherConfig, "teachers.NAME.")]
    silent = [key for key, text in documented if not text and not key.endswith(".kind")]
    assert not silent


def test_files_hold_no_path_of_a_machine():
    for file in Path(CONFIGS).rglob("*.yaml"):
        assert str(Path.home()) not in file.read_text()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.steps=" + "9" * 400, r"command line: run\.steps: expected a number between"),
        (
            "data.mixture=[{weight: -9223372036854775809}]",
            r"data\.mixture\.0\.weight: expected a nu",
        ),
        ("rollout.temperature=1e300", r"rollout\.temperature: .* less than or equal to 1000000"),
        ('run.name="a\\0b"', r"run\.name: expected a path of UTF-8, without control"),
        ('run.dir="a\\0b"', r"run\.dir: expected a path of UTF-8, without control"),
    ],
)
def test_a_value_that_no_machine_takes_is_refused_by_its_key(override, words):
    with pytest.raises(UserError, match=words):
        load_config([TEACHER, override])
