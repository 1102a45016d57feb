"""Windows: batches that are drawn before the first update on them, kept in files."""

import dataclasses
import inspect
import typing

import jax
import numpy as np
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.runs.checkpoints import Checkpoints, saved_steps
from fireopd_jax.runtime.signals import Interrupted, StopFlag
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh
from fireopd_jax.training.distill import Distillation
from fireopd_jax.training.run import train
from fireopd_jax.training.windows import PARTS, Windows, read, write
from fireopd_jax.types import Audit, EarlyScores, ModelScores, Original, Rollout, TokenStats
from tests.cases import make_rollout
from tests.training.test_training import BASE, MODEL, lines, steps

RUN = [*BASE, f"teacher.architecture={MODEL}", "method/gkd", "eval.problems=0", "rollout.window=3",
       "run.steps=5", "run.completions_every=0", "rollout.max_tokens=8",
       "optim.learning_rate=1e-2"]  # fmt: skip


def batch(step):
    mask = np.arange(6)[None] < np.arange(8)[:, None]
    rollout = make_rollout(mask)
    return dataclasses.replace(rollout, tokens=np.full((8, 6), step, np.int32))


@dataclasses.dataclass
class Spy:
    """Draws batches and notes the order of what is done."""

    stop: StopFlag = dataclasses.field(default_factory=StopFlag)
    stop_in: int | None = None
    log: list = dataclasses.field(default_factory=list)

    def sample(self, step):
        self.log.append(step)
        if step == self.stop_in:
            self.stop(2, None)
        return batch(step)

    def refine(self, rollout):
        step = int(np.asarray(rollout.tokens)[0, 0])
        return dataclasses.replace(rollout, leaked=np.full(8, step % 2 == 0))

    def rollout(self, windows, step):
        out = windows.rollout(step, self.sample, self.refine)
        assert (np.asarray(out.tokens) == step).all(), "every step has its own batch"
        np.testing.assert_array_equal(out.leaked, np.full(8, step % 2 == 0))
        return out


def windows_in(folder, size, spy, steps=5):
    return Windows(folder, size, steps, mesh=make_mesh(MeshConfig()), stop=spy.stop)


def names(folder):
    return sorted(int(file.stem.removeprefix("step_")) for file in folder.glob("*.npz"))


def test_a_window_of_one_step_writes_nothing(tmp_path):
    spy = Spy()
    windows = windows_in(tmp_path / "rollouts", 1, spy)
    for step in range(3):
        spy.rollout(windows, step)
    assert spy.log == [0, 1, 2] and not (tmp_path / "rollouts").exists()
    windows.forget(2)


def test_a_window_is_drawn_whole_and_in_order_at_its_first_step(tmp_path):
    spy = Spy()
    windows = windows_in(tmp_path, 3, spy)
    first = spy.rollout(windows, 0)
    assert spy.log == [0, 1, 2] and names(tmp_path) == [1, 2, 3]
    # The rows lie where the score program wants them.
    assert {shard.data.shape for shard in first.tokens.addressable_shards} == {(1, 6)}
    spy.rollout(windows, 1), spy.rollout(windows, 2)
    assert spy.log == [0, 1, 2]
    spy.rollout(windows, 3)
    assert spy.log == [0, 1, 2, 3, 4], "the last window ends with the run"
    windows.forget(before=3)
    assert names(tmp_path) == [4, 5]
    with pytest.raises(UserError, match=r"step_000000002\.npz: no such file"):
        windows.rollout(1, spy.sample, spy.refine)


def test_the_files_of_an_interrupted_window_are_used_as_they_are(tmp_path):
    spy = Spy()
    spy.rollout(windows_in(tmp_path, 3, spy), 0)
    again = Spy()
    again.rollout(windows_in(tmp_path, 3, again), 0)
    assert again.log == []
    (tmp_path / "step_000000002.npz").rename(tmp_path / "step_000000002.part")  # half written
    again.rollout(windows_in(tmp_path, 3, again), 0)
    assert again.log == [1] and names(tmp_path) == [1, 2, 3]


