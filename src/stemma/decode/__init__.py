"""Decoding: generate, caches of shared and compressed prefixes, sampling, rollouts, a server that samples."""
