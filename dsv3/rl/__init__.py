"""Reinforcement learning: group-relative advantages, the GRPO loss, rollouts with router replay, the step and its loop."""
