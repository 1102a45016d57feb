import subprocess
import sys

import fireopd_jax


def test_every_public_name_is_found_where_it_lives():
    assert sorted(fireopd_jax._MODULE) == sorted(fireopd_jax.__all__) == dir(fireopd_jax)
    for name in fireopd_jax.__all__:
        assert getattr(fireopd_jax, name) is not None


def test_no_public_name_is_hidden_by_a_module():
    code = (
        "import fireopd_jax, fireopd_jax.training.run, types;"
        "print([n for n in fireopd_jax.__all__"
        " if isinstance(getattr(fireopd_jax, n), types.ModuleType)])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.stdout.strip() == "[]", printed.stderr


def test_import_loads_no_jax():
    code = "import fireopd_jax, sys; print('jax' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.stdout.strip() == "False"
