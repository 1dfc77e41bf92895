"""The commands of `lorax-ft`: modules with `main`, which reads `sys.argv`. No JAX at import.

`scripts/*.py` are the same commands, for a checkout of the repository.
"""
