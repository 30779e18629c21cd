"""The census: every causal-LM type of transformers, shrunken, built and compared with each row alone."""

from stemma.census.configs import NOT_STANDALONE, build, model_types, shrunken_config

__all__ = ["NOT_STANDALONE", "build", "model_types", "shrunken_config"]
