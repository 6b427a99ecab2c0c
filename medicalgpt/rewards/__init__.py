"""Rewards for answers, by rule and by model."""
