"""Reinforcement learning: trajectories, rewards, advantages, weights from trainer to sampler."""
