import jax
import jax.numpy as jnp
import pytest

from fireopd_jax.runtime.compilation import CompileCounter, cache_folder, compile_cache

OPTIONS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def options():
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


def test_a_new_program_counts_and_its_second_call_does_not():
    x = jnp.arange(3.0)
    program = jax.jit(lambda x: x * 17.25)
    counter = CompileCounter()
    program(x).block_until_ready()
    assert counter.count == 1
    program(x).block_until_ready()
    assert counter.count == 1
    program(jnp.arange(4.0)).block_until_ready()
    assert counter.count > 1


def test_a_counter_starts_at_its_making():
    first = CompileCounter()
    jax.jit(lambda x: x * 18.25)(jnp.arange(3.0)).block_until_ready()
    second = CompileCounter()
    assert first.count > 0 and second.count == 0
    x = jnp.arange(3.0)
    before = (first.count, second.count)
    jax.jit(lambda x: x * 19.25)(x).block_until_ready()
    assert (first.count, second.count) == (before[0] + 1, before[1] + 1)


def test_the_cache_fills_and_its_answer_counts_too(tmp_path, options):
    assert compile_cache(True, tmp_path / "xla") == tmp_path / "xla"
    x = jnp.arange(3.0)

    def program():
        return jax.jit(lambda x: x * 20.25)(x).block_until_ready()

    program()
    kept = {path.name for path in (tmp_path / "xla").iterdir()}
    assert kept
    jax.clear_caches()
    counter, hits = CompileCounter(), []

    def listen(event: str, **_):
        hits.append(event == "/jax/compilation_cache/cache_hits")

    jax.monitoring.register_event_listener(listen)
    try:
        program()
    finally:
        jax.monitoring.unregister_event_listener(listen)
    assert counter.count == 1 and any(hits)


def test_a_cache_that_is_off_stays_empty(tmp_path, options):
    compile_cache(True, tmp_path / "xla")
    assert compile_cache(False, tmp_path / "xla") is None
    jax.jit(lambda x: x * 21.25)(jnp.arange(3.0)).block_until_ready()
    assert not list((tmp_path / "xla").iterdir())


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FIREOPD_CACHE_DIR", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("FIREOPD_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fireopd_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fireopd_jax"