def test_a_signal_ends_the_drawing_between_two_batches(tmp_path):
    spy = Spy(stop_in=0)
    with pytest.raises(Interrupted, match="the rollouts of 2 steps left"):
        spy.rollout(windows_in(tmp_path, 3, spy), 0)
    assert spy.log == [0] and names(tmp_path) == [1]
    last = Spy(stop_in=2)
    last.rollout(windows_in(tmp_path, 3, last), 0)
    assert last.log == [1, 2], (
        "with nothing left to draw the step goes on, and is saved by the loop"
    )


def test_an_error_in_a_refinement_is_raised_and_keeps_the_batches_before(tmp_path):
    spy = Spy()

    def failing(rollout):
        if int(np.asarray(rollout.tokens)[0, 0]) == 1:
            raise UserError("no answer")
        return spy.refine(rollout)

    with pytest.raises(UserError, match="no answer"):
        windows_in(tmp_path, 3, spy).rollout(0, spy.sample, failing)
    assert names(tmp_path) == [1]


def whole():
    rng = np.random.default_rng(0)
    rollout = jax.device_get(batch(3))
    mask = np.asarray(rollout.mask)
    ids = rng.integers(0, 9, (8, 6)).astype(np.int32)
    real = ids.astype(np.float32)
    return dataclasses.replace(
        rollout,
        prompts=dataclasses.replace(
            rollout.prompts, reference=ids, reference_length=np.arange(8, dtype=np.int32)
        ),
        logprob=rng.standard_normal((8, 6)).astype(np.float32),
        correct=np.arange(8, dtype=np.float32),
        original=Original(ids, ~mask, -np.ones((8, 6), np.float32), ids[:, 0], mask),
        leaked=mask[:, 0],
        early=EarlyScores(
            ModelScores(TokenStats(real, real + 1), ids[..., None]),
            ModelScores(TokenStats(real + 2, real * np.float32(np.nan)), at_ids=real[..., None]),
        ),
        audit=Audit(ids, ids + 1, np.ones((8, 6), np.float32), np.ones((8, 6), np.float32)),
        policy=TokenStats(real + 3, real + 4),
    )


@pytest.mark.parametrize("make", [whole, lambda: jax.device_get(batch(1))], ids=["all", "least"])
def test_what_is_read_is_what_was_written(make, tmp_path):
    rollout, file = make(), tmp_path / "x.npz"
    write(file, rollout)
    found = read(file)
    assert jax.tree.structure(found) == jax.tree.structure(rollout)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(rollout), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert [each.name for each in tmp_path.iterdir()] == ["x.npz"]


def test_every_part_of_a_rollout_can_be_read():
    """A part that `read` does not know would make the files of a window useless."""
    parts, seen = {}, [Rollout]
    while seen:
        for name, hint in inspect.get_annotations(seen.pop()).items():
            for kind in (hint, *typing.get_args(hint)):
                if dataclasses.is_dataclass(kind):
                    parts[name] = kind
                    seen.append(kind)
    assert dict(PARTS) == parts and len(parts) == 8
    assert all(getattr(whole(), name) is not None for name in vars(whole())), "the test has all"


class Died(BaseException):
    """The process ends here."""


