"""Runs, trainers, checkpoints, curves."""
