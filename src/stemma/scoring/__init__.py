"""Scoring over prefix trees: switch a model on, plan, score, stream, compare with the plain forward."""
