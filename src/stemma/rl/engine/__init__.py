"""What the methods of this room share: batch, hooks, rollouts, rewards, advantages, losses, update, trainer."""
