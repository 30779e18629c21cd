"""What the RL methods share: batch, hooks, rollouts, rewards, advantages, losses, update, trainer."""
