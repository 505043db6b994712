"""The type checker of `conftest.py`'s import hook."""

from beartype import BeartypeConf, beartype

# An int may stand for a float, as mypy has it.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
