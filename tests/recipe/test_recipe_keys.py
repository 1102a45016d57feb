"""Every key is used by the code that it configures, in one observed run."""

import dataclasses
import sys

from fireopd_jax.data.settings import Source
from fireopd_jax.recipe.schema import Config, MethodConfig, load_config
from fireopd_jax.remote.settings import ServedConfig
from tests.recipe.annotations import members

WATCHED = ("fireopd_jax/config.py", "recipe/schema.py", "recipe/checks.py", "dataclasses.py")
MODEL = (
    "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, "
    "head_dim: 8, intermediate_size: 32}"
)
TINY = [
    "mesh.data=1",
    "data.path=builtin:addition-1",
    "data.max_prompt_tokens=8",
    "rollout.batch_size=8",
    "rollout.max_tokens=16",
    f"student.architecture={MODEL}",
    "student.sft={steps: 2, batch_size: 8, source: teacher, teacher_rows: 16}",
    "student.lora={rank: 2}",
    "method.teacher={prompt: reference, max_prompt_tokens: 500}",
    f"teacher.architecture={MODEL}",
    "teacher.quantize=int8",
    "teacher.sft={steps: 30, batch_size: 32, optim: {learning_rate: 1e-2, schedule: cosine}}",
    "run.steps=1",
    "run.updates_per_rollout=2",
    "eval.problems=4",
    "eval.samples=1",
    "eval.batch_size=16",
    "eval.every=1",
    "eval.sets.more={path: builtin:addition-1, problems: 4}",
    "optim.schedule=linear",
]


def config_classes(section=Config):
    """Return a config class and all classes nested in it."""
    found = [section]
    for field in dataclasses.fields(section):
        stack = [field.type]
        while stack:
            annotation = stack.pop()
            for inner in members(annotation):
                stack += [a for a in getattr(inner, "__args__", ()) if not isinstance(a, str)]
                if dataclasses.is_dataclass(inner) and inner not in found:
                    found += [c for c in config_classes(inner) if c not in found]
    return found


def test_every_key_is_read_by_what_it_configures(tmp_path, monkeypatch):
    """A key that no code uses would be silently ignored."""
    from fireopd_jax.training.run import train

    read = set()

    def watch(section):
        names = {field.name for field in dataclasses.fields(section)}
        plain = section.__getattribute__

        def watched(self, name):
            if name in names:
                caller = sys._getframe(1).f_code
                # Generated code (repr, hash, eq) and the checks ask every key: that is no use.
                if "fireopd_jax" in caller.co_filename and not caller.co_filename.endswith(WATCHED):
                    read.update(f"{c.__name__}.{name}" for c in section.__mro__ if c in classes)
            return plain(self, name)

        monkeypatch.setattr(section, "__getattribute__", watched)

    classes = config_classes()
    assert len(classes) > 12
    for section in classes:
        watch(section)
    train(load_config([*TINY, f"run.dir={tmp_path}/run"]))
    wanted = {
        f"{section.__name__}.{field.name}"
        for section in classes
        for field in dataclasses.fields(section)
        if field.name != "kind"
    }
    # Read only for a prompt that is too long, a run without run.dir, a run that was interrupted:
    # tests/data/test_pipeline.py and tests/runs/test_folder.py do that.
    elsewhere = {"DataConfig.overlong", "RunConfig.name", "RunConfig.resume"}
    # Read on export, of a model from a folder, and of a model that has experts or stretched
    # positions: tests/models/ does that.
    elsewhere |= {"DecoderConfig.model_type"}
    # Read for a teacher behind HTTP: tests/remote/ shows what each does.
    elsewhere |= {f"ServedConfig.{field.name}" for field in dataclasses.fields(ServedConfig)}
    elsewhere |= {f"{c}.{n}" for c in ("ModelConfig", "StudentConfig", "TeacherConfig")
                  for n in ("dtype", "param_dtype", "ignore_config_keys")}  # fmt: skip
    # Read for a mixture: tests/data/test_streams.py shows what each does.
    elsewhere |= {f"Source.{field.name}" for field in dataclasses.fields(Source)}
    # Of other variants of a stage than this run's, and other values than the defaults: each is
    # shown to change what its stage gives in tests/method/.
    default = {type(stage) for stage in vars(MethodConfig()).values()}
    variants = {
        inner
        for field in dataclasses.fields(MethodConfig)
        for stage in members(field.type)
        if dataclasses.is_dataclass(stage)
        for inner in config_classes(stage)
        if inner not in default
    }
    elsewhere |= {f"{c.__name__}.{f.name}" for c in variants for f in dataclasses.fields(c)}
    # Other layouts of the cache than this run's: tests/rollout/ draws the same with each.
    optional = ("MoEConfig.", "LinearRope.", "Llama3Rope.", "YarnRope.", "Paged.", "PagedTPU.",
                "PagedGPU.", "DenseGPU.")  # fmt: skip
    assert [k for k in sorted(wanted - read - elsewhere) if not k.startswith(optional)] == []
