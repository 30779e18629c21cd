"""The census: every causal-LM type of transformers, shrunken, built and compared with each row alone."""

from stemma.census.configs import NOT_STANDALONE, build, model_types, shrunken_config, window_is_optional

__all__ = ["NOT_STANDALONE", "build", "model_types", "shrunken_config", "window_is_optional"]
