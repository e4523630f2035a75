"""The version of Ligature: setup.py reads it, `ligature --version` prints it, runs and exports record it.

Tested in tests/test_package.py.
"""

VERSION = "0.1.0"
