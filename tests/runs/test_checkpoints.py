"""Saved states are restored bit for bit; incomplete checkpoints are ignored."""

import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.runs.checkpoints import Checkpoints, restore_params, save_model
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, replicate
from fireopd_jax.types import pytree

POSITION = {"position": 3, "data": "abc", "seed": 7}


@pytree
class State:
    params: dict[str, jax.Array]
    count: jax.Array


def make_state(seed):
    key = jax.random.key(seed)
    params = {"a": jax.random.normal(key, (4, 8)), "b": jnp.float32(seed)}
    return State(params=params, count=jnp.int32(seed))


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    mesh = make_mesh(MeshConfig())
    state = replicate(mesh, make_state(5))
    first = Checkpoints(tmp_path, keep=2)
    assert first.latest() is None
    first.save(5, state, POSITION)
    first.close()
    again = Checkpoints(tmp_path, keep=2)
    step, restored, position = again.restore(replicate(mesh, make_state(0)))
    again.close()
    assert (step, position) == (5, POSITION)
    assert_same_bits(restored, state)
    assert restored.params["a"].sharding == state.params["a"].sharding
    assert isinstance(restored, State)


def test_the_newest_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_best=1)
    scores = {1: 0.1, 2: 0.9, 3: None, 4: 0.2, 5: None, 6: 0.3}
    for step, score in scores.items():
        metrics = None if score is None else {"score": score}
        checkpoints.save(step, make_state(step), POSITION, metrics)
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=2, keep_best=1)
    assert again.steps() == [2, 5, 6] and again.latest() == 6
    assert int(again.restore(make_state(0), 2)[1].count) == 2
    again.close()


def test_only_the_newest_stay_without_a_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), POSITION)
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=1)
    assert again.steps() == [3]
    again.close()


def test_an_interrupted_write_leaves_the_one_before(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, make_state(1), POSITION)
    checkpoints.close()
    # What a kill leaves: the folder under the name it is written as.
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    shutil.rmtree(tmp_path / "2.orbax-checkpoint-tmp" / "state")
    again = Checkpoints(tmp_path, keep=2)
    step, restored, _ = again.restore(make_state(0))
    assert step == 1
    assert_same_bits(restored, make_state(1))
    again.save(2, make_state(2), POSITION)
    again.close()
    last = Checkpoints(tmp_path, keep=2)
    assert last.restore(make_state(0))[0] == 2
    last.close()


def test_nothing_saved_cannot_be_restored(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(FileNotFoundError):
        checkpoints.restore(make_state(0))
    checkpoints.close()


def test_a_donated_update_right_after_a_save_does_not_reach_the_file(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    copy = jax.jit(lambda s: jax.tree.map(jnp.copy, s))
    state = State(params={"a": jnp.zeros((512, 512))}, count=jnp.int32(0))
    checkpoints = Checkpoints(tmp_path, keep=10)
    for number in range(1, 4):
        state = step(state)
        checkpoints.save(number, copy(state), POSITION)
        for _ in range(3):
            state = step(state)
    like = copy(state)
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=10)
    for number in range(1, 4):
        _, restored, _ = again.restore(like, number)
        assert np.unique(np.asarray(restored.params["a"])).tolist() == [4 * number - 3]
    again.close()


def test_a_model_comes_back_with_its_description(tmp_path):
    params = make_state(3).params
    save_model(tmp_path / "m", params, {"vocab_size": 7})
    assert json.loads((tmp_path / "m" / "model.json").read_text()) == {"vocab_size": 7}
    assert_same_bits(restore_params(tmp_path / "m", make_state(0).params), params)
    # Written again over what an interrupted write has left.
    other = make_state(4).params
    save_model(tmp_path / "m", other, {"vocab_size": 8})
    assert_same_bits(restore_params(tmp_path / "m", make_state(0).params), other)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["model.json", "params"]


def test_the_description_appears_last(tmp_path):
    class Unwritable:
        pass

    with pytest.raises(TypeError):
        save_model(tmp_path / "m", make_state(1).params, {"x": Unwritable()})
    assert not (tmp_path / "m" / "model.json").exists()


def test_closing_leaves_no_thread_that_writes(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, make_state(1), POSITION)
    checkpoints.close()
    checkpoints.close()  # a signal in the last step closes, and so does the end of the run
    assert (tmp_path / "1").is_dir()
    assert not [t for t in threading.enumerate() if "save_finalize" in t.name]


def test_the_best_stays_after_a_resume(tmp_path):
    first = Checkpoints(tmp_path, keep=1, keep_best=1)
    for step, score in {1: 0.9, 2: 0.1, 3: None}.items():
        first.save(step, make_state(step), POSITION, None if score is None else {"score": score})
    first.close()
    again = Checkpoints(tmp_path, keep=1, keep_best=1)
    for step, score in {4: 0.3, 5: None, 6: 0.2}.items():
        again.save(step, make_state(step), POSITION, None if score is None else {"score": score})
    again.close()
    assert Checkpoints(tmp_path, keep=1, keep_best=1).steps() == [1, 6]
    last = Checkpoints(tmp_path, keep=1, keep_best=1)
    last.save(7, make_state(7), POSITION, {"score": 0.95})
    last.close()
    assert Checkpoints(tmp_path, keep=1).steps() == [7]


def test_a_save_without_a_score_warns_of_nothing(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep=1, keep_best=1)
    checkpoints.save(1, make_state(1), POSITION)
    checkpoints.close()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_what_is_saved_is_not_changed_by_the_updates_that_follow(tmp_path):
    """The state is donated to the next update while its files are still being written."""
    update = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 2 + 1, x), donate_argnums=0)
    state = {"a": jnp.arange(2_000_000, dtype=jnp.float32), "b": jnp.float32(3)}
    expected = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, POSITION)
    for _ in range(3):
        state = update(state)
    checkpoints.close()
    _, restored, _ = Checkpoints(tmp_path, keep=1).restore(expected)
    assert_same_bits(restored, expected)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), POSITION, {"score": step / 10})
    checkpoints.close()
    return folder


