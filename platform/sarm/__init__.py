"""SARM: reward models whose score is a sum of a few nameable sparse features.

Importing this package loads neither torch nor ray, so that `--help` answers at once.
"""

__version__ = "0.1.0"
