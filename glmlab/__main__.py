"""``python -m glmlab`` is the command ``glmlab``."""

from glmlab.cli import main

main()
