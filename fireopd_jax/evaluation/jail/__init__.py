"""The inside of the sandbox: a program of its own, of the standard library alone.

    main -> namespaces -> pid 1 reads frames -> fork -> confine -> program -> outcome -> frame

`evaluation/sandbox.py` starts it with `python -S`, without the rest of the package: nothing of it,
nor of JAX, exists in the process that runs the program of a model. The imports are relative, so
that the modules load under any name.
"""
