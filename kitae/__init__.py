"""kitae: post-training for reasoning models that proves the run."""

__version__ = "0.1.0"
