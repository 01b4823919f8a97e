"""The former home of :mod:`glmlab.prompts.encoding`, kept for old import paths."""

from glmlab.prompts.encoding import *  # noqa: F403