def run(folder, *settings):
    return train(load_config([*RUN, *settings, f"run.dir={folder}"]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run, and for each batch: step, updates before it, and parameters."""
    folder, drawn = tmp_path_factory.mktemp("runs") / "run", []
    rollout, update = Distillation.rollout, Distillation.update

    def spied(self, policies, step):
        params = jax.tree.leaves(jax.device_get(policies.student))
        drawn.append(("draw", step, int(policies.updates), [np.array(leaf) for leaf in params]))
        return rollout(self, policies, step)

    def noted(self, *arguments):
        drawn.append(("update",))
        return update(self, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Distillation, "rollout", spied)
        patched.setattr(Distillation, "update", noted)
        summary = run(folder)
    return folder, summary, drawn


def test_all_batches_of_a_window_come_from_its_first_parameters(finished):
    folder, _, done = finished
    order = [each[0] for each in done]
    assert order == ["draw"] * 3 + ["update"] * 3 + ["draw"] * 2 + ["update"] * 2
    draws = [each for each in done if each[0] == "draw"]
    assert [(step, updates) for _, step, updates, _ in draws] == [
        (0, 0), (1, 0), (2, 0), (3, 3), (4, 3),
    ]  # fmt: skip
    params = [each[3] for each in draws]
    for same in (params[1], params[2]):
        for ours, theirs in zip(same, params[0], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert any(not np.array_equal(a, b) for a, b in zip(params[3], params[0], strict=True))
    trained = [line for line in lines(folder) if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5]
    # The first batch is scored by the parameters that drew it, the others by later ones.
    gaps = [line["sampler/logprob_gap_max"] for line in trained]
    assert gaps[0] < 1e-3 and gaps[3] < 1e-3 and min(gaps[1], gaps[2], gaps[4]) > 1e-3
    assert [line["perf/compilations"] for line in trained][2:] == [0, 0, 0]
    # Files from which no checkpoint resumes are gone.
    oldest = min(saved_steps(folder / "checkpoints"))
    assert names(folder / "rollouts") == list(range(oldest + 1, 6))


@pytest.mark.slow
def test_a_run_that_died_within_a_window_ends_in_the_same_bits(finished, tmp_path, monkeypatch):
    """Killed after step 2 was saved, and again while the second window was drawn."""
    _, summary, _ = finished
    folder, drawn = tmp_path / "run", []
    rollout, update = Distillation.rollout, Distillation.update

    def dying(self, policies, step):
        if step == 4:
            raise Died
        drawn.append(step)
        return rollout(self, policies, step)

    def dying_later(self, judge, state, scored):
        if int(state.updates) == 2:
            self.checkpoints.close()
            raise Died
        return update(self, judge, state, scored)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "update", dying_later)
        with pytest.raises(Died):
            run(folder)
    assert saved_steps(folder / "checkpoints") == [2]
    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "rollout", dying)
        with pytest.raises(Died):
            run(folder)
    assert drawn == [3] and names(folder / "rollouts") in ([3, 4], [3])
    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "rollout", lambda self, policies, step: rollout(
            self, policies, drawn.append(step) or step))  # fmt: skip
        assert run(folder)["params_sha256"] == summary["params_sha256"]
    assert drawn[1:] in ([4], [3, 4]) and steps(folder) == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_signal_within_a_window_saves_the_steps_before_it(finished, tmp_path, monkeypatch):
    _, summary, _ = finished
    folder = tmp_path / "run"
    rollout, save = Distillation.rollout, Checkpoints.save
    saved = []

    def stopping(self, policies, step):
        if step == 3:
            self.session.stop(2, None)
        return rollout(self, policies, step)

    def noted(self, step, *rest):
        saved.append(step)
        return save(self, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "rollout", stopping)
        patched.setattr(Checkpoints, "save", noted)
        with pytest.raises(Interrupted, match=r"rollouts of 1 steps left.*fireopd resume "):
            run(folder)
    assert saved == [2, 3] and saved_steps(folder / "checkpoints")[-1] == 3
    assert steps(folder) == [1, 2, 3]
    assert run(folder)["params_sha256"] == summary["params_sha256"]
    assert steps(folder) == [1, 2, 3, 4, 5]


def test_losses_on_the_students_own_samples_want_no_window():
    base = ["smoke", "rollout.window=2"]
    with pytest.raises(UserError, match=r"rollout\.window=2: sampled_reverse_kl .*importance_cap"):
        load_config([*base, "method/opd"])
    load_config([*base, "method/opd", "method.loss.importance_cap=2"])
    load_config([*base, "method/trd"])
    load_config(["smoke", "method/opd", "rollout.window=1"])
