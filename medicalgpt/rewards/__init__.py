"""Rewards for answers: rule-based reward functions and reward models."""
