"""Teachers that wait in the host's memory: the same run, and the devices' memory is free."""

import jax
import pytest

from fireopd_jax.recipe.schema import load_config
from fireopd_jax.runtime.topologies import find_topology
from fireopd_jax.sharding.mesh import MeshConfig, by_rows, make_mesh
from fireopd_jax.sharding.offload import HOST, in_host_memory, on_devices
from fireopd_jax.training.distill import Distillation
from fireopd_jax.training.forecast import forecast
from tests.training.test_training import BASE, MODEL, lines, run

WIDTH = 24
OWN = [
    *BASE,
    "mesh.fsdp=2",
    f"teacher.architecture={MODEL.replace('hidden_size: 16', f'hidden_size: {WIDTH}')}",
    "run.steps=3",
    "eval.problems=4",
    "eval.samples=1",
    "eval.batch_size=8",
]


def test_shards_remain_and_what_is_on_the_devices_is_not_copied():
    mesh = make_mesh(MeshConfig(fsdp=8))
    tree = {"a": jax.device_put(jax.numpy.arange(16.0), by_rows(mesh))}
    waiting = in_host_memory(tree)
    assert waiting["a"].sharding.memory_kind == HOST
    assert waiting["a"].sharding.spec == tree["a"].sharding.spec
    back = on_devices(waiting)
    assert back["a"].sharding == tree["a"].sharding and (back["a"] == tree["a"]).all()

    def places(x):
        return [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]

    assert places(on_devices(tree)["a"]) == places(tree["a"])


def matrices():
    """Return the matrices of one layer of the teacher's width, of all models that are alive."""
    return [x for x in jax.live_arrays() if x.ndim == 3 and x.shape[0] == 1 and WIDTH in x.shape]


@pytest.mark.parametrize("method", ["fire_opd", "gkd"])
def test_a_run_is_the_same_and_its_devices_are_free_while_it_samples(method, tmp_path, monkeypatch):
    own = [*OWN, f"method/{method}", "run.completions_every=2", "run.completions_topk=2"]
    there = run(tmp_path / "there", *own)
    seen, others = {}, matrices()

    def looking(name):
        call = getattr(Distillation, name)

        def looked(self, *arguments):
            own = (x for x in matrices() if all(x is not other for other in others))
            seen.setdefault(name, []).append({x.sharding.memory_kind for x in own})
            return call(self, *arguments)

        monkeypatch.setattr(Distillation, name, looked)

    for name in ("rollout", "score", "after"):
        looking(name)
    waiting = run(tmp_path / "waiting", *own, "teacher.offload=true")
    assert {**waiting, "seconds": 0} == {**there, "seconds": 0}
    assert seen == {name: [{HOST}] * 3 for name in ("rollout", "score", "after")}
    compiled = [x["perf/compilations"] for x in lines(tmp_path / "waiting") if "loss" in x]
    assert compiled[1:] == [0, 0]


def test_a_plan_counts_it_where_it_scores_or_writes_only():
    there, waiting = (
        forecast(load_config([*OWN, f"teacher.offload={each}"]), find_topology(None))
        for each in ("false", "true")
    )
    teacher = there.models["teacher default"].bytes_per_device
    for name, program in there.programs.items():
        less = program.peak - waiting.programs[name].peak
        # Besides parameters and states a program may have inputs of its own, such as a batch.
        throughout = name.startswith(("update", "rollout of student"))
        assert (teacher / 2 < less <= teacher) if throughout else less == 0, name
    assert {name.split()[0] for name in there.programs} >= {"score", "update", "rollout"}
