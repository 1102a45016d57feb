"""`python -m fireopd_jax`: the same as `fireopd`."""

from fireopd_jax.cli import main

if __name__ == "__main__":
    main()