def emptied(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def only(pattern, content):
    def damage(folder):
        for file in folder.rglob(pattern):
            if file.is_file():
                file.write_bytes(content) if content is not None else file.unlink()

    return damage


def a_file(folder):
    shutil.rmtree(folder / "state")
    (folder / "state").write_text("a file")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(emptied, id="all files empty"),
        pytest.param(only("d/*", b""), id="data empty"),
        pytest.param(only("d/*", b"garbage" * 99), id="data garbage"),
        pytest.param(only("d/*", None), id="data absent"),
        pytest.param(only("manifest.ocdbt", b"\0" * 64), id="manifest of zeros"),
        pytest.param(only("position/metadata", b"{"), id="position cut off"),
        pytest.param(only("_METADATA", None), id="tree absent"),
        pytest.param(a_file, id="a file in place of a folder"),
        pytest.param(lambda folder: shutil.rmtree(folder / "state"), id="no state"),
    ],
)
def test_of_a_damaged_checkpoint_the_one_before_is_restored(three, tmp_path, caplog, capfd, damage):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    damage(folder / "3")
    checkpoints = Checkpoints(folder, keep=3)
    step, restored, position = checkpoints.restore(make_state(0))
    assert (step, position) == (2, POSITION)
    assert_same_bits(restored, make_state(2))
    # Its step is saved anew, and the damaged one is there to be looked at.
    assert checkpoints.steps() == [1, 2] and (tmp_path / "damaged" / "3").is_dir()
    assert f"{folder}/3 is damaged" in caplog.text
    checkpoints.save(3, make_state(7), POSITION)
    checkpoints.close()
    again = Checkpoints(folder, keep=3)
    assert int(again.restore(make_state(0))[1].count) == 7
    again.close()
    assert "Traceback" not in "".join(capfd.readouterr())


def test_where_no_checkpoint_is_whole_the_folder_is_named(three, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    emptied(folder)
    checkpoints = Checkpoints(folder, keep=3)
    with pytest.raises(UserError, match=rf"{folder}: none of its 3 .*delete the folder"):
        checkpoints.restore(make_state(0))
    checkpoints.close()


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe"])
def test_metrics_that_cannot_be_read_cost_the_score_alone(three, tmp_path, content):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three, folder)
    (folder / "2" / "metrics" / "metrics").write_bytes(content)
    checkpoints = Checkpoints(folder, keep=1, keep_best=1)
    assert checkpoints.restore(make_state(0))[0] == 3
    checkpoints.save(4, make_state(4), POSITION)
    checkpoints.close()
    again = Checkpoints(folder, keep=1, keep_best=1)
    assert again.steps() == [3, 4]
    again.close()


def test_a_score_may_follow_its_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, keep_best=1)
    for step, score in ((1, 0.9), (2, 0.1), (3, None)):
        checkpoints.save(step, make_state(step), POSITION)
        if score is not None:
            checkpoints.rate(step, {"score": score})
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=1, keep_best=1)
    assert again.steps() == [1, 3]
    again.close()


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, make_state(1), POSITION)

    def full(*arguments, **options):
        raise ValueError("Error writing: No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(UserError, match=rf"{tmp_path}: .*step 2: .*No space left.*older ones"):
        checkpoints.save(2, make_state(2), POSITION)
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=1)
    assert again.restore(make_state(0))[0] == 1
    again.close()


def test_damaged_parameters_of_a_model_are_one_line(tmp_path):
    params = make_state(1).params
    save_model(tmp_path, params, {})
    emptied(tmp_path / "params")
    with pytest.raises(UserError, match=rf"{tmp_path}: the parameters cannot be read .*delete"):
        restore_params(tmp_path, params)
